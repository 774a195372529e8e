"""Takes a Pad into the convolution or pooling that follows it: TensorFlow's networks have many.

Before fuse.py and batch_norm.py, which see a layer's shape as it stays.
"""
from __future__ import annotations

import math
from dataclasses import replace

from kernels.ops import AvgPool2d, Conv2d, MaxPool2d, Op, Pad, Padding

from ..graph import Graph, Node


def absorb(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with every such Pad taken in; values in `keep` stay values. prune.py drops it."""
    producer = graph.producer()

    def padded(node: Node) -> Node:
        before = producer.get(node.inputs[0]) if node.inputs else None
        if before is None or before.output in keep or not isinstance(before.op, Pad):
            return node
        op = with_padding(node.op, before.op)
        return node if op is None else replace(
            node, op=op, inputs=(before.inputs[0], *node.inputs[1:]))

    return replace(graph, nodes=tuple(map(padded, graph.nodes)))


def with_padding(op: Op, pad: Pad) -> Op | None:
    """The op that pads by itself; None where it does not pad with this value or along these
    axes."""
    if pad.mode != "constant" or len(pad.before) != 4 or any(
            (pad.before[i], pad.after[i]) != (0, 0) for i in (0, 3)):
        return None
    sides = (pad.before[1], pad.before[2], pad.after[1], pad.after[2])
    if isinstance(op, Conv2d) and pad.value == 0:
        return replace(op, padding=added(op.padding, sides))
    if isinstance(op, MaxPool2d) and pad.value == -math.inf and fits(op, sides):
        return replace(op, padding=added(op.padding, sides))
    if (isinstance(op, AvgPool2d) and pad.value == 0 and fits(op, sides)
            and (op.count_include_pad or op.padding == (0, 0, 0, 0))):
        return replace(op, padding=added(op.padding, sides), count_include_pad=True)
    return None


def added(padding: Padding, sides: Padding) -> Padding:
    top, left, bottom, right = (p + side for p, side in zip(padding, sides, strict=True))
    return top, left, bottom, right


def fits(op: MaxPool2d | AvgPool2d, sides: Padding) -> bool:
    """Whether no window lies in the padding alone, and where windows end does not depend on what
    is padding."""
    reach = [(k - 1) * d for k, d in zip(op.kernel_size, op.dilation, strict=True)] * 2
    return not op.ceil_mode and all(
        side <= most for side, most in zip(added(op.padding, sides), reach, strict=True))
