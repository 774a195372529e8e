"""Depthwise convolution of many pixels, NHWC: a thread goes down a column of images.

Where depthwise.py is bound by what L2 delivers, for it fetches a row of x once for each row of y.
Here a thread computes a run of rows, of `pixels` neighbours each, for one vector of channels. It
keeps the sums of all rows of y that a row of x is part of, so that it loads each row of x once,
and that while it computes with the one before. The weights stay in registers, which is why
vectors are short. A block takes neighbours of a slab of channels, of at most a cache line, so that
few of its columns of x are another block's, too. Sums are added in the order of depthwise.py.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .depthwise import THREADS, finish, pixel_address
from .index import DIVISOR, split, thread_index
from .ptx import Regs, asm_op, cuda, float32, int32, uint32, uint64

BLOCKS = 4      # of a multiprocessor: 128 registers a thread

# x, weight [taps][channels] and bias (both fp32), residual, has_residual, y, count of threads,
# channels, height, width, out_height, out_width, top, left, low, high, rows of a run, then the
# divisors by which a thread finds its place: vectors of a slab, pixel groups, slabs, runs
SIGNATURE = ("pointer",) * 4 + ("uint32", "pointer") + ("uint32",) * 8 + ("float32",) * 2 + (
    "uint32",) + DIVISOR * 4


def make(dtype: str, lanes: int, pixels: int, kernel: int, stride: int, activation_name: str
         ) -> Callable:
    """kernel, stride: of a square window without dilation."""
    size, taps, total = vector.STORAGE[dtype].bytes, kernel * kernel, pixels * lanes
    ages = rows_at_once(kernel, stride)
    weights, sums, oldest = taps * lanes, ages * total, (ages - 1) * total
    load_constant = vector.load("float32", lanes)
    load_row, unpack_row, words, values = row_of(dtype, lanes, (pixels - 1) * stride + kernel)
    add = products(lanes, pixels, kernel, stride)
    end = finish(dtype, lanes, pixels, activation(activation_name, vector.arch(dtype)))

    def depthwise_run(x, weight, bias, residual, has_residual, y, count, channels, height, width,
                      out_height, out_width, top, left, low, high, run, slab, slab_m, slab_s,
                      groups, groups_m, groups_s, slabs, slabs_m, slabs_s, runs, runs_m, runs_s):
        i = thread_index(THREADS)
        if i >= count:
            return
        i, channel = split(i, slab, slab_m, slab_s)
        i, column = split(i, groups, groups_m, groups_s)
        i, number = split(i, slabs, slabs_m, slabs_s)
        image, out_row = split(i, runs, runs_m, runs_s)
        channel = uint32(uint32(number * slab + channel) * uint32(lanes))
        column, out_row = uint32(column * uint32(pixels)), uint32(out_row * run)
        rows = min(run, uint32(out_height - out_row))

        w = cuda.local.array(weights, float32)
        for t in range(taps):
            load_constant(w, t * lanes,
                          weight + uint64(uint32(uint32(t) * channels + channel)) * uint64(4))
        start = cuda.local.array(lanes, float32)
        load_constant(start, 0, bias + uint64(channel) * uint64(4))
        acc = cuda.local.array(sums, float32)       # of rows of y, the youngest first
        for k in range(sums):
            acc[k] = start[k % lanes]

        pitch = uint32(channels * uint32(size))
        line, out_line = uint64(width) * uint64(pitch), uint64(out_width) * uint64(pitch)
        offset = (uint64(uint32(image * out_height + out_row)) * out_line
                  + uint64(column) * uint64(pitch) + uint64(uint32(channel * uint32(size))))
        row, left = uint32(out_row * uint32(stride) - top), uint32(column * uint32(stride) - left)
        last = uint32(row + uint32(uint32(rows * uint32(stride)) + uint32(kernel - stride)))
        bottom = min(height, last)      # a run that ends above the image has a huge `last`
        x = pixel_address(x + uint64(image * height * width * channels + channel) * uint64(size),
                          int32(row), width, left, uint64(pitch))

        ahead = cuda.local.array(words, uint32)
        value = cuda.local.array(values, float32)
        load_row(ahead, x, row < bottom, left, width, pitch)
        young = uint32(ages - 1)        # steps until the first row of y is whole
        while rows > uint32(0):
            for i in range(stride):
                unpack_row(value, ahead)
                row, x = uint32(row + uint32(1)), uint64(x + line)
                load_row(ahead, x, row < bottom, left, width, pitch)
                for age in range(ages - 1, -1, -1):
                    if age * stride + i < kernel:
                        add(acc, age * total, value, w, age * stride + i)
            if young > uint32(0):
                young = uint32(young - uint32(1))
            else:
                end(y + offset, acc, oldest, residual + offset, has_residual,
                    uint32(out_width - column), pitch, low, high)
                offset, rows = uint64(offset + out_line), uint32(rows - uint32(1))
            for k in range(sums - 1, -1, -1):       # costs nothing: the next products go there
                acc[k] = acc[k - total] if k >= total else start[k % lanes]

    return depthwise_run


def rows_at_once(kernel: int, stride: int) -> int:
    """Rows of y that one row of x can be part of."""
    return -(-kernel // stride)


def row_of(dtype: str, lanes: int, columns: int) -> tuple[Callable, Callable, int, int]:
    """Device functions that load a row of x as it is stored, which takes fewer registers while it
    is on its way, and that convert it; the words and the values that it has."""
    storage = vector.STORAGE[dtype]
    held = 4 // storage.bytes
    words, total = lanes // held, columns * lanes // held
    load = vector.load("bits32", words, fill=0.0)
    names = [f"${i}" for i in range(held)]
    widen = asm_op(f"widen_{dtype}", "{ .reg .b16 lo, hi; "
                   + storage.widen.format(*names, w=f"${held}") + " }",
                   Regs(float32, held) if held > 1 else float32, [uint32], pure=True)

    @cuda.jit(device=True, inline="always")
    def load_row(row, address, inside, left, width, pitch):
        for c in range(columns):
            load(row, c * words, address + uint64(uint32(c)) * uint64(pitch),
                 inside and uint32(left + uint32(c)) < width)

    @cuda.jit(device=True, inline="always")
    def unpack_singles(value, row):
        for k in range(total):
            value[k] = widen(row[k])

    @cuda.jit(device=True, inline="always")
    def unpack_pairs(value, row):
        for k in range(total):
            value[2 * k], value[2 * k + 1] = widen(row[k])

    return load_row, unpack_pairs if held > 1 else unpack_singles, total, total * held


def products(lanes: int, pixels: int, kernel: int, stride: int) -> Callable:
    """Device function that adds to the sums of a row of y those of a row of x with row r of the
    window."""
    columns = (pixels - 1) * stride + kernel

    @cuda.jit(device=True, inline="always")
    def add(acc, first, value, w, r):
        for c in range(columns):
            for p in range(pixels):
                t = c - p * stride
                if 0 <= t < kernel:
                    for k in range(lanes):
                        acc[first + p * lanes + k] += (value[c * lanes + k]
                                                       * w[(r * kernel + t) * lanes + k])

    return add
