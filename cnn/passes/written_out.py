"""Makes one op of an activation that a file writes as several, so that it can be fused.

    x * sigmoid(x)                              Silu
    min(max(x + 3, 0), 6) / 6                   HardSigmoid
    x * hard_sigmoid(x), with PyTorch's slope   HardSwish
    x * (1 + erf(x / sqrt(2))) / 2              Gelu, the half being a factor of any of these
    scale * relu(x) ** 2 + bias                 StarRelu

Before fuse.py, which takes an activation into the layer before it. Constants may differ by what
exporters round away.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from kernels.ops import (
    Add,
    Clip,
    Erf,
    Gelu,
    HardSigmoid,
    HardSwish,
    Mul,
    Op,
    Relu,
    Sigmoid,
    Silu,
    StarRelu,
)

from ..graph import Graph, Node

NEAR = 1e-6         # relative: what float32 rounds


def join(graph: Graph) -> Graph:
    """The graph with one op in the place of each. prune.py drops what led to it."""
    search = Search(graph)
    for node in graph.nodes:
        found = next((joined for rule in (silu, hard_sigmoid, hard_swish, gelu, star_relu)
                      if (joined := rule(search, node))), None)
        if found is not None:
            search.nodes[node.output] = replace(node, op=found[0], inputs=(found[1],))
    return replace(graph, nodes=tuple(search.nodes.values()))


class Search:
    """The nodes so far, and what is asked about them."""

    def __init__(self, graph: Graph) -> None:
        self.nodes, self.constants = graph.producer(), graph.constants

    def op(self, value: str, kind: type[Op]) -> Node | None:
        """The node that gives a value, if it is of this kind."""
        node = self.nodes.get(value)
        return node if node is not None and isinstance(node.op, kind) else None

    def pairs(self, node: Node, kind: type[Op]) -> Iterator[tuple[str, Node]]:
        """Each (input, node of that kind that gives the other input)."""
        for value, other in (node.inputs, node.inputs[::-1]):
            if (gate := self.op(other, kind)) is not None:
                yield value, gate

    def number(self, value: str, kind: type[Op]) -> tuple[str, float] | None:
        """(x, number) of a value that is x + number, or x * number."""
        node = self.op(value, kind)
        if node is not None:
            for x, other in (node.inputs, node.inputs[::-1]):
                array = self.constants.get(other)
                if array is not None and array.size == 1:
                    return x, float(array.reshape(()))
        return None

    def without(self, value: str, kind: type[Op], number: float) -> str | None:
        """x of a value that is x + number, or x * number."""
        found = self.number(value, kind)
        if found is not None and math.isclose(found[1], number, rel_tol=NEAR):
            return found[0]
        return None


# A rule gives the op that the node is, and the value that it is applied to.
Rule = Callable[[Search, Node], "tuple[Op, str] | None"]


def silu(search: Search, node: Node) -> tuple[Op, str] | None:
    if isinstance(node.op, Mul):
        for x, gate in search.pairs(node, Sigmoid):
            if gate.inputs == (x,):
                return Silu(), x
    return None


def hard_sigmoid(search: Search, node: Node) -> tuple[Op, str] | None:
    bounded = search.without(node.output, Mul, 1 / 6)
    clip = None if bounded is None else search.op(bounded, Clip)
    if clip is None or clip.op != Clip(0.0, 6.0):
        return None
    x = search.without(clip.inputs[0], Add, 3)
    return None if x is None else (HardSigmoid(), x)


def hard_swish(search: Search, node: Node) -> tuple[Op, str] | None:
    if isinstance(node.op, Mul):
        for x, gate in search.pairs(node, HardSigmoid):
            assert isinstance(gate.op, HardSigmoid)
            near = math.isclose(gate.op.alpha, 1 / 6, rel_tol=NEAR) and gate.op.beta == 0.5
            if gate.inputs == (x,) and near:
                return HardSwish(), x
    return None


def gelu(search: Search, node: Node) -> tuple[Op, str] | None:
    whole = search.without(node.output, Mul, 0.5)
    product = search.op(node.output if whole is None else whole, Mul)
    if product is None:
        return None
    for value, gate in (product.inputs, product.inputs[::-1]):
        factors = [(value, gate)] if whole is not None else [
            (search.without(value, Mul, 0.5), gate), (value, search.without(gate, Mul, 0.5))]
        for x, plus in factors:
            if x is not None and plus is not None and x == input_of_gate(search, plus):
                return Gelu(), x
    return None


def input_of_gate(search: Search, value: str) -> str | None:
    """x of a value that is 1 + erf(x / sqrt(2))."""
    erf_value = search.without(value, Add, 1)
    erf = None if erf_value is None else search.op(erf_value, Erf)
    return None if erf is None else search.without(erf.inputs[0], Mul, math.sqrt(0.5))


def star_relu(search: Search, node: Node) -> tuple[Op, str] | None:
    shifted = search.number(node.output, Add)
    scaled = shifted and search.number(shifted[0], Mul)
    square = scaled and search.op(scaled[0], Mul)
    if not shifted or not scaled or not square or square.inputs[0] != square.inputs[1]:
        return None
    relu = search.op(square.inputs[0], Relu)
    return None if relu is None else (StarRelu(scaled[1], shifted[1]), relu.inputs[0])
