"""Folds into a convolution or Linear layer what scales and shifts its channels.

A batch norm, a constant that is multiplied and one that is added are y * scale + shift, and

    (conv(x) + bias) * scale + shift = conv(x) * scale + (bias * scale + shift)

so that the scale goes into the weight and the rest into the bias. Worked out in float64 and rounded
once. The new node keeps the layer's name and gives the last one's value. TensorFlow's files have a
product and a sum where PyTorch's have a batch norm, and MatMul + Add where those have Gemm. Two of
them without a layer before them are joined to a batch norm, one kernel, which takes an activation.
"""
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kernels.norm import in_float64
from kernels.ops import Add, BatchNorm, Conv2d, Linear, Mul

from ..graph import Graph, Node
from .merge import Merger, merge


def fold(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with all that folded whose layer feeds nothing else; values in `keep` stay."""
    return merge(graph, keep, _into_layer)


def join(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with those that follow each other as one batch norm."""
    return merge(graph, keep, _into_norm)


def _into_layer(state: Merger, node: Node) -> Node | None:
    """A residual is not scaled by the weight, so that a layer with one stays as it is."""
    found = _affine(state, node)
    layer = None if found is None else state.layer(found.x)
    if found is None or layer is None or len(layer.inputs) > 3:
        return None
    if isinstance(node.op, Add):        # the weight stays as it is
        bias = state.constants[layer.inputs[2]] if len(layer.inputs) > 2 else np.zeros(1)
        outputs = len(state.constants[layer.inputs[1]])
        name = _channels(state, f"{node.output}:bias", bias + found.shift, outputs)
        return replace(layer, inputs=(*layer.inputs[:2], name))
    assert isinstance(layer.op, (Conv2d, Linear))
    weight, bias = state.parameters(layer)
    folded = state.with_parameters(layer, node.output, (weight.T * found.scale).T,
                                   bias * found.scale + found.shift)
    return replace(folded, op=replace(layer.op, activation=getattr(node.op, "activation", None)))


def _into_norm(state: Merger, node: Node) -> Node | None:
    second = _affine(state, node)
    before = None if second is None else state.layer(second.x, (BatchNorm, Mul, Add))
    first = None if before is None else _affine(state, before)
    if first is None or second is None or before is None:
        return None
    spec = state.specs[first.x]
    if spec is None or spec.shape[-1] is None:
        return None
    parameters = {"scale": first.scale * second.scale,
                  "bias": first.shift * second.scale + second.shift,
                  "mean": np.zeros(1), "var": np.ones(1)}
    names = [_channels(state, f"{node.output}:{name}", array, spec.shape[-1])
             for name, array in parameters.items()]
    op = BatchNorm(0.0, getattr(node.op, "activation", None))
    return replace(before, op=op, inputs=(first.x, *names))


class Affine(NamedTuple):
    """x * scale + shift, float64, each one number for all channels or for each."""
    x: str
    scale: np.ndarray
    shift: np.ndarray


def _affine(state: Merger, node: Node) -> Affine | None:
    """What a node computes, if it is a batch norm, or a product or a sum with such a constant."""
    if isinstance(node.op, BatchNorm):
        x, *names = node.inputs
        if not all(name in state.constants for name in names):
            return None
        return Affine(x, *in_float64(node.op, [state.constants[name] for name in names]))
    for x, other in (node.inputs, node.inputs[::-1]) if isinstance(node.op, (Mul, Add)) else ():
        constant, spec = state.constants.get(other), state.specs[x]
        if constant is None or spec is None or constant.ndim > len(spec.shape):
            continue
        if constant.size == 1 or constant.shape[-1:] == spec.shape[-1:] == (constant.size,):
            numbers = constant.reshape(-1).astype(np.float64)
            return (Affine(x, numbers, np.zeros(1)) if isinstance(node.op, Mul) else
                    Affine(x, np.ones(1), numbers))
    return None


def _channels(state: Merger, name: str, array: np.ndarray, count: int) -> str:
    """The name of a new constant, float32, with a number for each channel."""
    state.constants[name] = np.broadcast_to(array, (count,)).astype(np.float32)
    return name
