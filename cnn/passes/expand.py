"""Leaves out what is only expanded for an op that broadcasts by itself, as files write gates.

Before layout.py: an expanded value has an order of axes, and what is not expanded none.
"""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import Binary, Mul, TensorSpec, broadcast_shapes

from ..graph import Graph, Node


def leave_out(graph: Graph) -> Graph:
    """The graph in which such ops read what was expanded; prune.py drops what nobody reads."""
    expanded = {node.output: x for node in graph.nodes if isinstance(node.op, Mul)
                for x, other in (node.inputs, node.inputs[::-1])
                if other in graph.constants and (graph.constants[other] == 1).all()}
    if not expanded:
        return graph
    specs = graph.infer()

    def narrowed(node: Node) -> Node:
        if not isinstance(node.op, Binary):
            return node
        inputs = list(node.inputs)
        for i in (0, 1):
            narrow = expanded.get(inputs[i])
            if narrow is not None and _become(specs[narrow], specs[inputs[1 - i]],
                                              specs[node.output]):
                inputs[i] = narrow
        return replace(node, inputs=tuple(inputs))

    return replace(graph, nodes=tuple(map(narrowed, graph.nodes)))


def _become(a: TensorSpec | None, b: TensorSpec | None, y: TensorSpec | None) -> bool:
    """Whether a and b are broadcast to y, as far as is known."""
    if a is None or b is None or y is None:
        return False
    return broadcast_shapes(a.shape, b.shape) == y.shape
