"""Makes one Silu of x * sigmoid(x), which is how exporters write it, so that it can be fused.

Before fuse.py, which takes an activation into the layer before it.
"""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import Mul, Sigmoid, Silu

from ..graph import Graph, Node


def join(graph: Graph) -> Graph:
    """The graph with a Silu in the place of every such product. prune.py drops the sigmoids."""
    producer = graph.producer()

    def joined(node: Node) -> Node:
        if isinstance(node.op, Mul):
            for value, other in (node.inputs, node.inputs[::-1]):
                gate = producer.get(other)
                if gate is not None and isinstance(gate.op, Sigmoid) and gate.inputs == (value,):
                    return replace(node, op=Silu(), inputs=(value,))
        return node

    return replace(graph, nodes=tuple(map(joined, graph.nodes)))
