"""FakeQuantize, also of sums, where what is read or written may be codes of 8 bits: see ops.Grid.

What is read, float32 or codes, is a number less a zero point, times a scale; 0 and 1 of float32. A
code less its own zero point is written times a scale, plus a zero point, to either.
"""
from __future__ import annotations

import numpy as np

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for
from .simd import widest_vectors

PIECE = 1 << 12     # numbers that one thread works on at once


@kernel
def quantize(x_scale, x_zero, scale, low, high, y_scale, y_zero, rows, width, x, y, y_step,
             threads):
    """The code of each number of flat x [rows, width] by scale, from low to high; rows of flat y
    are y_step apart."""
    pieces = -(-width // PIECE)
    parallel_for(quantize_pieces, rows * pieces, threads, (
        x_scale, x_zero, scale, low, high, y_scale, y_zero, pieces, width, x, y, y_step))


@njit(fastmath={"contract"})
def quantize_pieces(thread, first, end, x_scale, x_zero, scale, low, high, y_scale, y_zero, pieces,
                    width, x, y, y_step):
    widest_vectors()
    for unit in range(first, end):
        row, start = unit // pieces, unit % pieces * PIECE
        count = min(PIECE, width - start)
        part = x[row * width + start:row * width + start + count]
        target = y[row * y_step + start:row * y_step + start + count]
        for i in range(len(target)):
            real = (np.float32(part[i]) - x_zero) * x_scale
            target[i] = scalar.nearest_code(real / scale, low, high) * y_scale + y_zero


@kernel
def add(a_scale, b_scale, shift, low, high, y_scale, y_zero, a, b, y, threads):
    """The code, from low to high, of each sum a * a_scale + b * b_scale + shift, of scales that are
    those of a and b by that of the codes; all flat."""
    parallel_for(add_pieces, -(-len(y) // PIECE), threads, (
        a_scale, b_scale, shift, low, high, y_scale, y_zero, a, b, y))


@njit(fastmath={"contract"})
def add_pieces(thread, first, end, a_scale, b_scale, shift, low, high, y_scale, y_zero, a, b, y):
    widest_vectors()
    for start in range(first * PIECE, end * PIECE, PIECE):
        target = y[start:start + PIECE]
        left, right = a[start:start + PIECE], b[start:start + PIECE]
        for i in range(len(target)):
            total = np.float32(left[i]) * a_scale + (np.float32(right[i]) * b_scale + shift)
            target[i] = scalar.nearest_code(total, low, high) * y_scale + y_zero
