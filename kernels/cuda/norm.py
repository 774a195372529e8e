"""Batch norm that no convolution could take in: one multiply-add and an activation per
element, in place if asked.

Bound by memory. A thread takes one vector of channels through PIXELS neighbouring pixels, so that
scale and shift are loaded once for all of them. The grid is exact.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .index import DIVISOR, split, thread_index
from .ptx import cuda, float32, uint32, uint64

THREADS = 256
PIXELS = 4

# x, scale, shift (fp32, one per channel), y, count of threads, pixels, elements from a pixel of x
# and of y to the next, then the divisor by which a thread finds its place: vectors, then low, high
SIGNATURE = ("pointer",) * 4 + ("uint32",) * 4 + DIVISOR + ("float32",) * 2


def make(dtype: str, lanes: int, function: str) -> Callable:
    """y[.., c] = activation(x[.., c] * scale[c] + shift[c], low, high)"""
    size, total = vector.STORAGE[dtype].bytes, PIXELS * lanes
    load = vector.load(dtype, lanes, fill=0.0, shared_with_stores=True)
    load_constant, store = vector.load("float32", lanes), vector.store(dtype, lanes)
    activate = activation(function)

    def scale_shift(x, scale, shift, y, count, pixels, x_step, y_step, vectors, vectors_m,
                    vectors_s, low, high):
        thread = thread_index(THREADS)
        if thread >= count:
            return
        pixel, channel = split(thread, vectors, vectors_m, vectors_s)
        pixel, channel = uint32(pixel * uint32(PIXELS)), uint32(channel * uint32(lanes))
        value = cuda.local.array(total, float32)
        a, b = cuda.local.array(lanes, float32), cuda.local.array(lanes, float32)
        load_constant(a, 0, scale + uint64(channel) * uint64(4))
        load_constant(b, 0, shift + uint64(channel) * uint64(4))
        x_pitch, y_pitch = uint64(x_step) * uint64(size), uint64(y_step) * uint64(size)
        x += uint64(pixel) * x_pitch + uint64(channel) * uint64(size)
        y += uint64(pixel) * y_pitch + uint64(channel) * uint64(size)
        for p in range(PIXELS):
            load(value, p * lanes, x + uint64(p) * x_pitch, uint32(pixel + uint32(p)) < pixels)
        for p in range(PIXELS):
            for k in range(lanes):
                value[p * lanes + k] = activate(value[p * lanes + k] * a[k] + b[k], low, high)
            if uint32(pixel + uint32(p)) < pixels:
                store(y + uint64(p) * y_pitch, value, p * lanes)

    return scale_shift
