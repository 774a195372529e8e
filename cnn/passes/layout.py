"""Moves transposes towards the outputs until they meet their inverse and cancel.

The importer wraps each image op in a transpose before and one after. Walking down the graph, a
transpose is not emitted but remembered: "this value is that one, with its axes permuted so". Ops
that work in any order of axes (elementwise, concat, softmax) then take the value as it lies and
hand the permutation on; the transpose in front of the next convolution undoes it, and nothing is
left. Flatten + Linear takes it in by permuting the weight's columns. What needs the literal order
after all gets a real transpose.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kernels import ops
from kernels.ops import Op, Shape, TensorSpec

from ..graph import Graph, Node, infer_node

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class Permuted:
    """A value that is `base` with axis permutation[i] as its axis i."""
    base: str
    permutation: Permutation


@dataclass(frozen=True)
class Reordered:
    """A value (N, features) whose column i is column columns[i] of `base`."""
    base: str
    columns: tuple[int, ...]
    source: str                 # the 4-D value and the op that give the literal value
    op: Op


def arrange(graph: Graph) -> Graph:
    """The same network with as few transposes as this can reach."""
    state = Layout(graph)
    for node in graph.nodes:
        state.visit(node)
    for name in graph.outputs:
        state.literal(name, as_output=True)
    return replace(graph, nodes=tuple(state.nodes), constants=state.constants)


class Layout:
    """The graph being rebuilt; `pending` says which values are not there in their literal order."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = []
        self.constants = dict(graph.constants)
        self.specs: dict[str, TensorSpec | None] = dict(graph.inputs)
        self.specs.update((name, TensorSpec(array.shape, array.dtype.name))
                          for name, array in graph.constants.items())
        self.pending: dict[str, Permuted | Reordered] = {}
        self.layer = {node.output: node.name for node in graph.nodes}
        self.transposes = {node.output for node in graph.nodes
                           if isinstance(node.op, ops.Transpose)}

    # ---- emitting -----------------------------------------------------------------------------

    def emit(self, op: Op, inputs: Sequence[str], output: str, name: str) -> None:
        node = Node(op, tuple(inputs), output, name)
        self.specs[output] = infer_node(node, [self.specs[value] for value in inputs])
        self.nodes.append(node)

    def shape(self, value: str) -> Shape | None:
        spec = self.specs.get(value)
        return None if spec is None else spec.shape

    def literal(self, value: str, as_output: bool = False) -> str:
        """A value in its literal order, emitting the transpose that it waits for."""
        waiting = self.pending.get(value)
        if waiting is None:
            return value
        if isinstance(waiting, Reordered):
            del self.pending[value]
            self.emit(waiting.op, [self.literal(waiting.source)], value, self.layer[value])
            return value
        base, permutation = waiting.base, waiting.permutation
        if _is_identity(permutation) and not as_output:
            return base
        del self.pending[value]
        moved = self.shape(base)
        if moved is not None and _keeps_order(moved, permutation):
            target = tuple(moved[i] for i in permutation)
            op: Op = ops.Reshape(tuple(-1 if size is None else size for size in target))
        else:
            op = ops.Transpose(permutation)
        suffix = "" if value in self.transposes else ":order"
        self.emit(op, [base], value, self.layer[value] + suffix)
        return value

    # ---- rules --------------------------------------------------------------------------------

    def visit(self, node: Node) -> None:
        """Emit the node, in some order of axes."""
        done = False
        if isinstance(node.op, ops.Transpose):
            done = self.transpose(node, node.op)
        elif isinstance(node.op, ops.Unary):
            done = self.unary(node)
        elif isinstance(node.op, (ops.Binary, ops.Concat, ops.Softmax)):
            done = self.any_order(node)
        elif isinstance(node.op, (ops.Flatten, ops.Reshape)):
            done = self.flatten(node)
        elif isinstance(node.op, ops.Linear):
            done = self.linear(node)
        if not done:
            inputs = [self.literal(value) for value in node.inputs]
            self.emit(node.op, inputs, node.output, node.name)

    def transpose(self, node: Node, op: ops.Transpose) -> bool:
        value = node.inputs[0]
        waiting = self.pending.get(value)
        if isinstance(waiting, Permuted):
            order = tuple(waiting.permutation[i] for i in op.permutation)
            self.pending[node.output] = Permuted(waiting.base, order)
        else:
            self.pending[node.output] = Permuted(self.literal(value), op.permutation)
        return True

    def unary(self, node: Node) -> bool:
        waiting = self.pending.get(node.inputs[0])
        if waiting is None:
            return False
        base = f"{node.output}:moved"
        self.emit(node.op, [waiting.base], base, node.name)
        if isinstance(waiting, Permuted):
            self.pending[node.output] = replace(waiting, base=base)
        else:
            self.pending[node.output] = replace(waiting, base=base, source=node.inputs[0],
                                                op=node.op)
        return True

    def any_order(self, node: Node) -> bool:
        """Ops that work in any order of axes, where all inputs wait for the same permutation."""
        waiting = [self.pending.get(value) for value in node.inputs]
        orders = {w.permutation for w in waiting if isinstance(w, Permuted)}
        if len(orders) != 1:
            return False
        (order,) = orders
        inputs = []
        for value, w in zip(node.inputs, waiting, strict=True):
            if isinstance(w, Permuted):
                inputs.append(w.base)
            elif value in self.constants and self.constants[value].ndim <= len(order):
                inputs.append(self._moved_constant(value, order))
            else:
                return False
        op = node.op
        if isinstance(op, (ops.Concat, ops.Softmax)):
            op = replace(op, axis=order[ops.normal_axis(op.axis, len(order))])
        base = f"{node.output}:moved"
        self.emit(op, inputs, base, node.name)
        self.pending[node.output] = Permuted(base, order)
        return True

    def _moved_constant(self, value: str, order: Permutation) -> str:
        """The constant that becomes `value` when its axes are permuted by `order`."""
        array = self.constants[value]
        full = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
        name = f"{value}:moved{''.join(map(str, order))}"
        self.constants[name] = np.ascontiguousarray(full.transpose(np.argsort(order)))
        self.specs[name] = TensorSpec(self.constants[name].shape, array.dtype.name)
        return name

    def flatten(self, node: Node) -> bool:
        """Flatten, or Reshape to the same, of a value that waits for a transpose."""
        waiting = self.pending.get(node.inputs[0])
        moved = self.shape(waiting.base) if isinstance(waiting, Permuted) else None
        if not isinstance(waiting, Permuted) or moved is None:
            return False
        order = waiting.permutation
        shape = tuple(moved[i] for i in order)
        target = node.op.output_shape(shape)
        if _keeps_order(moved, order) and sum(size is None for size in target) <= 1:
            op = ops.Reshape(tuple(-1 if size is None else size for size in target))
            self.emit(op, [waiting.base], node.output, node.name)
            return True
        features = None if None in shape[1:] else math.prod(ops.known(shape[1:]))
        if features is None or order[0] != 0 or target != (shape[0], features):
            return False
        base = f"{node.output}:moved"
        self.emit(ops.Flatten(1), [waiting.base], base, node.name)
        back = np.arange(features).reshape(ops.known(moved[1:]))
        columns = tuple(back.transpose([i - 1 for i in order[1:]]).reshape(-1).tolist())
        self.pending[node.output] = Reordered(base, columns, node.inputs[0], node.op)
        return True

    def linear(self, node: Node) -> bool:
        """y = x @ W.T with x's column i being base's column columns[i]: W's columns move there."""
        waiting = self.pending.get(node.inputs[0])
        if not isinstance(waiting, Reordered) or node.inputs[1] not in self.constants:
            return False
        weight = self.constants[node.inputs[1]]
        name = f"{node.output}:weight"
        moved = np.empty_like(weight)
        moved[:, waiting.columns] = weight
        self.constants[name], self.specs[name] = moved, TensorSpec(moved.shape)
        self.emit(node.op, [waiting.base, name, *node.inputs[2:]], node.output, node.name)
        return True


def _is_identity(permutation: Permutation) -> bool:
    return permutation == tuple(range(len(permutation)))


def _keeps_order(shape: Shape, permutation: Permutation) -> bool:
    """Whether the permutation only moves axes of size 1, so that no element changes place."""
    moved = [i for i in permutation if shape[i] != 1]
    return moved == sorted(moved) and sum(size is None for size in shape) <= 1
