"""Fuses into a layer what follows it: an activation or a residual add; into an add or a layer norm
FakeQuantize.

The value is then written once, finished, instead of being read and written again by each.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from kernels.ops import (
    Add,
    AddFakeQuantize,
    BatchNorm,
    Conv2d,
    FakeQuantize,
    LayerNorm,
    Linear,
    Unary,
)

from ..graph import Graph, Node
from .merge import Merger, merge


def fuse(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with everything fused that can be; values in `keep` stay values."""
    return merge(graph, keep, _activation, _norm, _sum, _residual)


def _activation(state: Merger, node: Node) -> Node | None:
    """Of a layer; FakeQuantize also after one of few that it has already."""
    if not isinstance(node.op, Unary):
        return None
    last = node.op
    takes = FakeQuantize.FIRST if isinstance(last, FakeQuantize) and not last.relu else ()
    layer = state.layer(node.inputs[0], (Conv2d, Linear, BatchNorm), takes)
    if layer is None:
        return None
    assert isinstance(layer.op, (Conv2d, Linear, BatchNorm))
    if layer.op.activation is not None:
        assert isinstance(last, FakeQuantize)
        last = replace(last, first=layer.op.activation)
    return replace(layer, op=replace(layer.op, activation=last))


def _norm(state: Merger, node: Node) -> Node | None:
    """FakeQuantize of a layer norm."""
    if not isinstance(node.op, FakeQuantize) or node.op.relu:
        return None
    layer = state.layer(node.inputs[0], (LayerNorm,))
    if layer is None:
        return None
    assert isinstance(layer.op, LayerNorm)
    return replace(layer, op=replace(layer.op, activation=node.op))


def _sum(state: Merger, node: Node) -> Node | None:
    """FakeQuantize of an Add of two computed values of one shape."""
    if not isinstance(node.op, FakeQuantize):
        return None
    layer = state.layer(node.inputs[0], (Add,))
    if layer is None or any(name in state.constants for name in layer.inputs):
        return None
    specs = [state.specs[name] for name in layer.inputs]
    if None in specs or specs[0] != specs[1]:
        return None
    last = node.op
    return replace(layer, op=AddFakeQuantize(last.scale, last.zero_point, last.relu))


def _residual(state: Merger, node: Node) -> Node | None:
    """Add of another value of the same shape; of two layers the later one takes it in."""
    if not isinstance(node.op, Add) or node.inputs[0] == node.inputs[1]:
        return None
    for value, other in sorted((node.inputs, node.inputs[::-1]),
                               key=lambda pair: -state.order.get(pair[0], -1)):
        layer, spec = state.layer(value), state.specs[value]
        if (layer is None or len(layer.inputs) > 3
                or (isinstance(layer.op, Conv2d) and layer.op.groups > 1)   # depthwise take none
                or spec is None or spec != state.specs[other] or other in state.constants):
            continue
        inputs = layer.inputs
        if len(inputs) == 2:
            inputs = (*inputs, f"{node.output}:bias")
            state.constants[inputs[2]] = np.zeros(len(state.constants[inputs[1]]), np.float32)
        return replace(layer, inputs=(*inputs, other))
    return None
