"""Graph of nodes holding `kernels.ops`; shape inference; nothing else."""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from kernels.ops import Op, Shape, TensorSpec

from .errors import ModelError


@dataclass(frozen=True)
class Glue(Op):
    """A file's operator that only works out shapes or constants: Shape, Gather, Cast ...

    No kernel runs it; `fold.py` evaluates it in NumPy, at the latest when the input's shape is
    known, and what can not be evaluated then is an error. `attributes` are the operator's own.
    """
    operator: str = ""
    attributes: tuple[tuple[str, object], ...] = ()
    arity: ClassVar[tuple[int, int]] = (0, 1 << 16)

    @property
    def kind(self) -> str:
        return self.operator


@dataclass(frozen=True)
class Node:
    """One layer: `op` applied to the values named `inputs` gives the value named `output`.

    `name` is the layer's name as people know it (in the file, or torch's dotted path).
    """
    op: Op
    inputs: tuple[str, ...]
    output: str
    name: str


@dataclass(frozen=True)
class Graph:
    """A network. Nodes stand in an order in which they can run.

    inputs     name -> spec; None stands for a dimension that each call may choose
    outputs    names of values
    constants  name -> array, the weights
    """
    inputs: dict[str, TensorSpec]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def producer(self) -> dict[str, Node]:
        """Value name -> the node that gives it."""
        return {node.output: node for node in self.nodes}

    def consumers(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, in order; outputs of the graph are not listed."""
        result: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                result.setdefault(name, []).append(node)
        return result

    def with_input_shapes(self, shapes: dict[str, Shape]) -> Graph:
        """The same graph for inputs of these shapes."""
        return replace(self, inputs={name: replace(spec, shape=tuple(shapes.get(name, spec.shape)))
                                     for name, spec in self.inputs.items()})

    def infer(self) -> dict[str, TensorSpec | None]:
        """Spec of every value; None where it depends on a value that is not known yet.

        Raises ModelError, naming the layer, where shapes do not fit.
        """
        specs: dict[str, TensorSpec | None] = dict(self.inputs)
        for name, array in self.constants.items():
            specs[name] = TensorSpec(array.shape, array.dtype.name)
        for node in self.nodes:
            specs[node.output] = infer_node(node, [specs[name] for name in node.inputs])
        return specs


def infer_node(node: Node, inputs: list[TensorSpec | None]) -> TensorSpec | None:
    """Spec of the node's output; glue has none until it is folded."""
    least, most = node.op.arity
    if not least <= len(inputs) <= most:
        raise ModelError(f"layer {node.name!r}: {node.op.kind} takes {least} to {most} inputs, "
                         f"it has {len(inputs)}")
    shapes = [spec.shape for spec in inputs if spec is not None]
    if len(shapes) != len(inputs) or isinstance(node.op, Glue):
        return None
    try:
        return TensorSpec(node.op.output_shape(*shapes))
    except ValueError as error:
        raise ModelError(f"layer {node.name!r}: {error}") from None
