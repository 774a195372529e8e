"""Depthwise convolution (one filter per channel), NHWC float32.

There is little arithmetic per loaded value, so loads decide. `depthwise_tile` of microkernels.py
computes PIXELS neighbours of one output row, LANES channels after the other: a weight is loaded
once for all of them, and for the common windows so is each input. Padding costs no copy: lines
outside the image are left out of the window, and so are columns; only those of uncommon windows,
which `depthwise_any` computes, are read from a row of zeros.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..ops import Conv2d, TensorSpec, known
from ..step import Array, Options, Run, Step
from .epilogue import epilogue
from .jit import LANES, njit
from .microkernels import DEPTHWISE_PIXELS as PIXELS
from .microkernels import WINDOWS, Window, depthwise_any, depthwise_tile
from .parallel import parallel_for
from .simd import at

# A thread takes this many channels down all its rows, so that their weights stay in L1.
GROUP = 16 * LANES


class Geometry(NamedTuple):
    """The numbers of a depthwise convolution that its kernel needs."""
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    top: int
    left: int
    dilation_height: int
    dilation_width: int


@njit()
def depthwise2d(x, weight, bias, zeros, y, batch, columns, geometry, low, high, threads):
    """Every output row of every group of channels, shared among the threads.

    x, y: flat NHWC; weight: [taps, padded channels]; bias, zeros: [padded channels];
    columns: made by `cut_columns`; geometry: Geometry's numbers.
    """
    g = Geometry(*geometry)
    rows = batch * g.out_height
    parallel_for(depthwise_units, -(-g.channels // GROUP) * rows, threads, (
        x, weight, bias, zeros, y, rows, columns, g, low, high))


@njit()
def depthwise_units(thread, first_unit, end_unit, x, weight, bias, zeros, y, rows, columns, g, low,
                    high):
    for unit in range(first_unit, end_unit):
        row, first_channel = unit % rows, unit // rows * GROUP
        for tile in range(len(columns)):
            pixels(row, columns[tile], first_channel, min(GROUP, g.channels - first_channel), x,
                   weight, bias, zeros, y, g, low, high)


@njit(inline="always")
def pixels(row, tile, c, count, x, weight, bias, zeros, y, g, low, high):
    """One tile of an output row, counted through the batch, and `count` channels from c on."""
    column, size, number, left = tile
    image, top = row // g.out_height, row % g.out_height * g.stride_height - g.top
    line = -(top // g.dilation_height) if top < 0 else 0    # first and end line inside the image
    end_line = min(g.kernel_height, (g.height - 1 - top) // g.dilation_height + 1)
    source = (image * g.height + top + line * g.dilation_height) * g.width * g.channels + c
    x_line = g.dilation_height * g.width * g.channels
    first = column * g.stride_width - g.left
    padded = len(bias)
    w = at(weight, line * g.kernel_width * padded + c)
    target = at(y, (row * g.out_width + column) * g.channels + c)
    if number >= 0:
        depthwise_tile(number, (
            at(x, source + (first + left) * g.channels), g.channels, end_line - line, x_line, w,
            padded, at(bias, c), target, count, low, high))
    else:
        any_tile(size, (
            at(x, source), first, g.width, g.channels, end_line - line, x_line, at(zeros, 0), w,
            padded, g.kernel_width, g.dilation_width, g.stride_width, at(bias, c), target, count,
            low, high))


@njit(inline="always")
def any_tile(size, arguments):
    """The micro-kernel of the wanted size, which it must know when it is compiled."""
    if size == PIXELS:
        depthwise_any(PIXELS, arguments)
    else:
        depthwise_any(1, arguments)


def cut_columns(g: Geometry) -> Array:
    """Tiles [.., 4] of an output row: first column, pixels (PIXELS or 1), number of its window in
    WINDOWS (-1: none), columns of the window that are outside on the left. The last tile moves back
    over its neighbour."""
    size = PIXELS if g.out_width >= PIXELS else 1
    tiles = []
    for start in range(0, g.out_width, size):
        column = min(start, g.out_width - size)
        first = column * g.stride_width - g.left
        end = first + (size - 1) * g.stride_width + g.kernel_width
        window = Window(g.kernel_width, g.stride_width, max(-first, 0), max(end - g.width, 0))
        fixed = size == PIXELS and g.dilation_width == 1 and window in WINDOWS
        tiles.append((column, size, WINDOWS.index(window) if fixed else -1, window.left))
    return np.array(tiles, np.int64)


def fits(op: Conv2d, weight_shape: tuple[int, ...], channels: int) -> bool:
    """One filter per channel, and one channel per filter."""
    return op.groups == channels == weight_shape[0] and weight_shape[3] == 1


def prepare_depthwise(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec, weight: Array,
                      bias: Array | None, options: Options) -> Step:
    """Inputs x, weight (C, KH, KW, 1), [bias]."""
    batch, height, width, channels = known(inputs[0].shape)
    _, out_height, out_width, _ = known(output.shape)
    kh, kw = weight.shape[1:3]
    g = Geometry(height, width, channels, out_height, out_width, kh, kw, *op.stride,
                 *op.padding[:2], *op.dilation)
    padding = -channels % LANES

    def pack(w: Array) -> Array:
        return np.pad(w.reshape(channels, -1).T, ((0, 0), (0, padding))).ravel()

    packed = options.pack(weight, "depthwise", pack)
    packed_bias = np.pad(np.zeros(channels, np.float32) if bias is None else bias, (0, padding))
    zeros, columns, geometry = np.zeros(LANES, np.float32), cut_columns(g), tuple(g)
    low, high, finish, suffix = epilogue(op.activation)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        x, flat = arrays[0].reshape(-1), y.reshape(-1)

        def run() -> None:
            depthwise2d(x, packed, packed_bias, zeros, flat, batch, columns, geometry,
                        low, high, options.threads)
            finish(flat, options.threads)
        return run

    return Step(f"depthwise_{kh}x{kw}_f32_{PIXELS}x{LANES}{suffix}", bind)
