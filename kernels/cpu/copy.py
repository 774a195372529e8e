"""Ops that only move data: concat, transpose, reshape."""
from __future__ import annotations

from .jit import kernel, njit
from .parallel import parallel_for
from .simd import at, copy_numbers

BLOCK = 32      # a 32 x 32 block of float32 is read and written while it lies in L1


@kernel
def copy_columns(x, width, y, y_width, first, threads):
    """y[:, first:first + width] = x, row by row; both flat."""
    parallel_for(copy_rows, len(x) // width, threads, (x, width, y, y_width, first))


@njit()
def copy_rows(thread, first_row, end_row, x, width, y, y_width, first):
    for row in range(first_row, end_row):
        copy_numbers(at(y, row * y_width + first), at(x, row * width), width)


@kernel
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


@kernel
def transpose_any(x, y, sizes, steps, threads):
    """Flat y of these sizes, whose axes step through flat x by `steps` elements."""
    parallel_for(transpose_range, len(y), threads, (x, y, sizes, steps))


@njit()
def transpose_range(thread, first, end, x, y, sizes, steps):
    for i in range(first, end):
        rest, source = i, 0
        for axis in range(len(sizes) - 1, -1, -1):
            source += rest % sizes[axis] * steps[axis]
            rest //= sizes[axis]
        y[i] = x[source]
