"""Times whole networks on our engine against its peers, fairly.

Each engine runs in a process of its own, on the same number of threads and in its own native
layout. They are commanded in turn and sit idle between turns, because thread pools spin for a
while after a call and tax whoever runs next. Before anything is timed, all must give the same
output. Ratios are the first engine's time over the other's, so that below 1 the first is faster;
they are taken round by round, where both saw the same machine. Name an engine twice to see the
noise.

    python profiling/bench_network.py --networks resnet50 efficientnet_lite0 --json result.json
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "cnn" / "zoo"
PACKAGES = ("numpy", "numba", "onnx", "onnxruntime", "openvino", "torch", "numba-cnn")

Call = Callable[[], np.ndarray]
Rounds = list[list[float]]          # seconds of each call, round by round


# ---- engines: (model file, NCHW batch, threads) -> a call that gives the logits ----------------
# Each imports its library inside, so that a worker process holds no engine but its own.

Engine = Callable[[str, np.ndarray, int], Call]


def ours(path: str, batch: np.ndarray, threads: int) -> Call:
    sys.path.insert(0, str(ROOT))   # time this checkout, installed or not
    import cnn
    model = cnn.load(path, device="cpu", threads=threads, activation="none")
    nhwc = np.ascontiguousarray(batch.transpose(0, 2, 3, 1))
    return lambda: model.predict(nhwc)


def onnx_runtime(path: str, batch: np.ndarray, threads: int) -> Call:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: batch}
    return lambda: session.run(None, feed)[0]


def openvino(path: str, batch: np.ndarray, threads: int) -> Call:
    """In float32, which it must be told where the CPU has bfloat16."""
    import openvino
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(batch.shape))
    request = core.compile_model(model, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    return lambda: request.infer([batch], share_inputs=True)[0]


def pytorch(path: str, batch: np.ndarray, threads: int) -> Call:
    """In channels_last, where its convolutions are fastest, batch norm folded."""
    import torch
    from torch_network import TorchNetwork
    torch.set_num_threads(threads)
    layout = torch.channels_last
    network = TorchNetwork(path, fold=True).to(memory_format=layout)
    images = torch.from_numpy(batch).to(memory_format=layout)

    @torch.inference_mode()
    def call() -> np.ndarray:
        return network(images).numpy()
    return call


# By the module that each needs.
ENGINES: dict[str, Engine] = {"cnn": ours, "onnxruntime": onnx_runtime, "openvino": openvino,
                              "torch": pytorch}


def require(engines: Sequence[str]) -> None:
    """ValueError where one is not installed."""
    missing = [name for name in engines if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} can not be imported: pip install 'numba-cnn[peers]'"
                         f", or choose among the engines with --engines")


# ---- worker processes -------------------------------------------------------------------------

class Worker:
    """One engine in a process of its own. `output` is what it gives for the batch.

    RuntimeError where the process ends by itself; its own traceback is on stderr by then.
    """

    def __init__(self, name: str, engine: Engine, path: Path, batch: np.ndarray,
                 threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, daemon=True,
                                       args=(theirs, engine, str(path), batch, threads))
        self.process.start()
        theirs.close()
        self.output: np.ndarray = self._answer()

    def turn(self, calls: int) -> list[float]:
        """Seconds of each of `calls` calls that follow one warm-up call."""
        self.pipe.send(calls)
        return self._answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(0)
        self.process.join()

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the worker of {self.name} ended with exit code "
                               f"{self.process.exitcode}; its error stands above") from None


def serve(pipe: Connection, engine: Engine, path: str, batch: np.ndarray, threads: int) -> None:
    """A worker's whole life: send the output, then answer each number of calls; 0 ends it."""
    call = engine(path, batch, threads)
    pipe.send(call())
    while calls := pipe.recv():
        call()
        pipe.send([seconds(call) for _ in range(calls)])


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(workers: Sequence[Worker], rounds: int, calls: int, idle: float) -> list[Rounds]:
    """The rounds of each worker. Each goes first in turn; all idle (seconds) before every turn.

    ONNX Runtime's threads were seen to spin for 33 ms after a call: idle should be longer.
    """
    times: list[Rounds] = [[] for _ in workers]
    order = list(zip(workers, times, strict=True))
    for _ in range(rounds):
        for worker, mine in order:
            time.sleep(idle)
            mine.append(worker.turn(calls))
        order = order[1:] + order[:1]
    return times


# ---- statistics -------------------------------------------------------------------------------

def minimum(rounds: Rounds) -> float:
    return min(map(min, rounds))


def median(rounds: Rounds) -> float:
    return statistics.median(time for calls in rounds for time in calls)


def pairwise_ratio(first: Rounds, other: Rounds) -> float:
    """Median over the rounds of (first's median in the round) / (other's in the same round)."""
    return statistics.median(statistics.median(a) / statistics.median(b)
                             for a, b in zip(first, other, strict=True))


def tolerance(model: onnx.ModelProto) -> float:
    """How far two engines' outputs may differ, relative to the greatest output.

    Rounding makes a dot product of K terms wrong by about sqrt(K) eps (Higham and Mary 2019), and
    over the layers these errors add up, at worst linearly.
    """
    eps = float(np.finfo(np.float32).eps)
    return eps * sum(math.sqrt(terms) for terms, _ in networks.dot_products(model))


def check_outputs(workers: Sequence[Worker], relative: float) -> list[float]:
    """Greatest difference of each worker's output from the first's.

    ValueError where one exceeds `relative` times the first's greatest output, or is NaN.
    """
    expected = workers[0].output
    allowed = relative * float(np.abs(expected).max())
    differences = []
    for worker in workers:
        if worker.output.shape != expected.shape:
            raise ValueError(f"{worker.name} gives shape {worker.output.shape}, "
                             f"{workers[0].name} {expected.shape}")
        differences.append(float(np.abs(worker.output - expected).max()))
        if not differences[-1] <= allowed:
            raise ValueError(f"outputs of {worker.name} and {workers[0].name} differ by "
                             f"{differences[-1]:.3g}; {allowed:.3g} is allowed")
    return differences


# ---- one network ------------------------------------------------------------------------------

def find_network(name: str, folder: Path) -> Path:
    """The file of a network: a path, a zoo name, or one that is built into `folder`."""
    if name.endswith(".onnx"):
        return Path(name)
    if name in networks.NETWORKS:
        path = folder / f"{name}.onnx"
        onnx.save(networks.build(name), path)
        return path
    zoo = {path.stem: path for path in ZOO.glob("*.onnx")}
    if name not in zoo:
        raise ValueError(f"there is no network {name!r}; there are "
                         f"{', '.join([*networks.NETWORKS, *sorted(zoo)])}, or give an .onnx file")
    return zoo[name]


def random_batch(model: onnx.ModelProto, size: int) -> np.ndarray:
    """Seeded normal noise for the network's input, NCHW float32."""
    weights = {weight.name for weight in model.graph.initializer}
    image = next(value for value in model.graph.input if value.name not in weights)
    shape = [dim.dim_value for dim in image.type.tensor_type.shape.dim]
    if len(shape) != 4 or not all(shape[1:]):
        raise ValueError(f"input {image.name!r} must be (N, C, H, W) with only N free; its "
                         f"dimensions are {shape}, where 0 is a free one")
    if shape[0] not in (0, size):
        raise ValueError(f"input {image.name!r} has the fixed batch {shape[0]}, not {size}")
    return np.random.default_rng(0).standard_normal((size, *shape[1:]), dtype=np.float32)


@contextlib.contextmanager
def started(engines: Sequence[str], path: Path, batch: np.ndarray,
            threads: int) -> Iterator[list[Worker]]:
    """A worker for each engine, ended with the block."""
    workers: list[Worker] = []
    try:
        for name in engines:
            workers.append(Worker(name, ENGINES[name], path, batch, threads))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def bench(name: str, path: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Everything measured on one network, as it goes to JSON."""
    model = onnx.load(path)
    batch = random_batch(model, settings.batch)
    relative = tolerance(model)
    with started(settings.engines, path, batch, settings.threads) as workers:
        differences = check_outputs(workers, relative)
        times = interleave(workers, settings.rounds, settings.calls, settings.idle_ms / 1000)
    return {"network": name,
            "gmacs_per_image": networks.macs(model) / 1e9,
            "relative_tolerance": relative,
            "engines": [{"engine": worker.name,
                         "min_ms": 1000 * minimum(rounds),
                         "median_ms": 1000 * median(rounds),
                         "ratio_pairwise": pairwise_ratio(times[0], rounds),
                         "ratio_of_minima": minimum(times[0]) / minimum(rounds),
                         "max_abs_difference": difference,
                         "rounds_ms": [[1000 * call for call in calls] for calls in rounds]}
                        for worker, rounds, difference
                        in zip(workers, times, differences, strict=True)]}


# ---- report -----------------------------------------------------------------------------------

def provenance() -> dict[str, Any]:
    """What one must know to judge or repeat the figures."""
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "commit": git_commit(),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.machine()}",
            "versions": {"python": platform.python_version(),
                         **{package: version(package) for package in PACKAGES}}}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(results: Sequence[dict[str, Any]], settings: argparse.Namespace) -> Table:
    table = Table(title=f"batch {settings.batch}, {settings.threads} threads, "
                        f"{settings.rounds} rounds of {settings.calls} calls",
                  caption=f"ratio: {settings.engines[0]}'s time over the row's")
    table.add_column("network", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for heading in ("min\nms", "median\nms", "ratio\nby pairs", "ratio of\nminima", "max\n|diff|"):
        table.add_column(heading, justify="right")
    for result in results:
        for i, row in enumerate(result["engines"]):
            table.add_row(result["network"] if i == 0 else "", row["engine"],
                          f"{row['min_ms']:.2f}", f"{row['median_ms']:.2f}",
                          f"{row['ratio_pairwise']:.3f}", f"{row['ratio_of_minima']:.3f}",
                          f"{row['max_abs_difference']:.2g}",
                          end_section=i == len(result["engines"]) - 1)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["efficientnet_lite0", "resnet50"],
                        help="names from networks.py or the zoo, or .onnx files")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--calls", type=positive, default=5, help="timed calls in a turn")
    parser.add_argument("--idle-ms", type=float, default=50, help="idle time before a turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main() -> None:
    settings = parse_arguments()
    results = []
    console = Console()
    try:
        require(settings.engines)
        with tempfile.TemporaryDirectory() as folder:
            for name in settings.networks:
                path = find_network(name, Path(folder))
                with console.status(f"timing {path.stem}"):
                    results.append(bench(path.stem, path, settings))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"bench_network: {error}")
    console.print(report(results, settings))
    if settings.json:
        options = {name: value for name, value in vars(settings).items() if name != "json"}
        record = {"provenance": provenance(), "settings": options, "results": results}
        settings.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
