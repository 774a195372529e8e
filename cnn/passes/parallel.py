"""Makes one convolution of several that are added up, as networks have them that were trained so.

A convolution of 3x3, one of 1x1 and a batch norm of the same image are one convolution of 3x3: the
smaller kernel is added to those taps of the larger one that see the same pixels, and a batch norm
is a convolution of 1x1 that keeps channels apart (Ding et al. 2021, arXiv:2101.03697). Worked out
in float64 and rounded once. After batch_norm.py: the norms that are left have no convolution.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

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
        layer, added = state.layer(value, (Conv2d,)), state.nodes.get(other)
        if (layer is not None and added is not None and len(layer.inputs) < 4
                and added.inputs[0] == layer.inputs[0]):
            joined = _joined(state, layer, added)
            if joined is not None:
                names = f"{node.output}:weight", f"{node.output}:bias"
                state.constants.update(zip(names, joined, strict=True))
                return replace(layer, inputs=(layer.inputs[0], *names))
    return None


def _joined(state: Merger, layer: Node, added: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight and bias of the layer that adds the other one, of the same input, to its sum; None
    where their windows or groups do not allow it, or somebody else needs the other one."""
    assert isinstance(layer.op, Conv2d)
    weight, bias = _parameters(state, layer)
    if isinstance(added.op, BatchNorm):
        found = _of_batch_norm(state, added, weight.shape, layer.op.groups)
        padding, stride = (0, 0, 0, 0), (1, 1)
    elif state.layer(added.output, (Conv2d,)) is added and len(added.inputs) < 4:
        assert isinstance(added.op, Conv2d)
        found, padding, stride = _parameters(state, added), added.op.padding, added.op.stride
        if (added.op.groups, added.op.dilation) != (layer.op.groups, layer.op.dilation):
            return None
    else:
        return None
    if found is None or stride != layer.op.stride or layer.op.dilation != (1, 1):
        return None
    place = layer.op.padding[0] - padding[0], layer.op.padding[1] - padding[1]
    if not _inside(place, found[0].shape[1:3], weight.shape[1:3]):
        return None
    rows, columns = (slice(first, first + size)
                     for first, size in zip(place, found[0].shape[1:3], strict=True))
    weight[:, rows, columns] += found[0]
    return weight.astype(np.float32), (bias + found[1]).astype(np.float32)


def _inside(place: Pair, small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(0 <= first <= most - size
               for first, size, most in zip(place, small, large, strict=True))


def _parameters(state: Merger, layer: Node) -> tuple[np.ndarray, np.ndarray]:
    """float64 copies of a convolution's weight and bias."""
    weight = state.constants[layer.inputs[1]].astype(np.float64)
    bias = (state.constants[layer.inputs[2]].astype(np.float64) if len(layer.inputs) > 2
            else np.zeros(len(weight)))
    return weight, bias


def _of_batch_norm(state: Merger, norm: Node, shape: tuple[int, ...], groups: int
                   ) -> tuple[np.ndarray, np.ndarray] | None:
    """A batch norm as a convolution of 1x1 in as many groups: output o reads channel o alone."""
    assert isinstance(norm.op, BatchNorm)
    out_channels, _, _, per_group = shape
    if (norm.op.activation is not None or out_channels != per_group * groups
            or state.readers.get(norm.output) != 1 or norm.output in state.needed
            or not all(name in state.constants for name in norm.inputs[1:])):
        return None
    scale, bias, mean, var = (state.constants[name].astype(np.float64) for name in norm.inputs[1:])
    scale = scale / np.sqrt(var + norm.op.epsilon)
    weight = np.zeros((out_channels, 1, 1, per_group))
    weight[np.arange(out_channels), 0, 0, np.arange(out_channels) % per_group] = scale
    return weight, bias - mean * scale
