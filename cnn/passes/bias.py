"""Makes a constant that is added to a convolution or Linear layer without bias its bias.

Files write it so where they say MatMul + Add. Before batch_norm.py, which looks for such layers.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from kernels.ops import Add

from ..graph import Graph, Node
from .merge import Merger, merge


def absorb(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with every such constant taken in; values in `keep` stay values."""
    return merge(graph, keep, _bias)


def _bias(state: Merger, node: Node) -> Node | None:
    """The constant has one number for each output channel and adds no axis."""
    if not isinstance(node.op, Add):
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        layer, spec = state.layer(value), state.specs[value]
        if layer is None or spec is None or len(layer.inputs) > 2 or other not in state.constants:
            continue
        bias = state.constants[other]
        if bias.shape[-1:] == spec.shape[-1:] == (bias.size,) and bias.ndim <= len(spec.shape):
            name = f"{node.output}:bias"
            state.constants[name] = np.ascontiguousarray(bias.reshape(-1))
            return replace(layer, inputs=(*layer.inputs, name))
    return None
