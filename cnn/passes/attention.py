"""Makes one op of what files write as several: attention, and a product with what scales it.

    scale * (a @ b), or a factor or both scaled     MatMul
    softmax(scale * q @ k.T + bias) @ v             Attention, maybe without bias

    a slice that only a product reads               the product's window

After layout.py, which says how the matrices of a product lie.
"""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import (
    Add,
    Attention,
    MatMul,
    Matrices,
    Mul,
    Reshape,
    Slice,
    Softmax,
    Window,
    normal_axis,
)

from ..graph import Graph, Node
from .written_out import Search


def join(graph: Graph) -> Graph:
    """The graph with one op in the place of each. prune.py drops what led to it."""
    if not any(isinstance(node.op, MatMul) for node in graph.nodes):
        return graph
    search = Products(graph)
    for node in graph.nodes:
        joined = search.scaled(node)
        search.nodes[node.output] = search.attention(joined) or joined
    return replace(graph, nodes=tuple(map(search.windowed, search.nodes.values())))


class Products(Search):
    """A search that also knows the values that only one node reads, and all shapes."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.specs = graph.infer()
        self.once = {value for value, nodes in graph.consumers().items()
                     if len(nodes) == 1 and nodes[0].inputs.count(value) == 1}
        self.once -= {*graph.outputs}

    def product(self, value: str) -> tuple[Node, MatMul] | None:
        """What gives a value that nobody else reads, and lies as it is meant."""
        node = self.nodes.get(value) if value in self.once else None
        if node is None or not isinstance(node.op, MatMul) or not _as_meant(node.op, -1):
            return None
        return node, node.op

    def scaled(self, node: Node) -> Node:
        """A product that takes in the numbers by which its matrices, or it, are multiplied."""
        if isinstance(node.op, MatMul):
            inputs, scale = list(node.inputs), node.op.scale
            for i in (0, 1):
                while (found := self.number(inputs[i], Mul)) is not None and (
                        self.specs[found[0]] == self.specs[inputs[i]]):
                    inputs[i], scale = found[0], scale * found[1]
            return replace(node, op=replace(node.op, scale=scale), inputs=tuple(inputs))
        found = self.number(node.output, Mul)
        product = None if found is None else self.product(found[0])
        if found is None or product is None:
            return node
        return Node(replace(product[1], scale=product[1].scale * found[1]), product[0].inputs,
                    node.output, product[0].name)

    def attention(self, node: Node) -> Node | None:
        """Of a product whose left matrices are softmaxes of others."""
        op = node.op
        if not isinstance(op, MatMul) or op.scale != 1 or not _as_meant(op, 0):
            return None
        weights, rank = self.op(node.inputs[0], Softmax), len(op.orders[0])
        if weights is None or node.inputs[0] not in self.once or (
                weights.op not in (Softmax(-1), Softmax(rank - 1))):
            return None
        value, bias = weights.inputs[0], list[str]()
        added = self.op(value, Add)
        if added is not None and value in self.once:
            for scores, other in (added.inputs, added.inputs[::-1]):
                if self.product(scores) and self.specs[scores] == self.specs[value]:
                    value, bias = scores, [other]
                    break
        found = self.product(value)
        if found is None or len(found[1].orders[0]) != rank:
            return None
        product, (q, k, _) = found[0], found[1].orders
        orders = (q, (*k[:-2], k[-1], k[-2]), *op.orders[1:])
        return replace(node, op=Attention(orders, scale=found[1].scale),
                       inputs=(*product.inputs, node.inputs[1], *bias))

    def windowed(self, node: Node) -> Node:
        """A product that reads what a slice would copy for it."""
        op, inputs = node.op, list(node.inputs)
        if not isinstance(op, Matrices) or op.windows:
            return node
        windows = [self.window(value) for value in inputs[:3]]
        for i, found in enumerate(windows):
            if found is not None:
                inputs[i] = found[0]
        if windows.count(None) == len(windows):
            return node
        return replace(node, inputs=tuple(inputs), op=replace(op, windows=tuple(
            None if found is None else found[1] for found in windows)))

    def window(self, value: str) -> tuple[str, Window] | None:
        """(x, window) of a value that is a slice of x, maybe without the axis that it has one
        element of."""
        whole, wanted = value, self.specs[value]
        while (reshape := self.op(whole, Reshape)) is not None:
            whole = reshape.inputs[0]
        part = self.op(whole, Slice)
        spec = None if part is None else self.specs[part.output]
        if part is None or spec is None or not isinstance(part.op, Slice) or part.op.step > 1:
            return None
        axis = normal_axis(part.op.axis, len(spec.shape))
        found = Window(axis, part.op.start, part.op.stop, whole != value)
        if wanted is None or wanted.shape != found.of(spec.shape, found.stop - found.start) or (
                found.gone and spec.shape[axis] != 1):
            return None
        return part.inputs[0], found


def _as_meant(op: MatMul, index: int) -> bool:
    """Whether an input, or with -1 the output, lies as it is meant."""
    return bool(op.orders) and op.orders[index] == tuple(range(len(op.orders[index])))
