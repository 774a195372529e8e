"""profiling/compare_gpu.py on stand-ins for CuPy and PyTorch: what is compared, what is said."""
import json
import time

import compare_gpu as script
import gpu_engines
import gpu_timing
import numpy as np
import pytest
from compare_gpu import Case
from gpu_engines import COMPILE, EAGER, OURS, Engine
from graph_reference import outputs

import cnn
from cnn.executor import specialise

RIVALS = gpu_engines.RIVALS[:4]     # PyTorch's: JAX is another where it is installed
COSTS = dict(zip(RIVALS, (0.09, 0.05, 0.08, 0.02), strict=True))     # ms of a call
LAUNCH = 0.001                                                      # ms of each of our kernels
BYTES = 5000
TORCH = gpu_engines.Torch


@pytest.fixture
def cupy(machine, monkeypatch):
    """A small GPU whose clock is that of its kernels; PyTorch's engines are stand-ins."""
    monkeypatch.setattr(gpu_timing, "clocks", lambda index: {})
    monkeypatch.setattr(gpu_timing, "MOST_COPIES", 2)
    monkeypatch.setattr(gpu_timing, "MOST_REPLAYS", 1)
    monkeypatch.setattr(script, "MOST_CALLS", 1)
    monkeypatch.setattr(script, "LATENCY", 1)
    monkeypatch.setattr(gpu_engines, "Torch", FakeTorch)
    monkeypatch.setattr(FakeTorch, "odd", {})
    return machine()


class FakeTorch:
    """odd: by the name of an engine, a function of its right logits that gives others."""
    odd: dict = {}      # noqa: RUF012 (each test has its own)

    def __init__(self, index, stream, compile_mode="default"):
        self.stream = stream

    def reference(self, path, images):
        graph = specialise(cnn.load(path, device="cpu")._graph, {"input": images.shape})
        return outputs(graph, {"input": images.astype(np.float64)})[0]

    def rivals(self, path, dtype, batches):
        return FakeRivals(self, path, batches)

    def release(self):
        pass


class FakeRivals:
    def __init__(self, torch, path, batches):
        self.torch, self.path, self.batches = torch, path, batches

    def engine(self, name):
        logits = self.torch.reference(self.path, np.asarray(self.batches[0], np.float64))
        logits = self.torch.odd.get(name, lambda y: y)(logits)
        clock = self.torch.stream.cupy

        def call(i):
            def pass_time():
                clock.milliseconds += COSTS[name]
            assert i < len(self.batches)
            self.torch.stream.put(pass_time)
            return logits
        return Engine(name, call, np.asarray, BYTES)


def measure(small_model, tmp_path, *options, batches=(1,)):
    path = tmp_path / "networks.json"
    script.main(["--networks", str(small_model), "--dtypes", "float16", "--rounds", "2",
                 "--batches", *map(str, batches), "--engines", *RIVALS, "--json", str(path),
                 *options])
    return json.loads(path.read_text())


def raises(error):
    def give(y):
        raise error
    return give


def slow(y):
    """Until it is interrupted."""
    time.sleep(60)
    return y


def test_a_network_has_its_figures(cupy, small_model, tmp_path, capsys):
    result = measure(small_model, tmp_path, "--plot", str(tmp_path / "networks.svg"),
                     batches=(2, 1))
    large, one = result["rows"]
    assert (large["batch"], large["measured"]) == (2, "throughput")
    assert (one["batch"], one["measured"]) == (1, "latency")
    for row in result["rows"]:
        assert list(row["engines"]) == [OURS, *RIVALS]
        assert row["errors"] == {}
        for name, cost in COSTS.items():
            assert row["engines"][name]["rounds_ms"] == pytest.approx([cost] * 2)
            assert row["engines"][name]["max_abs_error"] == pytest.approx(0, abs=1e-12)
            assert row["engines"][name]["bytes"] == BYTES
        mine = row["engines"][OURS]
        launches = round(mine["median_ms"] / LAUNCH)    # of a whole call, input and output included
        assert mine["median_ms"] == pytest.approx(launches * LAUNCH)
        assert 4 <= launches <= 8
        assert mine["images_per_s"] == pytest.approx(1000 * row["batch"] / mine["median_ms"])
        assert 0 < mine["max_abs_error"] < 0.05
        assert row["best"] == RIVALS[3]
        assert row["speedup"] == pytest.approx(COSTS[RIVALS[3]] / mine["median_ms"])
    assert result["headline"] == {
        f"small float16 batch {row['batch']}: PyTorch's time / ours": row["speedup"]
        for row in result["rows"]}
    assert result["provenance"]["gpu"]["name"] == "Fake GPU"
    assert result["settings"]["batches"] == [2, 1]
    assert (result["skipped"], result["failed"], result["kind"]) == ([], {}, "measurement")
    out = capsys.readouterr().out
    assert "0.020 (0.020)" in out
    assert f"batch 2: PyTorch's time / ours: {large['speedup']:.3g}" in out
    assert (tmp_path / "networks.svg").stat().st_size > 1000


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
def test_every_dtype_is_right(cupy, small_model, tmp_path, dtype):
    row, = measure(small_model, tmp_path, "--dtypes", dtype)["rows"]
    assert (row["dtype"], row["errors"]) == (dtype, {})


def test_a_latency_is_of_awaited_calls_and_inputs_rotate(cupy, small_model, monkeypatch):
    stream, log = cupy.cuda.Stream(), []
    bench = script.Bench(0, stream, None, 2, 0.0, None)
    monkeypatch.setattr(script, "MOST_CALLS", 2)
    monkeypatch.setattr(stream, "synchronize", lambda: log.append("wait"))
    engine = Engine("any", log.append, np.asarray, 0)
    for batch, expected in (1, [1, "wait", 2, "wait"]), (2, [1, 2]):
        rival = bench.turn(engine, Case("net", "float16", batch), 3)
        rival.replay()
        log.clear()
        rival.replay()
        assert log == expected
        assert rival.calls == 2


def test_ratios_are_to_the_fastest_within_a_round():
    # The machine is slower in the second round.
    times = {OURS: [2.0, 20.0, 3.0], EAGER: [4.0, 20.0, 4.5], COMPILE: [6.0, 60.0, 3.0]}
    timed = {name: (Engine(name, None, None, size), gpu_timing.Times(rounds))
             for size, (name, rounds) in enumerate(times.items(), start=1)}
    row = script.row(Case("net", "tf32", 64), timed, dict.fromkeys(times, 0.0), {})
    assert (row["best"], row["speedup"]) == (EAGER, 1.5)
    assert script.headline([row]) == {"net tf32 batch 64: PyTorch's time / ours": 1.5,
                                      "net tf32 batch 64: PyTorch's memory / ours": 2.0}


def test_the_most_important_cases_come_first():
    chosen = script.cases(script.NETWORKS, script.FIRST_DTYPES, script.BATCHES)
    assert len(set(chosen)) == len(chosen) == 7 * 4 * 4
    assert [case.label for case in chosen[:4]] == [
        "resnet50 float16 batch 256", "resnet50 float16 batch 1", "vgg16 float16 batch 256",
        "vgg16 float16 batch 1"]
    assert {case.dtype for case in chosen[:14]} == {"float16"}
    assert {case.batch for case in chosen[:56]} == {256, 1}
    assert chosen[56:58] == [Case("resnet50", "float16", 64), Case("resnet50", "float16", 8)]


def test_what_is_left_out_is_listed_and_the_rest_is_kept(cupy, small_model, tmp_path, monkeypatch,
                                                         capsys):
    kept = []

    def measured(self, case):
        kept.append(json.loads((tmp_path / "networks.json").read_text())["rows"]
                    if kept else None)
        monkeypatch.setattr(script.time, "monotonic", lambda: 10.0 * len(kept))
        return {**script.row(case, {}, {}, {}), "engines": {}}
    monkeypatch.setattr(script.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(script.Bench, "measure", measured)
    result = measure(small_model, tmp_path, "--budget", "15", batches=(4, 3, 2, 1))
    assert [row["batch"] for row in result["rows"]] == [4, 3]
    assert result["skipped"] == [f"small float16 batch {size}" for size in (2, 1)]
    assert [row["batch"] for row in kept[1]] == [4]     # was written before the second one began
    assert "skipped: small float16 batch 1" in capsys.readouterr().out


def test_a_rival_that_is_wrong_or_fails_is_not_timed(cupy, small_model, tmp_path, monkeypatch,
                                                     capsys):
    monkeypatch.setattr(FakeTorch, "odd", {
        RIVALS[0]: lambda y: np.where(np.arange(10) == 9, np.nan, y),
        RIVALS[2]: lambda y: y[:, ::-1], RIVALS[3]: lambda y: y[:, :9]})
    row, = measure(small_model, tmp_path)["rows"]
    assert list(row["engines"]) == [OURS, RIVALS[1]]
    assert row["best"] == RIVALS[1]
    errors = row["errors"]
    assert "wrong: a logit is nan away" in errors[RIVALS[0]]
    assert "wrong: a logit is " in errors[RIVALS[2]]
    assert "wrong: logits of shape (1, 9), not (1, 10)" in errors[RIVALS[3]]
    assert f"ERROR, so not timed: small float16 batch 1: {RIVALS[3]}: " in capsys.readouterr().out


def test_where_all_of_pytorch_fails_ours_is_timed(cupy, small_model, tmp_path, monkeypatch):
    failures = dict.fromkeys(RIVALS, raises(RuntimeError("out of memory")))
    failures[COMPILE] = raises(KeyError("inductor"))        # it raises what it likes
    monkeypatch.setattr(FakeTorch, "odd", failures)
    result = measure(small_model, tmp_path)
    row, = result["rows"]
    assert list(row["engines"]) == [OURS]
    assert (row["best"], row["speedup"], result["headline"]) == (None, None, {})
    assert row["errors"] == {**dict.fromkeys(RIVALS, "RuntimeError: out of memory"),
                             COMPILE: "KeyError: 'inductor'"}


def test_compiling_has_half_of_the_time_and_is_not_tried_again(cupy, small_model, tmp_path,
                                                              monkeypatch):
    monkeypatch.setattr(FakeTorch, "odd", {COMPILE: slow})
    monkeypatch.setattr(script.time, "monotonic", lambda: 0.0)
    result = measure(small_model, tmp_path, "--budget", "2", batches=(2, 1))
    first, second = (row["errors"] for row in result["rows"])
    assert "not compiled after 1 s, half of the time" in first[COMPILE]
    assert all("left out" in error for error in (first[RIVALS[3]], *second.values()))
    assert list(second) == [COMPILE, RIVALS[3]]
    assert list(result["headline"]) == [
        f"small float16 batch {size}: uncompiled PyTorch's time / ours" for size in (2, 1)]


def test_ours_that_is_wrong_is_not_timed_and_fails(cupy, small_model, tmp_path, monkeypatch,
                                                  capsys):
    right = FakeTorch.reference
    monkeypatch.setattr(FakeTorch, "reference", lambda self, path, images:
                        right(self, path, images) * 1.1)
    with pytest.raises(SystemExit, match="1"):
        measure(small_model, tmp_path)
    out = capsys.readouterr().out
    assert f"batch 1: {OURS}: ValueError: wrong: a logit" in out
    assert f"{EAGER}: ValueError" not in out
    result = json.loads((tmp_path / "networks.json").read_text())
    assert result["rows"][0]["speedup"] is None
    assert result["headline"] == {}


def test_an_error_of_the_gpu_ends_it_and_keeps_what_was_measured(cupy, small_model, tmp_path,
                                                                monkeypatch, capsys):
    measured = script.Bench.measure

    def ends(self, case):
        if case.batch == 1:
            cupy.illegal = {call.name for call in cupy.calls}
        return measured(self, case)
    monkeypatch.setattr(script.Bench, "measure", ends)
    with pytest.raises(SystemExit, match="1"):
        measure(small_model, tmp_path, batches=(2, 1, 3))
    result = json.loads((tmp_path / "networks.json").read_text())
    assert [row["batch"] for row in result["rows"]] == [2]
    assert list(result["failed"]) == ["small float16 batch 1"]
    assert result["skipped"] == ["small float16 batch 3"]
    assert "cudaErrorIllegalAddress" in capsys.readouterr().out


def test_another_gpu_than_the_first(machine, cupy, small_model, tmp_path):
    machine(capabilities=((9, 0), (9, 0)))
    assert measure(small_model, tmp_path, "--gpu", "1")["failed"] == {}


def test_a_network_that_there_is_not_stops_no_other(cupy, small_model, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        measure(small_model, tmp_path, "--networks", "resnet5", str(small_model))
    assert "FAILED: resnet5 float16 batch 1: there is no network 'resnet5'" in (
        capsys.readouterr().out)
    assert len(json.loads((tmp_path / "networks.json").read_text())["rows"]) == 1


def test_without_torch_or_cupy_there_is_a_sentence(cupy, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setattr(gpu_engines, "Torch", TORCH)
    monkeypatch.setitem(modules, "torch", None)
    with pytest.raises(SystemExit, match="compare_gpu: PyTorch, which we are compared with, can "):
        script.main([])
    with pytest.raises(SystemExit, match="compare_gpu: there is no GPU 7"):
        script.main(["--gpu", "7"])
    gpu_timing.gpu.cupy.cache_clear()
    monkeypatch.setitem(modules, "cupy", None)
    with pytest.raises(SystemExit, match="compare_gpu: a GPU is used through CuPy"):
        script.main([])


def test_options():
    settings = script.parse_arguments([])
    assert (settings.networks, settings.batches) == (script.NETWORKS, [256, 1, 64, 8])
    assert settings.budget is None
    with pytest.raises(SystemExit):
        script.parse_arguments(["--batches", "0"])
