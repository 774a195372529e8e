"""Attention, float32: a tile of scores stays in the cache from its first product to the second.

A thread packs the keys and the values of one matrix (matmul.py), then goes over tiles of queries:
their scores are one product, become shares by softmax where they lie, and are multiplied by the
values.
"""
from __future__ import annotations

from .jit import kernel, njit
from .matmul import multiply, pack, place, take_rows, whole
from .parallel import parallel_for
from .sizes import LANES, TILE_ROWS
from .softmax import some_rows


@kernel
def attention(q, k, v, bias, y, matrices, sizes, steps, depth, keys, width, tiles, bands, zeros,
              scale, scratch, threads):
    """y = softmax(scale * q @ k.T + bias) @ v of each matrix.

    Flat arrays, bias maybe empty; steps [5, ..]: of q, k, v, bias and y along the leading axes,
    then from row to row and from column to column, which for y is 1; depth: columns of q and k;
    keys: rows of k and v; width: columns of v; matrices, sizes, tiles, zeros: as of matmul;
    scratch: of each thread room for both packed matrices and for TILE_ROWS rows of q and of scores.
    """
    parallel_for(attention_units, matrices * bands, threads, (
        q, k, v, bias, y, sizes, steps, depth, keys, width, tiles, bands, zeros, scale, scratch))


@njit()
def attention_units(thread, first_unit, end_unit, q, k, v, bias, y, sizes, steps, depth, keys,
                    width, tiles, bands, zeros, scale, scratch):
    of_keys, of_values = depth * whole(keys, LANES), keys * whole(width, LANES)
    length = of_keys + of_values + TILE_ROWS * (depth + keys)
    mine = scratch[thread * length:(thread + 1) * length]
    packed_keys, rest = mine[:of_keys], mine[of_keys:]
    packed_values, rest = rest[:of_values], rest[of_values:]
    queries, scores = rest[:TILE_ROWS * depth], rest[TILE_ROWS * depth:]
    packed_of = -1
    for unit in range(first_unit, end_unit):
        matrix, band = divmod(unit, bands)
        if matrix != packed_of:
            pack(k, place(matrix, sizes, steps[1]), steps[1, -1], steps[1, -2], depth, keys,
                 packed_keys)
            pack(v, place(matrix, sizes, steps[2]), steps[2, -2], steps[2, -1], keys, width,
                 packed_values)
            packed_of = matrix
        q_first, y_first = place(matrix, sizes, steps[0]), place(matrix, sizes, steps[4])
        bias_first = place(matrix, sizes, steps[3])
        for t in range(band * len(tiles) // bands, (band + 1) * len(tiles) // bands):
            row, count = tiles[t]
            take_rows(q, q_first + row * steps[0, -2], steps[0, -2], steps[0, -1], count, depth,
                      scale, queries)
            multiply(count, queries, depth, packed_keys, keys, zeros, scores, 0, keys)
            if len(bias) > 0:
                for r in range(count):
                    add_bias(scores[r * keys:(r + 1) * keys], bias,
                             bias_first + (row + r) * steps[3, -2], steps[3, -1])
            some_rows(scores, scores, count, keys, keys)
            multiply(count, scores, keys, packed_values, width, zeros, y,
                     y_first + row * steps[4, -2], steps[4, -2])


@njit()
def add_bias(line, bias, first, step):
    if step == 1:
        source = bias[first:]
        for i in range(len(line)):
            line[i] += source[i]
    else:
        for i in range(len(line)):
            line[i] += bias[first + i * step]
