"""Fuses into a convolution or Linear layer what follows it: bias, residual add, activation.

The value is then written once, finished, instead of being read and written again by each.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kernels.ops import Add, Conv2d, Linear, TensorSpec, Unary

from ..graph import Graph, Node

Rule = Callable[["Fusion", Node], "Node | None"]


class Fusion:
    """The graph being rewritten, and what the rules ask about it."""

    def __init__(self, graph: Graph, keep: frozenset[str]) -> None:
        self.constants = dict(graph.constants)
        self.specs: dict[str, TensorSpec | None] = graph.infer()
        self.nodes = {node.output: node for node in graph.nodes}
        self.order = {node.output: i for i, node in enumerate(graph.nodes)}
        self.readers = {name: len(nodes) for name, nodes in graph.consumers().items()}
        self.needed = {*graph.outputs, *keep}

    def layer(self, value: str) -> Node | None:
        """The convolution or Linear layer that gives a value which only one node reads."""
        node = self.nodes.get(value)
        if (node is None or not isinstance(node.op, (Conv2d, Linear)) or node.op.activation
                or self.readers.get(value) != 1 or value in self.needed):
            return None
        return node


def fuse(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with everything fused that can be; values in `keep` stay values."""
    state = Fusion(graph, keep)
    for node in graph.nodes:
        merged = _activation(state, node) or _bias(state, node) or _residual(state, node)
        if merged is not None:
            # The merged node runs where the later of the two stood: all its inputs exist there.
            del state.nodes[merged.output]
            state.nodes[node.output] = replace(merged, output=node.output)
    nodes = sorted(state.nodes.values(), key=lambda node: state.order[node.output])
    return replace(graph, nodes=tuple(nodes), constants=state.constants)


def _activation(state: Fusion, node: Node) -> Node | None:
    layer = state.layer(node.inputs[0]) if isinstance(node.op, Unary) else None
    if layer is None:
        return None
    assert isinstance(layer.op, (Conv2d, Linear))
    assert isinstance(node.op, Unary)
    return replace(layer, op=replace(layer.op, activation=node.op))


def _bias(state: Fusion, node: Node) -> Node | None:
    """Add of a constant with one number for each output."""
    if not isinstance(node.op, Add):
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        layer, spec = state.layer(value), state.specs[value]
        if layer is None or spec is None or len(layer.inputs) > 2 or other not in state.constants:
            continue
        bias = state.constants[other]
        if bias.size == spec.shape[-1] == bias.shape[-1] and bias.ndim <= len(spec.shape):
            name = f"{node.output}:bias"
            state.constants[name] = np.ascontiguousarray(bias.reshape(-1))
            return replace(layer, inputs=(*layer.inputs, name))
    return None


def _residual(state: Fusion, node: Node) -> Node | None:
    """Add of another value of the same shape; of two convolutions the later one takes it in."""
    if not isinstance(node.op, Add) or node.inputs[0] == node.inputs[1]:
        return None
    pairs = [(value, other) for value, other in (node.inputs, node.inputs[::-1])
             if state.layer(value) is not None and other not in state.constants
             and state.specs[value] is not None and state.specs[value] == state.specs[other]]
    for value, other in sorted(pairs, key=lambda pair: -state.order[pair[0]]):
        layer = state.layer(value)
        if layer is None or not isinstance(layer.op, Conv2d) or len(layer.inputs) > 3:
            continue
        if layer.op.groups > 1:     # depthwise kernels take no residual
            continue
        bias = layer.inputs[2] if len(layer.inputs) > 2 else f"{node.output}:bias"
        if bias not in state.constants:
            outputs = state.constants[layer.inputs[1]].shape[0]
            state.constants[bias] = np.zeros(outputs, np.float32)
        return replace(layer, inputs=(*layer.inputs[:2], bias, other))
    return None
