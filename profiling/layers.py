"""Times every layer of a network, and sets it against what the machine can do.

    python profiling/layers.py resnet50 --threads 2 --json layers.json
    python profiling/layers.py resnet50 --device cuda --dtype float16 --batch 256 --plot layers.svg

Layers run one after the other, as they do in any call; each is timed from step to step. On the CPU
what a call takes beyond its layers (copying inputs and outputs, Python) has a row of its own. Peaks
are measured in the same run: on the CPU products from registers and copying through memory, on
a GPU the largest of PyTorch's matrix products and a copy. A layer's roofline is the longer of the
times that its FLOPs take at the peak and its bytes at the copy's bandwidth; depthwise and other
layers that tensor cores can not compute have bytes alone. Percentages are of the fastest run of
each layer; caches may carry it past 100.

On a GPU each layer is an NVTX range of its name: `nsys profile python profiling/layers.py ...`.
"""
from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from charts import Point, Roofline, save_rooflines
from common import positive, provenance, write_json
from measured_network import find_network, random_batch
from rich import box
from rich.console import Console
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
import cpu_peak
import roofline

from cnn import passes
from cnn.by_image import for_one_image
from cnn.devices import CPU_DTYPES, CpuDevice, Run
from cnn.errors import Error
from cnn.executor import Program, specialise
from cnn.onnx_import import load_onnx
from kernels import ops
from kernels.cpu.launch import Launch, together
from kernels.cpu.threads import team
from kernels.cuda.errors import CudaError

OUTSIDE, OUTPUT = "(outside of layers)", "(output)"
WARM_UP = 2         # runs before the timed ones

Span = tuple[float, float]      # ms after the run's start


@dataclass(frozen=True)
class Row:
    """One layer: times in ms; FLOPs; bytes that it must read and write once.

    full_rate  whether its FLOPs could run at the machine's peak
    launches   what is known of its kernels, on a GPU
    """
    layer: str
    kind: str
    kernel: str
    output_shape: tuple[int, ...]
    min_ms: float
    median_ms: float
    flops: int
    bytes: int
    full_rate: bool = False
    launches: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """What the layers ran on: FLOP/s and bytes/s at best, and where the peak comes from."""
    name: str
    peak: float
    peak_source: str
    bandwidth: float
    on_gpu: bool

    def bound(self, row: Row) -> tuple[float, str]:
        """The roofline: least time in ms, and what takes it: "compute" or "memory"."""
        compute = 1e3 * row.flops / self.peak if row.full_rate else 0.0
        memory = 1e3 * row.bytes / self.bandwidth
        return (compute, "compute") if compute > memory else (memory, "memory")


class CpuWatch(CpuDevice):
    """The CPU, with the (start, end) of each step of each run written down."""

    def __init__(self, threads: int | None, dtype: str) -> None:
        super().__init__(threads, dtype)
        self.runs: list[list[Span]] = []
        self.facts: list[list[Any]] = []        # nothing more is known of a CPU's kernels

    def compile(self, steps: Sequence[tuple[str, Sequence[Launch]]]) -> Run:
        self.facts = [[] for _ in steps]
        layers = [together(launches) for _, launches in steps]

        def run(stream: Any) -> None:
            spans, start = [], time.perf_counter()
            with team(self.count):
                for layer in layers:
                    begin = time.perf_counter()
                    layer()
                    spans.append((begin, time.perf_counter()))
            self.runs.append([(1e3 * (a - start), 1e3 * (b - start)) for a, b in spans])
        return run


# ---- measuring --------------------------------------------------------------------------------

def profile(path: Path, batch: int, device: Any, runs: int) -> tuple[list[Row], list[Span]]:
    """(rows of a network, when each layer ran in the fastest run) by a stop watch of a device. The
    last row may be what belongs to no layer: on the CPU calls and copies, on a GPU outputs that
    become float32."""
    graph = passes.optimise(load_onnx(path).graph)
    image = np.ascontiguousarray(random_batch(onnx.load(path), batch).transpose(0, 2, 3, 1))
    name, = graph.inputs
    program = Program(specialise(graph, {name: image.shape}), device, device.options())
    if isinstance(device, CpuWatch) and for_one_image(graph, program.graph, device.options()):
        print("note: a model runs such a batch image by image, each on one thread, which is faster "
              "than these layers; --batch 1 --threads 1 shows that", file=sys.stderr)
    whole = []
    for _ in range(runs + WARM_UP):
        start = time.perf_counter()
        program.run({name: image})
        whole.append(1e3 * (time.perf_counter() - start))
    spans = np.array(device.runs[WARM_UP:])             # (run, layer, start and end)
    times = spans[..., 1] - spans[..., 0]
    layers = [layer for layer in program.layers if layer.step is not None]
    launches = [[asdict(one) for one in of_step] for of_step in device.facts]
    rows = [row(layer, times[:, i], launches[i], device.dtype) for i, layer in enumerate(layers)]
    elements = sum(ops.count(layer.output.shape) for layer in layers
                   if layer.node.output in graph.outputs)
    for i in range(len(layers), len(launches)):     # outputs become float32
        rows.append(Row(OUTPUT, OUTPUT, launches[i][0]["kernel"], (), float(times[:, i].min()),
                        float(np.median(times[:, i])), 0,
                        (4 + roofline.ITEMSIZE[device.dtype]) * elements, launches=launches[i]))
    if isinstance(device, CpuWatch):
        outside = np.array(whole[WARM_UP:]) - times.sum(axis=1)
        copied = 4 * sum(ops.count(spec.shape) for spec in program.graph.inputs.values())
        rows.append(Row(OUTSIDE, OUTSIDE, "", (), outside.min(), statistics.median(outside), 0,
                        2 * copied))
    return rows, [tuple(span) for span in spans[times.sum(axis=1).argmin()].tolist()]


def row(layer: Any, times: np.ndarray, launches: list[dict[str, Any]], dtype: str) -> Row:
    cost = roofline.cost(layer.node.name, layer.node.op, [spec.shape for spec in layer.inputs],
                         roofline.ITEMSIZE[dtype])
    # Without tensor cores in play all arithmetic runs on the units whose peak is taken.
    return Row(cost.name, cost.kind, layer.step.kernel, ops.known(layer.output.shape),
               float(times.min()), float(np.median(times)), cost.flops,
               cost.bytes + wide_bytes(layer, cost.tensor_cores, dtype),
               cost.tensor_cores or dtype == "float32", launches)


def wide_bytes(layer: Any, narrow_weights: bool, dtype: str) -> int:
    """What is to be added to 2 bytes an element where a CPU computes in bfloat16: it stores values
    in float32, but for those that only convolutions read."""
    if dtype != "bfloat16":
        return 0
    weights = (1, 2) if narrow_weights else (2,)        # a bias is counted as float32 already
    specs = [spec for i, spec in enumerate(layer.inputs) if i not in weights]
    return sum(2 * ops.count(spec.shape) for spec in [*specs, layer.output]
               if spec.dtype == "float32")


def measure(path: Path, settings: argparse.Namespace
            ) -> tuple[Machine, list[Row], list[Span], dict[str, Any]]:
    """(machine, rows, the fastest run, provenance) of the device that was asked for."""
    if settings.device == "cpu":
        watch = CpuWatch(settings.threads, settings.dtype)
        rows, fastest = profile(path, settings.batch, watch, settings.runs)
        peak, bandwidth = cpu_peak.measure(watch.threads, settings.dtype)
        machine = Machine(f"{watch.threads} threads", peak, "measured: products from registers",
                          bandwidth, on_gpu=False)
        return machine, rows, fastest, provenance()
    import gpu_timing
    from gpu_watch import GpuWatch

    from cnn.gpu_device import number
    gpu_watch = GpuWatch(number(settings.device), settings.dtype)
    rows, fastest = profile(path, settings.batch, gpu_watch, settings.runs)
    found = gpu_timing.provenance(gpu_watch.index)
    machine = Machine(found["gpu"]["name"], *gpu_watch.limits(settings.peak), on_gpu=True)
    return machine, rows, fastest, found


# ---- results ----------------------------------------------------------------------------------

def table(title: str, rows: Sequence[Row], machine: Machine) -> Table:
    unit, scale = ("TFLOP/s", 1e12) if machine.on_gpu else ("GFLOP/s", 1e9)
    shown = Table(Column("layer", "total"), Column("kernel", overflow="fold"), Column("output"),
                  box=box.SIMPLE, padding=0, show_footer=True,
                  title=f"{title}\n{machine.name}, at best {machine.peak / scale:.1f} {unit} "
                        f"({machine.peak_source}) and {machine.bandwidth / 1e9:.1f} GB/s")
    total = sum(row.median_ms for row in rows)
    if machine.on_gpu:
        shown.add_column("registers", justify="right")
        shown.add_column("occupancy", justify="right")
    least = sum(machine.bound(row)[0] for row in rows)
    fastest = sum(row.min_ms for row in rows)
    for heading, footer in (("min ms", f"{fastest:.3f}"), ("median ms", f"{total:.3f}"),
                            ("% of time", ""), (unit, ""), ("GB/s", ""), ("limit", ""),
                            ("% of\nroofline", f"{100 * least / fastest:.0f}")):
        shown.add_column(heading, footer, justify="right")
    for row in rows:
        occupied = [[str(launch["registers"]) for launch in row.launches],
                    [f"{launch['occupancy']:.0%}" for launch in row.launches]]
        shown.add_row(row.layer, row.kernel, "x".join(map(str, row.output_shape)),
                      *(map(" + ".join, occupied) if machine.on_gpu else ()),
                      f"{row.min_ms:.4f}", f"{row.median_ms:.4f}",
                      f"{100 * row.median_ms / total:.1f}",
                      f"{row.flops / row.min_ms * 1e3 / scale:.1f}" if row.flops else "",
                      f"{row.bytes / row.min_ms / 1e6:.1f}", machine.bound(row)[1],
                      f"{100 * machine.bound(row)[0] / row.min_ms:.0f}")
    return shown


def as_json(title: str, rows: Sequence[Row], machine: Machine, settings: argparse.Namespace,
            found: dict[str, Any]) -> dict[str, Any]:
    fastest = sum(row.min_ms for row in rows)
    bounds = [machine.bound(row) for row in rows]
    of_roofline = 100 * sum(least_ms for least_ms, _ in bounds) / fastest
    return {"kind": "measurement", "network": settings.model, "batch": settings.batch,
            "device": settings.device, "dtype": settings.dtype, "runs": settings.runs,
            "machine": asdict(machine), "provenance": found,
            "headline": {f"{title}: sum of layers, ms": fastest,
                         f"{title}: % of roofline": of_roofline},
            "rows": [{**asdict(row), "least_ms": least_ms, "limit": limit}
                     for row, (least_ms, limit) in zip(rows, bounds, strict=True)]}


def chart(title: str, rows: Sequence[Row], machine: Machine) -> Roofline:
    points = [Point(row.kind, row.flops / row.bytes, row.flops / row.min_ms / 1e9, row.min_ms)
              for row in rows if row.flops]
    return Roofline(title, {"peak": machine.peak / 1e12}, machine.bandwidth / 1e12, points)


def trace(rows: Sequence[Row], spans: Sequence[Span], machine: Machine) -> dict[str, Any]:
    """One run in Chrome's trace format, for chrome://tracing and Perfetto; times in us."""
    names = {"process_name": machine.name, "thread_name": "layers"}
    events = [{"name": kind, "ph": "M", "pid": 0, "tid": 0, "args": {"name": name}}
              for kind, name in names.items()]
    return {"displayTimeUnit": "ms", "traceEvents": [*events, *(
        {"name": row.layer, "cat": row.kind, "ph": "X", "pid": 0, "tid": 0, "ts": 1e3 * start,
         "dur": 1e3 * (end - start),
         "args": {"kernel": row.kernel, "output": "x".join(map(str, row.output_shape)),
                  "flops": row.flops, "bytes": row.bytes}}
        for row, (start, end) in zip(rows, spans, strict=False))]}  # what is outside has no span


# ---- command line -----------------------------------------------------------------------------

def device(text: str) -> str:
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device that layers can be timed on: "
                                         f"write cpu, cuda, or cuda:N with N the number of a GPU")
    return text


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of networks.py or of the zoo, or an .onnx file")
    parser.add_argument("--device", type=device, default="cpu",
                        help="cpu, cuda or cuda:N; default cpu")
    parser.add_argument("--dtype", choices=roofline.ITEMSIZE, default="float32",
                        help="default float32; the CPU also has bfloat16")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--threads", type=positive, default=None, help="default: all cores")
    parser.add_argument("--runs", type=positive, default=50, help="timed runs")
    parser.add_argument("--peak", type=float, metavar="TFLOPS",
                        help="a GPU's peak, say of its data sheet; default: measured by PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a roofline: .svg or .png")
    parser.add_argument("--trace", type=Path, metavar="FILE",
                        help="write the fastest run for chrome://tracing or Perfetto")
    settings = parser.parse_args(arguments)
    if settings.device == "cpu" and settings.dtype not in CPU_DTYPES:
        parser.error(f"--dtype {settings.dtype} and --peak are for a GPU: add --device cuda")
    if settings.device == "cpu" and settings.peak:
        parser.error("--peak is for a GPU: add --device cuda")
    if settings.device != "cpu" and settings.threads:
        parser.error("--threads is for the CPU: leave it or --device out")
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_arguments(arguments)
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 180         # a pipe's 80 columns would cut the numbers
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = find_network(settings.model, Path(folder))
            machine, rows, fastest, found = measure(path, settings)
        title = f"{Path(settings.model).stem}, batch {settings.batch}, {settings.dtype}"
        console.print(table(title, rows, machine))
        if settings.json:
            result = as_json(title, rows, machine, settings, found)
            write_json(settings.json, result)
        if settings.trace:
            write_json(settings.trace, trace(rows, fastest, machine), indent=None)
        if settings.plot:
            save_rooflines([chart(title, rows, machine)], machine.name, settings.plot)
    except (Error, CudaError, ValueError, OSError) as error:
        sys.exit(f"layers.py: {error}")


if __name__ == "__main__":
    main()
