"""Kernels that move data: permute, concat, slice, convert; pad; transpose; pixels of photos.

Bound by memory. Exact grids: a thread moves one vector, or a block one tile.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .index import AXES, DIVISOR, split, split_axes, thread_index
from .ptx import cuda, float32, int32, uint32, uint64

THREADS = 256

# x, y, count of vectors, first of x and of y (in elements), the axes, steps of x, steps of y
STRIDED_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 3 + AXES + ("uint32",) * 8


def strided(source: str, target: str, lanes: int) -> Callable:
    """y[y_first + i . y_steps] = x[x_first + i . x_steps] over four axes, converting from dtype to
    dtype.

    The last axis steps by `lanes` at a time, contiguous in x and in y, or lanes is 1.
    """
    bytes_x, bytes_y = vector.STORAGE[source].bytes, vector.STORAGE[target].bytes
    load, store = vector.load(source, lanes), vector.store(target, lanes)
    register = vector.STORAGE[source].register

    def copy(x, y, count, x_first, y_first, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s,
             x0, x1, x2, x3, y0, y1, y2, y3):
        thread = thread_index(THREADS)
        if thread >= count:
            return
        i0, i1, i2, i3 = split_axes(thread, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s)
        i3 = uint32(i3 * uint32(lanes))
        value = cuda.local.array(lanes, register)
        i, j = uint32(x_first + i0 * x0 + i1 * x1 + i2 * x2 + i3 * x3), uint32(
            y_first + i0 * y0 + i1 * y1 + i2 * y2 + i3 * y3)
        load(value, 0, x + uint64(i) * uint64(bytes_x))
        store(y + uint64(j) * uint64(bytes_y), value, 0)

    return copy


# x, y, count of y's vectors, value (its bits), the axes of y, elements before x, sizes of x
PAD_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 2 + AXES + ("uint32",) * 8


def pad(dtype: str, lanes: int, mode: str) -> Callable:
    """y = x with elements around it, over four axes; a vector of y is all of x or all padding.

    dtype: "bits16" or "bits32"; mode: that of ops.Pad.
    """
    find = MIRRORED.get(mode)
    size, register = vector.STORAGE[dtype].bytes, vector.STORAGE[dtype].register
    load, store = vector.load(dtype, lanes, fill=0.0), vector.store(dtype, lanes)

    def padded(x, y, count, value, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s,
               before0, before1, before2, before3, x0, x1, x2, x3):
        thread = thread_index(THREADS)
        if thread >= count:
            return
        i0, i1, i2, i3 = split_axes(thread, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s)
        # What lies before x wraps to beyond it.
        i0, i1, i2 = uint32(i0 - before0), uint32(i1 - before1), uint32(i2 - before2)
        i3 = uint32(i3 * uint32(lanes) - before3)
        if find is not None:
            i0, i1, i2, i3 = find(i0, x0), find(i1, x1), find(i2, x2), find(i3, x3)
        inside = i0 < x0 and i1 < x1 and i2 < x2 and i3 < x3
        place = uint32(uint32(uint32(i0 * x1 + i1) * x2 + i2) * x3 + i3)
        element = cuda.local.array(lanes, register)
        load(element, 0, x + uint64(place) * uint64(size), inside)
        for k in range(lanes):
            element[k] = element[k] if inside else value
        store(y + uint64(thread) * uint64(lanes * size), element, 0)

    return padded


@cuda.jit(device=True, inline="always")
def reflected(i, size):
    """The element of 0 .. size that element i mirrors, which is less than `size` beyond them."""
    i = uint32(abs(int32(i)))
    return i if i < size else uint32(uint32(2) * size - uint32(2) - i)


@cuda.jit(device=True, inline="always")
def nearest(i, size):
    return uint32(min(max(int32(i), int32(0)), int32(size) - int32(1)))


MIRRORED = {"reflect": reflected, "edge": nearest}

SIDE = 32       # accesses along a tile's edge: a warp reads, and writes, one row of a tile
ROUNDS = SIDE * SIDE // THREADS

# x, y, rows, columns, then the divisors of the block's number: tiles along columns, along rows
TRANSPOSE_SIGNATURE = ("pointer",) * 2 + ("uint32",) * 2 + DIVISOR * 2


def transpose(source: str, target: str, lanes: int) -> Callable:
    """y[b, j, i] = x[b, i, j], converting, through a tile of 32-bit words in shared memory.

    Two lanes make full 128-byte rows of 16-bit elements. The tile's pitch is odd, so that with one
    lane neither a row nor a column meets itself in a bank; with two lanes pairs of threads do,
    which shared memory, many times faster than the global one, can afford.
    """
    bytes_x, bytes_y = vector.STORAGE[source].bytes, vector.STORAGE[target].bytes
    load, store = vector.load(source, lanes, fill=0.0), vector.store(target, lanes)
    register = vector.STORAGE[source].register
    side = SIDE * lanes
    pitch, step = side + 1, SIDE // ROUNDS
    shared_size = side * pitch

    def transposed(x, y, rows, columns, across, across_m, across_s, down, down_m, down_s):
        tile = cuda.shared.array(shared_size, register)
        value = cuda.local.array(lanes, register)
        rest, block_column = split(uint32(cuda.blockIdx.x), across, across_m, across_s)
        batch, block_row = split(rest, down, down_m, down_s)
        first_row, first_column = uint32(block_row * uint32(side)), uint32(
            block_column * uint32(side))
        start = uint64(uint32(batch * rows * columns))
        lane = uint32(uint32(cuda.threadIdx.x) % uint32(SIDE)) * uint32(lanes)
        warp = uint32(uint32(cuda.threadIdx.x) // uint32(SIDE))

        for i in range(ROUNDS * lanes):
            row = uint32(warp + uint32(i * step))
            source_row, column = uint32(first_row + row), uint32(first_column + lane)
            load(value, 0, x + (start + uint64(uint32(source_row * columns + column)))
                 * uint64(bytes_x), source_row < rows and column < columns)
            for k in range(lanes):
                tile[uint32(row * uint32(pitch) + lane + uint32(k))] = value[k]
        cuda.syncthreads()
        for i in range(ROUNDS * lanes):
            column = uint32(warp + uint32(i * step))
            target_row, row = uint32(first_column + column), uint32(first_row + lane)
            for k in range(lanes):
                value[k] = tile[uint32(uint32(lane + uint32(k)) * uint32(pitch) + column)]
            if target_row < columns and row < rows:
                store(y + (start + uint64(uint32(target_row * rows + row))) * uint64(bytes_y),
                      value, 0)

    return transposed


# x, y, count of threads, scale and shift of up to three channels
PIXELS_SIGNATURE = ("pointer",) * 2 + ("uint32",) + ("float32",) * 6


def pixels(dtype: str, channels: int, padded: int, group: int) -> Callable:
    """Photos become inputs: uint8 (.., channels) -> dtype (.., padded), y = x * scale + shift.

    A thread takes `group` pixels, so that 4 pixels of 3 bytes are read by words and written by
    vectors. Padding channels are zero.
    """
    bytes_x, bytes_y = group * channels, group * padded * vector.STORAGE[dtype].bytes
    total_x, total_y = group * channels, group * padded
    lanes_x, lanes_y = vector.lanes("uint8", total_x), vector.lanes(dtype, total_y)
    step_y = lanes_y * vector.STORAGE[dtype].bytes
    load, store = vector.load("uint8", lanes_x), vector.store(dtype, lanes_y)
    reads, writes = total_x // lanes_x, total_y // lanes_y

    def normalise(x, y, count, scale_0, scale_1, scale_2, shift_0, shift_1, shift_2):
        thread = thread_index(THREADS)
        if thread >= count:
            return
        byte = cuda.local.array(total_x, float32)
        value = cuda.local.array(total_y, float32)
        scale, shift = cuda.local.array(3, float32), cuda.local.array(3, float32)
        scale[0], scale[1], scale[2] = scale_0, scale_1, scale_2
        shift[0], shift[1], shift[2] = shift_0, shift_1, shift_2
        for i in range(reads):
            load(byte, i * lanes_x, x + uint64(thread) * uint64(bytes_x) + uint64(i * lanes_x))
        for p in range(group):
            for c in range(padded):
                value[p * padded + c] = float32(0)
            for c in range(channels):
                value[p * padded + c] = byte[p * channels + c] * scale[c] + shift[c]
        for i in range(writes):
            store(y + uint64(thread) * uint64(bytes_y) + uint64(i * step_y), value, i * lanes_y)

    return normalise
