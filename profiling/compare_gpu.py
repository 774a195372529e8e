"""Times whole networks on our engine against PyTorch at its best, and JAX, on one GPU.

    python profiling/compare_gpu.py --json networks.json --plot networks.svg
    python profiling/compare_gpu.py --networks resnet50 --dtypes float16 --batches 256 1

Images lie on the GPU when a call begins, and logits when it ends. Up to a batch of 8 it is latency
that is measured: each call is awaited before the next one, so that what the host does in between
counts. Larger batches are queued without waiting: throughput. Calls go through copies of the batch
that exceed the L2 cache. gpu_engines.py says how the others are set up; the ratio is of the time of
PyTorch's fastest variant to ours, taken round by round.

Nothing is timed before it is right: every logit is compared with the float64 network of the same
images; measured_network.py says how far it may be off. fp32 sums count as truncated, not rounded.

Networks are measured in float16 before other dtypes, at batches 256 and 1 before others. With
--budget, torch.compile has half of the time that is left; where that is not enough, it is left out
from then on.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from charts import new_figure
from common import positive, write_json
from measured_network import Network
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
import gpu_engines
import gpu_timing
from gpu_engines import COMPILE, JAX, OURS, RIVALS, Engine
from gpu_timing import Rival, Times
from layer_cases import ROUNDOFF, SUM_ROUNDOFF

from cnn.errors import Error
from kernels.cuda import gpu
from kernels.cuda.backend import DTYPES
from kernels.cuda.errors import CudaError

NETWORKS = ["resnet50", "vgg16", "mobilenet_v2", "efficientnet_lite0", "squeezenet1_1",
            "densenet121", "resnet18"]
FIRST_DTYPES = ["float16", "bfloat16", "tf32", "float32"]
BATCHES = [256, 1, 64, 8]
FIRST_BATCHES = 2           # of those given: the more important ones
LATENCY = 8                 # the largest batch whose calls are awaited one by one
UNIT = {**ROUNDOFF, "tf32": 2.0 ** -10}     # tensor cores cut the rest of an operand off
TURN_MS, MOST_CALLS = 20, 10


# ---- what is measured -------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    network: str
    dtype: str
    batch: int

    @property
    def label(self) -> str:
        return f"{Path(self.network).stem} {self.dtype} batch {self.batch}"


def cases(names: Sequence[str], dtypes: Sequence[str], batches: Sequence[int]) -> list[Case]:
    """All of them, the most important ones first."""
    return [Case(name, dtype, batch)
            for some in (batches[:FIRST_BATCHES], batches[FIRST_BATCHES:])
            for dtype in dtypes for name in names for batch in some]


# ---- measuring --------------------------------------------------------------------------------

class OutOfTime(BaseException):
    """No Exception, so that no library takes it for a failure of its own."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """OutOfTime inside once so many seconds have passed; any number of them if infinite."""
    def stop(*_: object) -> None:
        raise OutOfTime
    if math.isinf(seconds):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Bench:
    """Where and how everything is measured. compiles: whether torch.compile has always had time
    enough."""
    index: int
    stream: Any
    torch: gpu_engines.Torch
    rounds: int
    deadline: float
    folder: Path
    networks: dict[str, Network] = field(default_factory=dict)
    engines: Sequence[str] = RIVALS
    compiles: bool = True

    def measure(self, case: Case) -> dict[str, Any]:
        """A row: figures of each engine that is right, in "errors" what is said of the others."""
        if case.network not in self.networks:
            self.networks[case.network] = Network(case.network, self.folder,
                                                  self.torch.reference)
        network = self.networks[case.network]
        batches = self.batches(network, case)
        rivals = self.torch.rivals(network.path, case.dtype, batches)
        engines: list[Engine] = []
        wrong_by: dict[str, float] = {}
        errors: dict[str, str] = {}
        for name in (OURS, *self.engines):
            try:
                if name == OURS:
                    engine = gpu_engines.ours(network.path, case.dtype, self.index, batches)
                else:
                    engine = self.rival(rivals, name)
                found = engine.to_host(engine.call(0))
                wrong_by[name] = network.check(found, case.batch, UNIT[case.dtype], SUM_ROUNDOFF)
                engines.append(engine)
            except Exception as error:      # one engine's failure, of whatever kind, stops no other
                errors[name] = f"{type(error).__name__}: {error}"
        times = gpu_timing.interleave(
            [self.turn(engine, case, len(batches)) for engine in engines], self.stream,
            self.rounds)
        return row(case, {engine.name: (engine, found) for engine, found
                          in zip(engines, times, strict=True)}, wrong_by, errors)

    def release(self) -> None:
        """Free what the case before took."""
        self.torch.release()
        gpu.cupy().get_default_memory_pool().free_all_blocks()

    def batches(self, network: Network, case: Case) -> list[Any]:
        """So many copies on the GPU that they exceed its L2 cache: float32, or float16 which is
        what ours takes for bfloat16, too."""
        dtype = np.float32 if case.dtype in ("float32", "tf32") else np.float16
        host = network.batch(case.batch, dtype)
        count = gpu_timing.copies(host.nbytes, gpu_timing.l2_bytes(self.index))
        first = gpu.cupy().asarray(host)
        return [first, *(first.copy() for _ in range(count - 1))]

    def rival(self, rivals: gpu_engines.Rivals, name: str) -> Engine:
        if not name.startswith(COMPILE):
            return rivals.engine(name)
        if not self.compiles:
            raise ValueError("left out, for compiling has run out of time before")
        seconds = max(1.0, (self.deadline - time.monotonic()) / 2)
        try:
            with limit(seconds):
                return rivals.engine(name)
        except OutOfTime:
            self.compiles = False
            raise ValueError(f"not compiled after {seconds:.0f} s, half of the time that was "
                             f"left: give a larger --budget, or none") from None

    def turn(self, engine: Engine, case: Case, batches: int) -> Rival:
        order = itertools.cycle(range(batches))

        def call() -> None:
            engine.call(next(order))
            if case.batch <= LATENCY:
                self.stream.synchronize()
        call()
        once = max(gpu_timing.RESOLUTION_MS, gpu_timing.elapsed_ms(self.stream, call))
        calls = max(1, min(MOST_CALLS, int(TURN_MS / once)))

        def replay() -> None:
            for _ in range(calls):
                call()
        return Rival(engine.name, replay, calls)


def row(case: Case, timed: dict[str, tuple[Engine, Times]], wrong_by: dict[str, float],
        errors: dict[str, str]) -> dict[str, Any]:
    """Everything about one case, as it goes to JSON; "best" is the fastest of PyTorch,
    "speedup" its time over ours."""
    best = min((name for name in timed if name not in (OURS, JAX)),
               key=lambda name: timed[name][1].median_ms, default=None)
    speedup = timed[best][1].ratio(timed[OURS][1]) if best and OURS in timed else None
    return {**asdict(case), "measured": "latency" if case.batch <= LATENCY else "throughput",
            "best": best, "speedup": speedup,
            "engines": {name: {"min_ms": found.min_ms, "median_ms": found.median_ms,
                               "images_per_s": 1e3 * case.batch / found.median_ms,
                               "bytes": engine.bytes, "max_abs_error": wrong_by[name],
                               "rounds_ms": found.rounds_ms}
                        for name, (engine, found) in timed.items()},
            "errors": errors}


@dataclass
class Record:
    """rows: what was measured. skipped: labels of what was left out. failed: by label, why."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(chosen: Sequence[Case], bench: Bench, console: Console) -> Iterator[Record]:
    """The record as it is after each case, until time is up or the GPU reports an error, after
    which nothing it says counts."""
    record, broken = Record(skipped=[case.label for case in chosen]), False
    with console.status("") as status:
        for case in chosen:
            if broken or time.monotonic() > bench.deadline:
                break
            status.update(case.label)
            record.skipped.remove(case.label)
            try:
                bench.release()
                record.rows.append(bench.measure(case))
                gpu.check_context(bench.index)
            except (Error, ValueError, OSError, MemoryError) as error:
                record.failed[case.label] = str(error)
            except (CudaError, RuntimeError) as error:      # CuPy's and PyTorch's are of this kind
                record.failed[case.label] = str(error)
                broken = True
            yield record
    yield record


# ---- results ----------------------------------------------------------------------------------

def label(row: dict[str, Any]) -> str:
    return Case(row["network"], row["dtype"], row["batch"]).label


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The few figures that matter, by what they are."""
    found: dict[str, float] = {}
    for each in rows:
        if each["speedup"] is None:
            continue
        mine, theirs = each["engines"][OURS], each["engines"][each["best"]]
        compiled = any(name.startswith(COMPILE) for name in each["engines"])
        rival = "PyTorch's" if compiled else "uncompiled PyTorch's"
        found[f"{label(each)}: {rival} time / ours"] = each["speedup"]
        if each["measured"] == "throughput" and mine["bytes"]:
            found[f"{label(each)}: {rival} memory / ours"] = theirs["bytes"] / mine["bytes"]
    return found


def table(result: dict[str, Any]) -> Table:
    shown = Table("network", "dtype", box=box.SIMPLE, padding=(0, 1),
                  title=f"{result['provenance']['gpu']['name']}: ms a call, median (minimum) of "
                        f"{result['settings']['rounds']} rounds")
    names = (OURS, *RIVALS)
    for heading in ("batch", *names, "images/s\nof ours", "MB\nof ours", "MB of\nPyTorch",
                    "its time\n/ ours"):
        shown.add_column(heading, justify="right")
    for each in result["rows"]:
        engines = each["engines"]
        mine, theirs = engines.get(OURS), engines.get(each["best"])
        shown.add_row(
            Path(each["network"]).stem, each["dtype"], str(each["batch"]),
            *(f"{engines[name]['median_ms']:.3f} ({engines[name]['min_ms']:.3f})"
              if name in engines else "error" if name in each["errors"] else ""
              for name in names),
            f"{mine['images_per_s']:,.0f}" if mine else "",
            *(f"{engine['bytes'] / 1e6:,.0f}" if engine else "" for engine in (mine, theirs)),
            f"{each['speedup']:.2f}" if each["speedup"] is not None else "")
    return shown


def plot(result: dict[str, Any], path: Path) -> None:
    """How much faster than PyTorch each case is: .svg or .png."""
    rows = [each for each in result["rows"] if each["speedup"] is not None][::-1]
    figure = new_figure(8, 1.5 + 0.3 * len(rows))
    axes = figure.subplots()
    bars = axes.barh([f"{label(each)}, to {each['best']}" for each in rows],
                     [each["speedup"] for each in rows])
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.axvline(1, color="0.6", zorder=0)
    axes.set(title=result["provenance"]["gpu"]["name"], xlabel="PyTorch's time / ours")
    figure.savefig(path)


# ---- command line -----------------------------------------------------------------------------

def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME",
                        help=f"the most important first; default: {' '.join(NETWORKS)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=FIRST_DTYPES,
                        metavar="DTYPE", help=f"default: {' '.join(FIRST_DTYPES)}")
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES, metavar="N",
                        help="the first two of them before others, default: 256 1 64 8")
    parser.add_argument("--engines", nargs="+", choices=RIVALS, default=RIVALS, metavar="ENGINE",
                        help=f"default: {', '.join(RIVALS)}")
    parser.add_argument("--compile-mode", choices=gpu_engines.COMPILE_MODES,
                        default=gpu_engines.COMPILE_MODES[0],
                        help=f"of torch.compile, default {gpu_engines.COMPILE_MODES[0]}")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="which GPU, default 0")
    parser.add_argument("--rounds", type=positive, default=7, help="default 7")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="begin nothing new after this time; what is left out is listed")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write every figure, case by case")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw ratios: .svg or .png")
    return parser.parse_args(arguments)


def compare(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything measured, as it goes to JSON, where it is written after each case."""
    deadline = time.monotonic() + (math.inf if settings.budget is None else settings.budget)
    options = {name: value for name, value in vars(settings).items() if name not in (
        "json", "plot")}
    chosen = cases(settings.networks, settings.dtypes, settings.batches)
    cuda = gpu.cupy().cuda
    result = {"kind": "measurement", "provenance": gpu_timing.provenance(settings.gpu),
              "settings": options}
    # A stream is of the device that is current when it is made.
    with cuda.Device(settings.gpu), cuda.Stream(non_blocking=True) as stream:
        torch = gpu_engines.Torch(settings.gpu, stream, settings.compile_mode)
        bench = Bench(settings.gpu, stream, torch, settings.rounds, deadline, folder,
                      engines=settings.engines)
        for record in run(chosen, bench, Console(stderr=True)):
            result |= {"headline": headline(record.rows), **asdict(record)}
            if settings.json:       # whoever ends this process keeps what there is so far
                write_json(settings.json, result)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where one of our networks fails or the GPU reports an error."""
    settings = parse_arguments(arguments)
    console = Console(highlight=False)
    console.width = max(console.width, 200)     # a pipe's 80 columns would cut the numbers
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(settings, Path(folder))
        console.print(table(result))
        if settings.plot:
            plot(result, settings.plot)
    except (Error, CudaError, ValueError, OSError) as error:
        sys.exit(f"compare_gpu: {error}")
    for name, value in result["headline"].items():
        print(f"{name}: {value:.3g}")
    for each in result["skipped"]:
        print(f"skipped: {each}")
    for each in result["rows"]:
        for name, error in each["errors"].items():
            print(f"ERROR, so not timed: {label(each)}: {name}: {error.splitlines()[0]}")
    for case, error in result["failed"].items():
        print(f"FAILED: {case}: {error}")
    if result["failed"] or any(OURS in each["errors"] for each in result["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
