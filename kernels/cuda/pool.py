"""Max, average and global pooling, NHWC.

Bound by memory. A thread of `window` computes one output pixel for one vector of channels; where
windows overlap, the L1 cache serves the second reader. A tap outside the image is a predicated
load that gives what changes nothing, so that all taps are in flight together. Exact grids.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from . import vector
from .index import DIVISOR, split, thread_index
from .ptx import cuda, float32, uint32, uint64

THREADS = 128

# x, y, count of threads, elements from a pixel of x and of y to the next, height, width, top, left,
# kernel (h, w), stride (h, w), dilation (h, w), margin (h, w) and extent (h, w) of what an average
# counts, then the divisors by which a thread finds its place: vectors, output columns, output rows
WINDOW_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 17 + DIVISOR * 3


def window(kind: str, dtype: str, lanes: int, kernel_h: int, kernel_w: int) -> Callable:
    """kind: "max" or "avg". A kernel size compiled in unrolls the taps; 0 takes the arguments'."""
    size, is_max = vector.STORAGE[dtype].bytes, kind == "max"
    start = -math.inf if is_max else 0.0
    load, store = vector.load(dtype, lanes, fill=start), vector.store(dtype, lanes)

    def pool(x, y, count, x_step, y_step, height, width, top, left, any_h, any_w, stride_h,
             stride_w, dilation_h, dilation_w, margin_h, margin_w, counted_h, counted_w, vectors,
             vectors_m, vectors_s, out_width, out_width_m, out_width_s, out_height, out_height_m,
             out_height_s):
        thread = thread_index(THREADS)
        if thread >= count:
            return
        pixel, channel = split(thread, vectors, vectors_m, vectors_s)
        row, column = split(pixel, out_width, out_width_m, out_width_s)
        image, row = split(row, out_height, out_height_m, out_height_s)
        channel = uint32(channel * uint32(lanes))
        row, first = uint32(row * stride_h - top), uint32(column * stride_w - left)
        source = x + uint64(channel) * uint64(size)
        pitch = uint64(x_step) * uint64(size)

        acc = cuda.local.array(lanes, float32)
        value = cuda.local.array(lanes, float32)
        for k in range(lanes):
            acc[k] = float32(start)
        rows, columns = uint32(0), uint32(0)        # how many of the window count in an average
        for _ in range(kernel_h or any_h):
            line = uint32(uint32(image * height + row) * width)
            column, columns = first, uint32(0)
            for _ in range(kernel_w or any_w):
                load(value, 0, source + uint64(uint32(line + column)) * pitch,
                     row < height and column < width)
                for k in range(lanes):
                    if not is_max:
                        acc[k] += value[k]
                    elif value[k] > acc[k] or value[k] != value[k]:     # NaN wins, and stays
                        acc[k] = value[k]
                columns = uint32(columns + uint32(uint32(column + margin_w) < counted_w))
                column = uint32(column + dilation_w)
            rows = uint32(rows + uint32(uint32(row + margin_h) < counted_h))
            row = uint32(row + dilation_h)
        if not is_max:
            for k in range(lanes):
                acc[k] = acc[k] / float32(uint32(rows * columns))
        at = uint64(pixel) * uint64(y_step) + uint64(channel)
        store(y + at * uint64(size), acc, 0)

    return pool


# All pixels: a block takes 8 vectors of channels, 128 bytes of a pixel, so that a warp reads whole
# cache lines of four pixels; what its 32 rows of threads found is combined in shared memory, in
# one order always. Four loads a thread are in flight.
VECTORS, ROWS, FLIGHT = 8, 32, 4
WHOLE_THREADS = VECTORS * ROWS

# x (images, pixels, channels), y (images, splits, channels), pixels, pixels a split, channels,
# number to divide by, then divisors of the block's number: blocks of channels, splits
WHOLE_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 3 + ("float32",) + DIVISOR * 2


def whole(kind: str, source: str, target: str, lanes: int) -> Callable:
    """What a kind makes of x's pixels, split by split; source, target: their dtypes.

    "max"      the greatest
    "avg"      the sum, divided by a number
    "squares"  the sum of squares, "root" the root of the sum, "l2" the root of the sum of squares
    """
    bytes_x, bytes_y = vector.STORAGE[source].bytes, vector.STORAGE[target].bytes
    start, combine = (-math.inf, greater) if kind == "max" else (0.0, add)
    squares, root = kind in ("squares", "l2"), kind in ("root", "l2")
    load, store = vector.load(source, lanes, fill=start), vector.store(target, lanes)
    shared_size = lanes * WHOLE_THREADS

    def global_pool(x, y, pixels, per_split, channels, divided_by, blocks, blocks_m, blocks_s,
                    splits, splits_m, splits_s):
        thread = uint32(cuda.threadIdx.x)
        part, block = split(uint32(cuda.blockIdx.x), blocks, blocks_m, blocks_s)
        image, number = split(part, splits, splits_m, splits_s)
        channel = uint32(uint32(block * uint32(VECTORS) + thread % uint32(VECTORS)) * uint32(lanes))
        inside = channel < channels
        row = uint32(thread // uint32(VECTORS))
        pixel = uint32(number * per_split + row)
        end = min(uint32(number * per_split + per_split), pixels)

        acc = cuda.local.array(lanes, float32)
        value = cuda.local.array(lanes, float32)
        for k in range(lanes):
            acc[k] = float32(start)
        pitch = uint64(channels) * uint64(bytes_x)
        address = (x + uint64(uint32(image * pixels + pixel)) * pitch
                   + uint64(channel) * uint64(bytes_x))
        while pixel < end:
            for _ in range(FLIGHT):
                load(value, 0, address, inside and pixel < end)
                for k in range(lanes):
                    acc[k] = combine(acc[k], value[k] * value[k] if squares else value[k])
                pixel = uint32(pixel + uint32(ROWS))
                address = uint64(address + uint64(ROWS) * pitch)

        # Element k of all threads lies together: no two lanes of a warp meet in a bank.
        found = cuda.shared.array(shared_size, float32)
        for k in range(lanes):
            found[uint32(uint32(k * WHOLE_THREADS) + thread)] = acc[k]
        half = uint32(ROWS // 2)
        while half > uint32(0):
            cuda.syncthreads()
            if row < half:
                for k in range(lanes):
                    mine = uint32(uint32(k * WHOLE_THREADS) + thread)
                    other = found[uint32(mine + half * uint32(VECTORS))]
                    found[mine] = combine(found[mine], other)
            half = uint32(half >> uint32(1))
        if row == uint32(0) and inside:
            for k in range(lanes):
                total = found[uint32(uint32(k * WHOLE_THREADS) + thread)]
                acc[k] = math.sqrt(total) if root else total / divided_by
            store(y + uint64(uint32(part * channels + channel)) * uint64(bytes_y), acc, 0)

    return global_pool


@cuda.jit(device=True, inline="always")
def add(a, b):
    return float32(a + b)


@cuda.jit(device=True, inline="always")
def greater(a, b):
    return b if b > a or b != b else a      # NaN wins, and stays
