"""Where the matrices of `ops.Matrices` lie in memory, for the kernels of both backends."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .axes import broadcast_steps, dense_steps, merge_axes
from .ops import Matrices, TensorSpec, known
from .step import Array


class Lie(NamedTuple):
    """Steps, in elements, of the matrices of one operand: along the leading axes, from row to row
    and from column to column."""
    leading: tuple[int, ...]
    row: int
    column: int

    def turned(self) -> Lie:
        """Of the transposed matrices."""
        return Lie(self.leading, self.column, self.row)


def nowhere(sizes: Sequence[int]) -> Lie:
    """Of a bias that is not there, for kernels that take one."""
    return Lie((0,) * len(sizes), 0, 0)


class Operands(NamedTuple):
    """sizes: of the leading axes, as few as there can be, one at least; shapes: of the matrices of
    the inputs, without a bias, and of the output; lies: of all inputs and the output; starts: the
    first element of each of the inputs, without a bias."""
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    lies: tuple[Lie, ...]
    starts: tuple[int, ...]


def operands(op: Matrices, inputs: Sequence[TensorSpec], output: TensorSpec) -> Operands:
    """Of a MatMul, or of an Attention with or without bias."""
    shapes = [known(spec.shape) for spec in inputs]
    matrices, bias = shapes[:3], shapes[3:]
    meant = [known(shape) for shape in op.meant(*matrices)]
    rank = len(meant[0])
    steps, starts = [], []
    for i, shape in enumerate(matrices):
        dense, window = dense_steps(shape), op.windows[i] if op.windows else None
        if window is not None:
            starts.append(window.start * dense[window.axis])
            dense = list(known(window.of(dense, dense[window.axis])))
        else:
            starts.append(0)
        dense = [0] * (rank - len(dense)) + dense
        steps.append([dense[axis] for axis in op.order(i, rank)])
    y_shape, y_order = known(output.shape), op.order(-1, rank)
    meant.append(tuple(y_shape[axis] for axis in y_order))
    steps.append([dense_steps(y_shape)[axis] for axis in y_order])
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
                          for first, step in zip(leading, steps, strict=True)), tuple(starts))


def from_starts(arrays: Sequence[Array], starts: Sequence[int]) -> list[Array]:
    """Flat, each from its start on; what has no start, whole."""
    flat = [array.reshape(-1) for array in arrays]
    return [*(array[start:] for array, start in zip(flat, starts, strict=False)),
            *flat[len(starts):]]
