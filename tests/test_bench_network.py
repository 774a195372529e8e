"""What the benchmark computes and how it commands its workers; nothing here is timed."""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import bench_network
import networks
import numpy as np
import onnx
import pytest
from bench_network import Worker, check_outputs, interleave, median, minimum, pairwise_ratio

BATCH = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)


# ---- engines for workers: they must be importable in a new process ------------------------------

def mean_engine(path, batch, threads):
    return lambda: batch.mean(axis=(2, 3))


def double_engine(path, batch, threads):
    return lambda: 2 * batch.mean(axis=(2, 3))


def broken_engine(path, batch, threads):
    raise OSError("no such engine")


def modules_engine(path, batch, threads):
    return lambda: np.array([name in sys.modules for name in ("cnn", "numba", "onnxruntime")])


@pytest.fixture
def start():
    workers = []

    def begin(engine) -> Worker:
        workers.append(Worker(engine.__name__, engine, Path("unused.onnx"), BATCH, 1))
        return workers[-1]
    yield begin
    for worker in workers:
        worker.close()


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Convolution, batch norm, ReLU, mean and Linear on (N, 3, 8, 8)."""
    net = networks.Builder(seed=0)
    x = net.relu(net.batch_norm(net.conv("input", "conv", 4, 3), "bn"))
    net.linear(net.global_pool(x), "fc", 5)
    onnx.save(net.model("tiny", size=8), tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


# ---- statistics -------------------------------------------------------------------------------

def test_minimum_and_median_are_over_all_calls():
    rounds = [[5.0, 3.0], [4.0, 8.0], [1.0, 100.0]]
    assert minimum(rounds) == 1
    assert median(rounds) == 4.5


def test_ratio_is_taken_within_a_round():
    # The machine is slower in the second round: a ratio of medians over all calls would say
    # 0.75, one of minima 4, but in most rounds the first took half as long.
    first = [[4.0, 4.0, 9.0], [20.0, 20.0, 20.0], [6.0, 6.0, 6.0]]
    other = [[8.0, 8.0, 1.0], [40.0, 40.0, 40.0], [3.0, 3.0, 3.0]]
    assert (median(first) / median(other), minimum(first) / minimum(other)) == (0.75, 4)
    assert pairwise_ratio(first, other) == 0.5
    assert pairwise_ratio(other, first) == 2
    assert pairwise_ratio(first, first) == 1


def test_ratio_needs_as_many_rounds_of_both():
    with pytest.raises(ValueError, match="shorter"):
        pairwise_ratio([[1.0], [1.0]], [[1.0]])


def test_tolerance_follows_the_terms_of_the_dot_products(tiny):
    model = onnx.load(tiny)
    assert networks.dot_products(model) == [(27, 4 * 8 * 8), (4, 5)]
    assert bench_network.tolerance(model) == 2.0 ** -23 * (math.sqrt(27) + math.sqrt(4))


class Fake:
    """In a worker's place: says what it was asked, in a log shared with the others."""

    def __init__(self, name, output=0.0, log=None):
        self.name, self.output, self.log = name, np.full(3, output), log

    def turn(self, calls):
        self.log.append(self.name)
        return [float(len(self.log))] * calls


def test_workers_take_turns_and_each_goes_first(monkeypatch):
    log = []
    monkeypatch.setattr(time, "sleep", lambda idle: log.append(idle))
    times = interleave([Fake("a", log=log), Fake("b", log=log)], rounds=3, calls=2, idle=0.5)
    assert log == [0.5, "a", 0.5, "b", 0.5, "b", 0.5, "a", 0.5, "a", 0.5, "b"]
    assert times == [[[2, 2], [8, 8], [10, 10]], [[4, 4], [6, 6], [12, 12]]]


def test_outputs_that_agree_give_their_differences():
    assert check_outputs([Fake("a", 4.0), Fake("b", 4.5), Fake("c", 4.0)], 0.125) == [0, 0.5, 0]


@pytest.mark.parametrize("value", [4.75, math.nan])
def test_outputs_that_differ_are_refused(value):
    with pytest.raises(ValueError, match=r"outputs of b and a differ by (0.75|nan); 0.5 is"):
        check_outputs([Fake("a", 4.0), Fake("b", value)], 0.125)


# ---- workers ----------------------------------------------------------------------------------

def test_workers_answer_turn_by_turn(start):
    workers = [start(mean_engine), start(double_engine)]
    expected = BATCH.mean(axis=(2, 3))
    np.testing.assert_array_equal(workers[0].output, expected)
    np.testing.assert_array_equal(workers[1].output, 2 * expected)
    for rounds in interleave(workers, rounds=2, calls=3, idle=0):
        assert [len(calls) for calls in rounds] == [3, 3]
        assert minimum(rounds) > 0


def test_worker_holds_no_engine_but_its_own(start):
    assert not start(modules_engine).output.any()


def test_worker_that_fails_is_named(start, capfd):
    with pytest.raises(RuntimeError, match="worker of broken_engine ended with exit code 1"):
        start(broken_engine)
    assert "no such engine" in capfd.readouterr().err


# ---- end to end -------------------------------------------------------------------------------

def test_command_line_writes_table_and_json(tiny, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    result = tiny.with_suffix(".json")
    monkeypatch.setattr(sys, "argv", [
        "bench_network.py", "--networks", str(tiny), "--engines", "onnxruntime", "onnxruntime",
        "--batch", "2", "--threads", "1", "--rounds", "2", "--calls", "3", "--idle-ms", "0",
        "--json", str(result)])
    bench_network.main()
    assert "tiny" in capsys.readouterr().out
    record = json.loads(result.read_text())
    assert record["settings"]["batch"] == 2
    assert record["provenance"]["versions"]["onnxruntime"]
    (network,) = record["results"]
    assert [row["engine"] for row in network["engines"]] == ["onnxruntime"] * 2
    assert network["engines"][0]["ratio_pairwise"] == 1
    for row in network["engines"]:
        assert np.shape(row["rounds_ms"]) == (2, 3)
        assert row["min_ms"] == np.min(row["rounds_ms"])
        assert row["max_abs_difference"] == 0


def test_failure_is_one_sentence(monkeypatch):
    arguments = ["bench_network.py", "--engines", "cnn", "--networks", "resnet5"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="there is no network 'resnet5'; there are resnet50"):
        bench_network.main()
    monkeypatch.setitem(bench_network.ENGINES, "no_such_engine", None)
    monkeypatch.setattr(sys, "argv", [*arguments, "--engines", "cnn", "no_such_engine"])
    with pytest.raises(SystemExit, match="no_such_engine can not be imported: pip install"):
        bench_network.main()


@pytest.mark.parametrize(("shape", "message"), [
    (["N", 3, "H", 8], "only N free"), ([4, 3, 8, 8], "fixed batch 4, not 2"),
    (["N", 3], "must be")])
def test_inputs_that_can_not_be_timed_are_refused(shape, message):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], []))
    with pytest.raises(ValueError, match=message):
        bench_network.random_batch(model, 2)


def test_threads_and_counts_must_be_positive():
    with pytest.raises(argparse.ArgumentTypeError, match="0 is not at least 1"):
        bench_network.positive("0")
