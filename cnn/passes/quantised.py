"""Leaves out what a file quantised to 8 bits does twice, or to no effect.

A clip before a FakeQuantize which clips as tightly, or with its relu would; a Relu after one; and a
FakeQuantize of numbers that are its own already, as files have them around each layer that only
moves or picks numbers. What a Concat puts together or a MaxPool picks is quantised before, by the
layers that give it. First of all, so that other passes see a layer beside what follows it.
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
        before, graph = graph.nodes, prune(_leave_out(_earlier(graph, keep), keep), keep)
    return graph


def _leave_out(graph: Graph, keep: frozenset[str]) -> Graph:
    """The graph where nobody reads these."""
    readers, producer = graph.consumers(), graph.producer()
    needed = {*graph.outputs, *keep}

    def unclipped(node: Node) -> Node:
        """A FakeQuantize that reads what a clip is given, where all that read this can do that."""
        clip = producer.get(node.inputs[0])
        if clip is None or clip.output in needed or None in [
                _with_clip(reader.op, clip.op) for reader in readers[clip.output]]:
            return node
        op = _with_clip(node.op, clip.op)
        assert op is not None
        return replace(node, op=op, inputs=tuple(same.get(name, name) for name in clip.inputs))

    def with_relu(node: Node) -> Node:
        """The FakeQuantize before a Relu, or before one that has it, with this, where nobody else
        reads that."""
        before = producer.get(node.inputs[0])
        if (before is None or not isinstance(before.op, FakeQuantize) or before.output in needed
                or len(readers[before.output]) > 1
                or node.op not in (Relu(), replace(before.op, relu=True))):
            return node
        inputs = tuple(same.get(name, name) for name in before.inputs)
        return replace(node, op=replace(before.op, relu=True), inputs=inputs)

    grids: dict[str, FakeQuantize] = {}     # of values that lie on one, what would not change them
    same: dict[str, str] = {}               # of each that is left out, the one that it equals
    nodes: list[Node] = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(same.get(name, name) for name in node.inputs))
        if isinstance(node.op, (Relu, FakeQuantize)):
            node = with_relu(node)
        if isinstance(node.op, FakeQuantize):
            node = unclipped(node)
            if node.op in _unchanged_by(grids.get(node.inputs[0])) and node.output not in needed:
                same[node.output] = node.inputs[0]
                continue
            assert isinstance(node.op, FakeQuantize)
            grids[node.output] = node.op
        elif _moves(node.op) and len(found := {grids.get(name) for name in node.inputs}) == 1:
            grids.update((node.output, grid) for grid in found if grid is not None)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _unchanged_by(grid: FakeQuantize | None) -> tuple[FakeQuantize, ...]:
    """What changes none of the numbers that a FakeQuantize gives."""
    return () if grid is None else (grid, replace(grid, relu=False))


def _earlier(graph: Graph, keep: frozenset[str]) -> Graph:
    """FakeQuantize of each input of a Concat or MaxPool in place of that of its output, also across
    the transposes that stand around a MaxPool."""
    readers, producer = graph.consumers(), graph.producer()
    nodes: list[Node] = []
    for node in graph.nodes:
        before = producer.get(node.inputs[0]) if isinstance(node.op, FakeQuantize) else None
        if (before is None or not isinstance(before.op, (Concat, MaxPool2d, Transpose))
                or len(readers[before.output]) > 1
                or before.output in {*graph.outputs, *keep}
                or not graph.constants.keys().isdisjoint(before.inputs)):
            nodes.append(node)
            continue
        parts = [Node(node.op, (name,), f"{node.output}:{i}", f"{node.name}:{i}")
                 for i, name in enumerate(before.inputs)]
        nodes += parts
        nodes.append(replace(before, inputs=tuple(part.output for part in parts),
                             output=node.output))
    return replace(graph, nodes=tuple(nodes))


def _moves(op: Op) -> bool:
    foreign = isinstance(op, Pad) and op.mode == "constant" and op.value != 0
    return isinstance(op, MOVES) and not foreign


def _with_clip(op: Op, clip: Op) -> FakeQuantize | None:
    """What makes of a number what `op` makes of the clipped one, rounded as kernels round; None
    where no FakeQuantize does."""
    if not isinstance(op, FakeQuantize) or not isinstance(clip, (Clip, Relu)):
        return None
    low, high = (clip.low, clip.high) if isinstance(clip, Clip) else (0.0, np.inf)
    least, most = np.rint(np.divide([low, high], op.scale, dtype=np.float32))
    if most < op.bounds[1]:
        return None
    if least <= op.bounds[0]:
        return op
    return replace(op, relu=True) if least == 0 else None
