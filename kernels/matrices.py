"""Where the matrices of `ops.Matrices` lie in memory, for the kernels of both backends."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .axes import broadcast_steps, dense_steps, merge_axes
from .ops import Matrices, Shape, TensorSpec, known


class Lie(NamedTuple):
    """Steps, in elements, of the matrices of one operand: along the leading axes, from row to row
    and from column to column."""
    leading: tuple[int, ...]
    row: int
    column: int

    def turned(self) -> Lie:
        """Of the transposed matrices."""
        return Lie(self.leading, self.column, self.row)


class Operands(NamedTuple):
    """sizes: of the leading axes, as few as there can be, one at least; shapes: of the matrices of
    the inputs, without a bias, and of the output; lies: of all inputs and the output."""
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    lies: tuple[Lie, ...]


def operands(op: Matrices, inputs: Sequence[TensorSpec], output: TensorSpec) -> Operands:
    """Of a MatMul, or of an Attention with or without bias."""
    shapes = [known(spec.shape) for spec in inputs]
    matrices, bias = shapes[:3], shapes[3:]
    meant = [known(shape) for shape in op.meant(*matrices)]
    rank = len(meant[0])
    full = [(1,) * (rank - len(shape)) + shape for shape in matrices]
    steps = [_steps(shape, op.order(i, rank)) for i, shape in enumerate(full)]
    y_order = op.order(-1, rank)
    meant.append(tuple(known(output.shape)[axis] for axis in y_order))
    steps.append(_steps(known(output.shape), y_order))
    for step, shape in zip(steps, meant, strict=True):
        step[:-2] = [0 if size == 1 else n for n, size in zip(step[:-2], shape[:-2], strict=True)]
    sizes = meant[-1][:-2]
    if bias:
        scores = (*sizes, meant[0][-2], meant[1][-2])
        steps.insert(-1, broadcast_steps(scores, bias[0]))
    merged, leading = merge_axes(sizes, *(step[:-2] for step in steps))
    if merged == [1]:
        leading = [[0]] * len(steps)
    return Operands(tuple(merged), tuple((shape[-2], shape[-1]) for shape in meant),
                    tuple(Lie(tuple(first), *step[-2:])
                          for first, step in zip(leading, steps, strict=True)))


def _steps(shape: Shape, order: Sequence[int]) -> list[int]:
    """Of the axes as they are meant, of a dense array of this shape."""
    dense = dense_steps(shape)
    return [dense[axis] for axis in order]
