"""Graph -> Graph: the same network with less to do. One idea a file."""
from __future__ import annotations

from ..graph import Graph
from . import batch_norm, fuse, layout, prune

NOTHING: frozenset[str] = frozenset()


def optimise(graph: Graph) -> Graph:
    """All passes. The result is a fixed point: optimising it again changes nothing."""
    return combine(arrange(graph))


def arrange(graph: Graph) -> Graph:
    """The same layers, on NHWC values with as few transposes as possible."""
    return prune.prune(layout.arrange(prune.prune(graph)))


def combine(graph: Graph, keep: frozenset[str] = NOTHING) -> Graph:
    """Fewer layers: batch norms folded, activations and residual adds fused into convolutions.

    Values named in `keep` stay values that the network computes.
    """
    return prune.prune(fuse.fuse(batch_norm.fold(graph, keep), keep), keep)
