"""Makes one layer of a batch norm and the convolution that alone reads what it gives.

The other norms are folded into the convolution before them (affine.py). One that comes first can
not be where there is a ReLU between the two, as in DenseNet; but some devices' convolutions
normalise what they read.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kernels.ops import BatchNorm, Conv2d, NormConv2d, Unary

from ..graph import Graph, Node
from .merge import Merger, merge

# Whether a norm and a convolution with weights of this shape can be one kernel.
Takes = Callable[[BatchNorm, Conv2d, tuple[int, ...]], bool]


def join(graph: Graph, takes: Takes, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with all such pairs as one layer each; values in `keep` stay values."""
    def pair(state: Merger, node: Node) -> Node | None:
        if not isinstance(node.op, Conv2d) or len(node.inputs) > 3:     # with a residual
            return None
        norm = state.layer(node.inputs[0], (BatchNorm,), (Unary,))
        weight = state.constants.get(node.inputs[1])
        if norm is None or weight is None:
            return None
        assert isinstance(norm.op, BatchNorm)
        if not takes(norm.op, node.op, weight.shape):
            return None
        return replace(norm, op=NormConv2d(norm.op, node.op), name=node.name,
                       inputs=(*norm.inputs, *node.inputs[1:]))

    return merge(graph, keep, pair)
