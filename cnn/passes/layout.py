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
from typing import NamedTuple

import numpy as np

from kernels import ops
from kernels.ops import Op, Shape, TensorSpec

from ..graph import Graph, Node, infer_node

Permutation = tuple[int, ...]


class Permuted(NamedTuple):
    """A value that is `base` with axis permutation[i] as its axis i."""
    base: str
    permutation: Permutation


class Found(NamedTuple):
    """How a value can be had, the shape of its base, and its own."""
    waiting: Permuted
    moved: Shape
    shape: Shape


@dataclass(frozen=True)
class Reordered:
    """A value (N, features) whose column i is column columns[i] of `base`."""
    base: str
    columns: tuple[int, ...]
    source: str                 # the 4-D value and the op that give the literal value
    op: Op


def arrange(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The same network with as few transposes as this can reach, each node visited once. Outputs
    and the values in `keep` are there under their own names, in their literal order."""
    state, needed = Layout(graph), {*graph.outputs, *keep}
    for node in graph.nodes:
        state.visit(node)
        if node.output in needed:
            state.literal(node.output)
    return replace(graph, nodes=tuple(state.nodes), constants=state.constants)


class Layout:
    """The graph being rebuilt.

    specs    of the values that are there: inputs, constants, what `nodes` give so far
    pending  how a value of the old graph can be had from one that is there
    place    of the old graph's values, in the order in which they are computed
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = []
        self.constants = dict(graph.constants)
        self.specs: dict[str, TensorSpec | None] = dict(graph.inputs)
        self.specs.update((name, TensorSpec(array.shape, array.dtype.name))
                          for name, array in graph.constants.items())
        self.pending: dict[str, Permuted | Reordered] = {}
        self.old, self.readers = graph.producer(), graph.consumers()
        self.place = {node.output: i for i, node in enumerate(graph.nodes)}

    # ---- emitting -----------------------------------------------------------------------------

    def emit(self, op: Op, inputs: Sequence[str], output: str, name: str) -> str:
        node = Node(op, tuple(inputs), output, name)
        self.specs[output] = infer_node(node, [self.specs[value] for value in inputs])
        self.nodes.append(node)
        return output

    def shape(self, value: str) -> Shape | None:
        spec = self.specs.get(value)
        return None if spec is None else spec.shape

    def literal(self, value: str) -> str:
        """A value under its own name, in its literal order; emits the transpose it waits for."""
        if value in self.specs:
            return value
        waiting, old = self.pending[value], self.old[value]
        if isinstance(waiting, Reordered):
            return self.emit(waiting.op, [self.literal(waiting.source)], value, old.name)
        name = old.name if isinstance(old.op, ops.Transpose) else f"{old.name}:order"
        op = _reordering(self.shape(waiting.base), waiting.permutation)
        return self.emit(op, [waiting.base], value, name)

    def settled(self, value: str) -> str:
        """The value, or the one that it equals because its transposes have cancelled."""
        waiting = self.pending.get(value)
        if isinstance(waiting, Permuted) and _is_identity(waiting.permutation):
            return waiting.base
        return value

    def permuted(self, value: str) -> Found | None:
        """Of a value that waits for a transpose, where the shape of its base is known."""
        waiting = self.pending.get(value)
        moved = self.shape(waiting.base) if isinstance(waiting, Permuted) else None
        if not isinstance(waiting, Permuted) or moved is None:
            return None
        return Found(waiting, moved, tuple(moved[i] for i in waiting.permutation))

    # ---- rules --------------------------------------------------------------------------------

    def visit(self, node: Node) -> None:
        """Emit the node, in some order of axes."""
        node = replace(node, inputs=tuple(map(self.settled, node.inputs)))
        done = False
        if isinstance(node.op, ops.Transpose):
            done = self.transpose(node, node.op)
        elif isinstance(node.op, ops.Unary):
            done = self.unary(node)
        elif isinstance(node.op, (ops.Binary, ops.Concat, ops.Softmax, ops.Slice, ops.Pad)):
            done = self.any_order(node)
        elif isinstance(node.op, (ops.Flatten, ops.Reshape)):
            done = self.norm(node) or self.flatten(node) or self.regroup(node)
        elif isinstance(node.op, ops.Linear):
            done = self.linear(node)
        elif isinstance(node.op, ops.Matrices):
            done = self.matrices(node, node.op)
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
        base = self.emit(node.op, [waiting.base], f"{node.output}:moved", node.name)
        if isinstance(waiting, Permuted):
            self.pending[node.output] = waiting._replace(base=base)
        else:
            self.pending[node.output] = replace(waiting, base=base, source=node.inputs[0],
                                                op=node.op)
        return True

    def any_order(self, node: Node) -> bool:
        """Ops that work in any order of axes, where all inputs can have the same one: that of the
        input computed last, for what else waits in another order is turned once, not twice."""
        orders = {value: waiting.permutation for value in node.inputs
                  if isinstance(waiting := self.pending.get(value), Permuted)}
        if not orders or len(set(map(len, orders.values()))) > 1:
            return False
        order = orders[max(orders, key=lambda value: self.place[value])]
        inputs = [moved for value in node.inputs if (moved := self.moved(value, order))]
        if len(inputs) < len(node.inputs):
            return False
        op = node.op
        if isinstance(op, (ops.Concat, ops.Softmax, ops.Slice)):
            op = replace(op, axis=order[ops.normal_axis(op.axis, len(order))])
        elif isinstance(op, ops.Pad):
            back = [order.index(axis) for axis in range(len(order))]
            op = replace(op, before=tuple(op.before[i] for i in back),
                         after=tuple(op.after[i] for i in back))
        base = self.emit(op, inputs, f"{node.output}:moved", node.name)
        self.pending[node.output] = Permuted(base, order)
        return True

    def moved(self, value: str, order: Permutation) -> str | None:
        """What becomes `value` when its axes are permuted by `order`; None where making it would
        cost a transpose."""
        waiting, shape = self.pending.get(value), self.shape(value)
        if isinstance(waiting, Permuted):
            return waiting.base if waiting.permutation == order else self.turned(value, order)
        if shape is None or len(shape) > len(order):
            return None
        full = (1,) * (len(order) - len(shape)) + shape
        back = tuple(np.argsort(order).tolist())
        name = f"{value}:moved{''.join(map(str, order))}"
        if value in self.constants:
            array = self.constants[value].reshape(ops.known(full)).transpose(back)
            self.constants[name] = np.ascontiguousarray(array)
            self.specs[name] = TensorSpec(array.shape, array.dtype.name)
        elif not _keeps_order(full, back):
            return None
        elif name not in self.specs:        # such as the (N, C, 1, 1) gates of squeeze-excitation
            self.emit(_reshape(full, back), [value], name, f"{value}:order")
        return name

    def turned(self, value: str, order: Permutation) -> str:
        """The base of a value that waits in another order, from now on in this one."""
        waiting = self.pending[value]
        assert isinstance(waiting, Permuted)
        name = f"{value}:turned{''.join(map(str, order))}"
        op = _reordering(self.shape(waiting.base), tuple(
            waiting.permutation[order.index(axis)] for axis in range(len(order))))
        self.pending[value] = Permuted(self.emit(op, [waiting.base], name, f"{value}:order"), order)
        return name

    def flatten(self, node: Node) -> bool:
        """Flatten, or Reshape to the same, of a value that waits for a transpose."""
        found = self.permuted(node.inputs[0])
        if found is None:
            return False
        (base, order), moved, shape = found
        target = node.op.output_shape(shape)
        if _keeps_order(moved, order) and sum(size is None for size in target) <= 1:
            self.emit(_reshape(target), [base], node.output, node.name)
            return True
        features = None if None in shape[1:] else math.prod(ops.known(shape[1:]))
        if features is None or order[0] != 0 or target != (shape[0], features):
            return False
        flat = self.emit(ops.Flatten(1), [base], f"{node.output}:moved", node.name)
        back = np.arange(features).reshape(ops.known(moved[1:]))
        columns = tuple(back.transpose([i - 1 for i in order[1:]]).reshape(-1).tolist())
        self.pending[node.output] = Reordered(flat, columns, node.inputs[0], node.op)
        return True

    def regroup(self, node: Node) -> bool:
        """Reshape that splits axes, or joins neighbours, of a value that waits for a transpose, as
        the shuffle of channels does: each is split, or brought together and joined, where it
        lies."""
        found = self.permuted(node.inputs[0])
        groups = found and _groups(found.shape, node.op.output_shape(found.shape))
        if found is None or not groups:
            return False
        (base, order), moved, _ = found
        # The groups, each with the axes of base that it takes and the sizes that it gives, in the
        # order in which base has the first of them; one of size 1 moves at no cost.
        lie = sorted(range(len(groups)), key=lambda i: [
            order[a] for a in groups[i].old if moved[order[a]] != 1][:1])
        together = tuple(order[a] for i in lie for a in groups[i].old)
        if together != tuple(range(len(moved))):
            base = self.emit(_reordering(moved, together), [base], f"{node.output}:together",
                             f"{node.name}:order")
        target = tuple(size for i in lie for size in groups[i].sizes)
        base = self.emit(_reshape(target), [base], f"{node.output}:moved", node.name)
        starts, place = {}, 0
        for i in lie:
            starts[i], place = place, place + len(groups[i].sizes)
        self.pending[node.output] = Permuted(base, tuple(
            starts[i] + k for i, group in enumerate(groups) for k in range(len(group.sizes))))
        return True

    def norm(self, node: Node) -> bool:
        """Back to the shape that a value had before a norm of all elements of a sample, for which
        their order is no matter. prune.py drops the one in their literal order."""
        norm, shape = self.before_reshapes(node.inputs[0]), self.shape(node.inputs[0])
        if norm is None or shape is None or not isinstance(norm.op, ops.LayerNorm):
            return False
        target, (x, *constants) = node.op.output_shape(shape), norm.inputs
        while (found := self.permuted(x)) is None or found.shape != target:
            before = self.old.get(x)
            if before is None or not isinstance(before.op, (ops.Flatten, ops.Reshape)):
                return False
            x = before.inputs[0]
        if found.waiting.permutation[0] != 0 or None in target[1:] or any(
                array is None or np.unique(array).size > 1 or array.size != ops.count(target[1:])
                for array in map(self.constants.get, constants)):
            return False
        flat = self.emit(ops.Flatten(1), [found.waiting.base], f"{node.output}:flat", norm.name)
        normal = self.emit(norm.op, [flat, *constants], f"{node.output}:normal", norm.name)
        base = self.emit(_reshape(found.moved), [normal], f"{node.output}:moved", node.name)
        self.pending[node.output] = found.waiting._replace(base=base)
        return True

    def before_reshapes(self, value: str) -> Node | None:
        """The node that gave what is reshaped to a value."""
        while (node := self.old.get(value)) is not None and isinstance(
                node.op, (ops.Flatten, ops.Reshape)):
            value = node.inputs[0]
        return node

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

    def matrices(self, node: Node, op: ops.Matrices) -> bool:
        """Inputs are read as they lie, and the output is written as the next transpose wants it."""
        count = min(len(node.inputs), 3)        # all but the bias of an attention
        windows = op.windows or (None,) * count     # what they show lies as the literal value does
        found = [self.permuted(value) if window is None else None
                 for value, window in zip(node.inputs, windows, strict=False)]
        inputs = [self.literal(value) if at is None else at.waiting.base
                  for value, at in zip(node.inputs, found, strict=False)]
        shapes = [self.shape(value) for value in inputs]
        ranks = {None if shape is None else len(op.seen(i, shape))
                 for i, shape in enumerate(shapes)}
        rank = ranks.pop()
        if ranks or rank is None:
            return False
        orders = [op.order(i, rank) if at is None else
                  tuple(at.waiting.permutation[axis] for axis in op.order(i, rank))
                  for i, at in enumerate(found)]
        y, wanted = op.order(-1, rank), self.wanted(node, rank)
        turned = [order[-2] == rank - 1 for order in orders]
        places = tuple(range(rank))
        if isinstance(op, ops.MatMul) and (all(turned) or (
                any(turned) and wanted[y[-2]] == rank - 1)):
            # y.T = b.T @ a.T: nothing else turns what lies turned already.
            inputs, orders, y = inputs[::-1], [_turned(order) for order in orders[::-1]], _turned(y)
            if rank == 4:       # the heads of a pixel side by side, as channels
                places = (0, 2, 1, 3)
        if wanted[y[-1]] != rank - 1:
            wanted = dict(zip(y, places, strict=True))
        moved = replace(op, orders=(*orders, tuple(wanted[axis] for axis in y)))
        if moved == op and inputs == list(node.inputs[:count]):
            return False
        rest = [self.literal(value) for value in node.inputs[count:]]
        base = self.emit(moved, [*inputs, *rest], f"{node.output}:moved", node.name)
        self.pending[node.output] = Permuted(base, tuple(wanted[axis] for axis in range(rank)))
        return True

    def wanted(self, node: Node, rank: int) -> dict[int, int]:
        """Where the axes of an output go by the transpose that alone reads it, else as they are."""
        readers = self.readers.get(node.output, [])
        if len(readers) == 1 and isinstance(readers[0].op, ops.Transpose):
            return {axis: place for place, axis in enumerate(readers[0].op.permutation)}
        return {axis: axis for axis in range(rank)}


class Group(NamedTuple):
    """Neighbouring axes of a shape, and the sizes of those that they become."""
    old: tuple[int, ...]
    sizes: Shape


def _groups(shape: Shape, target: Shape) -> list[Group] | None:
    """The Reshape as groups of axes that are split, joined or kept, as small as can be; None where
    one both splits and joins, or an unknown size is not simply kept."""
    groups, i, j = [], 0, 0
    while i < len(shape) and j < len(target):
        # The longer of the two runs grows until both have as many elements.
        rows, columns = 1, 1
        while (shape[i:i + rows] != target[j:j + columns]
               and _elements(shape[i:i + rows]) != _elements(target[j:j + columns])):
            if None in (*shape[i:i + rows], *target[j:j + columns]) or max(
                    i + rows - len(shape), j + columns - len(target)) > 0:
                return None
            if _elements(shape[i:i + rows]) < _elements(target[j:j + columns]):
                rows += 1
            else:
                columns += 1
        while i + rows == len(shape) and target[j + columns:j + columns + 1] == (1,):
            columns += 1        # axes of size 1 at the end go with the last one
        while j + columns == len(target) and shape[i + rows:i + rows + 1] == (1,):
            rows += 1
        if min(rows, columns) > 1:
            return None
        groups.append(Group(tuple(range(i, i + rows)), target[j:j + columns]))
        i, j = i + rows, j + columns
    return groups if i == len(shape) and j == len(target) else None


def _elements(sizes: Shape) -> int:
    """Their number; of an unknown size none."""
    return 0 if None in sizes else ops.count(sizes)


def _turned(order: Permutation) -> Permutation:
    """Of transposed matrices."""
    return (*order[:-2], order[-1], order[-2])


def _reordering(shape: Shape | None, permutation: Permutation) -> Op:
    """The op that permutes axes: a Reshape, which costs nothing, where no element moves."""
    if _is_identity(permutation):
        return ops.Reshape((0,) * len(permutation))
    if shape is not None and _keeps_order(shape, permutation):
        return _reshape(shape, permutation)
    return ops.Transpose(permutation)


def _reshape(shape: Shape, permutation: Permutation | None = None) -> ops.Reshape:
    """To a shape, permuted so, of which one size at most is unknown."""
    target = shape if permutation is None else tuple(shape[i] for i in permutation)
    return ops.Reshape(tuple(-1 if size is None else size for size in target))


def _is_identity(permutation: Permutation) -> bool:
    return permutation == tuple(range(len(permutation)))


def _keeps_order(shape: Shape, permutation: Permutation) -> bool:
    """Whether the permutation only moves axes of size 1, so that no element changes place."""
    moved = [i for i in permutation if shape[i] != 1]
    return moved == sorted(moved) and sum(size is None for size in shape) <= 1
