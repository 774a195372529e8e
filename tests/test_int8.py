"""8 bits on the CPU: who multiplies them, what is said where that can not be had, and a quantised
file."""
import numpy as np
import pytest
from onnx_models import build, node, saved

import cnn
from cnn import devices, doctor
from kernels.cpu import dot_units
from kernels.cpu.host import unit_choice
from kernels.ops import Grid, Linear, TensorSpec
from kernels.step import Options

NOTHING = {"amx": ["amx-tile", "amx-int8", "avx512vnni"], "vnni": ["avx512vnni"],
           "avxvnni": ["avxvnni"], "avx2": ["avx2"],
           "dotprod": ["dotprod"]}
NARROW, OLD = {**NOTHING, "avxvnni": []}, {**NOTHING, "avx2": []}
ARM = {**NOTHING, "dotprod": []}
VECTORS = {"amx": ["amx-tile", "amx-int8"], "vnni": []}
TILES = {"amx": [], "vnni": []}
EMULATED = ("amx_emulated", "vnni_emulated", "dotprod_emulated")


# ---- the choice -------------------------------------------------------------------------------

def test_tiles_are_chosen_before_vectors_and_permission_is_asked_for_once(cpu):
    system = cpu(TILES)
    assert unit_choice.choose_int8() is unit_choice.choose_int8() is dot_units.AMX_INT8
    assert system.calls == [(158, 0x1023, 18)]     # arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA
    system = cpu(VECTORS)
    assert unit_choice.choose_int8() is dot_units.VNNI_INT8
    assert system.calls == []


def test_a_cpu_without_either_has_narrower_vectors_or_none(cpu):
    cpu(NARROW)
    assert unit_choice.choose_int8() is dot_units.AVXVNNI_INT8
    cpu(OLD)
    assert unit_choice.choose_int8() is dot_units.AVX2_INT8
    cpu(ARM)
    assert unit_choice.choose_int8() is dot_units.DOTPROD_INT8
    system = cpu(NOTHING)
    assert unit_choice.choose_int8() is None
    assert system.calls == []


def test_vectors_serve_where_the_system_does_not_permit_tiles(cpu):
    system = cpu(TILES, permitted=False)
    assert unit_choice.choose_int8() is dot_units.VNNI_INT8
    assert len(system.calls) == 1
    devices.CpuDevice(1)        # is no error
    assert dict(doctor.report())["int8"] == "vnni"


def test_the_environment_chooses(cpu, monkeypatch):
    system = cpu(TILES)
    for name, unit in unit_choice.INT8.items():
        monkeypatch.setenv("CNN_INT8", name)
        assert unit_choice.choose_int8() is unit
        assert unit.name == name
        assert unit.is_int8
    assert len(system.calls) == 1       # for "amx" alone
    monkeypatch.setenv("CNN_INT8", "none")
    assert unit_choice.choose_int8() is None
    cpu(NOTHING)
    for name in EMULATED:
        monkeypatch.setenv("CNN_INT8", name)
        assert unit_choice.choose_int8() is unit_choice.INT8[name]


@pytest.mark.parametrize(("missing", "permitted", "asked", "words"), [
    (VECTORS, True, "amx", "CNN_INT8 is 'amx' and this CPU lacks amx-tile, amx-int8; leave it out"),
    (NOTHING, True, "vnni", "CNN_INT8 is 'vnni' and this CPU lacks avx512vnni; leave it out"),
    (TILES, True, "emulate", "CNN_INT8 is 'emulate'; it must be one of amx, vnni, avxvnni, "
                             "avx2, dotprod, amx_emulated, vnni_emulated, dotprod_emulated, none"),
    (TILES, True, "", "CNN_INT8 is ''; it must be one of"),
    (TILES, False, "amx", r"the system does not let this process use it \(Operation not supported\)"
                          r"; set CNN_INT8=vnni"),
])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_can_not_be_had_is_said_at_load(cpu, monkeypatch, missing, permitted, asked, words,
                                             dtype):
    cpu(missing, permitted)
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    monkeypatch.setenv("CNN_INT8", asked)
    with pytest.raises(ValueError, match=words):
        unit_choice.choose_int8()
    with pytest.raises(cnn.DeviceError, match=words):
        cnn.load(device="cpu", dtype=dtype)
    value = dict(doctor.report())["int8"]
    assert value.startswith("none: CNN_INT8" if permitted else "none: this CPU has AMX")


def test_doctor_names_what_multiplies(cpu, monkeypatch, cnn):
    for missing, name in ((TILES, "amx"), (VECTORS, "vnni"), (NARROW, "avxvnni"),
                          (OLD, "avx2"), (ARM, "dotprod")):
        cpu(missing)
        assert dict(doctor.report())["int8"] == name
    cpu(NOTHING)
    expected = "none: quantised files are multiplied in float32"
    assert dict(doctor.report())["int8"] == expected
    monkeypatch.setenv("CNN_INT8", "none")
    cpu(TILES)
    monkeypatch.setenv("CNN_INT8", "none")
    status, out, _ = cnn("doctor")
    assert status == 0
    assert expected in out
    assert "CNN_INT8=none" in out


def test_a_features_name_is_one_that_the_compiler_knows():
    import llvmlite.binding as llvm
    known = llvm.get_host_cpu_features()
    assert all(name in known for name in doctor.FEATURES)


# ---- layers and a file ------------------------------------------------------------------------

def test_a_linear_layer_of_few_samples_takes_the_vectors_of_its_cpu(monkeypatch):
    from kernels.cpu import backend
    monkeypatch.setenv("CNN_INT8", "amx_emulated")
    weight = np.arange(15, dtype=np.float32).reshape(3, 5)
    for samples, kernel in ((1, "linear_int8_vnni_emulated_gemv"),
                            (7, "linear_int8_vnni_emulated_8x32"),
                            (8, "linear_int8_amx_emulated_32x32")):
        specs = [TensorSpec((samples, 5), grid=Grid(0.5, 3)), TensorSpec(weight.shape)]
        step = backend.prepare(Linear(), specs, TensorSpec((samples, 3)), [None, weight],
                               Options(1))
        assert step.kernel == kernel


@pytest.fixture
def quantised_file(tmp_path):
    """x, quantised, a convolution, quantised, its linear layer; scales are powers of two."""
    rng = np.random.default_rng(0)
    constants = {"s": np.float32(0.5), "z": np.uint8(9), "t": np.float32(16), "u": np.uint8(100),
                 "w": rng.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8),
                 "v": rng.integers(-127, 128, (5, 8 * 6 * 5)).astype(np.int8),
                 "ws": np.float32(0.125), "wz": np.int8(0)}
    nodes = [node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
             node("DequantizeLinear", ["v", "ws", "wz"], ["vd"]),
             node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
             node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
             node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1]),
             node("QuantizeLinear", ["c", "t", "u"], ["cq"]),
             node("DequantizeLinear", ["cq", "t", "u"], ["cd"]),
             node("Flatten", ["cd"], ["f"]), node("Gemm", ["f", "vd"], ["y"], transB=1)]
    return saved(tmp_path, build(nodes, {"x": ["N", 4, 6, 5]}, constants=constants))


def kernels_of(model):
    return {row.kernel for row in model.summary().rows}


def test_a_quantised_file_gives_the_same_whatever_multiplies_it(cpu, monkeypatch, quantised_file):
    cpu(NOTHING)
    x = np.random.default_rng(1).integers(-9, 150, (3, 4, 6, 5)).astype(np.float32)
    answers = {}
    for name in (None, "none", *EMULATED):
        if name is not None:
            monkeypatch.setenv("CNN_INT8", name)
        model = cnn.load(quantised_file, device="cpu")
        answers[name] = model.run({"x": x})["y"]
        whose = {kernel for kernel in kernels_of(model) if "_int8_" in kernel}
        assert bool(whose) == (name in EMULATED)
        assert any(f"conv2d_3x3_int8_{name}_" in kernel for kernel in whose) == bool(whose)
    assert len(np.unique(answers[None])) > 9
    for answer in answers.values():
        assert answer.tobytes() == answers[None].tobytes()


@pytest.mark.parametrize("name", EMULATED)
def test_a_quantised_file_in_bfloat16_is_multiplied_in_8_bits(monkeypatch, quantised_file, name):
    monkeypatch.setenv("CNN_INT8", name)
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    model = cnn.load(quantised_file, device="cpu", dtype="bfloat16")
    assert not any("_bf16_" in kernel for kernel in kernels_of(model))
    x = np.random.default_rng(1).integers(-9, 150, (3, 4, 6, 5)).astype(np.float32)
    wide = cnn.load(quantised_file, device="cpu")
    np.testing.assert_array_equal(model.run({"x": x})["y"], wide.run({"x": x})["y"])
    monkeypatch.setenv("CNN_INT8", "none")
    model = cnn.load(quantised_file, device="cpu", dtype="bfloat16")
    assert not any("_int8_" in kernel for kernel in kernels_of(model))


def test_a_network_of_floats_has_nothing_of_8_bits(monkeypatch):
    monkeypatch.setenv("CNN_INT8", "vnni_emulated")
    assert not any("int8" in kernel or "u8" in kernel for kernel in kernels_of(cnn.load()))
