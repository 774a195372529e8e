"""Says how fast a GPU could run whole networks at best. A model: nothing here is measured.

Each layer that the optimising passes leave gets the least time of the roofline model (Williams,
Waterman and Patterson 2009): FLOPs over peak or bytes over bandwidth, whichever is longer.

    python profiling/roofline.py resnet50 --batch 256 --plot roofline.svg
"""
from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networks
from charts import Point, Roofline, save_rooflines
from common import git_commit, positive, write_json
from measured_network import ZOO, find_network
from rich import box
from rich.console import Console
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
from cnn.errors import ModelError
from cnn.executor import specialise
from cnn.graph import Graph
from cnn.onnx_import import load_onnx
from cnn.plan import joins_channels, views
from kernels import ops

ASSUMPTIONS = [
    "A model, not a measurement.",
    "Inputs, weights and outputs move once between chip and device memory, whatever a cache may "
    "keep from one layer to the next: at small batches a GPU can be faster than this.",
    "Convolutions and Linear layers fill the tensor cores to the last tile; depthwise "
    "convolutions and all other layers run on the CUDA cores, as float32 does everywhere.",
    "FLOPs are two per multiply-accumulate; what is fused behind a layer costs bytes alone.",
    "A layer is one launch, and launches take no time. A Concat of channels is taken for "
    "none, as if all that it joins were written where it belongs.",
]
ITEMSIZE = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}


# ---- the GPU ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Quantity:
    """A number with where it comes from."""
    value: float
    unit: str
    source: str


# What is measured was measured with vendor libraries. The paper's share is of the data sheet's
# peak; here it is taken of the measured one, as if whatever keeps a library's GEMM from the data
# sheet cost both instructions alike.
H200 = {
    "float16": Quantity(790, "TFLOP/s", "measured: dense library GEMM"),
    "bfloat16": Quantity(790, "TFLOP/s", "measured: dense library GEMM"),
    "tf32": Quantity(790 * 494.5 / 989.5, "TFLOP/s", "not measured: bfloat16's figure times the "
                     "data sheet's ratio, 494.5 / 989.5"),
    "float32": Quantity(67, "TFLOP/s", "not measured: data sheet, CUDA cores"),
    "bandwidth": Quantity(4.3, "TB/s", "measured: copy, bytes read plus bytes written"),
    "mma.sync": Quantity(0.629, "of wgmma's peak", "not measured here: published mean on an H800; "
                         "Luo et al. 2024, 'Benchmarking and Dissecting the Nvidia Hopper GPU "
                         "Architecture via Microbenchmarking', arXiv:2402.13499"),
}


@dataclass(frozen=True)
class Roof:
    """What limits a layer when matrix products are made of `instruction`."""
    instruction: str
    tflops: float

    def bound(self, layer: Layer) -> tuple[float, str]:
        """Least time in ms, and what takes it: "compute" or "memory"."""
        peak = self.tflops if layer.tensor_cores else H200["float32"].value
        compute, memory = layer.flops / peak / 1e9, layer.bytes / H200["bandwidth"].value / 1e9
        return (compute, "compute") if compute > memory else (memory, "memory")


def roofs(dtype: str, only: str | None = None) -> list[Roof]:
    """One for each instruction of the dtype, or for `only`: "wgmma" or "mma"."""
    peak = H200[dtype].value
    if dtype == "float32":
        if only:
            raise ValueError(f"--instruction {only}: float32 runs on the CUDA cores; leave it out")
        return [Roof("CUDA cores", peak)]
    both = {"wgmma": Roof("wgmma", peak), "mma": Roof("mma.sync", peak * H200["mma.sync"].value)}
    return [both[only]] if only else list(both.values())


# ---- the network ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Layer:
    """One launch. `bytes` must move at least once."""
    name: str
    kind: str
    shape: tuple[int, ...]
    flops: int
    bytes: int
    tensor_cores: bool


def read_network(name: str) -> Graph:
    """A network as it is in its file; ValueError or ModelError where it can not be had."""
    with tempfile.TemporaryDirectory() as folder:
        return load_onnx(find_network(name, Path(folder))).graph


def operations(source: Graph, batch: int) -> list[tuple[str, ops.Op, tuple[ops.Shape, ...]]]:
    """(name, op, shapes of its inputs) of what is left to run of a network."""
    graph = specialise(source, {value: (batch, *image.shape[1:])
                                for value, image in source.inputs.items()})
    specs = graph.infer()
    free = {*views(graph), *(node.output for node in graph.nodes if joins_channels(node, specs))}
    return [(node.name, node.op, tuple(spec.shape for value in node.inputs
                                       if (spec := specs[value])))
            for node in graph.nodes if node.output not in free]


def read_layers(name: str, batch: int, itemsize: int) -> list[Layer]:
    """What is left to run of a network; ValueError or ModelError where it can not be had."""
    return [cost(layer, op, shapes, itemsize)
            for layer, op, shapes in operations(read_network(name), batch)]


def cost(name: str, op: ops.Op, shapes: Sequence[ops.Shape], itemsize: int) -> Layer:
    """The layer of an op on inputs of these shapes, `itemsize` bytes an element."""
    kind = op.kind
    tensor_cores = isinstance(op, (ops.Linear, ops.Attention, ops.NormConv2d))
    if isinstance(op, ops.Conv2d):
        tensor_cores = op.groups == 1 or shapes[1][3] != 1
        kind = (f"{'conv' if tensor_cores else 'depthwise'} {shapes[1][1]}x{shapes[1][2]}"
                f"{' + residual' if len(shapes) > 3 else ''}")
    return Layer(name, kind, ops.known(op.output_shape(*shapes)), op.flops(*shapes),
                 moved_bytes(op, shapes, itemsize), tensor_cores)


def moved_bytes(op: ops.Op, shapes: Sequence[ops.Shape], itemsize: int) -> int:
    """The op's own bytes, but for a bias, which is float32, and pixels that no window touches."""
    size = op.bytes(*shapes, itemsize=itemsize)
    if isinstance(op, (ops.Conv2d, ops.Linear)) and len(shapes) > 2:
        size += (4 - itemsize) * ops.count(shapes[2])
    if isinstance(op, ops.Conv2d):
        n, height, width, channels = ops.known(shapes[0])
        pixels = touched(op, shapes, axis=0) * touched(op, shapes, axis=1)
        size -= itemsize * n * (height * width - pixels) * channels
    return size


def touched(op: ops.Conv2d, shapes: Sequence[ops.Shape], axis: int) -> int:
    """How many rows (axis 0) or columns (1) of x lie in a window: a stride can skip some."""
    size, windows, kernel = (ops.known(shape)[1 + axis] for shape in
                             (shapes[0], op.output_shape(*shapes), shapes[1]))
    return len({window * op.stride[axis] + tap * op.dilation[axis] - op.padding[axis]
                for window in range(windows) for tap in range(kernel)} & set(range(size)))


# ---- results ----------------------------------------------------------------------------------

def record(name: str, batch: int, dtype: str, limits: Sequence[Roof]) -> dict[str, Any]:
    """Everything about one network, as it goes to JSON."""
    layers = read_layers(name, batch, ITEMSIZE[dtype])
    return {"network": Path(name).stem, "batch": batch, "dtype": dtype, "gpu": "H200",
            "launches": len(layers),
            "flops": sum(layer.flops for layer in layers),
            "bytes": sum(layer.bytes for layer in layers),
            "totals": {roof.instruction: totals(batch, layers, roof) for roof in limits},
            "layers": [{**asdict(layer), "shape": list(layer.shape),
                        "flops_per_byte": layer.flops / layer.bytes,
                        "least_ms": {roof.instruction: roof.bound(layer)[0] for roof in limits},
                        "limit": {roof.instruction: roof.bound(layer)[1] for roof in limits}}
                       for layer in layers]}


def totals(batch: int, layers: Sequence[Layer], roof: Roof) -> dict[str, float]:
    bounds = [roof.bound(layer) for layer in layers]
    least_ms = sum(ms for ms, _ in bounds)
    memory_ms = sum(ms for ms, limit in bounds if limit == "memory")
    return {"peak_tflops": roof.tflops, "least_ms": least_ms,
            "images_per_s": 1000 * batch / least_ms, "memory_share_of_time": memory_ms / least_ms}


def provenance() -> dict[str, Any]:
    """What one must know to judge or repeat the figures."""
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "commit": git_commit(),
            "assumptions": ASSUMPTIONS,
            "H200": {name: asdict(quantity) for name, quantity in H200.items()}}


def title(result: dict[str, Any]) -> str:
    return "{network}, batch {batch}, {dtype}, {gpu}".format(**result)


def table(result: dict[str, Any]) -> Table:
    found = Table(Column("layer", f"{result['launches']} launches"), "kind", "output", padding=0,
                  title=f"{title(result)}: a model, not a measurement", box=box.SIMPLE,
                  show_footer=True)
    found.add_column("GFLOP", f"{result['flops'] / 1e9:.3f}", justify="right")
    found.add_column("MB", f"{result['bytes'] / 1e6:.2f}", justify="right")
    found.add_column("FLOP/B", f"{result['flops'] / result['bytes']:.1f}", justify="right")
    for name, total in result["totals"].items():
        found.add_column(f"least ms\n({name})", f"{total['least_ms']:.5f}", justify="right")
        found.add_column("limit", f"{total['memory_share_of_time']:.0%} memory")
    for layer in result["layers"]:
        bounds = [cell for name, least_ms in layer["least_ms"].items()
                  for cell in (f"{least_ms:.5f}", layer["limit"][name])]
        found.add_row(layer["name"], layer["kind"], "x".join(map(str, layer["shape"])),
                      f"{layer['flops'] / 1e9:.3f}", f"{layer['bytes'] / 1e6:.2f}",
                      f"{layer['flops_per_byte']:.1f}", *bounds)
    return found


def summary(result: dict[str, Any], instruction: str) -> str:
    """The throughput that the model allows, and what memory limits."""
    total, layers = result["totals"][instruction], result["layers"]
    kinds = Counter(layer["kind"] for layer in layers)
    bound = Counter(layer["kind"] for layer in layers if layer["limit"][instruction] == "memory")
    listed = ", ".join(f"{bound[kind]} of {kinds[kind]} {kind}" for kind in bound) or "no layer"
    return (f"{title(result)}, {instruction}: the model allows at most "
            f"{total['images_per_s']:,.0f} images/s. Memory limits "
            f"{total['memory_share_of_time']:.0%} of the time: {listed}.")


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a roofline for each network."""
    save_rooflines([chart(result) for result in results], "A model, not a measurement", path)


def chart(result: dict[str, Any]) -> Roofline:
    """The roofs, and the layers under the last of them, which is the lowest."""
    peaks = {name: total["peak_tflops"] for name, total in result["totals"].items()}
    instruction = list(peaks)[-1]
    points = [Point(layer["kind"], layer["flops_per_byte"], layer["flops"] / ms / 1e9, ms)
              for layer in result["layers"] for ms in [layer["least_ms"][instruction]]]
    return Roofline(title(result), {**peaks, "CUDA cores": H200["float32"].value},
                    H200["bandwidth"].value, points, f"TFLOP/s at best ({instruction})")


# ---- command line -----------------------------------------------------------------------------

def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*networks.NETWORKS, *sorted(path.stem for path in ZOO.glob("*.onnx"))]
    parser.add_argument("networks", nargs="*", default=known, metavar="NETWORK",
                        help=f"from {', '.join(known)}, or .onnx files; default: all of those")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--dtype", choices=ITEMSIZE, default="float16")
    parser.add_argument("--instruction", choices=["wgmma", "mma"], help="default: show both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every layer's figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw rooflines: .svg or .png")
    return parser.parse_args()


def main() -> None:
    settings = parse_arguments()
    console = Console()
    console.width = max(console.width, 132)     # a pipe's 80 columns would cut the numbers
    try:
        limits = roofs(settings.dtype, settings.instruction)
        results = [record(name, settings.batch, settings.dtype, limits)
                   for name in settings.networks]
        for result in results:
            console.print(table(result))
        sentences = [summary(result, roof.instruction) for result in results for roof in limits]
        print(*ASSUMPTIONS, "", *sentences, sep="\n")
        if settings.json:
            everything = {"kind": "model", "provenance": provenance(), "networks": results}
            write_json(settings.json, everything)
        if settings.plot:
            plot(results, settings.plot)
    except (OSError, ValueError, ModelError) as error:
        sys.exit(f"roofline: {error}")


if __name__ == "__main__":
    main()
