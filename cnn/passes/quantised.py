"""Leaves out what a file quantised to 8 bits does twice, or to no effect.

A clip before a FakeQuantize which clips as tightly; and a FakeQuantize of numbers that are its own
already, as files have them around each layer that only moves or picks numbers. What is put together
by a Concat is quantised before. First of all, so that other passes see a layer beside what follows
it.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from kernels.ops import (
    Clip,
    Concat,
    FakeQuantize,
    Flatten,
    GlobalMaxPool2d,
    MaxPool2d,
    Op,
    Pad,
    Relu,
    Reshape,
    Slice,
    Transpose,
)

from ..graph import Graph, Node
from .prune import prune

# What gives only numbers that it is given; Relu and Pad may add 0, which every grid has.
MOVES = (Concat, Flatten, GlobalMaxPool2d, MaxPool2d, Pad, Relu, Reshape, Slice, Transpose)


def leave_out(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph without these; values in `keep` stay values."""
    if not any(isinstance(node.op, FakeQuantize) for node in graph.nodes):
        return graph
    before: tuple[Node, ...] = ()
    while graph.nodes != before:    # a Concat may have stood behind a clip, or another Concat
        before, graph = graph.nodes, prune(_leave_out(_before_concat(graph, keep), keep), keep)
    return graph


def _leave_out(graph: Graph, keep: frozenset[str]) -> Graph:
    """The graph where nobody reads these."""
    readers, producer = graph.consumers(), graph.producer()
    needed = {*graph.outputs, *keep}

    def unclipped(value: str) -> str:
        """The value that a clip to no effect is given, or the value itself."""
        before = producer.get(value)
        if before is None or value in needed or not all(
                _clips_as(reader.op, before.op) for reader in readers[value]):
            return value
        return same.get(before.inputs[0], before.inputs[0])

    grids: dict[str, FakeQuantize] = {}     # of values that lie on one
    same: dict[str, str] = {}               # of each that is left out, the one that it equals
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = [same.get(name, name) for name in node.inputs]
        if isinstance(node.op, FakeQuantize):
            inputs = [unclipped(name) for name in inputs]
            if grids.get(inputs[0]) == node.op and node.output not in needed:
                same[node.output] = inputs[0]
                continue
            grids[node.output] = node.op
        elif _moves(node.op) and len(found := {grids.get(name) for name in inputs}) == 1:
            grids.update((node.output, grid) for grid in found if grid is not None)
        nodes.append(replace(node, inputs=tuple(inputs)))
    return replace(graph, nodes=tuple(nodes))


def _before_concat(graph: Graph, keep: frozenset[str]) -> Graph:
    """FakeQuantize of each input of a Concat in place of that of its output."""
    readers, producer = graph.consumers(), graph.producer()
    nodes: list[Node] = []
    for node in graph.nodes:
        concat = producer.get(node.inputs[0]) if isinstance(node.op, FakeQuantize) else None
        if (concat is None or not isinstance(concat.op, Concat) or len(readers[concat.output]) > 1
                or concat.output in {*graph.outputs, *keep}
                or not graph.constants.keys().isdisjoint(concat.inputs)):
            nodes.append(node)
            continue
        parts = [Node(node.op, (name,), f"{node.output}:{i}", f"{node.name}:{i}")
                 for i, name in enumerate(concat.inputs)]
        nodes += parts
        nodes.append(replace(concat, inputs=tuple(part.output for part in parts),
                             output=node.output))
    return replace(graph, nodes=tuple(nodes))


def _moves(op: Op) -> bool:
    foreign = isinstance(op, Pad) and op.mode == "constant" and op.value != 0
    return isinstance(op, MOVES) and not foreign


def _clips_as(op: Op, clip: Op) -> bool:
    """Whether `op` makes the same of a number as of the clipped one, rounded as kernels round."""
    if not isinstance(op, FakeQuantize) or not isinstance(clip, (Clip, Relu)):
        return False
    low, high = (clip.low, clip.high) if isinstance(clip, Clip) else (0.0, np.inf)
    least, most = np.rint(np.divide([low, high], op.scale, dtype=np.float32))
    return bool(least <= -op.zero_point and most >= 255 - op.zero_point)
