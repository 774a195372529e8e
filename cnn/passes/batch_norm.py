"""Folds a batch norm into the convolution or Linear layer before it.

(conv(x) + b - mean) * s + bias = conv(x) * s + (b - mean) * s + bias with s = scale /
sqrt(var + epsilon), so that s goes into the weight and the rest into the bias. Worked out in
float64 and rounded once. The new node keeps the layer's name and gives the batch norm's value.
"""
from __future__ import annotations

from dataclasses import replace

from kernels.norm import in_float64
from kernels.ops import BatchNorm, Conv2d, Linear

from ..graph import Graph, Node
from .merge import Merger, merge


def fold(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with every batch norm folded whose convolution feeds nothing else."""
    return merge(graph, keep, _batch_norm)


def _batch_norm(state: Merger, node: Node) -> Node | None:
    layer = state.layer(node.inputs[0]) if isinstance(node.op, BatchNorm) else None
    if (layer is None or len(layer.inputs) > 3      # a residual is not scaled by the weight
            or not all(name in state.constants for name in node.inputs[1:])):
        return None
    assert isinstance(node.op, BatchNorm)
    assert isinstance(layer.op, (Conv2d, Linear))
    scale, shift = in_float64(node.op, [state.constants[name] for name in node.inputs[1:]])
    weight, bias = state.parameters(layer)
    folded = state.with_parameters(layer, node.output, (weight.T * scale).T, bias * scale + shift)
    return replace(folded, op=replace(layer.op, activation=node.op.activation))
