"""Walks the layers in order and merges into a layer what follows it.

What may be merged, and how, is said by rules: see bias.py, batch_norm.py and fuse.py. One walk is
enough for a rule: when a node is visited, the layer before it has already taken in all that it can.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kernels.ops import Conv2d, Linear, Op, TensorSpec

from ..graph import Graph, Node

# The layer that does the node's work too, or None where the two can not be one.
Rule = Callable[["Merger", Node], "Node | None"]


class Merger:
    """The graph being rewritten, and what the rules ask about it."""

    def __init__(self, graph: Graph, keep: frozenset[str]) -> None:
        self.constants = dict(graph.constants)
        self.specs: dict[str, TensorSpec | None] = graph.infer()
        self.nodes = {node.output: node for node in graph.nodes}
        self.order = {node.output: i for i, node in enumerate(graph.nodes)}
        self.readers = {name: len(nodes) for name, nodes in graph.consumers().items()}
        self.needed = {*graph.outputs, *keep}

    def layer(self, value: str, kinds: tuple[type[Op], ...] = (Conv2d, Linear)) -> Node | None:
        """The layer of these kinds, without activation yet and with constant weights, that gives
        a value which only one node reads."""
        node = self.nodes.get(value)
        if (node is None or not isinstance(node.op, kinds) or getattr(node.op, "activation", None)
                or not all(name in self.constants for i, name in enumerate(node.inputs)
                           if i in node.op.packed)
                or self.readers.get(value) != 1 or value in self.needed):
            return None
        return node


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
