"""Drops what nobody needs: nodes, constants, and transposes that another one repeats."""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import Transpose

from ..graph import Graph, Node


def prune(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph without nodes and constants that neither an output nor `keep` depends on."""
    nodes = _merge_transposes(graph)
    needed = {*graph.outputs, *keep}
    kept: list[Node] = []
    for node in reversed(nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    constants = {name: array for name, array in graph.constants.items() if name in needed}
    return replace(graph, nodes=tuple(reversed(kept)), constants=constants)


def _merge_transposes(graph: Graph) -> list[Node]:
    """Nodes, with those that read a second equal transpose of a value reading the first."""
    first: dict[tuple[str, Transpose], str] = {}
    same: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(same.get(name, name) for name in node.inputs))
        if isinstance(node.op, Transpose):
            earlier = first.setdefault((node.inputs[0], node.op), node.output)
            if earlier != node.output:
                same[node.output] = earlier
        nodes.append(node)
    return nodes
