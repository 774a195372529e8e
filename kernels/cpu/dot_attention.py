"""Attention in bfloat16: as in attention.py a tile of scores stays in the cache from its first
product to the second. Scores are float32, and shares, which are multiplied by the values, bfloat16.
"""
from __future__ import annotations

from .attention import add_bias
from .dot_matmul import pack, products, take_rows
from .dot_simd import configure, release
from .dot_units import COLUMNS, STEP
from .jit import kernel, njit
from .matmul import place, whole
from .parallel import parallel_for
from .softmax import some_rows


@kernel
def attention(unit, q, k, v, bias, y, matrices, sizes, steps, depth, keys, width, tiles, bands,
              places, lines, zeros, taps, scale, halves, words, line, scores, sums, spare, threads):
    """y = softmax(scale * q @ k.T + bias) @ v of each matrix.

    q, k, v, y: flat, each float32 or bfloat16; bias, matrices, sizes, steps, depth, keys, width,
    bands: as of attention.py; lines: where the rows of a tile are in scores; the rest as of
    dot_matmul.py, for both products: halves [threads, whole depth * (whole columns of keys + rows
    of the unit) + whole keys * (whole columns of width + rows of the unit) + COLUMNS * the deeper
    of the two]; scores [threads, rows of the unit * whole keys].
    """
    parallel_for(attention_units, matrices * bands, threads, (
        unit, q, k, v, bias, y, sizes, steps, depth, keys, width, tiles, bands, places, lines,
        zeros, taps, scale, halves, words, line, scores, sums, spare))


@njit()
def attention_units(thread, first_unit, end_unit, unit, q, k, v, bias, y, sizes, steps, depth, keys,
                    width, tiles, bands, places, lines, zeros, taps, scale, halves, words, line,
                    scores, sums, spare):
    configure(unit, STEP)
    deep, long = whole(depth, STEP), whole(keys, STEP)
    values = deep * whole(keys, COLUMNS)
    queries = values + long * whole(width, COLUMNS)
    shares = queries + deep * len(lines)
    turning = shares + long * len(lines)
    mine, of_words, of_scores = halves[thread], words[thread], scores[thread]
    packed_of = -1
    for index in range(first_unit, end_unit):
        matrix, band = divmod(index, bands)
        if matrix != packed_of:
            pack(k, place(matrix, sizes, steps[1]), steps[1, -1], steps[1, -2], depth, keys, mine,
                 of_words, 0, turning, line[thread])
            pack(v, place(matrix, sizes, steps[2]), steps[2, -2], steps[2, -1], keys, width, mine,
                 of_words, values, turning, line[thread])
            packed_of = matrix
        q_first, y_first = place(matrix, sizes, steps[0]), place(matrix, sizes, steps[4])
        bias_first = place(matrix, sizes, steps[3])
        for t in range(band * len(tiles) // bands, (band + 1) * len(tiles) // bands):
            row, count, pattern = tiles[t]
            take_rows(q, q_first + row * steps[0, -2], steps[0, -2], steps[0, -1], count, depth,
                      scale, mine[queries:], line[thread])
            products(unit, count, mine[queries:], deep, mine, keys, of_scores, 0, lines, zeros,
                     taps, sums[thread], of_scores)
            if len(bias) > 0:
                for r in range(count):
                    add_bias(of_scores[r * long:r * long + keys], bias,
                             bias_first + (row + r) * steps[3, -2], steps[3, -1])
            some_rows(of_scores, mine[shares:], count, long, keys)
            products(unit, count, mine[shares:], long, mine[values:], width, y,
                     y_first + row * steps[4, -2], places[pattern], zeros, taps, sums[thread],
                     spare[thread])
    release(unit)
