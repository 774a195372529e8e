"""Where each value lives: one arena with offsets, planned from when values are born and last read.

Greedy: the largest value first, each at the lowest offset that is free during its whole life
(Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020). The largest
is the one of most bytes, or of most bytes times steps, whichever gives the smaller arena: in a
dense block, whose array outlives all that its layers compute, the second does.
"""
from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels import ops
from kernels.memory import ALIGNMENT
from kernels.ops import TensorSpec, known, normal_axis

from .graph import Graph, Node


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


def joins_channels(node: Node, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether it is a Concat along the last axis."""
    rank = len(specs[node.output].shape)
    return isinstance(node.op, ops.Concat) and normal_axis(node.op.axis, rank) == rank - 1


def parts(graph: Graph, specs: Mapping[str, TensorSpec], strided: Mapping[str, int],
          keep: frozenset[str], readers: Mapping[str, int]) -> dict[str, Part]:
    """Those values in `strided` that one Concat along their last axis reads, and else only, as
    their first input, the nodes whose outputs are in `readers`, and that lie in what it gives where
    all of these take them: see Step. What such a Concat gives may itself be a part of another's: a
    dense block has one array.
    """
    reads = Counter(name for node in graph.nodes for i, name in enumerate(node.inputs)
                    if i > 0 or node.output not in readers)
    reads.update((*graph.outputs, *keep))
    units = dict(strided)       # in channels
    for node in graph.nodes:
        if node.output in readers and node.inputs[0] in units:
            units[node.inputs[0]] = math.lcm(units[node.inputs[0]], readers[node.output])
    found: dict[str, Part] = {}
    for node in reversed(graph.nodes):      # a Concat stands behind those that it joins
        if joins_channels(node, specs):
            whole, first = found.get(node.output, Part(node.output, 0))
            channels = known(specs[whole].shape)[-1]
            for name in node.inputs:
                if (name in strided and reads[name] == 1
                        and first % units[name] == channels % units[name] == 0):
                    found[name] = Part(whole, first)
                first += known(specs[name].shape)[-1]
    return found


def plan(graph: Graph, specs: Mapping[str, TensorSpec], workspaces: Sequence[int],
         keep: frozenset[str] = frozenset(), strided: Mapping[str, int] | None = None,
         readers: Mapping[str, int] | None = None) -> Plan:
    """Offsets for fully known `specs`.

    workspaces: bytes of scratch that each node needs while it runs. strided: values that can be
    written as a part of another, readers: what is made by nodes that can read such a part, both
    with the number that Step has for it. Inputs are written before the first node; outputs and the
    values in `keep` stay until after the last.
    """
    shared, end = views(graph), len(graph.nodes)
    inside = parts(graph, specs, strided or {}, keep, readers or {})
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
    def by_size(block: Block) -> int:
        return -block.size

    def by_size_and_time(block: Block) -> int:
        return -block.size * (block.last - block.born + 1)

    # Most networks need no more than what is alive at once, already with the first.
    size = place_in_turn(blocks, by_size)
    if size > alive_at_once(blocks):
        offsets = [block.offset for block in blocks]
        other = place_in_turn(blocks, by_size_and_time)
        if other < size:
            return other
        for block, offset in zip(blocks, offsets, strict=True):
            block.offset = offset
    return size


def alive_at_once(blocks: Sequence[Block]) -> int:
    """Bytes that some step needs at once."""
    steps = range(min((b.born for b in blocks), default=0),
                  max((b.last for b in blocks), default=-1) + 1)
    return max((sum(b.size for b in blocks if b.born <= step <= b.last) for step in steps),
               default=0)


def place_in_turn(blocks: Sequence[Block], order: Callable[[Block], int]) -> int:
    """The same, with the blocks in this order."""
    placed: list[Block] = []            # by their offsets
    for block in sorted(blocks, key=order):
        block.offset = 0
        for other in placed:
            if block.meets(other):
                if block.offset + block.size <= other.offset:
                    break
                block.offset = max(block.offset, _aligned(other.offset + other.size))
        insort(placed, block, key=lambda b: b.offset)
    return max((block.offset + block.size for block in placed), default=0)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
