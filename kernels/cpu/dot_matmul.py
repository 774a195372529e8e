"""Products of matrices that are both computed, in bfloat16 with float32 sums.

As in matmul.py the right matrix is brought into panels by the thread that multiplies by it, and
rows of the left one are copied, a tile at a time. Both are rounded thereby, where they are not
bfloat16 already, and made as deep as whole steps of the unit, with zeros.
"""
from __future__ import annotations

from .convert import wide
from .dot_conv import size
from .dot_simd import configure, multiply, narrow, pair_rows, release, scaled
from .dot_units import BLOCK, COLUMNS, STEP
from .dot_write import write_block
from .jit import kernel, njit
from .matmul import HIGHEST, LOWEST, place, whole
from .parallel import parallel_for
from .scalar import ONE, ZERO
from .simd import at, clear, transpose_tile
from .sizes import LANES


@kernel
def matmul(unit, a, b, y, matrices, sizes, steps, depth, columns, tiles, bands, places, zeros, taps,
           scale, halves, words, line, sums, spare, threads):
    """y = scale * a @ b of each matrix.

    a, b, y: flat, each float32 or bfloat16; matrices, sizes, steps, depth, columns, bands: as of
    matmul.py; tiles [.., 3]: first row, rows and number of their pattern; places [.., rows of the
    unit]: of each pattern where a tile's rows are in y, or -1; zeros: BLOCK of them; taps: where
    steps of the unit begin.

    Of each thread, and with whole steps as depth: halves [threads, depth * (whole columns + COLUMNS
    + rows of the unit)], which are bfloat16, and words, the same memory as float32; line [threads,
    depth or 2 * BLOCK]; sums [threads, 2 * rows of the unit * BLOCK]; spare [threads, BLOCK] of y's
    dtype.
    """
    parallel_for(matmul_units, matrices * bands, threads, (
        unit, a, b, y, sizes, steps, depth, columns, tiles, bands, places, zeros, taps, scale,
        halves, words, line, sums, spare))


@njit()
def matmul_units(thread, first_unit, end_unit, unit, a, b, y, sizes, steps, depth, columns, tiles,
                 bands, places, zeros, taps, scale, halves, words, line, sums, spare):
    configure(unit, STEP)
    deep = whole(depth, STEP)
    panels, turning = deep * whole(columns, COLUMNS), deep * COLUMNS
    mine, rows = halves[thread], halves[thread, panels + turning:]
    packed_of = -1
    for index in range(first_unit, end_unit):
        matrix, band = divmod(index, bands)
        if matrix != packed_of:
            pack(b, place(matrix, sizes, steps[1]), steps[1, -2], steps[1, -1], depth, columns,
                 mine, words[thread], 0, panels, line[thread])
            packed_of = matrix
        a_first, y_first = place(matrix, sizes, steps[0]), place(matrix, sizes, steps[2])
        for t in range(band * len(tiles) // bands, (band + 1) * len(tiles) // bands):
            row, count, pattern = tiles[t]
            take_rows(a, a_first + row * steps[0, -2], steps[0, -2], steps[0, -1], count, depth,
                      scale, rows, line[thread])
            products(unit, count, rows, deep, mine, columns, y, y_first + row * steps[2, -2],
                     places[pattern], zeros, taps, sums[thread], spare[thread])
    release(unit)


@njit()
def pack(b, first, row_step, column_step, depth, columns, halves, words, start, turning, line):
    """The matrix as panels [whole depth / 2, columns of a BLOCK, 2] from halves[start] on, the last
    as narrow as it can be; zeros where there is no row or column. turning: where there is room for
    COLUMNS columns."""
    deep = whole(depth, STEP)
    for c in range(0, columns, BLOCK):
        valid = min(BLOCK, columns - c)
        width, panel = whole(valid, COLUMNS), start + c * deep
        if row_step == 1 and column_step != 1:
            for some in range(0, width, COLUMNS):
                turn(b, first + (c + some) * column_step, column_step, depth, valid - some, halves,
                     words, turning)
                for k in range(0, deep // 2, LANES):
                    for i in range(0, COLUMNS, LANES):
                        transpose_tile(at(words, (turning + i * deep) // 2 + k), deep // 2,
                                       at(words, panel // 2 + k * width + some + i), width)
            continue
        for k in range(0, deep, 2):
            row = first + k * row_step + c * column_step
            of_first, of_second = valid * (k < depth), valid * (k + 1 < depth)
            target = at(halves, panel + k * width)
            if column_step == 1:
                pair_rows(target, at(b, row), at(b, row + row_step), of_first, of_second, width)
            else:
                gather(b, row, column_step, of_first, line)
                gather(b, row + row_step, column_step, of_second, line[BLOCK:])
                pair_rows(target, at(line, 0), at(line, BLOCK), of_first, of_second, width)


@njit()
def turn(b, first, column_step, depth, columns, halves, words, turning):
    """COLUMNS columns as rows of whole depth: those that are not there are zeros."""
    deep = whole(depth, STEP)
    for i in range(COLUMNS):
        target = at(halves, turning + i * deep)
        if i < columns:
            narrow(target, at(b, first + i * column_step), depth, deep, ONE, 0)
        else:
            clear(target, deep)


@njit()
def gather(x, first, step, count, line):
    for i in range(count):
        line[i] = wide(x[first + i * step])


@njit()
def take_rows(a, first, row_step, column_step, count, depth, scale, rows, line):
    """rows [count, whole depth] = scale * rows of a matrix."""
    deep = whole(depth, STEP)
    for r in range(count):
        row = first + r * row_step
        if column_step == 1:
            scaled(at(rows, r * deep), at(a, row), depth, deep, scale)
        else:
            gather(a, row, column_step, depth, line)
            scaled(at(rows, r * deep), at(line, 0), depth, deep, scale)


@njit()
def products(unit, count, rows, deep, packed, columns, y, y_first, places, zeros, taps, sums,
             spare):
    """y[y_first + places[r] + c] = rows [count, deep] @ the matrix that `pack` packed."""
    mine, other = at(sums, 0), at(sums, len(places) * BLOCK)
    done = (mine, at(zeros, 0), at(y, 0), 0, at(y, 0), at(places, 0), at(spare, 0), 0, 0, LOWEST,
            HIGHEST, 0, ONE, ZERO, ZERO)        # there is none yet
    tapped, together = (deep // STEP, 1) if unit.depth == STEP else (1, deep // unit.together)
    for c in range(0, columns, BLOCK):
        channels = min(BLOCK, columns - c)
        multiply(unit, size(unit, count, channels), 0, (
            at(rows, 0), deep, at(taps, 0), tapped, together, STEP, at(packed, c * deep), mine,
            *done))
        done = (mine, at(zeros, 0), at(y, 0), 0, at(y, y_first + c), at(places, 0), at(spare, 0),
                count, channels, LOWEST, HIGHEST, 0, ONE, ZERO, ZERO)
        mine, other = other, mine
    write_block(0, done)
