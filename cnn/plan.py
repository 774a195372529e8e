"""Where each value lives: one arena with offsets, planned from when values are born and last read.

Greedy by size: the largest value first, each at the lowest offset that is free during its whole
life (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020).
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels import ops
from kernels.memory import ALIGNMENT
from kernels.ops import TensorSpec, known, normal_axis

from .graph import Graph


class Part(NamedTuple):
    """Where a value lies: in the value `whole` of a Concat, from this index of its last axis on."""
    whole: str
    first: int


@dataclass(frozen=True)
class Plan:
    """Offsets in bytes, of each node's workspace and of every value but constants and `parts`."""
    offsets: dict[str, int]
    parts: dict[str, Part]
    workspaces: tuple[int, ...]
    size: int


@dataclass
class Block:
    """Bytes that are needed from step `born` to step `last`, both included."""
    size: int
    born: int
    last: int
    offset: int = -1

    def meets(self, other: Block) -> bool:
        """Whether some step needs both."""
        return self.born <= other.last and other.born <= self.last


def views(graph: Graph) -> dict[str, str]:
    """Value -> the value whose memory it shares: what Reshape and Flatten give costs nothing."""
    roots: dict[str, str] = {}
    for node in graph.nodes:
        if isinstance(node.op, (ops.Reshape, ops.Flatten)) and (
                node.inputs[0] not in graph.constants):
            roots[node.output] = roots.get(node.inputs[0], node.inputs[0])
    return roots


def parts(graph: Graph, specs: Mapping[str, TensorSpec], strided: frozenset[str],
          keep: frozenset[str], readers: frozenset[str] = frozenset()) -> dict[str, Part]:
    """Those values in `strided` that one Concat along their last axis reads, and else only, as
    their first input, the nodes whose outputs are `readers`. What such a Concat gives may itself be
    a part of another's: a dense block has one array.
    """
    reads = Counter(name for node in graph.nodes for i, name in enumerate(node.inputs)
                    if i > 0 or node.output not in readers)
    reads.update((*graph.outputs, *keep))
    found: dict[str, Part] = {}
    for node in graph.nodes:
        rank = len(specs[node.output].shape)
        if isinstance(node.op, ops.Concat) and normal_axis(node.op.axis, rank) == rank - 1:
            first = 0
            for name in node.inputs:
                if name in strided and reads[name] == 1:
                    found[name] = Part(node.output, first)
                first += known(specs[name].shape)[-1]
    for name, part in reversed(found.items()):      # a Concat stands behind those that it joins
        outer = found.get(part.whole)
        if outer is not None:
            found[name] = Part(outer.whole, outer.first + part.first)
    return found


def plan(graph: Graph, specs: Mapping[str, TensorSpec], workspaces: Sequence[int],
         keep: frozenset[str] = frozenset(), strided: frozenset[str] = frozenset(),
         readers: frozenset[str] = frozenset()) -> Plan:
    """Offsets for fully known `specs`.

    workspaces: bytes of scratch that each node needs while it runs. strided: values that can be
    written as a part of another; readers: what is made by nodes that can read such a part. Inputs
    are written before the first node; outputs and the values in `keep` stay until after the last.
    """
    shared, end = views(graph), len(graph.nodes)
    inside = parts(graph, specs, strided, keep, readers)
    roots = shared | {name: part.whole for name, part in inside.items()}
    blocks: dict[str, Block] = {}
    for step, name in [(-1, name) for name in graph.inputs] + [
            (step, node.output) for step, node in enumerate(graph.nodes)]:
        if name not in roots:
            spec = specs[name]
            blocks[name] = Block(ops.count(spec.shape) * np.dtype(spec.dtype).itemsize, step, step)
    uses = [(step, name) for step, node in enumerate(graph.nodes)
            for name in (*node.inputs, node.output)]
    for step, name in uses + [(end, name) for name in (*graph.outputs, *keep)]:
        root = roots.get(name, name)
        if root not in graph.constants:
            block = blocks[root]
            block.born, block.last = min(block.born, step), max(block.last, step)
    scratch = [Block(size, step, step) for step, size in enumerate(workspaces)]
    size = place([*blocks.values(), *scratch])
    offsets = {name: block.offset for name, block in blocks.items()}
    offsets.update((name, offsets[root]) for name, root in shared.items())
    return Plan(offsets, inside, tuple(block.offset for block in scratch), size)


def place(blocks: Sequence[Block]) -> int:
    """Set each block's offset, so that blocks that meet do not overlap; returns bytes in all."""
    placed: list[Block] = []
    for block in sorted(blocks, key=lambda b: -b.size):
        block.offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if block.meets(other):
                if block.offset + block.size <= other.offset:
                    break
                block.offset = max(block.offset, _aligned(other.offset + other.size))
        placed.append(block)
    return max((block.offset + block.size for block in placed), default=0)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
