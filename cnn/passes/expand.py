"""Leaves out what is only expanded for an op that broadcasts by itself, as files write gates.

Before layout.py: an expanded value has an order of axes, and what is not expanded none.
"""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import Binary, Mul, broadcast_shapes

from ..graph import Graph, Node


def leave_out(graph: Graph) -> Graph:
    """The graph in which such ops read what was expanded; prune.py drops what nobody reads."""
    specs, producer = graph.infer(), graph.producer()

    def before(value: str) -> str | None:
        """What a value is that is multiplied by ones alone."""
        node = producer.get(value)
        if node is not None and isinstance(node.op, Mul):
            for x, other in (node.inputs, node.inputs[::-1]):
                if other in graph.constants and (graph.constants[other] == 1).all():
                    return x
        return None

    def narrowed(node: Node) -> Node:
        if not isinstance(node.op, Binary):
            return node
        inputs, output = list(node.inputs), specs[node.output]
        for i in (0, 1):
            narrow, other = before(inputs[i]), specs[inputs[1 - i]]
            spec = None if narrow is None else specs[narrow]
            if narrow is not None and spec is not None and other is not None and (
                    output is not None
                    and broadcast_shapes(spec.shape, other.shape) == output.shape):
                inputs[i] = narrow
        return replace(node, inputs=tuple(inputs))

    return replace(graph, nodes=tuple(map(narrowed, graph.nodes)))
