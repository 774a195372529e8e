"""What compare_cpu.py computes and says, and how it commands its workers; nothing here is timed."""
import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import compare_cpu as script
import cpu_engines
import numpy as np
import onnx
import pytest
from charts import Bars, save_bars
from common import ROOT, positive
from compare_cpu import OURS, Case, ratio
from cpu_engines import PEERS, Worker, interleave
from graph_reference import float64_logits
from measured_network import IMAGES, Network, logit_error, random_batch

LIBRARIES = ("numba", "onnxruntime", "openvino", "torch")
BATCH = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)


# ---- engines for workers: they must be importable in a new process ------------------------------

def mean_engine(path, batch, threads):
    return lambda: batch.mean(axis=(2, 3))


def broken_engine(path, batch, threads):
    raise RuntimeError("no such engine")


def modules_engine(path, batch, threads):
    return lambda: np.array([name in sys.modules for name in LIBRARIES])


def right_engine(path, batch, threads):
    logits = float64_logits(path, batch.transpose(0, 2, 3, 1)).astype(np.float32)
    return lambda: logits


def wrong_engine(path, batch, threads):
    call = right_engine(path, batch, threads)
    return lambda: call() + np.float32(0.01)


def dying_engine(path, batch, threads):
    """Right, and gone with its second call."""
    logits = iter([right_engine(path, batch, threads)()])

    def call():
        for each in logits:
            return each
        raise RuntimeError("no longer")
    return call


class Local:
    """A worker without a process."""

    def __init__(self, name, engine, *arguments):
        self.name, self.make = name, lambda: engine(*arguments)

    def logits(self):
        self.call = self.make()
        return self.call()

    def turn(self, calls):
        return [cpu_engines.seconds(self.call) for _ in range(calls)]


@contextlib.contextmanager
def local(engines, *arguments):
    yield [Local(name, engine, *arguments) for name, engine in engines.items()]


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
def peers(monkeypatch):
    """Function (ours=engine, name=engine, ...): these stand in for all others, in this process.
    None is one that is not installed."""
    def replace(ours=right_engine, **engines):
        monkeypatch.setattr(script, "started", local)
        monkeypatch.setattr(script, "ours", ours)
        for name in list(PEERS):
            monkeypatch.delitem(PEERS, name)
        for name, engine in engines.items():
            monkeypatch.setitem(PEERS, name, engine)
        monkeypatch.setattr(script, "is_installed", lambda peer: engines[peer] is not None)
    return replace


def compare(small_model, tmp_path, *options):
    path = tmp_path / "cpu.json"
    script.main(["--networks", str(small_model), "--cases", "2x1", "--rounds", "2", "--idle-ms",
                 "0", "--json", str(path), *options])
    return json.loads(path.read_text())


# ---- statistics -------------------------------------------------------------------------------

def test_ratio_is_taken_within_a_round():
    # The machine is slower in the second round: a ratio of medians over all calls would say
    # 0.75, one of minima 4, but in most rounds the first took half as long.
    first = [[4.0, 4.0, 9.0], [20.0, 20.0, 20.0], [6.0, 6.0, 6.0]]
    other = [[8.0, 8.0, 1.0], [40.0, 40.0, 40.0], [3.0, 3.0, 3.0]]
    assert ratio(first, other) == 0.5
    assert ratio(other, first) == 2
    assert ratio(first, first) == 1
    with pytest.raises(ValueError, match="shorter"):
        ratio(first, other[:2])


def row(name, ours, **peers):
    timed = {OURS: [[ours / 1e3, ours / 1e3]], **{peer: [[each / 1e3]] for peer, each
                                                  in peers.items()}}
    return script.row(name, Case(1, 2), timed, dict.fromkeys(timed, 0.0), {})


def test_a_row_is_to_the_fastest_peer():
    timed = {OURS: [[0.004, 0.005, 0.009], [0.003, 0.004, 0.008]],
             "a": [[0.01, 0.01, 0.01], [0.01, 0.01, 0.01]],
             "b": [[0.015, 0.005, 0.015], [0.002, 0.002, 0.002]]}
    wrong_by = {OURS: 0.1, "a": 0.2, "b": 0.3}
    found = script.row("x/net.onnx", Case(8, 2), timed, wrong_by, {"c": "no"})
    assert (found["network"], found["batch"], found["threads"]) == ("net", 8, 2)
    ours, a, b = found["engines"].values()
    assert (ours["min_ms"], ours["median_ms"], ours["ratio"]) == (3, 4.5, 1)
    assert (a["ratio"], b["ratio"]) == pytest.approx((2.25, 1.75))
    assert (found["best"], found["ratio"]) == ("b", b["ratio"])
    assert (a["max_abs_error"], found["errors"]) == (0.2, {"c": "no"})
    assert np.shape(ours["rounds_ms"]) == (2, 3)


def test_means_are_geometric_and_over_networks():
    rows = [row("one", 2.0, a=4.0, b=8.0), row("two", 4.0, a=8.0, b=2.0), row("three", 1.0, a=8.0),
            row("alone", 1.0)]
    assert script.headline(rows, [Case(1, 2), Case(1, 1)]) == pytest.approx({
        "batch 1, 2 threads: fastest peer's time / ours, geometric mean of 3 networks": 2,
        "batch 1, 2 threads: a's time / ours, geometric mean of 3 networks": 32 ** (1 / 3),
        "batch 1, 2 threads: b's time / ours, geometric mean of 2 networks": 2 ** 0.5})
    assert script.verdict(rows[1]) == "b is the fastest peer, its time / ours is 0.50"
    assert script.verdict(rows[3]) == "no peer is right"
    bars = script.chart(rows, Case(1, 2), ["a", "b"])
    assert bars.groups == ["one", "two", "three"]
    assert bars.series[OURS] == pytest.approx([0.5, 2, 0.125])
    assert bars.series["a"] == pytest.approx([1, 4, 1])
    assert bars.series["b"] == pytest.approx([2, 1, math.nan], nan_ok=True)


# ---- what is right ----------------------------------------------------------------------------

@pytest.fixture
def network(small_model, tmp_path):
    return Network(str(small_model), tmp_path, float64_logits)


def test_a_network_knows_what_is_right(network):
    assert network.images.shape == (IMAGES, 16, 16, 3)
    assert network.logits.dtype == np.float64
    assert network.terms == [27, 8]
    assert network.macs == 27 * 8 * 8 * 8 + 8 * 10
    rounded = network.logits[[0, 1, 2, 0, 1]].astype(np.float32)
    assert 0 < network.check(rounded, 5) < network.allowed() < 1e-4
    np.testing.assert_array_equal(network.batch(5)[3:], network.batch(2))
    assert network.allowed() == pytest.approx(
        8 * 2.0 ** -24 * math.sqrt(3 + 27 + 3 + 8) * np.sqrt(np.mean(network.logits ** 2)))
    assert logit_error([27, 8], network.logits, 0.5, 0) == pytest.approx(
        8 * 0.5 * math.sqrt(6) * np.sqrt(np.mean(network.logits ** 2)))


def test_logits_that_are_wrong_are_refused(network):
    right = network.logits[:2]
    assert network.check(right, 2) == 0
    with pytest.raises(ValueError, match=r"wrong: logits of shape \(2, 9\), not \(2, 10\)"):
        network.check(right[:, :9], 2)
    for odd in 2 * network.allowed(), math.nan:
        wrong = right.copy()
        wrong[1, 9] += odd
        with pytest.raises(ValueError, match=r"wrong: a logit is .* where rounding explains"):
            network.check(wrong, 2)
    with pytest.raises(ValueError, match="wrong: a logit"):
        network.check(right[::-1], 2)       # images that are mixed up


@pytest.mark.parametrize(("shape", "message"), [
    (["N", 3, "H", 8], "only N free"), ([4, 3, 8, 8], "fixed batch 4, not 2"),
    (["N", 3], "must be")])
def test_inputs_that_can_not_be_timed_are_refused(shape, message):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], []))
    with pytest.raises(ValueError, match=message):
        random_batch(model, 2)


# ---- workers ----------------------------------------------------------------------------------

class Fake:
    """In a worker's place: says what it was asked, in a log shared with the others."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def turn(self, calls):
        self.log.append(self.name)
        return [float(len(self.log))] * calls


def test_workers_take_turns_and_each_goes_first(monkeypatch):
    log = []
    monkeypatch.setattr(time, "sleep", lambda idle: log.append(idle))
    times = interleave([Fake("a", log), Fake("b", log)], rounds=3, calls=2, idle=0.5,
                       after_round=lambda: log.append("|"))
    assert log == [0.5, "a", 0.5, "b", "|", 0.5, "b", 0.5, "a", "|", 0.5, "a", 0.5, "b", "|"]
    assert times == [[[2, 2], [9, 9], [12, 12]], [[4, 4], [7, 7], [14, 14]]]


def test_workers_answer_turn_by_turn(start):
    workers = [start(mean_engine), start(mean_engine)]
    for worker in workers:
        np.testing.assert_array_equal(worker.logits(), BATCH.mean(axis=(2, 3)))
    for rounds in interleave(workers, 2, calls=3, idle=0, after_round=lambda: None):
        assert [len(calls) for calls in rounds] == [3, 3]
        assert min(map(min, rounds)) > 0


def test_a_worker_holds_no_engine_but_its_own(start):
    assert not start(modules_engine).logits().any()
    # It imports the script, too, whose own imports hold none either.
    code = ("import sys; sys.path.insert(0, 'profiling'); import compare_cpu; "
            f"sys.exit(bool(set({LIBRARIES}) & set(sys.modules)))")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_worker_that_fails_is_named(start, capfd):
    with pytest.raises(RuntimeError, match="worker of broken_engine ended with exit code 1"):
        start(broken_engine).logits()
    assert "no such engine" in capfd.readouterr().err


def test_a_worker_that_ends_in_between_is_named(small_model, capfd):
    batch = np.ones((1, 3, 16, 16), np.float32)
    with cpu_engines.started({"dying": dying_engine}, small_model, batch, 1) as (worker,):
        assert worker.logits().shape == (1, 10)
        with pytest.raises(RuntimeError, match="worker of dying ended with exit code 1"):
            worker.turn(2)
    assert "no longer" in capfd.readouterr().err


# ---- end to end -------------------------------------------------------------------------------

def test_a_network_has_its_figures(small_model, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    plot = tmp_path / "cpu.png"
    result = compare(small_model, tmp_path, "--peers", "onnxruntime", "--cases", "2x1", "1x1",
                     "2x1", "--plot", str(plot))
    two, one = result["rows"]
    assert (two["batch"], two["threads"], one["batch"], one["threads"]) == (2, 1, 1, 1)
    for row in result["rows"]:
        assert (row["network"], row["best"], row["errors"]) == ("small", "onnxruntime", {})
        assert list(row["engines"]) == [OURS, "onnxruntime"]
        assert row["engines"][OURS]["ratio"] == 1
        assert row["ratio"] == row["engines"]["onnxruntime"]["ratio"] > 0
        assert row["gmacs_per_image"] == pytest.approx(13904e-9)
        for engine in row["engines"].values():
            assert np.shape(engine["rounds_ms"])[0] == 2
            assert engine["min_ms"] == np.min(engine["rounds_ms"]) > 0
            assert engine["median_ms"] == np.median(engine["rounds_ms"])
            assert engine["max_abs_error"] <= row["allowed_error"]
    assert result["headline"] == pytest.approx(
        {f"batch {row['batch']}, 1 thread: {whose}'s time / ours, geometric mean of 1 network":
         row["ratio"] for row in result["rows"] for whose in ("fastest peer", "onnxruntime")})
    assert result["settings"] == {"networks": ["small"], "cases": ["2x1", "1x1"],
                                  "peers": ["onnxruntime"], "dtype": "float32", "rounds": 2,
                                  "idle_ms": 0}
    assert {"cpu", "cores", "date", "commit", "command"} <= result["provenance"].keys()
    assert result["provenance"]["versions"]["onnxruntime"]
    assert (result["skipped"], result["failed"], result["interrupted"]) == ([], {}, False)
    assert str(tmp_path) not in json.dumps(result)
    printed = capsys.readouterr()
    assert "batch 2, 1 thread: ms a call, median (minimum) of 2 rounds" in printed.out
    assert f"{two['engines'][OURS]['median_ms']:.2f} (" in printed.out
    assert "2/2 small, batch 1, 1 thread: onnxruntime is the fastest peer" in printed.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 5000


def test_a_peer_that_is_wrong_or_fails_is_not_timed(peers, small_model, tmp_path, capsys):
    peers(right=right_engine, wrong=wrong_engine, broken=broken_engine, absent=None)
    row, = compare(small_model, tmp_path)["rows"]
    assert list(row["engines"]) == [OURS, "right"]
    assert row["best"] == "right"
    assert "wrong: a logit is 0.01" in row["errors"]["wrong"]
    assert row["errors"]["broken"] == "no such engine"
    printed = capsys.readouterr()
    assert "absent is not installed, so it is left out" in printed.err
    assert "ERROR, so not timed: small, batch 2, 1 thread: wrong: wrong: a logit" in printed.out


def test_where_all_peers_are_wrong_ours_is_timed(peers, small_model, tmp_path, capsys):
    peers(wrong=wrong_engine)
    result = compare(small_model, tmp_path, "--plot", str(tmp_path / "cpu.svg"))
    row, = result["rows"]
    assert list(row["engines"]) == [OURS]
    assert (row["best"], row["ratio"], result["headline"]) == (None, None, {})
    assert "no peer is right" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "message"), [
    (wrong_engine, "wrong: a logit is 0.01"), (broken_engine, "no such engine")])
def test_ours_that_is_wrong_or_fails_is_not_timed_and_fails(peers, small_model, tmp_path, engine,
                                                            message, capsys):
    peers(ours=engine, right=right_engine)
    with pytest.raises(SystemExit, match="1"):
        compare(small_model, tmp_path, "--plot", str(tmp_path / "cpu.svg"))
    out = capsys.readouterr().out
    assert f"FAILED: small, batch 2, 1 thread: {message}" in out
    assert "ms a call" not in out       # there is no table of nothing


def test_an_engine_that_ends_in_between_stops_no_other_row(peers, small_model, tmp_path):
    peers(right=right_engine, dying=dying_engine)
    with pytest.raises(SystemExit, match="1"):
        compare(small_model, tmp_path, "--cases", "2x1", "1x1")
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert (result["rows"], result["skipped"]) == ([], [])
    assert result["failed"] == {f"small, batch {size}, 1 thread": "no longer" for size in (2, 1)}


@pytest.fixture
def measured(peers, monkeypatch):
    """The rows that are measured at once, by what `end` says: it is called before each."""
    peers(peer=right_engine)
    rows = []

    def measure(self, name, case, after_round):
        measure.end()
        rows.append(case)
        return {**row(name, 1.0, peer=2.0), **vars(case)}
    monkeypatch.setattr(script.Bench, "measure", measure)
    return measure, rows


def test_ctrl_c_keeps_what_was_measured(measured, small_model, tmp_path, capsys):
    measure, rows = measured

    def end():
        if rows:
            raise KeyboardInterrupt
    measure.end = end
    with pytest.raises(SystemExit, match="130"):
        compare(small_model, tmp_path, "--cases", "1x1", "2x1", "3x1")
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["batch"] for row in result["rows"]] == [1]
    assert result["skipped"] == ["small, batch 2, 1 thread", "small, batch 3, 1 thread"]
    assert result["interrupted"]
    assert "skipped: small, batch 3, 1 thread" in capsys.readouterr().out


def test_ctrl_c_before_any_measurement_is_no_traceback(peers, small_model, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    peers(peer=right_engine)
    monkeypatch.setattr(script, "Network", interrupt)
    with pytest.raises(SystemExit, match="130"):
        compare(small_model, tmp_path)


def test_nothing_begins_after_the_budget(measured, small_model, tmp_path, monkeypatch):
    measure, rows = measured
    clock = [0.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])

    def end():
        clock[0] += 10
    measure.end = end
    result = compare(small_model, tmp_path, "--cases", "1x1", "2x1", "3x1", "--budget", "15")
    assert [case.batch for case in rows] == [1, 2]
    assert result["skipped"] == ["small, batch 3, 1 thread"]


# ---- what is asked for ------------------------------------------------------------------------

def test_cases_are_parsed(monkeypatch):
    monkeypatch.setattr(script, "cores", lambda: 4)
    settings = script.parse_arguments(["--cases", "8x2", "1x4", "8x2"])
    assert settings.cases == [Case(8, 2), Case(1, 4)]
    assert script.parse_arguments([]).cases == [Case(1, 4), Case(8, 4), Case(1, 1)]
    assert [case.label for case in settings.cases] == ["batch 8, 2 threads", "batch 1, 4 threads"]
    assert str(Case(8, 2)) == "8x2"
    monkeypatch.setattr(script, "cores", lambda: 1)
    assert script.parse_arguments([]).cases == [Case(1, 1), Case(8, 1)]


@pytest.mark.parametrize(("text", "message"), [
    ("8", "'8' is no case: write BATCHxTHREADS, both at least 1, such as 8x2"),
    ("0x1", "'0x1' is no case"), ("1x0", "'1x0' is no case"), ("1x-1", "'1x-1' is no case"),
    ("1x2x3", "'1x2x3' is no case"),
    ("1x3", "1x3 asks for 3 threads, but this process may use 2")])
def test_cases_that_are_none_are_refused(monkeypatch, capsys, text, message):
    monkeypatch.setattr(script, "cores", lambda: 2)
    with pytest.raises(SystemExit):
        script.parse_arguments(["--cases", text])
    assert message in capsys.readouterr().err


def test_peers_that_are_not_installed(peers):
    peers(here=right_engine, absent=None)
    assert script.choose_peers(None) == (["here"], ["absent"])
    assert script.choose_peers(["here"]) == (["here"], [])
    with pytest.raises(SystemExit, match="compare_cpu: not installed: absent; run `pip install "):
        script.main(["--peers", "here", "absent"])
    peers(absent=None, other=None)
    with pytest.raises(SystemExit, match="compare_cpu: not installed: absent, other; run"):
        script.main([])


def test_what_is_installed_is_found():
    assert cpu_engines.is_installed("numpy")
    assert not cpu_engines.is_installed("no_such_module")


@pytest.mark.parametrize(("options", "message"), [
    (["--networks", "resnet5"], "there is no network 'resnet5'; there are resnet50"),
    (["--networks", "no_such.onnx"], "no_such.onnx"),
    (["--json", "no_such_folder/cpu.json"], "no_such_folder"),
    (["--plot", "no_such_folder/cpu.svg"], "no_such_folder"),
    (["--plot", "cpu.txt"], "txt")])
def test_what_can_not_be_done_is_one_sentence_before_all_else(peers, options, message):
    peers(peer=right_engine)
    with pytest.raises(SystemExit, match=f"compare_cpu: .*{message}"):
        script.main(options)


def test_counts_must_be_positive():
    with pytest.raises(argparse.ArgumentTypeError, match="0 is not at least 1"):
        positive("0")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_bars_are_drawn_where_some_are_missing(tmp_path, suffix):
    path = tmp_path / f"bars.{suffix}"
    panels = [Bars("one", ["net", "other"], {"ours": [0.5, 1.25], "peer": [1, math.nan]}),
              Bars("none", [], {"ours": [], "peer": []})]
    save_bars(panels, "CPU", "time", path)
    assert path.stat().st_size > 1000


def test_in_bfloat16_engines_are_told_so_and_may_round_more(peers, small_model, tmp_path):
    asked = []

    def rounding(path, batch, threads, dtype="float32"):
        asked.append(dtype)
        logits = right_engine(path, batch, threads)()
        return lambda: logits * np.float32(1 + 2.0 ** -10)
    peers(rounding, somebody=rounding)
    result = compare(small_model, tmp_path, "--dtype", "bfloat16")
    assert asked == ["bfloat16", "bfloat16"]
    assert not result["failed"]
    assert result["settings"]["dtype"] == "bfloat16"
    with pytest.raises(SystemExit):                 # what float32 does not explain
        compare(small_model, tmp_path)


def test_in_int8_the_network_is_the_quantised_one(peers, small_model, tmp_path):
    """And right is what its float64 network gives, not the float one's. Peers may choose theirs."""
    files = []

    def engine(path, batch, threads, dtype="float32"):
        files.append(Path(path).name)
        assert dtype == "int8"
        return cpu_engines.ours(path, batch, threads, dtype)
    peers(engine, torch=engine, somebody=engine)
    result = compare(small_model, tmp_path, "--dtype", "int8")
    assert files == [f"{small_model.stem}_{how}.onnx"
                     for how in ("products", "products", "everything")]
    assert list(result["rows"][0]["engines"]) == [OURS, "somebody", "somebody, everything"]
