"""Graph -> Graph: the same network with less to do. One idea a file.

Values named in `keep` stay values that the network computes, whatever could be saved without them.
"""
from __future__ import annotations

from ..graph import Graph, Node
from . import (
    affine,
    attention,
    expand,
    fuse,
    heads,
    layout,
    norms,
    pad,
    parallel,
    prune,
    quantised,
    written_out,
)

__all__ = ["arrange", "combine", "norms", "optimise"]
NOTHING: frozenset[str] = frozenset()


def optimise(graph: Graph, keep: frozenset[str] = NOTHING) -> Graph:
    """All passes. The result is a fixed point: optimising it again changes nothing."""
    return combine(arrange(graph, keep), keep)


def arrange(graph: Graph, keep: frozenset[str] = NOTHING) -> Graph:
    """The same layers, on NHWC values with as few transposes as possible."""
    graph = prune.prune(heads.leave_apart(expand.leave_out(graph)), keep)
    return prune.prune(layout.arrange(graph, keep), keep)


def combine(graph: Graph, keep: frozenset[str] = NOTHING) -> Graph:
    """Fewer layers: what is quantised twice left out, what is written out joined, batch norms and
    biases folded, sums of convolutions joined; activations and residual adds fused."""
    graph = prune.prune(quantised.leave_out(graph, keep), keep)
    graph = pad.absorb(attention.join(written_out.join(graph)), keep)
    graph = prune.prune(graph, keep)        # what is left over would still be a reader
    before: tuple[Node, ...] = ()
    while graph.nodes != before:        # a sum that became one layer may have to be folded, too
        graph = affine.join(affine.fold(graph, keep), keep)
        before, graph = graph.nodes, parallel.join(graph, keep)
    return prune.prune(fuse.fuse(prune.prune(graph, keep), keep), keep)
