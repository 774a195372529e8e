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
            number = float32(uint32(rows * columns))
            reciprocal = float32(float32(1) / number)
            for k in range(lanes):
                acc[k] = quotient(acc[k], number, reciprocal)
        at = uint64(pixel) * uint64(y_step) + uint64(channel)
        store(y + at * uint64(size), acc, 0)

    return pool


# All pixels: a warp takes 8 vectors of channels, 128 bytes at most, of 4 pixels at a time, and
# each thread has several loads in flight. What lanes found is combined by shuffles, what the warps
# of a block found in shared memory, in one order always. Where there are channels and images enough
# to keep all warps busy, each has some to itself, and the block no barrier: to read 49 pixels takes
# no longer than to combine what 8 warps made of them.
VECTORS, WARP_ROWS = 8, 4
WARPS = 8                   # of a block
WHOLE_THREADS = WARPS * 32
FLIGHT = {1: 7, WARPS: 4}   # loads of a thread, by the warps that share pixels: 7x7 in two rounds
ALL = 0xFFFFFFFF

# x (images, pixels, channels), y (images, splits, channels), pixels, pixels a split, channels,
# count of parts, number to divide by, 1 divided by it, then divisors of a part's number: blocks of
# channels, splits.  Grid: parts, for each of which `warps` warps.
WHOLE_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 4 + ("float32",) * 2 + DIVISOR * 2


def whole(kind: str, source: str, target: str, lanes: int, warps: int) -> Callable:
    """What a kind makes of x's pixels, split by split; source, target: their dtypes; warps: that
    share a split, 1 or WARPS.

    "max"      the greatest
    "avg"      the sum, divided by a number
    "squares"  the sum of squares, "root" the root of the sum, "l2" the root of the sum of squares
    """
    bytes_x, bytes_y = vector.STORAGE[source].bytes, vector.STORAGE[target].bytes
    start, combine = (-math.inf, greater) if kind == "max" else (0.0, add)
    squares, root = kind in ("squares", "l2"), kind in ("root", "l2")
    load, store = vector.load(source, lanes, fill=start), vector.store(target, lanes)
    flight, rows, found_size = FLIGHT[warps], warps * WARP_ROWS, WARPS * VECTORS * lanes

    @cuda.jit(device=True, inline="always")
    def combine_rows(acc):
        """acc = what the lanes of the same channels have."""
        for k in range(lanes):
            acc[k] = combine(acc[k], cuda.shfl_xor_sync(ALL, acc[k], 16))
            acc[k] = combine(acc[k], cuda.shfl_xor_sync(ALL, acc[k], 8))

    def global_pool(x, y, pixels, per_split, channels, count, divided_by, reciprocal, blocks,
                    blocks_m, blocks_s, splits, splits_m, splits_s):
        thread = uint32(cuda.threadIdx.x)
        warp, lane = uint32(thread >> uint32(5)), uint32(thread & uint32(31))
        vector_of_lane, row = uint32(lane % uint32(VECTORS)), uint32(lane // uint32(VECTORS))
        number = uint32(uint32(cuda.blockIdx.x) * uint32(WARPS // warps) + warp // uint32(warps))
        part, block = split(number, blocks, blocks_m, blocks_s)
        image, at = split(part, splits, splits_m, splits_s)
        channel = uint32(uint32(block * uint32(VECTORS) + vector_of_lane) * uint32(lanes))
        inside = number < count and channel < channels
        pixel = uint32(at * per_split + warp % uint32(warps) * uint32(WARP_ROWS) + row)
        end = min(uint32(at * per_split + per_split), pixels)

        acc = cuda.local.array(lanes, float32)
        value = cuda.local.array(lanes, float32)
        for k in range(lanes):
            acc[k] = float32(start)
        pitch = uint64(channels) * uint64(bytes_x)
        address = (x + uint64(uint32(image * pixels + pixel)) * pitch
                   + uint64(channel) * uint64(bytes_x))
        while pixel < end:
            for _ in range(flight):
                load(value, 0, address, inside and pixel < end)
                for k in range(lanes):
                    acc[k] = combine(acc[k], value[k] * value[k] if squares else value[k])
                pixel = uint32(pixel + uint32(rows))
                address = uint64(address + uint64(rows) * pitch)

        combine_rows(acc)
        if warps > 1:
            # Element k of all vectors lies together: no two lanes meet in a bank.
            found = cuda.shared.array(found_size, float32)
            if row == uint32(0):
                for k in range(lanes):
                    found[uint32(uint32(k * WARPS + warp) * uint32(VECTORS)
                                 + vector_of_lane)] = acc[k]
            cuda.syncthreads()
            # Each lane takes what two warps found, WARP_ROWS warps apart.
            for k in range(lanes):
                mine = uint32(uint32(k * WARPS * VECTORS) + lane)
                acc[k] = combine(found[mine], found[uint32(mine + uint32(WARP_ROWS * VECTORS))])
            combine_rows(acc)
            inside = inside and warp == uint32(0)
        if row == uint32(0) and inside:
            for k in range(lanes):
                if root:
                    acc[k] = math.sqrt(acc[k])
                elif kind == "avg":
                    acc[k] = quotient(acc[k], divided_by, reciprocal)
            store(y + uint64(uint32(part * channels + channel)) * uint64(bytes_y), acc, 0)

    return global_pool


@cuda.jit(device=True, inline="always")
def quotient(a, b, reciprocal):
    """a / b, rounded to nearest as by a division, which branches, for results from 2 ** -100 on and
    b below 2 ** 24 - 1; reciprocal: 1 / b, rounded so. (Markstein 1990, "Computation of Elementary
    Functions on the IBM RISC System/6000 Processor".)"""
    near = float32(a * reciprocal)
    nearest = cuda.fma(cuda.fma(-near, b, a), reciprocal, near)
    return nearest if nearest == nearest else near      # infinity - infinity is none


@cuda.jit(device=True, inline="always")
def add(a, b):
    return float32(a + b)


@cuda.jit(device=True, inline="always")
def greater(a, b):
    return b if b > a or b != b else a      # NaN wins, and stays
