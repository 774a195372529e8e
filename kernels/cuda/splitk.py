"""Sums the partial results of a sum over k that was split among blocks: the end of split-K.

    y[pixel, o] = activation(sum over s of sums[s, pixel, o] + bias[o] + residual[pixel, o])

sums is float32 [splits, pixels, out_channels]. Bound by memory: a thread holds the channels of one
access, and the planes are added in order, so that a result does not depend on the schedule.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .index import DIVISOR, split, thread_index
from .ptx import cuda, float32, uint32, uint64

THREADS = 128

# sums, bias (fp32), residual, has_residual, y, low, high, count of threads, splits,
# bytes of a plane, elements from a pixel of y to the next, then the divisor: accesses of a pixel
SIGNATURE = (("pointer",) * 3 + ("uint32", "pointer") + ("float32",) * 2 + ("uint32",) * 2
             + ("uint64", "uint32") + DIVISOR)


def make(dtype: str, lanes: int, activation_name: str) -> Callable:
    size = vector.STORAGE[dtype].bytes
    load_sums = vector.load("float32", lanes)
    load, store = vector.load(dtype, lanes), vector.store(dtype, lanes)
    activate = activation(activation_name)

    def reduce_splits(sums, bias, residual, has_residual, y, low, high, count, splits, plane,
                      y_step, vectors, vectors_m, vectors_s):
        i = thread_index(THREADS)
        if i >= count:
            return
        pixel, column = split(i, vectors, vectors_m, vectors_s)
        total = cuda.local.array(lanes, float32)
        added = cuda.local.array(lanes, float32)
        sums += uint64(i) * uint64(lanes * 4)
        load_sums(total, 0, sums)
        for _ in range(uint32(splits - uint32(1))):
            sums += plane
            load_sums(added, 0, sums)
            for k in range(lanes):
                total[k] += added[k]
        load_sums(added, 0, bias + uint64(column) * uint64(lanes * 4))
        for k in range(lanes):
            total[k] += added[k]
        if has_residual:
            load(added, 0, residual + uint64(i) * uint64(lanes * size))
            for k in range(lanes):
                total[k] += added[k]
        for k in range(lanes):
            total[k] = activate(total[k], low, high)
        at = uint64(pixel) * uint64(y_step) + uint64(column) * uint64(lanes)
        store(y + at * uint64(size), total, 0)

    return reduce_splits
