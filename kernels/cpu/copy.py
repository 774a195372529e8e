"""Ops that only move data: concat, transpose, reshape."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ..axes import as_matrices
from ..ops import Concat, Flatten, Reshape, TensorSpec, Transpose, count, known, normal_axis
from ..step import Array, Options, Run, Step
from .jit import njit
from .parallel import parallel_for
from .simd import at, copy_floats

BLOCK = 32      # a 32 x 32 block of float32 is read and written while it lies in L1


@njit()
def copy_columns(x, y, first, threads):
    """y[:, first:first + width] = x for 2-D x and y, row by row."""
    parallel_for(copy_rows, len(x), threads, (x.reshape(-1), y.reshape(-1), first, x.shape[1],
                                              y.shape[1]))


@njit()
def copy_rows(thread, first_row, end_row, x, y, first, width, y_width):
    for row in range(first_row, end_row):
        copy_floats(at(y, row * y_width + first), at(x, row * width), width)


def prepare_concat(op: Concat, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    """Inputs that lie in the output already, where they belong, are not copied."""
    axis = normal_axis(op.axis, len(output.shape))
    rows = count(output.shape[:axis])
    *starts, width = accumulate((count(spec.shape[axis:]) for spec in inputs), initial=0)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        columns = y.reshape(rows, width)
        parts = [(array.reshape(rows, -1), start)
                 for array, start in zip(arrays, starts, strict=True)
                 if not np.may_share_memory(array, y)]

        def run() -> None:
            for part, first in parts:
                copy_columns(part, columns, first, options.threads)
        return run

    return Step("concat_f32", bind)


@njit()
def transpose_matrices(x, y, threads):
    """y[b, j, i] = x[b, i, j], a block at a time."""
    stripes = -(-x.shape[1] // BLOCK)
    parallel_for(transpose_stripes, len(x) * stripes, threads, (x, y, stripes))


@njit()
def transpose_stripes(thread, first_unit, end_unit, x, y, stripes):
    _, rows, columns = x.shape
    for unit in range(first_unit, end_unit):
        b, first_row = unit // stripes, unit % stripes * BLOCK
        for first_column in range(0, columns, BLOCK):
            for j in range(first_column, min(first_column + BLOCK, columns)):
                for i in range(first_row, min(first_row + BLOCK, rows)):
                    y[b, j, i] = x[b, i, j]


def prepare_transpose(op: Transpose, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: Options) -> Step:
    matrices = as_matrices(known(inputs[0].shape), op.permutation)
    if matrices is None:
        return Step("transpose_numpy", lambda arrays, y, workspace: lambda: np.copyto(
            y, arrays[0].transpose(op.permutation)))
    batch, rows, columns = matrices

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        source, target = arrays[0].reshape(matrices), y.reshape(batch, columns, rows)
        return lambda: transpose_matrices(source, target, options.threads)

    return Step("transpose_f32", bind)


def prepare_reshape(op: Reshape | Flatten, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    """The executor makes views of these; a copy is needed only where one is asked for alone."""
    return Step("copy_numpy", lambda arrays, y, workspace: lambda: np.copyto(
        y, arrays[0].reshape(y.shape)))
