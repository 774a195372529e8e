"""Folds into a convolution or Linear layer what scales and shifts its channels.

A batch norm, a constant that is multiplied and one that is added are y * scale + shift, and

    (conv(x) + bias) * scale + shift = conv(x) * scale + (bias * scale + shift)

so that the scale goes into the weight and the rest into the bias. Worked out in float64 and rounded
once. The new node keeps the layer's name and gives the last one's value. TensorFlow's files have a
product and a sum where PyTorch's have a batch norm, and MatMul + Add where those have Gemm. Where
no layer stands before them they are joined to a batch norm, one kernel, which takes an activation.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from kernels.norm import in_float64
from kernels.ops import Add, BatchNorm, Conv2d, Linear, Mul, Op

from ..graph import Graph, Node
from .merge import Merger, merge


def fold(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with all that folded whose layer feeds nothing else; values in `keep` stay."""
    return merge(graph, keep, _batch_norm, _scale, _shift)


def join(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with the products and sums that are left as batch norms."""
    return merge(graph, keep, _norm)


def _batch_norm(state: Merger, node: Node) -> Node | None:
    layer = _layer(state, node.inputs[0]) if isinstance(node.op, BatchNorm) else None
    if layer is None or not all(name in state.constants for name in node.inputs[1:]):
        return None
    assert isinstance(node.op, BatchNorm)
    scale, shift = in_float64(node.op, [state.constants[name] for name in node.inputs[1:]])
    assert isinstance(layer.op, (Conv2d, Linear))
    folded = _scaled(state, layer, node.output, scale, shift)
    return replace(folded, op=replace(layer.op, activation=node.op.activation))


def _scale(state: Merger, node: Node) -> Node | None:
    value, scale = _constant(state, node, Mul)
    layer = _layer(state, value)
    return None if layer is None else _scaled(state, layer, node.output, scale, np.zeros(1))


def _shift(state: Merger, node: Node) -> Node | None:
    """The weight stays as it is."""
    value, shift = _constant(state, node, Add)
    layer = _layer(state, value)
    if layer is None:
        return None
    bias = state.constants[layer.inputs[2]] if len(layer.inputs) > 2 else np.zeros(1)
    return replace(layer, inputs=(*layer.inputs[:2], _channels(
        state, f"{node.output}:bias", bias + shift, len(state.constants[layer.inputs[1]]))))


def _norm(state: Merger, node: Node) -> Node | None:
    """x * scale + shift as a batch norm of mean 0 and variance 1."""
    value, shift = _constant(state, node, Add)
    product = state.layer(value, (Mul,))
    if product is None:
        return None
    x, scale = _constant(state, product, Mul)
    spec = state.specs.get(x)
    if spec is None or spec.shape[-1] is None:
        return None
    parameters = {"scale": scale, "bias": shift, "mean": np.zeros(1), "var": np.ones(1)}
    names = [_channels(state, f"{node.output}:{name}", array, spec.shape[-1])
             for name, array in parameters.items()]
    return replace(product, op=BatchNorm(0.0), inputs=(x, *names))


def _layer(state: Merger, value: str) -> Node | None:
    """The layer that gives it, without a residual, which its weight does not scale."""
    layer = state.layer(value)
    return layer if layer is not None and len(layer.inputs) <= 3 else None


def _constant(state: Merger, node: Node, kind: type[Op]) -> tuple[str, np.ndarray]:
    """The value that a node of this kind combines with a constant, and that in float64, one
    number for all channels or for each; "" where it is no such node."""
    for value, other in (node.inputs, node.inputs[::-1]) if isinstance(node.op, kind) else ():
        constant, spec = state.constants.get(other), state.specs[value]
        if constant is None or spec is None or constant.ndim > len(spec.shape):
            continue
        if constant.size == 1 or constant.shape[-1:] == spec.shape[-1:] == (constant.size,):
            return value, constant.reshape(-1).astype(np.float64)
    return "", np.zeros(0)


def _channels(state: Merger, name: str, array: np.ndarray, count: int) -> str:
    """The name of a new constant, float32, with a number for each channel."""
    state.constants[name] = np.broadcast_to(array, (count,)).astype(np.float32)
    return name


def _scaled(state: Merger, layer: Node, value: str, scale: np.ndarray, shift: np.ndarray) -> Node:
    """The layer that gives y * scale + shift in the place of y."""
    weight, bias = state.parameters(layer)
    return state.with_parameters(layer, value, (weight.T * scale).T, bias * scale + shift)
