"""Max, average and global average pooling, NHWC float32.

Bound by memory: the innermost loop runs over the channels of one tap, contiguous in x and y, and
becomes vector code. Windows are clipped to the image once per output pixel.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops import AvgPool2d, GlobalAvgPool2d, MaxPool2d, TensorSpec, count, known
from ..step import Array, Options, Run, Step
from .jit import njit
from .parallel import parallel_for

CHANNELS_AT_ONCE = 64       # of global average pooling: four AVX-512 vectors of sums


@njit()
def pool2d(is_max, include_pad, x, y, kernel, stride, padding, dilation, threads):
    """x (N, H, W, C) -> y (N, OH, OW, C), by rows of y; padding is (top, left, bottom, right)."""
    parallel_for(pool_rows, y.shape[0] * y.shape[1], threads, (
        is_max, include_pad, x, y, kernel, stride, padding, dilation))


@njit()
def pool_rows(thread, first_row, end_row, is_max, include_pad, x, y, kernel, stride, padding,
              dilation):
    height, width = x.shape[1], x.shape[2]
    for row in range(first_row, end_row):
        image, top = row // y.shape[1], row % y.shape[1] * stride[0] - padding[0]
        for column in range(y.shape[2]):
            left = column * stride[1] - padding[1]
            out = y[image, row % y.shape[1], column]
            out[:] = -np.inf if is_max else 0
            for h in range(top, top + kernel[0] * dilation[0], dilation[0]):
                for w in range(left, left + kernel[1] * dilation[1], dilation[1]):
                    if 0 <= h < height and 0 <= w < width:
                        if is_max:
                            keep_greatest(out, x[image, h, w])
                        else:
                            add_to(out, x[image, h, w])
            if not is_max:
                size = (extent(top, kernel[0], height, padding[0], padding[2], include_pad)
                        * extent(left, kernel[1], width, padding[1], padding[3], include_pad))
                divide(out, np.float32(size))


@njit()
def extent(start, length, size, before, after, include_pad):
    """How many elements of a window count along one axis: those in the image, or those in the
    image and its padding; what ceil_mode lets hang over beyond never counts."""
    low, high = (-before, size + after) if include_pad else (0, size)
    return min(start + length, high) - max(start, low)


@njit()
def keep_greatest(out, x):
    """NaN counts as greatest, and stays."""
    for c in range(len(out)):
        out[c] = x[c] if x[c] > out[c] or x[c] != x[c] else out[c]


@njit()
def add_to(out, x):
    for c in range(len(out)):
        out[c] += x[c]


@njit()
def divide(out, divisor):
    for c in range(len(out)):
        out[c] /= divisor


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
    for unit in range(first_unit, end_unit):
        image, first = unit // groups, unit % groups * CHANNELS_AT_ONCE
        end = min(first + CHANNELS_AT_ONCE, x.shape[2])
        out = y[image, first:end]
        out[:] = 0
        for pixel in range(x.shape[1]):
            add_to(out, x[image, pixel, first:end])
        divide(out, np.float32(x.shape[1]))


def prepare_global_avg_pool2d(op: GlobalAvgPool2d, inputs: list[TensorSpec], output: TensorSpec,
                              weights: list[Array | None], options: Options) -> Step:
    batch, height, width, channels = known(inputs[0].shape)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        pixels = arrays[0].reshape(batch, height * width, channels)
        flat = y.reshape(batch, count((channels,)))
        return lambda: global_avg_pool2d(pixels, flat, options.threads)

    return Step("global_avg_pool2d_f32", bind)
