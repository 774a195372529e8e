"""Pooling, by windows and global, NHWC, in float32; input and output may each be bfloat16.

Bound by memory. Windows are clipped to the image once per output pixel; what is left of one is a
rectangle, over which `pool_window` of microkernels.py goes with some vectors of channels at a time.
"""
from __future__ import annotations

import numpy as np

from .jit import kernel, njit
from .microkernels import pool_window
from .parallel import parallel_for
from .simd import at
from .sizes import GREATEST, L2_NORM, MEAN

CHANNELS_AT_ONCE = 64       # of global pooling: the vectors that pool_window has at work


@kernel
def pool2d(is_max, include_pad, x, x_shape, y, y_shape, window, stride, padding, dilation, threads):
    """Flat x (N, H, W, C) -> y (N, OH, OW, C), by rows of y; padding is (top, left, bottom,
    right)."""
    parallel_for(pool_rows, y_shape[0] * y_shape[1], threads, (
        is_max, include_pad, x, x_shape, y, y_shape, window, stride, padding, dilation))


@njit()
def pool_rows(thread, first_row, end_row, is_max, include_pad, x, x_shape, y, y_shape, window,
              stride, padding, dilation):
    _, height, width, channels = x_shape
    _, out_height, out_width, _ = y_shape
    for row in range(first_row, end_row):
        image, top = row // out_height, row % out_height * stride[0] - padding[0]
        line, lines = inside(top, window[0], dilation[0], height)
        for column in range(out_width):
            left = column * stride[1] - padding[1]
            tap, taps = inside(left, window[1], dilation[1], width)
            source = ((image * height + line) * width + tap) * channels
            seen = (at(x, source), lines, dilation[0] * width * channels, taps,
                    dilation[1] * channels, at(y, (row * out_width + column) * channels), channels)
            if is_max:
                greatest_of(seen, np.float32(1))
            else:
                size = (extent(top, window[0], height, padding[0], padding[2], include_pad)
                        * extent(left, window[1], width, padding[1], padding[3], include_pad))
                mean_of(seen, np.float32(size))


@njit(inline="always")
def inside(start, length, step, size):
    """(first, count) of the positions start, start + step, .. of a window that are in the image."""
    skipped = -(start // step) if start < 0 else 0
    end = min(length, (size - 1 - start) // step + 1)
    return start + skipped * step, max(end - skipped, 0)


@njit(inline="always")
def extent(start, length, size, before, after, include_pad):
    """How many elements of a window count along one axis: those in the image, or those in the
    image and its padding; what ceil_mode lets hang over beyond never counts."""
    low, high = (-before, size + after) if include_pad else (0, size)
    return min(start + length, high) - max(start, low)


@njit(inline="always")
def mean_of(window, size):
    pool_window(MEAN, window, size)


@njit(inline="always")
def greatest_of(window, size):
    pool_window(GREATEST, window, size)


@njit(inline="always")
def norm_of(window, size):
    pool_window(L2_NORM, window, size)


def global_pool(pool):
    """The kernel of flat x of shape (N, H, W, C) -> y (N, C), by groups of channels."""
    @njit(keep=False)
    def units(thread, first_unit, end_unit, x, shape, y):
        for unit in range(first_unit, end_unit):
            pool(all_pixels(unit, x, shape, y), np.float32(shape[1] * shape[2]))

    @kernel
    def pools(x, shape, y, threads):
        parallel_for(units, shape[0] * groups_of(shape), threads, (x, shape, y))

    return pools


@njit(inline="always")
def groups_of(shape):
    return -(-shape[3] // CHANNELS_AT_ONCE)


@njit(inline="always")
def all_pixels(unit, x, shape, y):
    """The window of a unit of global pooling: some channels of an image."""
    _, height, width, channels = shape
    image, group = unit // groups_of(shape), unit % groups_of(shape)
    first = group * CHANNELS_AT_ONCE
    return (at(x, image * height * width * channels + first), height, width * channels, width,
            channels, at(y, image * channels + first), min(CHANNELS_AT_ONCE, channels - first))


global_avg_pool2d, global_max_pool2d = global_pool(mean_of), global_pool(greatest_of)
global_l2_pool2d = global_pool(norm_of)
