"""Walks the layers in order and merges into a layer what follows it.

What may be merged, and how, is said by rules: see affine.py, parallel.py and fuse.py. One walk is
enough for a rule: when a node is visited, the layer before it has already taken in all that it can.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from types import NoneType

import numpy as np

from kernels.ops import Conv2d, Linear, Op, TensorSpec

from ..graph import Graph, Node

# The layer that does the node's work too, or None where the two can not be one.
Rule = Callable[["Merger", Node], "Node | None"]


class Merger:
    """The graph being rewritten, and what the rules ask about it."""

    def __init__(self, graph: Graph, keep: frozenset[str]) -> None:
        self.graph, self.constants = graph, dict(graph.constants)
        self.nodes = {node.output: node for node in graph.nodes}
        self.order = {node.output: i for i, node in enumerate(graph.nodes)}
        self.readers = {name: len(nodes) for name, nodes in graph.consumers().items()}
        self.needed = {*graph.outputs, *keep}

    @cached_property
    def specs(self) -> dict[str, TensorSpec | None]:
        """Of all values, as they were before anything was merged; few rules ask for them."""
        return self.graph.infer()

    def layer(self, value: str, kinds: tuple[type[Op], ...] = (Conv2d, Linear),
              activations: tuple[type[Op], ...] = ()) -> Node | None:
        """The layer of these kinds, without activation yet or with one of these, and with constant
        weights, that gives a value which only one node reads."""
        node = self.nodes.get(value)
        if (node is None or not isinstance(node.op, kinds)
                or not isinstance(getattr(node.op, "activation", None), (NoneType, *activations))
                or not all(name in self.constants for i, name in enumerate(node.inputs)
                           if i in node.op.packed)
                or self.readers.get(value) != 1 or value in self.needed):
            return None
        return node

    def parameters(self, layer: Node) -> tuple[np.ndarray, np.ndarray]:
        """float64 copies of a layer's weight and bias, zeros where it has none."""
        weight = self.constants[layer.inputs[1]].astype(np.float64)
        if len(layer.inputs) == 2:
            return weight, np.zeros(len(weight))
        return weight, self.constants[layer.inputs[2]].astype(np.float64)

    def with_parameters(self, layer: Node, value: str, weight: np.ndarray, bias: np.ndarray
                        ) -> Node:
        """The layer with these, rounded, instead of all its inputs but the first; they are named
        after the value that it is to give."""
        names = f"{value}:weight", f"{value}:bias"
        for name, array in zip(names, (weight, bias), strict=True):
            self.constants[name] = array.astype(np.float32)
        return replace(layer, inputs=(layer.inputs[0], *names))


def merge(graph: Graph, keep: frozenset[str], *rules: Rule) -> Graph:
    """The graph with the first rule applied that fits each node; values in `keep` stay values.

    A merged layer keeps its name and gives the value of the node that it took in.
    """
    state = Merger(graph, keep)
    for node in graph.nodes:
        merged = next((layer for rule in rules if (layer := rule(state, node))), None)
        if merged is not None:
            # It runs where the later of the two stood: all its inputs exist there.
            del state.nodes[merged.output]
            state.nodes[node.output] = replace(merged, output=node.output)
    nodes = sorted(state.nodes.values(), key=lambda node: state.order[node.output])
    return replace(graph, nodes=tuple(nodes), constants=state.constants)
