"""Leaves the heads of an attention apart from the batch, where a file joins them to turn matrices.

    (N, heads, ..) reshaped to (N * heads, ..), turned, and reshaped to (N, heads, ..)     Transpose

PyTorch's exporter writes keys so. Before layout.py, which can turn axes for nothing only while they
are apart.
"""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import Reshape, Shape, Transpose

from ..graph import Graph


def leave_apart(graph: Graph) -> Graph:
    """The graph with one Transpose for each such; prune.py drops what led to it."""
    made = graph.producer()
    found = [(node, turn, join) for node in graph.nodes if isinstance(node.op, Reshape)
             and (turn := made.get(node.inputs[0])) and isinstance(turn.op, Transpose)
             and (join := made.get(turn.inputs[0])) and isinstance(join.op, Reshape)]
    if not found:
        return graph
    specs = graph.infer()
    nodes = dict(made)
    for node, turn, join in found:
        values = join.inputs[0], join.output, turn.output, node.output
        shapes = [spec.shape for value in values if (spec := specs[value])]
        assert isinstance(turn.op, Transpose)
        if len(shapes) == len(values) and _undone(turn.op.permutation, *shapes):
            order = (0, *(axis + 1 for axis in turn.op.permutation))
            nodes[node.output] = replace(node, op=Transpose(order), inputs=join.inputs)
    return replace(graph, nodes=tuple(nodes.values()))


def _undone(permutation: tuple[int, ...], x: Shape, joined: Shape, turned: Shape, y: Shape) -> bool:
    """Whether x's first two axes, and no others, are joined, left where they are and split again
    as they were."""
    return (permutation[0] == 0 and len(x) == len(y) == len(joined) + 1 and x[:2] == y[:2]
            and None not in x[1:] and x[2:] == joined[1:] and y[2:] == turned[1:])
