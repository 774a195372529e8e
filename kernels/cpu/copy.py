"""Ops that only move data: concat, slice, pad, transpose, reshape."""
from __future__ import annotations

from .jit import kernel, njit
from .parallel import parallel_for
from .simd import at, copy_numbers, transpose_tile
from .sizes import CONSTANT, LANES, REFLECT

PIECE = 1 << 14     # numbers that one thread copies at once
BLOCK = 32          # rows of a matrix that a thread transposes at once: whole lines of the result


@kernel
def copy_columns(rows, width, x, x_width, x_first, y, y_width, y_first, threads):
    """y[:, y_first:y_first + width] = x[:, x_first:x_first + width], row by row; both flat."""
    pieces = -(-width // PIECE)
    parallel_for(copy_pieces, rows * pieces, threads, (
        pieces, width, x, x_width, x_first, y, y_width, y_first))


@njit()
def copy_pieces(thread, first_unit, end_unit, pieces, width, x, x_width, x_first, y, y_width,
                y_first):
    for unit in range(first_unit, end_unit):
        row, start = unit // pieces, unit % pieces * PIECE
        copy_numbers(at(y, row * y_width + y_first + start), at(x, row * x_width + x_first + start),
                     min(PIECE, width - start))


@kernel
def pad(x, x_sizes, before, y, y_sizes, mode, value, threads):
    """Flat y of axes y_sizes: x, of axes x_sizes, from `before` on, and around it `value`, or the
    elements of x that `mirrored` names."""
    parallel_for(pad_rows, len(y) // y_sizes[-1], threads, (
        x, x_sizes, before, y, y_sizes, mode, value))


@njit()
def pad_rows(thread, first_row, end_row, x, x_sizes, before, y, y_sizes, mode, value):
    last = len(y_sizes) - 1
    for row in range(first_row, end_row):
        rest, source, step, inside = row, 0, x_sizes[last], True
        for axis in range(last - 1, -1, -1):
            i = rest % y_sizes[axis] - before[axis]
            if mode != CONSTANT:
                i = mirrored(i, x_sizes[axis], mode)
            inside &= (i >= 0) & (i < x_sizes[axis])
            source += i * step
            step *= x_sizes[axis]
            rest //= y_sizes[axis]
        start = row * y_sizes[last]
        first, taken = start + before[last], x_sizes[last] if inside else 0
        copy_numbers(at(y, first), at(x, source), taken)
        end = start + y_sizes[last]
        if mode == CONSTANT:
            fill(y[start:first], value)
            fill(y[first + taken:end], value)
        else:
            for i in range(start - first, 0):
                y[first + i] = x[source + mirrored(i, taken, mode)]
            for i in range(taken, end - first):
                y[first + i] = x[source + mirrored(i, taken, mode)]


@njit()
def fill(y, value):
    for i in range(len(y)):
        y[i] = value


@njit(inline="always")
def mirrored(i, size, mode):
    """The element of 0 .. size that stands for element i: its mirror image, or the nearest."""
    if mode == REFLECT:
        return abs(i) if i < size else 2 * (size - 1) - i
    return max(0, min(i, size - 1))


@kernel
def transpose_matrices(x, y, threads):
    """y[b, j, i] = x[b, i, j], a tile of LANES x LANES at a time."""
    stripes = -(-x.shape[1] // BLOCK)
    parallel_for(transpose_stripes, len(x) * stripes, threads, (x, y, stripes))


@njit()
def transpose_stripes(thread, first_unit, end_unit, x, y, stripes):
    _, rows, columns = x.shape
    for unit in range(first_unit, end_unit):
        b, first_row = unit // stripes, unit % stripes * BLOCK
        end_row = min(first_row + BLOCK, rows)
        whole_rows = first_row + (end_row - first_row) // LANES * LANES
        whole_columns = columns // LANES * LANES
        for j in range(0, whole_columns, LANES):
            for i in range(first_row, whole_rows, LANES):
                transpose_tile(at(x, (b * rows + i) * columns + j), columns,
                               at(y, (b * columns + j) * rows + i), rows)
        one_by_one(x[b], y[b], first_row, whole_rows, whole_columns, columns)
        one_by_one(x[b], y[b], whole_rows, end_row, 0, columns)


@njit(inline="always")
def one_by_one(x, y, first_row, end_row, first_column, end_column):
    for i in range(first_row, end_row):
        line, out = x[i, first_column:end_column], y[first_column:end_column, i]
        for j in range(len(line)):
            out[j] = line[j]


@kernel
def gather(x, y, sizes, steps, threads):
    """Flat y of these sizes, whose axes step through flat x by `steps` elements, line by line."""
    parallel_for(gather_lines, len(y) // sizes[-1], threads, (x, y, sizes, steps))


@njit()
def gather_lines(thread, first, end, x, y, sizes, steps):
    length, step = sizes[-1], steps[-1]
    for line in range(first, end):
        rest, source, target = line, 0, line * length
        for axis in range(len(sizes) - 2, -1, -1):
            source += rest % sizes[axis] * steps[axis]
            rest //= sizes[axis]
        if step == 1:
            copy_numbers(at(y, target), at(x, source), length)
        else:
            for i in range(length):
                y[target + i] = x[source + i * step]
