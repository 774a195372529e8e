"""Softmax and its logarithm, with the maximum subtracted first.

A thread keeps the greatest value so far and the sum of exponents relative to it (Milakov and
Gimelshein 2018, arXiv:1805.02867), so that two readings of x are enough; the second finds it in
the cache. It starts from the lowest finite number, not from minus infinity, so that minus infinity
in x gives exp(-inf) = 0 and not exp(-inf + inf). NaN and plus infinity make the sum NaN, as they do
in the definition. Exact grids: a row, or a column, has one owner.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from . import vector
from .index import DIVISOR, split, thread_index
from .ptx import cuda, float32, uint32, uint64

THREADS = 128
WARPS = THREADS // 32
LOWEST = -3.4028234663852886e38
ALL = 0xFFFFFFFF        # lanes of a warp

ROWS_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 2     # x, y, rows, length


def rows(dtype: str, lanes: int, row_threads: int, log: bool) -> Callable:
    """Along the last axis: a row belongs to one warp (32), whose lanes exchange their sums in
    registers, or to a block (THREADS), whose warps then do so in shared memory."""
    size, row_warps, block_rows = vector.STORAGE[dtype].bytes, row_threads // 32, (
        THREADS // row_threads)
    load, store = vector.load(dtype, lanes), vector.store(dtype, lanes)
    scale_of, finish = LOG if log else PLAIN

    def softmax(x, y, count, length):
        thread = uint32(cuda.threadIdx.x)
        row = uint32(uint32(cuda.blockIdx.x) * uint32(block_rows) + thread // uint32(row_threads))
        if row >= count:        # a whole warp or none
            return
        first = uint32(uint32(thread % uint32(row_threads)) * uint32(lanes))
        step = uint32(row_threads * lanes)
        offset = uint64(uint32(row * length)) * uint64(size)

        value = cuda.local.array(lanes, float32)
        greatest, total = float32(LOWEST), float32(0)
        for i in range(first, length, step):
            load(value, 0, x + offset + uint64(i) * uint64(size))
            before = greatest
            for k in range(lanes):
                greatest = max(greatest, value[k])
            total *= exp(before - greatest)
            for k in range(lanes):
                total += exp(value[k] - greatest)

        top = greatest
        for step_log in range(5):
            top = max(top, cuda.shfl_xor_sync(ALL, top, 16 >> step_log))
        if row_warps > 1:
            tops = cuda.shared.array(WARPS, float32)
            sums = cuda.shared.array(WARPS, float32)
            tops[thread // uint32(32)] = top        # all lanes write the one value
            cuda.syncthreads()
            for w in range(WARPS):
                top = max(top, tops[w])
        total *= exp(greatest - top)
        for step_log in range(5):
            total += cuda.shfl_xor_sync(ALL, total, 16 >> step_log)
        if row_warps > 1:
            sums[thread // uint32(32)] = total
            cuda.syncthreads()
            total = float32(0)
            for w in range(WARPS):
                total += sums[w]

        scale = scale_of(total)
        for i in range(first, length, step):
            load(value, 0, x + offset + uint64(i) * uint64(size))
            for k in range(lanes):
                value[k] = finish(value[k] - top, scale)
            store(y + offset + uint64(i) * uint64(size), value, 0)

    return softmax


# x, y, count of columns, length, then the divisor by which a column finds its place: inner
COLUMNS_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 2 + DIVISOR


def columns(dtype: str, log: bool) -> Callable:
    """Along another axis of (outer, length, inner): a thread owns one column, its neighbours the
    neighbouring ones, so that accesses are coalesced."""
    size = vector.STORAGE[dtype].bytes
    load, store = vector.load(dtype, 1), vector.store(dtype, 1)
    scale_of, finish = LOG if log else PLAIN

    def softmax(x, y, count, length, inner, inner_m, inner_s):
        column = thread_index(THREADS)
        if column >= count:
            return
        outer, column = split(column, inner, inner_m, inner_s)
        offset = uint64(uint32(outer * length * inner + column)) * uint64(size)
        pitch = uint64(inner) * uint64(size)

        value = cuda.local.array(1, float32)
        greatest, total = float32(LOWEST), float32(0)
        for i in range(length):
            load(value, 0, x + offset + uint64(i) * pitch)
            before = greatest
            greatest = max(greatest, value[0])
            total = total * exp(before - greatest) + exp(value[0] - greatest)
        scale = scale_of(total)
        for i in range(length):
            load(value, 0, x + offset + uint64(i) * pitch)
            value[0] = finish(value[0] - greatest, scale)
            store(y + offset + uint64(i) * pitch, value, 0)

    return softmax


@cuda.jit(device=True, inline="always")
def exp(x):
    return math.exp(float32(x))


@cuda.jit(device=True, inline="always")
def inverse(total):
    return float32(1) / total


@cuda.jit(device=True, inline="always")
def scaled(x, scale):
    return exp(x) * scale


@cuda.jit(device=True, inline="always")
def logarithm(total):
    return math.log(total)


@cuda.jit(device=True, inline="always")
def lowered(x, scale):
    return float32(x - scale)


# What a row's sum is made into, and what an element less the maximum is with it.
PLAIN, LOG = (inverse, scaled), (logarithm, lowered)
