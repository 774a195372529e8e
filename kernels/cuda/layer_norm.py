"""Layer norm along the last axis: mean, then variance of what differs from it, then y.

Bound by memory. A row that some threads of a warp can hold in registers is read once; a longer one
belongs to a block and is read three times, the second and third time from a cache. The variance is
a mean of squares of differences, for E[x * x] - E[x] * E[x] cancels where the mean is large.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from . import vector
from .ptx import cuda, float32, uint32, uint64

THREADS = 128
WARPS = THREADS // 32
ALL = 0xFFFFFFFF        # lanes of a warp

# x, scale, bias (fp32, one per channel), y, rows, length, epsilon
SIGNATURE = ("pointer",) * 4 + ("uint32",) * 2 + ("float32",)


def held(dtype: str, lanes: int, row_threads: int, vectors: int) -> Callable:
    """A row belongs to `row_threads` neighbours of a warp, a power of two of them, which hold
    `vectors` vectors each."""
    size, total = vector.STORAGE[dtype].bytes, vectors * lanes
    block_rows, exchanges = THREADS // row_threads, row_threads.bit_length() - 1
    load, store = vector.load(dtype, lanes, fill=0.0, shared_with_stores=True), vector.store(
        dtype, lanes)
    load_constant = vector.load("float32", lanes)
    step = row_threads * lanes

    def layer_norm(x, scale, bias, y, rows, length, epsilon):
        thread = uint32(cuda.threadIdx.x)
        row = uint32(uint32(cuda.blockIdx.x) * uint32(block_rows) + thread // uint32(row_threads))
        first = uint32(uint32(thread % uint32(row_threads)) * uint32(lanes))
        # A row beyond the last has no elements; its threads take part in the exchange.
        end = length if row < rows else uint32(0)
        offset = uint64(uint32(row * length + first)) * uint64(size)

        value = cuda.local.array(total, float32)
        for i in range(vectors):
            load(value, i * lanes, x + offset + uint64(i * step * size),
                 uint32(first + uint32(i * step)) < end)
        part = float32(0)
        for k in range(total):
            part += value[k]
        mean = over_threads(part, exchanges) / float32(length)
        part = float32(0)
        for i in range(vectors):
            if uint32(first + uint32(i * step)) < end:
                for k in range(lanes):
                    value[i * lanes + k] -= mean
                    part += value[i * lanes + k] * value[i * lanes + k]
        factor = inverse_root(over_threads(part, exchanges) / float32(length) + epsilon)

        a, b = cuda.local.array(lanes, float32), cuda.local.array(lanes, float32)
        for i in range(vectors):
            channel = uint32(first + uint32(i * step))
            if channel < end:
                load_constant(a, 0, scale + uint64(channel) * uint64(4))
                load_constant(b, 0, bias + uint64(channel) * uint64(4))
                for k in range(lanes):
                    value[i * lanes + k] = value[i * lanes + k] * factor * a[k] + b[k]
                store(y + offset + uint64(i * step * size), value, i * lanes)

    return layer_norm


def long(dtype: str, lanes: int) -> Callable:
    """A row of any length belongs to a block."""
    size, step = vector.STORAGE[dtype].bytes, THREADS * lanes
    load, store = vector.load(dtype, lanes, shared_with_stores=True), vector.store(dtype, lanes)
    load_constant = vector.load("float32", lanes)

    def layer_norm(x, scale, bias, y, rows, length, epsilon):
        thread = uint32(cuda.threadIdx.x)
        first = uint32(thread * uint32(lanes))
        offset = uint64(uint32(uint32(cuda.blockIdx.x) * length)) * uint64(size)
        sums, squares = cuda.shared.array(WARPS, float32), cuda.shared.array(WARPS, float32)

        value = cuda.local.array(lanes, float32)
        part = float32(0)
        for i in range(first, length, uint32(step)):
            load(value, 0, x + offset + uint64(i) * uint64(size))
            for k in range(lanes):
                part += value[k]
        mean = over_block(part, sums, thread) / float32(length)
        part = float32(0)
        for i in range(first, length, uint32(step)):
            load(value, 0, x + offset + uint64(i) * uint64(size))
            for k in range(lanes):
                part += (value[k] - mean) * (value[k] - mean)
        factor = inverse_root(over_block(part, squares, thread) / float32(length) + epsilon)

        a, b = cuda.local.array(lanes, float32), cuda.local.array(lanes, float32)
        for i in range(first, length, uint32(step)):
            load(value, 0, x + offset + uint64(i) * uint64(size))
            load_constant(a, 0, scale + uint64(i) * uint64(4))
            load_constant(b, 0, bias + uint64(i) * uint64(4))
            for k in range(lanes):
                value[k] = (value[k] - mean) * factor * a[k] + b[k]
            store(y + offset + uint64(i) * uint64(size), value, 0)

    return layer_norm


@cuda.jit(device=True, inline="always")
def over_threads(part, exchanges):
    """The sum over 2 ** exchanges neighbouring threads, which all get it."""
    for i in range(exchanges):
        part += cuda.shfl_xor_sync(ALL, part, 1 << i)
    return part


@cuda.jit(device=True, inline="always")
def over_block(part, sums, thread):
    """The sum over a block's threads, through `sums` in shared memory, one of each warp."""
    sums[thread // uint32(32)] = over_threads(part, 5)      # all lanes write the one value
    cuda.syncthreads()
    total = float32(0)
    for w in range(WARPS):
        total += sums[w]
    return total


@cuda.jit(device=True, inline="always")
def inverse_root(x):
    return float32(1) / math.sqrt(x)
