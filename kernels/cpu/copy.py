"""Ops that only move data: concat, slice, pad, transpose, reshape."""
from __future__ import annotations

from .jit import kernel, njit
from .parallel import parallel_for
from .simd import at, copy_numbers, transpose_tile
from .sizes import LANES

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
def pad(x, x_sizes, before, y, y_sizes, value, threads):
    """Flat y of axes y_sizes: `value`, and in it x, of axes x_sizes, from `before` on."""
    parallel_for(pad_rows, len(y) // y_sizes[-1], threads, (x, x_sizes, before, y, y_sizes, value))


@njit()
def pad_rows(thread, first_row, end_row, x, x_sizes, before, y, y_sizes, value):
    last = len(y_sizes) - 1
    for row in range(first_row, end_row):
        rest, source, step, inside = row, 0, x_sizes[last], True
        for axis in range(last - 1, -1, -1):
            i = rest % y_sizes[axis] - before[axis]
            inside &= (i >= 0) & (i < x_sizes[axis])
            source += i * step
            step *= x_sizes[axis]
            rest //= y_sizes[axis]
        start = row * y_sizes[last]
        first, taken = start + before[last], x_sizes[last] if inside else 0
        fill(y[start:first], value)
        copy_numbers(at(y, first), at(x, source), taken)
        fill(y[first + taken:start + y_sizes[last]], value)


@njit()
def fill(y, value):
    for i in range(len(y)):
        y[i] = value


@kernel
def pad_mirrored(x, x_sizes, before, y, y_sizes, reflect, threads):
    """Flat y of axes y_sizes: x, of axes x_sizes, from `before` on, and around it what `mirrored`
    names."""
    parallel_for(pad_mirrored_rows, len(y) // y_sizes[-1], threads, (
        x, x_sizes, before, y, y_sizes, reflect))


@njit()
def pad_mirrored_rows(thread, first_row, end_row, x, x_sizes, before, y, y_sizes, reflect):
    last = len(y_sizes) - 1
    size = x_sizes[last]
    for row in range(first_row, end_row):
        rest, source, step = row, 0, size
        for axis in range(last - 1, -1, -1):
            i = rest % y_sizes[axis] - before[axis]
            source += mirrored(i, x_sizes[axis], reflect) * step
            step *= x_sizes[axis]
            rest //= y_sizes[axis]
        start = row * y_sizes[last]
        first = start + before[last]
        copy_numbers(at(y, first), at(x, source), size)
        for i in range(start, first):
            y[i] = x[source + mirrored(i - first, size, reflect)]
        for i in range(first + size, start + y_sizes[last]):
            y[i] = x[source + mirrored(i - first, size, reflect)]


@njit(inline="always")
def mirrored(i, size, reflect):
    """The element of 0 .. size that stands for element i: its mirror image, or the nearest."""
    if reflect:
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
    """Flat y of these sizes, whose axes step through flat x by `steps` elements."""
    parallel_for(gather_range, len(y), threads, (x, y, sizes, steps))


@njit()
def gather_range(thread, first, end, x, y, sizes, steps):
    for i in range(first, end):
        rest, source = i, 0
        for axis in range(len(sizes) - 1, -1, -1):
            source += rest % sizes[axis] * steps[axis]
            rest //= sizes[axis]
        y[i] = x[source]
