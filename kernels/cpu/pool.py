"""Max, average and global average pooling, NHWC float32.

Bound by memory. Windows are clipped to the image once per output pixel; what is left of one is a
rectangle, over which `pool_window` of microkernels.py goes with some vectors of channels at a time.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops import AvgPool2d, GlobalAvgPool2d, MaxPool2d, TensorSpec, count, known
from ..step import Array, Options, Run, Step
from .jit import njit
from .microkernels import pool_window
from .parallel import parallel_for
from .simd import at

CHANNELS_AT_ONCE = 64       # of global average pooling: the vectors that pool_window has at work


@njit()
def pool2d(is_max, include_pad, x, y, kernel, stride, padding, dilation, threads):
    """x (N, H, W, C) -> y (N, OH, OW, C), by rows of y; padding is (top, left, bottom, right)."""
    parallel_for(pool_rows, y.shape[0] * y.shape[1], threads, (
        is_max, include_pad, x, y, kernel, stride, padding, dilation))


@njit()
def pool_rows(thread, first_row, end_row, is_max, include_pad, x, y, kernel, stride, padding,
              dilation):
    _, height, width, channels = x.shape
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for row in range(first_row, end_row):
        image, top = row // y.shape[1], row % y.shape[1] * stride[0] - padding[0]
        line, lines = inside(top, kernel[0], dilation[0], height)
        for column in range(y.shape[2]):
            left = column * stride[1] - padding[1]
            tap, taps = inside(left, kernel[1], dilation[1], width)
            source = ((image * height + line) * width + tap) * channels
            window = (at(flat_x, source), lines, dilation[0] * width * channels, taps,
                      dilation[1] * channels, at(flat_y, (row * y.shape[2] + column) * channels),
                      channels)
            if is_max:
                greatest_of(window)
            else:
                size = (extent(top, kernel[0], height, padding[0], padding[2], include_pad)
                        * extent(left, kernel[1], width, padding[1], padding[3], include_pad))
                mean_of(window, np.float32(size))


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
def greatest_of(window):
    pool_window(1, window, np.float32(1))


@njit(inline="always")
def mean_of(window, size):
    pool_window(0, window, size)


def prepare_pool2d(op: MaxPool2d | AvgPool2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    is_max = isinstance(op, MaxPool2d)
    include_pad = isinstance(op, AvgPool2d) and op.count_include_pad

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        (x,) = arrays
        return lambda: pool2d(is_max, include_pad, x, y, op.kernel_size, op.stride, op.padding,
                              op.dilation, options.threads)

    name = "max" if is_max else "avg"
    return Step(f"{name}_pool2d_{op.kernel_size[0]}x{op.kernel_size[1]}_f32", bind)


@njit()
def global_avg_pool2d(x, y, threads):
    """x (N, pixels, C) -> y (N, C), by groups of channels."""
    groups = -(-x.shape[2] // CHANNELS_AT_ONCE)
    parallel_for(global_avg_units, x.shape[0] * groups, threads, (x, y, groups))


@njit()
def global_avg_units(thread, first_unit, end_unit, x, y, groups):
    _, pixels, channels = x.shape
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for unit in range(first_unit, end_unit):
        image, first = unit // groups, unit % groups * CHANNELS_AT_ONCE
        mean_of((at(flat_x, image * pixels * channels + first), 1, 0, pixels, channels,
                 at(flat_y, image * channels + first), min(CHANNELS_AT_ONCE, channels - first)),
                np.float32(pixels))


def prepare_global_avg_pool2d(op: GlobalAvgPool2d, inputs: list[TensorSpec], output: TensorSpec,
                              weights: list[Array | None], options: Options) -> Step:
    batch, height, width, channels = known(inputs[0].shape)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        pixels = arrays[0].reshape(batch, height * width, channels)
        flat = y.reshape(batch, count((channels,)))
        return lambda: global_avg_pool2d(pixels, flat, options.threads)

    return Step("global_avg_pool2d_f32", bind)
