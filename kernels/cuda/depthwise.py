"""Depthwise convolution (one filter per channel), NHWC.

Bound by memory. A thread computes `pixels` neighbours of one output row for one vector of
channels: neighbouring threads hold neighbouring channels, so accesses are coalesced; a weight is
loaded once for all pixels and, for the common windows, an input column once for all windows that
overlap on it. Rows that overlap are left to the L1 cache. So are the weights, which stay fp32:
that costs a load more per tap and saves converting every weight in every thread. The border costs
no branch: a column outside the image is a predicated load that gives zeros, so that all loads of
a window are in flight together. The grid is exact: each thread has enough to do to need no loop.
Where there are many pixels, depthwise_run.py takes less from L2.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .index import DIVISOR, split, thread_index
from .ptx import cuda, float32, int32, int64, uint32, uint64

THREADS = 128

# x, weight [taps][channels] and bias (both fp32), residual, has_residual, y, count of threads,
# channels, height, width, out_width, top, left, low, high, kernel (h, w), stride (h, w),
# dilation (h, w), then the divisors by which a thread finds its place: vectors, pixel groups,
# output rows
SIGNATURE = ("pointer",) * 4 + ("uint32", "pointer") + ("uint32",) * 7 + ("float32",) * 2 + (
    "uint32",) * 6 + DIVISOR * 3


def make(dtype: str, lanes: int, pixels: int, kernel: int, stride: int, activation_name: str
         ) -> Callable:
    """kernel, stride: of a square window without dilation, compiled in; 0 for any window."""
    size, total = vector.STORAGE[dtype].bytes, pixels * lanes
    load_bias = vector.load("float32", lanes)
    end = finish(dtype, lanes, pixels, activation(activation_name, vector.arch(dtype)))
    if kernel:
        accumulate = square_window(dtype, lanes, pixels, kernel, stride)
    else:
        accumulate = any_window(dtype, lanes, pixels)

    def depthwise(x, weight, bias, residual, has_residual, y, count, channels, height, width,
                  out_width, top, left, low, high, kernel_h, kernel_w, stride_h, stride_w,
                  dilation_h, dilation_w, vectors, vectors_m, vectors_s, groups, groups_m,
                  groups_s, out_height, out_height_m, out_height_s):
        i = thread_index(THREADS)
        if i >= count:
            return
        i, channel = split(i, vectors, vectors_m, vectors_s)
        row, column = split(i, groups, groups_m, groups_s)
        image, out_row = split(row, out_height, out_height_m, out_height_s)
        channel = uint32(channel * uint32(lanes))
        column = uint32(column * uint32(pixels))

        acc = cuda.local.array(total, float32)
        for p in range(pixels):
            load_bias(acc, p * lanes, bias + uint64(channel) * uint64(4))
        accumulate(acc, x + uint64(image * height * width * channels + channel) * uint64(size),
                   weight + uint64(channel) * uint64(4), channels, height, width,
                   uint32(out_row * stride_h - top), uint32(column * stride_w - left),
                   kernel_h, kernel_w, stride_w, dilation_h, dilation_w)

        offset = uint64(uint32((row * out_width + column) * channels + channel)) * uint64(size)
        end(y + offset, acc, 0, residual + offset, has_residual, uint32(out_width - column),
            uint32(channels * uint32(size)), low, high)

    return depthwise


def finish(dtype: str, lanes: int, pixels: int, activate: Callable) -> Callable:
    """Device function that stores the sums from acc[first] on, `pixels` neighbours, of which so
    many lie in the image, at `y`."""
    total = pixels * lanes
    load, store = vector.load(dtype, lanes, fill=0.0), vector.store(dtype, lanes)

    @cuda.jit(device=True, inline="always")
    def end(y, acc, first, residual, has_residual, inside, pitch, low, high):
        value = cuda.local.array(total, float32)
        if has_residual:
            for p in range(pixels):
                load(value, p * lanes, residual + uint64(uint32(p)) * uint64(pitch),
                     uint32(p) < inside)
            for k in range(total):
                acc[first + k] += value[k]
        for p in range(pixels):
            if uint32(p) < inside:
                for k in range(p * lanes, p * lanes + lanes):
                    value[k] = activate(acc[first + k], low, high)
                store(y + uint64(uint32(p)) * uint64(pitch), value, p * lanes)

    return end


@cuda.jit(device=True, inline="always")
def pixel_address(x, row, width, column, pitch):
    """Of a pixel that may lie left of its row: its uint32 column then stands for a negative."""
    return uint64(x + uint64(int64(row) * int64(width) + int64(int32(column))) * pitch)


def square_window(dtype: str, lanes: int, pixels: int, kernel: int, stride: int) -> Callable:
    """Device function that adds the products of `pixels` windows, each input loaded once."""
    size, columns = vector.STORAGE[dtype].bytes, (pixels - 1) * stride + kernel
    weights = kernel * lanes
    load, load_inside = vector.load("float32", lanes), vector.load(dtype, lanes, fill=0.0)

    @cuda.jit(device=True, inline="always")
    def accumulate(acc, x, weight, channels, height, width, top, left, kernel_h, kernel_w,
                   stride_w, dilation_h, dilation_w):
        w = cuda.local.array(weights, float32)
        value = cuda.local.array(lanes, float32)
        pitch = uint64(channels) * uint64(size)
        for r in range(kernel):
            row = uint32(top + uint32(r))
            for t in range(kernel):
                load(w, t * lanes, weight + uint64(r * kernel + t) * uint64(channels) * uint64(4))
            inside = row < height
            address = pixel_address(x, row, width, left, pitch)
            for c in range(columns):
                load_inside(value, 0, address, inside and uint32(left + uint32(c)) < width)
                address = uint64(address + pitch)
                for p in range(pixels):
                    if 0 <= c - p * stride < kernel:
                        for k in range(lanes):
                            acc[p * lanes + k] += value[k] * w[(c - p * stride) * lanes + k]

    return accumulate


def any_window(dtype: str, lanes: int, pixels: int) -> Callable:
    """The same for any window: a weight is loaded once, an input for every tap."""
    size = vector.STORAGE[dtype].bytes
    load, load_inside = vector.load("float32", lanes), vector.load(dtype, lanes, fill=0.0)

    @cuda.jit(device=True, inline="always")
    def accumulate(acc, x, weight, channels, height, width, top, left, kernel_h, kernel_w,
                   stride_w, dilation_h, dilation_w):
        w = cuda.local.array(lanes, float32)
        value = cuda.local.array(lanes, float32)
        pitch = uint64(channels) * uint64(size)
        row = uint32(top)
        for _ in range(kernel_h):
            first = uint32(left)
            for _ in range(kernel_w):
                load(w, 0, weight)
                address = pixel_address(x, row, width, first, pitch)
                for p in range(pixels):
                    column = uint32(first + uint32(p) * stride_w)
                    load_inside(value, 0, address, row < height and column < width)
                    address = uint64(address + uint64(stride_w) * pitch)
                    for k in range(lanes):
                        acc[p * lanes + k] += value[k] * w[k]
                weight = uint64(weight + uint64(channels) * uint64(4))
                first = uint32(first + dilation_w)
            row = uint32(row + dilation_h)

    return accumulate
