"""Products of matrices that are both computed, float32.

The micro-kernel of a convolution wants weights in panels; here the right matrix is brought into
panels first, by the thread that multiplies by it, and stays in its cache. Rows of the left matrix
are copied too, a tile at a time, wherever their elements lie.

A unit is one matrix and a band of its tiles of rows; host/matmul.py decides how many bands there
are, so that all threads have work.
"""
from __future__ import annotations

import numpy as np

from .jit import kernel, njit
from .microkernels import some_blocks
from .parallel import parallel_for
from .simd import at, clear, transpose_tile
from .sizes import BLOCK, BLOCK_VECTORS, LANES, TILE_ROWS

LOWEST, HIGHEST = np.float32(-np.inf), np.float32(np.inf)


@kernel
def matmul(a, b, y, matrices, sizes, steps, depth, columns, tiles, bands, zeros, scale, scratch,
           threads):
    """y = scale * a @ b of each matrix.

    a, b, y: flat; matrices: how many; sizes: of the leading axes; steps [3, ..]: of a, b and y
    along these, then from row to row and from column to column, which for y is 1; depth: columns
    of a; columns: of b; tiles [.., 2]: first row and rows; zeros: `columns` of them in whole
    vectors; scratch: of each thread depth * (columns in whole vectors + TILE_ROWS) floats.
    """
    parallel_for(matmul_units, matrices * bands, threads, (
        a, b, y, sizes, steps, depth, columns, tiles, bands, zeros, scale, scratch))


@njit()
def matmul_units(thread, first_unit, end_unit, a, b, y, sizes, steps, depth, columns, tiles, bands,
                 zeros, scale, scratch):
    panels = depth * whole(columns, LANES)
    length = panels + TILE_ROWS * depth
    packed = scratch[thread * length:thread * length + panels]
    rows = scratch[thread * length + panels:(thread + 1) * length]
    packed_of = -1
    for unit in range(first_unit, end_unit):
        matrix, band = divmod(unit, bands)
        if matrix != packed_of:
            pack(b, place(matrix, sizes, steps[1]), steps[1, -2], steps[1, -1], depth, columns,
                 packed)
            packed_of = matrix
        a_first, y_first = place(matrix, sizes, steps[0]), place(matrix, sizes, steps[2])
        for t in range(band * len(tiles) // bands, (band + 1) * len(tiles) // bands):
            row, count = tiles[t]
            take_rows(a, a_first + row * steps[0, -2], steps[0, -2], steps[0, -1], count, depth,
                      scale, rows)
            multiply(count, rows, depth, packed, columns, zeros, y, y_first + row * steps[2, -2],
                     steps[2, -2])


@njit(inline="always")
def whole(size, multiple):
    """The least multiple that is no less."""
    return -(-size // multiple) * multiple


@njit(inline="always")
def place(matrix, sizes, steps):
    """Where a matrix begins."""
    first = 0
    for axis in range(len(sizes) - 1, -1, -1):
        first += matrix % sizes[axis] * steps[axis]
        matrix //= sizes[axis]
    return first


@njit()
def pack(b, first, row_step, column_step, depth, columns, packed):
    """The matrix as panels [depth, BLOCK], the last as narrow as whole vectors can be; zeros where
    there is no column."""
    for start in range(0, columns, BLOCK):
        width = min(BLOCK, whole(columns - start, LANES))
        valid, target = min(width, columns - start), start * depth
        if column_step == 1:
            for k in range(depth):
                line = packed[target + k * width:target + (k + 1) * width]
                source = b[first + k * row_step + start:]
                for c in range(valid):
                    line[c] = source[c]
                clear(at(line, valid), width - valid)
        else:
            pack_columns(b, first + start * column_step, row_step, column_step, depth, valid, width,
                         packed[target:])


@njit()
def pack_columns(b, first, row_step, column_step, depth, valid, width, panel):
    """Of a matrix whose columns, not its rows, lie in one piece: a tile of LANES x LANES at a time
    is turned in registers."""
    whole = valid // LANES * LANES if row_step == 1 else 0
    turned = depth // LANES * LANES
    for c in range(0, whole, LANES):
        for k in range(0, turned, LANES):
            transpose_tile(at(b, first + c * column_step + k), column_step,
                           at(panel, k * width + c), width)
    for k in range(depth):
        for c in range(whole if k < turned else 0, valid):
            panel[k * width + c] = b[first + k * row_step + c * column_step]
        clear(at(panel, k * width + valid), width - valid)


@njit()
def take_rows(a, first, row_step, column_step, count, depth, scale, rows):
    """rows [count, depth] = scale * rows of a matrix."""
    for r in range(count):
        line = rows[r * depth:(r + 1) * depth]
        if column_step == 1:
            source = a[first + r * row_step:]
            for k in range(depth):
                line[k] = scale * source[k]
        else:
            for k in range(depth):
                line[k] = scale * a[first + r * row_step + k * column_step]


@njit()
def multiply(count, rows, depth, packed, columns, zeros, y, y_first, y_step):
    """y[r * y_step + c] = rows [count, depth] @ the matrix that `pack` packed."""
    full = columns // BLOCK
    done = full * BLOCK
    if full > 0:
        some_blocks(count, BLOCK_VECTORS, (
            at(rows, 0), depth, 1, 0, 1, 0, depth, full, at(packed, 0), at(packed, 0), 0,
            at(zeros, 0), at(zeros, 0), 0, at(y, y_first), y_step, LANES, LOWEST, HIGHEST))
    if done < columns:
        vectors = -(-(columns - done) // LANES)
        some_blocks(count, vectors, (
            at(rows, 0), depth, 1, 0, 1, 0, depth, 1, at(packed, done * depth), at(packed, 0), 0,
            at(zeros, 0), at(zeros, 0), 0, at(y, y_first + done), y_step,
            columns - done - (vectors - 1) * LANES, LOWEST, HIGHEST))
