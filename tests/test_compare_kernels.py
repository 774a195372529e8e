"""profiling/compare_kernels.py on a stand-in for CuPy: what is compared, and what is said of it."""
import json
import re
import tomllib
import weakref
from importlib import metadata
from pathlib import Path

import compare_kernels as script
import gpu_timing
import networks
import numpy as np
import onnx
import pytest
import torch_rivals
from gpu_timing import Rival
from layer_cases import Arrays, Case, attention, cases_of, check, gemm, to_host

from kernels import ops, reference
from kernels.cuda import backend

FASTER, SLOWER = 0.0005, 0.004      # ms of a call; each launch of ours takes 0.001 of the stand-in


@pytest.fixture
def cupy(machine, monkeypatch):
    """A small GPU with a bandwidth that is known."""
    monkeypatch.setattr(gpu_timing, "copy_bandwidth", lambda stream: 1e9)
    monkeypatch.setattr(gpu_timing, "clocks", lambda index: {})
    monkeypatch.setattr(gpu_timing, "MOST_COPIES", 2)
    monkeypatch.setattr(gpu_timing, "MOST_REPLAYS", 1)
    return machine()


def right(arrays):
    """float64 output for the first copy."""
    inputs = [constant if array is None else to_host(array, arrays.case.stored)
              for array, constant in zip(arrays.copies[0], arrays.constants, strict=True)]
    return reference.run(arrays.case.op, *inputs)


class FakeTorch:
    """Two rivals, right if `wrong` is 0, of which the second does less."""
    wrong = 0.0

    def __init__(self, index, stream, dtype):
        self.stream = stream

    def rivals(self, arrays):
        y = right(arrays) + self.wrong
        for name, cost in ("slow", SLOWER), (torch_rivals.ALONE, FASTER):
            yield (Rival(name, lambda cost=cost: self.replay(cost * len(arrays.copies)),
                         len(arrays.copies)), arrays.on_gpu(y))

    def replay(self, cost):
        def pass_time():
            self.stream.cupy.milliseconds += cost
        self.stream.put(pass_time)


def measure(groups, tmp_path, *options):
    path = tmp_path / "kernels.json"
    script.main([*groups, "--rounds", "2", "--json", str(path), *options])
    return json.loads(path.read_text())


def test_each_layer_has_its_figures(cupy, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_rivals, "Torch", FakeTorch)
    group = f"{small_model}:2"
    result = measure([group], tmp_path, "--plot", str(tmp_path / "kernels.svg"))
    rows = {row["layer"]: row for row in result["rows"]}
    assert sorted(rows) == ["conv 3x3 /2, 2x16x16x3 -> 8, relu", "globalavgpool 2x8x8x8",
                            "linear 2x8 -> 10"]
    for row in rows.values():
        assert (row["uses"], row["wrong"], row["torch"]) == ({group: 1}, {}, "slow")
        # The ratio is to what does the same, and what does less is listed, too.
        assert row["times"][torch_rivals.ALONE]["median_ms"] == pytest.approx(FASTER)
    conv = rows["conv 3x3 /2, 2x16x16x3 -> 8, relu"]
    assert conv["kernel"].startswith("conv_image_f16")
    assert conv["times"]["ours"]["median_ms"] == pytest.approx(0.001)
    assert conv["speedup"] == pytest.approx(4)
    assert conv["times"]["ours"]["tflops"] == pytest.approx(conv["flops"] / 0.001 / 1e9)
    assert result["headline"] == {
        f"{group}, sum of 3 of 3 layers: PyTorch's time / ours": pytest.approx(3 * SLOWER / 0.003)}
    assert result["provenance"]["gpu"]["name"] == "Fake GPU"
    assert "Fake GPU, float16, copy 1 GB/s" in capsys.readouterr().out
    assert (tmp_path / "kernels.svg").stat().st_size > 1000


@pytest.mark.parametrize(("dtype", "kernel"), [
    ("bfloat16", "clip_bf16x8"), pytest.param("tf32", "clip_f32x4", marks=pytest.mark.slow)])
def test_memory_is_set_against_a_copy_and_products_against_cublas(cupy, dtype, kernel, tmp_path,
                                                                 monkeypatch):
    monkeypatch.setattr(torch_rivals, "Torch", FakeTorch)
    monkeypatch.setattr(script, "MEMORY_BOUND", [(ops.Relu(), (3, 40))])
    monkeypatch.setattr(script, "GEMM_SIZES", (64,))
    result = measure(["gemm", "memory"], tmp_path, "--dtype", dtype)
    assert [row["kernel"] for row in result["rows"]][1] == kernel
    moved = 2 * 120 * (2 if dtype == "bfloat16" else 4)
    assert result["headline"] == {
        "linear 64x64 -> 64: % of cuBLAS": pytest.approx(100 * SLOWER / 0.001),
        "relu 3x40: % of copy": pytest.approx(100 * moved / 1e-6 / 1e9)}


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_attention_is_checked_and_timed(cupy, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(torch_rivals, "Torch", FakeTorch)
    monkeypatch.setattr(FakeTorch, "wrong", wrong)
    monkeypatch.setattr(script, "ATTENTION", [(2, 70, 2, 16, False), (1, 49, 3, 32, True)])
    result = measure(["attention"], tmp_path)
    plain, biased = result["rows"]
    assert [plain["layer"], biased["layer"]] == ["attention 2x70x2x16",
                                                 "attention 1x49x3x32, + bias"]
    assert plain["kernel"] == "attention_f16x8_16x16"
    assert biased["kernel"] == "attention_f16x8_32x32_bias"
    assert plain["flops"] == 2 * 2 * 2 * 70 * 70 * (16 + 16)
    assert ("slow" in plain["wrong"]) == bool(wrong)


@pytest.mark.parametrize("biased", [False, True])
def test_pytorchs_attention_is_the_same(biased):
    torch = pytest.importorskip("torch")
    case = attention(2, 7, 3, 8, biased, "float32")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in case.shapes]
    (function,) = torch_rivals.functions(torch, case).values()
    y = function(*(torch_rivals.nchw(torch.from_numpy(array)) for array in arrays))
    np.testing.assert_allclose(y.permute(0, 2, 3, 1), reference.run(case.op, *arrays), atol=1e-5)


def test_pytorchs_linear_adds_a_residual():
    torch = pytest.importorskip("torch")
    case = Case(ops.Linear(ops.Gelu()), ((5, 24), (7, 24), (7,), (5, 7)), "float32")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in case.shapes]
    (function,) = torch_rivals.functions(torch, case).values()
    y = function(*(torch.from_numpy(array.copy()) for array in arrays))
    np.testing.assert_allclose(y, reference.run(case.op, *arrays), atol=1e-5)


def test_a_linear_of_tokens_is_one_of_matrices(tmp_path):
    net = networks.Builder(0, 4)
    x = net.reshape(net.conv("input", "conv", 8, 1), "tokens", [0, 16, 8], 8)
    x = net.add(x, net.pointwise(net.gelu(net.pointwise(x, "up", 32)), "down", 8), "sum")
    net.linear(net.pick(x, "first", 0, axis=1), "head", 10)
    onnx.save(net.model("tokens"), tmp_path / "tokens.onnx")
    assert {case.label: count for case, count in cases_of(
        str(tmp_path / "tokens.onnx"), 2, "float16").items()} == {
            "conv 1x1, 2x4x4x3 -> 8": 1, "linear 32x8 -> 32, gelu": 1,
            "linear 32x32 -> 8, + residual": 1, "linear 2x8 -> 10": 1}


def test_a_layer_of_two_networks_is_measured_once(cupy, small_model, tmp_path, monkeypatch):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(small_model.read_bytes())
    measured = []
    monkeypatch.setattr(script.Bench, "measure", lambda self, case, uses: measured.append(
        case.label) or {"layer": case.label, "uses": uses, "torch": None, "times": {}, "wrong": {},
                        "kernel": ""})
    groups = [f"{small_model}:1", f"{copy}:1", f"{small_model}:2"]
    rows = measure(groups, tmp_path, "--no-torch")["rows"]
    assert [row["layer"] for row in rows] == measured
    assert [list(row["uses"]) for row in rows] == 3 * [groups[:2]] + 3 * [groups[2:]]


def test_what_is_left_out_is_listed(cupy, small_model, tmp_path, monkeypatch, capsys):
    times = iter([0, 1, 2, 3, *[99] * 9])        # the budget's start, the groups and the layers
    monkeypatch.setattr(script.time, "monotonic", lambda: next(times))
    groups = [f"{small_model}:1", f"{small_model}:2"]
    result = measure(groups, tmp_path, "--no-torch", "--budget", "9")
    assert [row["layer"] for row in result["rows"]] == [
        "conv 3x3 /2, 1x16x16x3 -> 8, relu", "globalavgpool 1x8x8x8"]
    assert result["skipped"] == [f"{groups[0]}: linear 1x8 -> 10", f"all of {groups[1]}"]
    assert result["layers"] == {groups[0]: 3}
    assert f"skipped: all of {groups[1]}" in capsys.readouterr().out


def test_who_cuts_it_off_keeps_what_was_measured_before(cupy, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MEMORY_BOUND", [(ops.Relu(), (9, 40)), (ops.Relu(), (1, 24))])
    bench = script.Bench.measure

    def measure_one(self, case, uses):
        if case.shapes == ((1, 24),):
            raise KeyboardInterrupt
        return bench(self, case, uses)
    monkeypatch.setattr(script.Bench, "measure", measure_one)
    with pytest.raises(KeyboardInterrupt):
        measure(["memory", "gemm"], tmp_path, "--no-torch")
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["layer"] for row in result["rows"]] == ["relu 9x40"]
    assert result["skipped"] == ["memory: relu 1x24", "all of gemm"]
    assert list(result["headline"]) == ["relu 9x40: % of copy"]
    assert result["provenance"]["gpu"]["name"] == "Fake GPU"


@pytest.mark.parametrize(("error", "measured"), [
    (RuntimeError, []),                     # PyTorch's, of the GPU, which is asked nothing more
    (ValueError, ["relu 1x24"])])           # a case's own
def test_an_error_while_rivals_are_timed_is_written_down(cupy, tmp_path, monkeypatch, error,
                                                         measured, capsys):
    monkeypatch.setattr(torch_rivals, "Torch", FakeTorch)
    monkeypatch.setattr(script, "MEMORY_BOUND", [(ops.Relu(), (9, 40)), (ops.Relu(), (1, 24))])
    interleave, calls = gpu_timing.interleave, iter([True, False])

    def fail_once(*arguments):
        if next(calls):
            raise error("CUDA error: no time was taken")
        return interleave(*arguments)
    monkeypatch.setattr(gpu_timing, "interleave", fail_once)
    with pytest.raises(SystemExit, match="1"):
        measure(["memory"], tmp_path)
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["failed"] == {"relu 9x40": "CUDA error: no time was taken"}
    assert [row["layer"] for row in result["rows"]] == measured
    assert result["skipped"] == ([] if measured else ["memory: relu 1x24"])
    assert "FAILED: relu 9x40: CUDA error: no time was taken" in capsys.readouterr().out


def test_an_error_of_the_gpu_ends_it_and_keeps_what_was_measured(cupy, tmp_path, monkeypatch,
                                                                 capsys):
    monkeypatch.setattr(script, "MEMORY_BOUND", [
        (ops.Relu(), (9, 40)), (ops.MaxPool2d(), (1, 4, 4, 8)), (ops.Relu(), (1, 24))])
    cupy.illegal = {"max_pool2d_2x2_f16x8"}
    with pytest.raises(SystemExit, match="1"):
        measure(["memory"], tmp_path, "--no-torch")
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["layer"] for row in result["rows"]] == ["relu 9x40"]
    assert list(result["failed"]) == ["maxpool 2x2 /2, 1x4x4x8"]
    assert result["skipped"] == ["memory: relu 1x24"]
    assert "FAILED: maxpool 2x2 /2, 1x4x4x8: cudaErrorIllegalAddress" in capsys.readouterr().out


def test_another_gpu_than_the_first(machine, cupy, tmp_path, monkeypatch):
    cupy = machine(capabilities=((9, 0), (9, 0)))
    monkeypatch.setattr(script, "MEMORY_BOUND", [(ops.Relu(), (1, 24))])
    measure(["memory"], tmp_path, "--no-torch", "--gpu", "1")
    assert {call.device for call in cupy.calls} == {1}


def test_what_the_gpus_memory_can_not_hold_is_passed_over(cupy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "MEMORY_BOUND", [
        (ops.Relu(), (1 << 10, 1 << 12)), (ops.Relu(), (1, 24))])
    cupy.free = 1 << 22
    with pytest.raises(SystemExit, match="1"):
        measure(["memory"], tmp_path, "--no-torch")
    assert "FAILED: relu 1024x4096: Out of memory" in capsys.readouterr().out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["layer"] for row in result["rows"]] == ["relu 1x24"]


def test_a_rival_that_is_wrong_is_not_timed(cupy, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_rivals, "Torch", FakeTorch)
    monkeypatch.setattr(FakeTorch, "wrong", 0.1)
    for row in measure([f"{small_model}:1"], tmp_path)["rows"]:
        assert list(row["wrong"]) == ["slow"]
        assert list(row["times"]) == ["ours", torch_rivals.ALONE]
        assert row["speedup"] is None
    assert "WRONG, so not timed: slow: globalavgpool 1x8x8x8: " in capsys.readouterr().out


def test_a_layer_that_torch_can_not_compute_is_timed_all_the_same(cupy, small_model, tmp_path,
                                                                  monkeypatch):
    def rivals(self, arrays):
        raise RuntimeError("out of memory")
    monkeypatch.setattr(torch_rivals, "Torch", FakeTorch)
    monkeypatch.setattr(FakeTorch, "rivals", rivals)
    for row in measure([f"{small_model}:1"], tmp_path)["rows"]:
        assert row["wrong"] == {"torch": "out of memory"}
        assert list(row["times"]) == ["ours"]


def test_ours_that_is_wrong_is_not_timed_and_fails(cupy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "MEMORY_BOUND", [(ops.Relu(), (3, 40))])
    monkeypatch.setattr(script, "prepare", lambda op, *rest: backend.prepare(
        ops.Clip(0.0, 1.0), *rest))
    with pytest.raises(SystemExit, match="1"):
        measure(["memory"], tmp_path, "--no-torch")
    assert "WRONG, so not timed: ours: relu 3x40: 1.0 instead of" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["convolutions"], "'convolutions' is nothing to measure; write gemm, attention, memory, or"),
    (["resnet50:0"], "'resnet50:0' is nothing to measure"),
    (["memory", "--gpu", "7"], "there is no GPU 7"),
    (["memory"], "give --no-torch to time our kernels alone"),
])
def test_what_can_not_be_measured_is_a_sentence(cupy, arguments, message, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)


def test_a_network_that_there_is_not_stops_no_other(cupy, small_model, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        measure(["resnet5:1", f"{small_model}:1"], tmp_path, "--no-torch")
    assert "FAILED: resnet5:1: there is no network 'resnet5'" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == 3


# ---- the sample that decides what is right ------------------------------------------------------

CASES = [
    Case(ops.Conv2d((2, 1), (1, 0, 2, 1), (1, 2), activation=ops.Relu()),
         ((3, 9, 8, 8), (16, 3, 2, 8), (16,), (3, 5, 7, 16)), "float16"),
    Case(ops.Conv2d(padding=(1, 1, 1, 1), groups=4, activation=ops.Clip(0.0, 6.0)),
         ((2, 6, 5, 8), (12, 3, 3, 2), (12,)), "bfloat16"),
    Case(ops.Conv2d(), ((1, 4, 4, 5), (6, 1, 1, 5)), "float32"),
    Case(ops.Linear(ops.Relu()), ((5, 24), (7, 24), (7,)), "float16"),
    gemm(48, "tf32"),
    Case(ops.MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)), ((3, 8, 9, 8),), "float16"),
    Case(ops.AvgPool2d((2, 2), (2, 2)), ((1, 6, 6, 8),), "float32"),
    Case(ops.Linear(ops.Gelu()), ((5, 24), (7, 24), (7,), (5, 7)), "bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_reference_passes_and_any_wrong_pixel_that_is_looked_at_does_not(cupy, case):
    arrays = Arrays(case, 1)
    y = right(arrays)
    check(arrays, arrays.on_gpu(y))
    for place in (0, -1):           # both corners are always looked at
        spoilt = y.copy()
        spoilt[place, ..., place] = spoilt[place, ..., place] * 1.1 + 0.1
        with pytest.raises(ValueError, match="times what rounding explains"):
            check(arrays, arrays.on_gpu(spoilt))
    with pytest.raises(ValueError, match="nan instead of"):
        check(arrays, arrays.on_gpu(np.full_like(y, np.nan)))


@pytest.mark.parametrize(("case", "label"), [
    (CASES[0], "conv 3x2 /2, 3x9x8x8 -> 16, + residual, relu"),
    (CASES[1], "conv 3x3, 2x6x5x8 -> 12, 4 groups, clip"), (CASES[3], "linear 5x24 -> 7, relu"),
    (CASES[5], "maxpool 3x3 /2, 3x8x9x8"),
    (Case(ops.GlobalAvgPool2d(), ((1, 7, 7, 8),), "float16"), "globalavgpool 1x7x7x8")])
def test_labels(case, label):
    assert case.label == label


# ---- where figures come from --------------------------------------------------------------------

def test_provenance_names_what_compiles_and_runs_kernels(cupy):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = {re.match(r"[\w-]+", each)[0] for name in ("compiler", "cuda13")
              for each in extras[name]} - {"numba-cnn"}
    found = gpu_timing.provenance(0)["gpu"]["versions"]
    assert needed | {"nvidia-nvvm", "torch", "jax", "jaxlib"} <= found.keys()
    for name in ("numba-cuda", "nvidia-cuda-nvcc", "nvidia-nvvm"):      # tests need these anyway
        assert found[name] == metadata.version(name)


# ---- timing and cold caches ---------------------------------------------------------------------

def test_times_are_of_one_call_and_everyone_goes_first(cupy):
    stream, log = cupy.cuda.Stream(), []

    def takes(name, ms):
        def replay():
            log.append(name)
            stream.put(lambda: setattr(cupy, "milliseconds", cupy.milliseconds + ms))
        return replay
    times = gpu_timing.interleave([Rival("a", takes("a", 6.0), 3), Rival("b", takes("b", 2.0), 4)],
                                  stream, rounds=3)
    assert [found.rounds_ms for found in times] == [pytest.approx([2] * 3), pytest.approx([.5] * 3)]
    assert "".join(log[-6:]) == "abbaab"
    assert times[0].ratio(times[1]) == pytest.approx(4)


def test_ratios_are_taken_within_a_round():
    # The machine is slower in the second round.
    a, b = gpu_timing.Times([4.0, 20.0, 6.0]), gpu_timing.Times([8.0, 40.0, 3.0])
    assert (a.ratio(b), b.ratio(a)) == (0.5, 2)
    assert (a.min_ms, a.median_ms) == (4, 6)


def test_a_replay_holds_the_memory_that_its_graph_uses(cupy):
    class Work:
        def __call__(self):
            pass
    work = Work()
    held = weakref.ref(work)
    replay = gpu_timing.capture(cupy.cuda.Stream(), work)
    del work
    assert held() is not None
    del replay
    assert held() is None


@pytest.mark.parametrize(("size", "copies", "cold"), [
    (1 << 30, 2, True), (50, 3, True), (30, 4, True), (1, 101, True)])
def test_copies_exceed_the_cache(size, copies, cold):
    assert gpu_timing.copies(size, 50) == copies
    assert gpu_timing.is_cold(size, 50) == cold


def test_copies_that_would_be_too_many_are_said_to_be_warm():
    assert gpu_timing.copies(1, 1 << 20) == gpu_timing.MOST_COPIES
    assert not gpu_timing.is_cold(1, 1 << 20)
