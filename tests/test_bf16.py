"""bfloat16 on the CPU: who multiplies it, what is said where nobody can, and a whole network."""
from pathlib import Path

import numpy as np
import pytest
from bf16_checks import every_unit
from PIL import Image

import cnn
from cnn import doctor
from kernels.cpu import dot_units, sizes
from kernels.cpu.host import unit_choice
from kernels.ops import Linear, TensorSpec
from kernels.step import Options

CAT = Path(__file__).parent.parent / "examples" / "cat.jpg"
NOTHING = {"amx": ["amx-tile", "amx-bf16", "avx512bf16"], "avx512": ["avx512bf16"]}
VECTORS = {"amx": ["amx-tile", "amx-bf16"], "avx512": []}
TILES = {"amx": [], "avx512": []}


def test_tiles_are_chosen_before_vectors_and_permission_is_asked_for_once(cpu):
    system = cpu(TILES)
    assert unit_choice.choose() is unit_choice.choose() is dot_units.AMX_BF16
    assert system.calls == [(158, 0x1023, 18)]     # arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA
    system = cpu(VECTORS)
    assert unit_choice.choose() is dot_units.AVX512_BF16
    assert system.calls == []


def test_the_environment_chooses(cpu, monkeypatch):
    system = cpu(TILES)
    for name, unit in unit_choice.BF16.items():
        monkeypatch.setenv("CNN_BF16", name)
        assert unit_choice.choose() is unit
        assert unit.name == name
    assert len(system.calls) == 1       # for "amx" alone
    cpu(NOTHING)
    for name in ("amx_emulated", "avx512_emulated"):
        monkeypatch.setenv("CNN_BF16", name)
        assert unit_choice.choose() is unit_choice.BF16[name]


@pytest.mark.parametrize(("missing", "permitted", "asked", "words"), [
    (NOTHING, True, None, "this CPU has neither: AMX needs amx-tile, amx-bf16, avx512bf16, "
                          "AVX512_BF16 avx512bf16; use dtype='float32'"),
    (VECTORS, True, "amx", "CNN_BF16 is 'amx' and this CPU lacks amx-tile, amx-bf16; leave it out"),
    (NOTHING, True, "avx512", "CNN_BF16 is 'avx512' and this CPU lacks avx512bf16"),
    (TILES, True, "emulate", "CNN_BF16 is 'emulate'; it must be one of amx, avx512, amx_emulated, "
                             "avx512_emulated"),
    (TILES, False, None, r"the system does not let this process use it \(Operation not supported\)"
                         r"; set CNN_BF16=avx512, or use dtype='float32'"),
])
def test_what_can_not_be_had_is_said_at_load(cpu, monkeypatch, missing, permitted, asked, words):
    cpu(missing, permitted)
    if asked is not None:
        monkeypatch.setenv("CNN_BF16", asked)
    with pytest.raises(cnn.DeviceError, match=words):
        cnn.load(device="cpu", dtype="bfloat16")
    assert dict(doctor.report())["bfloat16"].startswith("none: ")


def test_other_dtypes_are_refused_with_what_works():
    with pytest.raises(cnn.DeviceError, match="dtype='tf32' is not supported on the CPU; it can be "
                                              "'float32', or 'bfloat16' where the CPU has AMX or "
                                              "AVX512_BF16"):
        cnn.load(device="cpu", dtype="tf32")


def test_a_features_name_is_one_that_the_compiler_knows():
    import llvmlite.binding as llvm
    known = llvm.get_host_cpu_features()        # those of this architecture
    here = [needs for kind, needs in dot_units.NEEDS.items()
            if (kind is dot_units.Dotprod) == sizes.ARM]
    assert here
    assert all(need in known for needs in here for need in needs)


def test_a_linear_layer_of_few_samples_takes_the_vectors_of_its_cpu(monkeypatch):
    from kernels.cpu import backend
    monkeypatch.setenv("CNN_BF16", "amx_emulated")
    weight = np.zeros((3, 5), np.float32)
    for samples, kernel in ((1, "linear_bf16_avx512_emulated_gemv"),
                            (7, "linear_bf16_avx512_emulated_14x32"),
                            (8, "linear_bf16_amx_emulated_32x32")):
        specs = [TensorSpec((samples, 5)), TensorSpec(weight.shape)]
        step = backend.prepare(Linear(), specs, TensorSpec((samples, 3)), [None, weight],
                               Options(1, "bfloat16"))
        assert step.kernel == kernel


@every_unit
def test_the_embedded_network_sees_the_same_in_bfloat16(monkeypatch, unit):
    monkeypatch.setenv("CNN_BF16", unit.name)
    wide, narrow = cnn.load(), cnn.load(dtype="bfloat16")
    assert (narrow.device, narrow.dtype) == ("cpu", "bfloat16")
    kernels = {row.kernel for row in narrow.summary().rows}
    assert any(kernel.startswith(f"conv2d_1x1_bf16_{unit.name}_") for kernel in kernels)
    assert any(kernel.startswith("depthwise_3x3_f32") for kernel in kernels)
    assert not any(kernel.startswith(("conv2d_1x1_f32", "linear_f32")) for kernel in kernels)
    # The first two are 0.05 logits apart, and change places by the units' ways of rounding.
    first = [{found.label for found in model.classify(CAT, top=2)} for model in (narrow, wide)]
    assert first[0] == first[1]
    x = wide.preprocess([CAT, Image.open(CAT).rotate(90)])
    expected, found = wide.predict(x), narrow.predict(x)
    assert found.dtype == np.float32
    assert not np.array_equal(found, expected)
    np.testing.assert_array_equal(found[:1], narrow.predict(x[:1]))     # the batch changes no bit
