"""Times whole networks on our engine against ONNX Runtime, OpenVINO and PyTorch, on the CPU.

    python profiling/compare_cpu.py --json cpu.json --plot cpu.svg
    python profiling/compare_cpu.py --networks resnet50 --cases 1x2 8x2 --peers onnxruntime
    python profiling/compare_cpu.py --dtype bfloat16      # on a CPU that has it: AMX, AVX512_BF16
    python profiling/compare_cpu.py --dtype int8          # each network quantised first

A case is a batch size and a number of threads: 8x2 is a batch of 8 on 2 threads. Each engine runs
in a process of its own, in float32 or whatever it does fastest where bfloat16 is allowed, in its
own native layout (cpu_engines.py says how each is set up), and all take turns, with idle time
between. A turn is one call that warms up and some that are timed, as many for each engine. An
engine's ratio is its time over ours, so that above 1 we are faster: the median over the rounds of
the ratio within a round, where both saw the same machine. The fastest peer is the one of the least
ratio. In 8 bits peers have two turns, one with the file that `cnn quantize` makes, in which what
products read is quantised, and one with what ONNX Runtime's quantiser makes by itself, in which
everything is: some are faster with that. We run the first.

Nothing is timed before it is right: every logit of the very batch that is timed is compared with
the float64 network (kernels/reference.py) of the same images at full size, three different ones
that a batch repeats; measured_network.py says how far it may be off. The float64 network is read by
our importer; the peers, who read the file themselves, are compared with it, too.
"""
from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from charts import Bars, new_figure, save_bars
from common import cores, positive, provenance, write_json
from cpu_engines import (
    OURS,
    PEERS,
    Engine,
    Rounds,
    Worker,
    interleave,
    is_installed,
    ours,
    started,
)
from measured_network import EVERYTHING, FLOAT32, PRODUCTS, Network
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
from graph_reference import float64_logits

from cnn.errors import Error

NETWORKS = ["resnet18", "resnet50", "vgg16", "mobilenet_v2", "squeezenet1_1", "efficientnet_lite0",
            "densenet121", "convnext_tiny", "vit_s_16"]
FASTEST = "fastest peer"
# Unit roundoff of what is multiplied; for bfloat16 half of it, which everybody kept to. Whole
# numbers are not rounded, but which code is next to a sum is decided in float32.
UNIT = {"float32": FLOAT32, "bfloat16": 2.0 ** -9, "int8": 2.0 ** -9}
TURN, MOST_CALLS = 0.1, 10  # seconds of the fastest engine's timed calls in a turn; their number
OVERHEAD = 6                # of a row, in GMACs a thread: starting workers, idle time, warming up


# ---- what is measured -------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """Images in a call, and threads that compute it."""
    batch: int
    threads: int

    @property
    def label(self) -> str:
        return f"batch {self.batch}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    def __str__(self) -> str:
        return f"{self.batch}x{self.threads}"


def parse_case(text: str) -> Case:
    """Of BATCHxTHREADS, as argparse wants it."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no case: write BATCHxTHREADS, both at least 1, such as 8x2")
    batch, threads = map(int, found.groups())
    if threads > cores():
        raise argparse.ArgumentTypeError(
            f"{text} asks for {threads} threads, but this process may use {cores()} cores: more "
            f"threads than that would wait for each other")
    return Case(batch, threads)


def default_cases() -> list[Case]:
    """Latency and throughput of all cores, and latency of one."""
    return [Case(1, cores()), Case(8, cores()), Case(1, 1)]


def choose_peers(asked: Sequence[str] | None,
                 dtype: str = "float32") -> tuple[list[str], list[str]]:
    """(peers to compare with, those left out because they are not installed). PyTorch reads no
    quantised files.

    ValueError where one that is asked for is not installed, or none is.
    """
    wanted = asked or [peer for peer in PEERS if (peer, dtype) != ("torch", "int8")]
    missing = [peer for peer in wanted if not is_installed(peer)]
    chosen = [peer for peer in wanted if peer not in missing]
    if missing and (asked or not chosen):
        raise ValueError(f"not installed: {', '.join(missing)}; run `pip install "
                         f"'numba-cnn[peers]'`, or name others with --peers")
    return chosen, missing


# ---- measuring --------------------------------------------------------------------------------

@dataclass
class Bench:
    """How everything is measured. networks: by name. idle: seconds before a turn. everything: the
    networks quantised throughout, which peers run, too."""
    networks: dict[str, Network]
    peers: Sequence[str]
    rounds: int
    idle: float
    dtype: str = "float32"
    everything: dict[str, Network] = field(default_factory=dict)

    def measure(self, name: str, case: Case, after_round: Callable[[], object]) -> dict[str, Any]:
        """A row: figures of each engine that is right, in "errors" what is said of the others.

        ValueError or RuntimeError where ours is wrong or fails.
        """
        network = self.networks[name]
        batch = network.batch(case.batch).transpose(0, 3, 1, 2).copy()
        engines = {OURS: ours, **{peer: PEERS[peer] for peer in self.peers}}
        if self.dtype != "float32":
            engines = {name: partial(each, dtype=self.dtype) for name, each in engines.items()}
        of_engine = dict.fromkeys(engines, network)
        if name in self.everything:
            other = self.everything[name]
            for peer in self.peers:
                engines[with_everything(peer)] = partial(elsewhere, engines[peer], other.path)
                of_engine[with_everything(peer)] = other
        right: list[Worker] = []
        wrong_by: dict[str, float] = {}
        errors: dict[str, str] = {}
        with started(engines, network.path, batch, case.threads) as workers:
            for worker in workers:
                try:
                    wrong_by[worker.name] = of_engine[worker.name].check(
                        worker.logits(), case.batch, UNIT[self.dtype])
                    right.append(worker)
                except (ValueError, RuntimeError) as error:
                    if worker.name == OURS:
                        raise
                    errors[worker.name] = str(error)
            once = min(worker.turn(1)[0] for worker in right)
            calls = max(1, min(MOST_CALLS, int(TURN / once)))
            times = interleave(right, self.rounds, calls, self.idle, after_round)
        timed = {worker.name: rounds for worker, rounds in zip(right, times, strict=True)}
        return {**row(name, case, timed, wrong_by, errors), "gmacs_per_image": network.macs / 1e9,
                "allowed_error": network.allowed(UNIT[self.dtype])}


def with_everything(peer: str) -> str:
    """What a peer is called where it runs the file in which everything is quantised."""
    return f"{peer}, {EVERYTHING}"


def elsewhere(engine: Engine, file: Path, path: str, *arguments: Any, **named: Any) -> Any:
    """The engine with another file."""
    return engine(str(file), *arguments, **named)


def work(network: Network, case: Case) -> float:
    """About how long a row takes, compared with others."""
    return OVERHEAD + network.macs / 1e9 * case.batch / case.threads


def ratio(theirs: Rounds, mine: Rounds) -> float:
    """Median over the rounds of (their median in the round) / (my median in the same round)."""
    return median(median(a) / median(b) for a, b in zip(theirs, mine, strict=True))


def figures(rounds: Rounds) -> dict[str, Any]:
    calls = [1e3 * call for each in rounds for call in each]
    return {"min_ms": min(calls), "median_ms": median(calls),
            "rounds_ms": [[1e3 * call for call in each] for each in rounds]}


def row(name: str, case: Case, timed: dict[str, Rounds], wrong_by: dict[str, float],
        errors: dict[str, str]) -> dict[str, Any]:
    """Everything about one network in one case, as it goes to JSON."""
    ratios = {engine: ratio(rounds, timed[OURS]) for engine, rounds in timed.items()}
    best = min((engine for engine in timed if engine != OURS), key=ratios.__getitem__,
               default=None)
    return {"network": Path(name).stem, **asdict(case), "best": best,
            "ratio": None if best is None else ratios[best],
            "engines": {engine: {**figures(rounds), "ratio": ratios[engine],
                                 "max_abs_error": wrong_by[engine]}
                        for engine, rounds in timed.items()},
            "errors": errors}


@dataclass
class Record:
    """rows: what was measured. skipped: what was left out. failed: why, by what. interrupted: by
    Ctrl-C."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def label(name: str, case: Case) -> str:
    return f"{Path(name).stem}, {case.label}"


def run(bench: Bench, cases: Sequence[Case], deadline: float, console: Console
        ) -> Iterator[Record]:
    """The record as it is after each row, until all is measured, time is up, or Ctrl-C."""
    chosen = [(name, case) for case in cases for name in bench.networks]
    record = Record(skipped=[label(*each) for each in chosen])
    works = [work(bench.networks[name], case) for name, case in chosen]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
               TextColumn("so far,"), TimeRemainingColumn(), TextColumn("left"))
    # It is drawn between rounds alone: a thread that draws would take time of who is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False,
                  speed_estimate_period=3600) as bar:
        task = bar.add_task("", total=sum(works))
        for i, (name, case) in enumerate(chosen):
            if time.monotonic() > deadline:
                break
            here = label(name, case)
            bar.update(task, description=here, completed=sum(works[:i]), refresh=True)
            advance = partial(bar.update, task, advance=works[i] / bench.rounds, refresh=True)
            try:
                record.rows.append(bench.measure(name, case, advance))
                said = verdict(record.rows[-1])
            except (ValueError, RuntimeError, OSError) as error:
                record.failed[here] = str(error)
                said = "failed"
            except KeyboardInterrupt:
                record.interrupted = True
                break
            record.skipped.remove(here)
            bar.console.print(f"{i + 1}/{len(chosen)} {here}: {said}", markup=False,
                              soft_wrap=True)
            yield record
    yield record


def verdict(row: dict[str, Any]) -> str:
    if row["best"] is None:
        return "no peer is right"
    return f"{row['best']} is the fastest peer, its time / ours is {row['ratio']:.2f}"


# ---- results ----------------------------------------------------------------------------------

def of_case(rows: Sequence[dict[str, Any]], case: Case) -> list[dict[str, Any]]:
    return [row for row in rows if (row["batch"], row["threads"]) == (case.batch, case.threads)]


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each peer, where it is right, and under FASTEST those of the fastest one of each row."""
    found: dict[str, list[float]] = {FASTEST: [row["ratio"] for row in rows if row["best"]]}
    for row in rows:
        for name, engine in row["engines"].items():
            if name != OURS:
                found.setdefault(name, []).append(engine["ratio"])
    return {name: each for name, each in found.items() if each}


def headline(rows: Sequence[dict[str, Any]], cases: Sequence[Case]) -> dict[str, float]:
    """The few figures that matter, by what they are."""
    return {f"{case.label}: {name}'s time / ours, geometric mean of {len(each)} "
            f"network{'' if len(each) == 1 else 's'}": geometric_mean(each)
            for case in cases for name, each in ratios(of_case(rows, case)).items()}


def table(rows: Sequence[dict[str, Any]], case: Case, peers: Sequence[str], rounds: int) -> Table:
    footers = {name: f"{geometric_mean(each):.2f}" for name, each in ratios(rows).items()}
    shown = Table(Column("network", "geometric mean of\ntime / ours", no_wrap=True),
                  box=box.SIMPLE, padding=(0, 1), show_footer=True,
                  title=f"{case.label}: ms a call, median (minimum) of {rounds} rounds")
    for name in (OURS, *peers):
        shown.add_column(name, footers.get(name, ""), justify="right", no_wrap=True)
    shown.add_column(FASTEST, no_wrap=True)
    shown.add_column("its time\n/ ours", footers.get(FASTEST, ""), justify="right")
    for row in rows:
        engines = row["engines"]
        shown.add_row(row["network"], *(
            f"{engines[name]['median_ms']:.2f} ({engines[name]['min_ms']:.2f})"
            if name in engines else "error" for name in (OURS, *peers)),
            row["best"] or "", "" if row["best"] is None else f"{row['ratio']:.2f}")
    return shown


def chart(rows: Sequence[dict[str, Any]], case: Case, peers: Sequence[str]) -> Bars:
    """Times relative to the fastest peer's; NaN where there is none."""
    rows = [row for row in rows if row["best"]]
    series = {name: [row["engines"][name]["ratio"] / row["ratio"] if name in row["engines"]
                     else math.nan for row in rows] for name in (OURS, *peers)}
    return Bars(case.label, [row["network"] for row in rows], series)


# ---- command line -----------------------------------------------------------------------------

def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME",
                        help=f"of networks.py or the zoo, or .onnx files; default: "
                             f"{' '.join(NETWORKS)}")
    parser.add_argument("--cases", nargs="+", type=parse_case, default=default_cases(),
                        metavar="BATCHxTHREADS",
                        help=f"default: {' '.join(map(str, default_cases()))}")
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER",
                        help=f"among {', '.join(PEERS)}; default: all that are installed")
    parser.add_argument("--dtype", choices=UNIT, default="float32",
                        help="what engines may multiply in, default float32")
    parser.add_argument("--rounds", type=positive, default=15, help="default 15")
    parser.add_argument("--idle-ms", type=float, default=50, help="before a turn, default 50")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS",
                        help="begin nothing new after this time; what is left out is listed")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write every figure, network by network")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all cases: .svg or .png")
    settings = parser.parse_args(arguments)
    settings.cases = list(dict.fromkeys(settings.cases))
    return settings


def compare(settings: argparse.Namespace, peers: Sequence[str], folder: Path, console: Console
            ) -> dict[str, Any]:
    """Everything measured, as it goes to JSON, where it is written after each row."""
    deadline = time.monotonic() + settings.budget
    found: dict[str, Network] = {}
    everything: dict[str, Network] = {}
    in_8_bits = settings.dtype == "int8"
    for name in settings.networks:
        with console.status(f"{Path(name).stem}: computing the float64 logits"):
            found[name] = Network(name, folder, float64_logits, PRODUCTS if in_8_bits else None)
            if in_8_bits:
                everything[name] = Network(name, folder, float64_logits, EVERYTHING)
    bench = Bench(found, peers, settings.rounds, settings.idle_ms / 1e3, settings.dtype, everything)
    result = {"kind": "measurement", "provenance": provenance(),
              "settings": {"networks": [Path(name).stem for name in settings.networks],
                           "cases": list(map(str, settings.cases)), "peers": list(peers),
                           "dtype": settings.dtype, "rounds": settings.rounds,
                           "idle_ms": settings.idle_ms}}
    for record in run(bench, settings.cases, deadline, console):
        result |= {"headline": headline(record.rows, settings.cases), **asdict(record)}
        if settings.json:       # whoever ends this process keeps what there is so far
            write_json(settings.json, result)
    return result


def conclude(result: dict[str, Any]) -> None:
    """Print what the tables do not say."""
    for name, value in result["headline"].items():
        print(f"{name}: {value:.3g}")
    for each in result["skipped"]:
        print(f"skipped: {each}")
    for row in result["rows"]:
        for name, why in row["errors"].items():
            here = label(row["network"], Case(row["batch"], row["threads"]))
            print(f"ERROR, so not timed: {here}: {name}: {why}")
    for each, why in result["failed"].items():
        print(f"FAILED: {each}: {why}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where one of our networks fails, with 130 after Ctrl-C."""
    settings = parse_arguments(arguments)
    console = Console(highlight=False)
    console.width = max(console.width, 140)     # a pipe's 80 columns would cut the numbers
    try:
        peers, missing = choose_peers(settings.peers, settings.dtype)
        for peer in missing:
            print(f"{peer} is not installed, so it is left out", file=sys.stderr)
        if settings.json:       # empty files: what is wrong with them shows now, not at last
            settings.json.touch()
        if settings.plot:
            new_figure(1, 1).savefig(settings.plot)
        with tempfile.TemporaryDirectory() as folder:
            result = compare(settings, peers, Path(folder), Console(stderr=True, highlight=False))
        if settings.dtype == "int8":
            peers += list(map(with_everything, peers))
        cases = [(each, rows) for each in settings.cases if (rows := of_case(result["rows"], each))]
        for each, rows in cases:
            console.print(table(rows, each, peers, settings.rounds))
        if settings.plot and cases:
            save_bars([chart(rows, each, peers) for each, rows in cases],
                      result["provenance"]["cpu"], "time / the fastest peer's", settings.plot)
    except (Error, ValueError, OSError) as error:
        sys.exit(f"compare_cpu: {error}")
    except KeyboardInterrupt:       # before any measurement
        sys.exit(130)
    conclude(result)
    if result["failed"] or result["interrupted"]:
        sys.exit(130 if result["interrupted"] else 1)


if __name__ == "__main__":
    main()
