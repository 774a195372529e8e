"""What a network consists of, layer by layer: shapes, kernels, parameters, arithmetic, memory."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kernels import ops

from .by_image import ByImage
from .executor import Layer, Program
from .graph import Graph

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class Row:
    """One layer. `kernel` is "(view)" where nothing runs; bytes are read and written once, all
    numbers in the widest dtype that the layer reads or writes."""
    layer: str
    kernel: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """All layers of a network for one input shape; `str()` gives the table as text.

    apart  images of a batch that run one by one, and of one of which the rows are; 0 where the
           batch runs as a whole
    """
    model: str
    device: str
    dtype: str
    activation: str
    input_shapes: dict[str, tuple[int, ...]]
    rows: list[Row]
    parameters: int         # trainable ones, as the file has them: before batch norms are folded
    arena_bytes: int        # memory for all values, planned for re-use
    apart: int = 0

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    HEADER = ("layer", "kernel", "output shape", "parameters", "MACs", "bytes")

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text."""
        return [(row.layer, row.kernel, "x".join(map(str, row.output_shape)),
                 f"{row.parameters:,}", f"{row.macs:,}", f"{row.bytes:,}") for row in self.rows]

    def footer(self) -> str:
        """Totals, and the choices made, as sentences."""
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}"
                           for name, shape in self.input_shapes.items())
        apart = (f"The {self.apart} images of a batch run one by one, each on one thread: the "
                 f"layers are those of one image.\n" if self.apart else "")
        return (f"{self.parameters:,} parameters, {self.macs / 1e6:,.1f} M multiply-accumulates, "
                f"{self.arena_bytes / 1e6:.1f} MB for values; input {shapes}.\n{apart}"
                f"Runs on {self.device} in {self.dtype}; activation of the output: "
                f"{self.activation}.")

    def __str__(self) -> str:
        table = [self.HEADER, *self.cells()]
        widths = [max(len(line[i]) for line in table) for i in range(len(self.HEADER))]
        lines = ["  ".join(cell.ljust(width) if i < 3 else cell.rjust(width)
                           for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
                 for line in table]
        return "\n".join([self.model, *lines, self.footer()])


def summarise(model: Model, program: Program | ByImage, source: Graph) -> Summary:
    """The summary of a model as `program` runs it; `source` is its graph before any pass."""
    return Summary(model.name, model.device, model.dtype, model.activation,
                   {name: ops.known(spec.shape) for name, spec in program.graph.inputs.items()},
                   [_row(layer, program.graph) for layer in program.layers],
                   parameter_count(source), program.bytes,
                   program.batch if isinstance(program, ByImage) else 0)


def _row(layer: Layer, graph: Graph) -> Row:
    op, shapes = layer.node.op, [spec.shape for spec in layer.inputs]
    held = [math.prod(graph.constants[name].shape) for name in layer.node.inputs
            if name in graph.constants]
    if layer.step is None:
        return Row(layer.node.name, "(view)", ops.known(layer.output.shape), 0, 0, 0)
    itemsize = max(np.dtype(spec.dtype).itemsize for spec in (*layer.inputs, layer.output))
    return Row(layer.node.name, layer.step.kernel, ops.known(layer.output.shape), sum(held),
               op.macs(*shapes), op.bytes(*shapes, itemsize=itemsize))


def parameter_count(graph: Graph) -> int:
    """Trainable parameters: all weights but the running statistics of batch norms."""
    statistics = {name for node in graph.nodes if isinstance(node.op, ops.BatchNorm)
                  for name in node.inputs[3:]}
    return sum(array.size for name, array in graph.constants.items() if name not in statistics)
