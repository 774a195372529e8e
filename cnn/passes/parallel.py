"""Makes one convolution of several that are added up, as networks have them that were trained so.

A convolution of 3x3, one of 1x1 and a batch norm of the same image are one convolution of 3x3: the
smaller kernel is added to those taps of the larger one that see the same pixels, and a batch norm,
or the image itself, is a convolution of 1x1 that keeps channels apart (Ding et al. 2021,
arXiv:2101.03697). Worked out in float64 and rounded once. After affine.py: the norms that are left
have no convolution.
"""
from __future__ import annotations

import numpy as np

from kernels.norm import in_float64
from kernels.ops import Add, BatchNorm, Conv2d, Pair

from ..graph import Graph, Node
from .merge import Merger, merge


def join(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with all such sums as one convolution each; values in `keep` stay values."""
    return merge(graph, keep, _sum)


def _sum(state: Merger, node: Node) -> Node | None:
    if not isinstance(node.op, Add):
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        layer, added = state.layer(value, (Conv2d,)), state.layer(other, (Conv2d, BatchNorm))
        if (layer is None or len(layer.inputs) > 3 or state.specs[value] != state.specs[other]
                or layer.inputs[0] != (other if added is None else added.inputs[0])):
            continue
        joined = _joined(state, layer, added)
        if joined is not None:
            return state.with_parameters(layer, node.output, *joined)
    return None


def _joined(state: Merger, layer: Node, added: Node | None
            ) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight and bias of the layer that adds the other one, of the same input, or that input itself
    to its sum; None where their windows or groups do not allow it."""
    assert isinstance(layer.op, Conv2d)
    weight, bias = state.parameters(layer)
    op, found = layer.op, _as_convolution(state, added, layer.op, weight.shape)
    if found is None or op.dilation != (1, 1):
        return None
    small, its_bias, padding = found
    place = op.padding[0] - padding[0], op.padding[1] - padding[1]
    if not _inside(place, small.shape[1:3], weight.shape[1:3]):
        return None
    rows, columns = (slice(first, first + size)
                     for first, size in zip(place, small.shape[1:3], strict=True))
    weight[:, rows, columns] += small
    return weight, bias + its_bias


def _inside(place: Pair, small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(0 <= first <= most - size
               for first, size, most in zip(place, small, large, strict=True))


def _as_convolution(state: Merger, added: Node | None, op: Conv2d, shape: tuple[int, ...]
                    ) -> tuple[np.ndarray, np.ndarray, Pair] | None:
    """Weight, bias and padding (top, left) of what is added, as a convolution of op's stride and
    groups; None where it is none. shape: of op's weight."""
    if added is not None and isinstance(added.op, Conv2d):
        same = (added.op.stride, added.op.groups, added.op.dilation) == (
            op.stride, op.groups, op.dilation)
        if not same or len(added.inputs) > 3:
            return None
        return *state.parameters(added), added.op.padding[:2]
    # A batch norm is one of 1x1 whose output o reads channel o alone, and so is the input itself;
    # but a convolution without groups takes that as a residual.
    out_channels, _, _, per_group = shape
    if op.stride != (1, 1) or out_channels != per_group * op.groups or (
            added is None and op.groups == 1):
        return None
    scale, shift = np.ones(out_channels), np.zeros(out_channels)
    if added is not None:
        assert isinstance(added.op, BatchNorm)
        scale, shift = in_float64(added.op, [state.constants[name] for name in added.inputs[1:]])
    weight = np.zeros((out_channels, 1, 1, per_group))
    weight[np.arange(out_channels), 0, 0, np.arange(out_channels) % per_group] = scale
    return weight, shift, (0, 0)
