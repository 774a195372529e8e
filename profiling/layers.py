"""Times every layer of a network on the CPU, and sets it against what the machine can do.

    python profiling/layers.py resnet50 --threads 2 --json layers.json

Layers run one after the other, as they do in any call; each is timed from step to step. What a
call takes beyond its layers (copying inputs and outputs, Python) has a row of its own. Peaks are
measured in the same run: multiply-adds from registers, copying through memory. Percentages are of
the fastest run of each layer; caches may carry a layer past the bandwidth of memory.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_network import find_network, positive, provenance, random_batch
from rich import box
from rich.console import Console
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
import cpu_peak

from cnn import passes
from cnn.devices import CpuDevice
from cnn.errors import Error
from cnn.executor import Layer, Program, specialise
from cnn.onnx_import import load_onnx
from kernels import ops

OUTSIDE = "(outside of layers)"


@dataclass(frozen=True)
class Row:
    """One layer: times in ms; FLOPs; bytes that it must read and write once."""
    layer: str
    kernel: str
    output_shape: tuple[int, ...]
    min_ms: float
    median_ms: float
    flops: int
    bytes: int


class StopWatch(CpuDevice):
    """The CPU, with the time of each step of each run written down."""

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads)
        self.runs: list[list[int]] = []         # nanoseconds

    def compile(self, bound: Sequence[Callable[[], object]]) -> Callable[[], None]:
        def timed(step: Callable[[], object]) -> Callable[[], None]:
            def call() -> None:
                start = time.perf_counter_ns()
                step()
                self.runs[-1].append(time.perf_counter_ns() - start)
            return call
        return super().compile([timed(step) for step in bound])


def profile(path: Path, batch: int, threads: int, runs: int) -> list[Row]:
    """The rows of a network, the last being what belongs to no layer."""
    device = StopWatch(threads)
    graph = passes.optimise(load_onnx(path).graph)
    image = np.ascontiguousarray(random_batch(onnx.load(path), batch).transpose(0, 2, 3, 1))
    name, = graph.inputs
    program = Program(specialise(graph, {name: image.shape}), device, device.options())
    whole = []
    for _ in range(runs + 2):
        device.runs.append([])
        start = time.perf_counter_ns()
        program.run({name: image})
        whole.append(time.perf_counter_ns() - start)
    times = np.array(device.runs[2:]) / 1e6     # the first two warm caches up
    outside = np.array(whole[2:]) / 1e6 - times.sum(axis=1)
    layers = [layer for layer in program.layers if layer.step is not None]
    rows = [row(layer, times[:, i]) for i, layer in enumerate(layers)]
    copied = 4 * sum(ops.count(spec.shape) for spec in program.graph.inputs.values())
    return [*rows, Row(OUTSIDE, "", (), outside.min(), statistics.median(outside), 0, 2 * copied)]


def row(layer: Layer, times: np.ndarray) -> Row:
    op, shapes = layer.node.op, [spec.shape for spec in layer.inputs]
    assert layer.step is not None
    return Row(layer.node.name, layer.step.kernel, ops.known(layer.output.shape),
               float(times.min()), float(np.median(times)), op.flops(*shapes), op.bytes(*shapes))


def table(name: str, rows: Sequence[Row], peak: float, bandwidth: float, threads: int) -> Table:
    shown = Table(Column("layer", "total"), Column("kernel"), Column("output"), box=box.SIMPLE,
                  title=f"{name}, {threads} threads: {peak / 1e9:.1f} GFLOP/s, "
                        f"{bandwidth / 1e9:.1f} GB/s at best", show_footer=True)
    total = sum(row.median_ms for row in rows)
    for heading, footer in (("min ms", f"{sum(row.min_ms for row in rows):.3f}"),
                            ("median ms", f"{total:.3f}"), ("% of time", ""), ("GFLOP/s", ""),
                            ("% of peak", ""), ("GB/s", ""), ("% of copy", "")):
        shown.add_column(heading, footer, justify="right")
    for row in rows:
        flops, moved = row.flops / row.min_ms * 1e3, row.bytes / row.min_ms * 1e3
        shown.add_row(row.layer, row.kernel, "x".join(map(str, row.output_shape)),
                      f"{row.min_ms:.3f}", f"{row.median_ms:.3f}",
                      f"{100 * row.median_ms / total:.1f}",
                      *((f"{flops / 1e9:.1f}", f"{100 * flops / peak:.0f}") if row.flops
                        else ("", "")), f"{moved / 1e9:.1f}", f"{100 * moved / bandwidth:.0f}")
    return shown


def as_json(name: str, rows: Sequence[Row], peak: float, bandwidth: float,
            settings: argparse.Namespace) -> dict[str, Any]:
    return {"kind": "measurement", "network": name, "batch": settings.batch,
            "threads": settings.threads, "runs": settings.runs, "peak_flops": peak,
            "copy_bytes_per_s": bandwidth, "provenance": provenance(),
            "rows": [asdict(row) for row in rows]}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of networks.py or of the zoo, or an .onnx file")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--threads", type=positive, default=None, help="default: all cores")
    parser.add_argument("--runs", type=positive, default=50, help="timed runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        settings.threads = CpuDevice(settings.threads).threads
        with tempfile.TemporaryDirectory() as folder:
            path = find_network(settings.model, Path(folder))
            rows = profile(path, settings.batch, settings.threads, settings.runs)
        peak, bandwidth = cpu_peak.measure(settings.threads)
    except (Error, ValueError, OSError) as error:
        sys.exit(f"layers.py: {error}")
    console.print(table(settings.model, rows, peak, bandwidth, settings.threads))
    if settings.json:
        result = as_json(settings.model, rows, peak, bandwidth, settings)
        settings.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
