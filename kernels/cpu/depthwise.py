"""Depthwise convolution (one filter per channel), NHWC float32.

There is little arithmetic per loaded value, so loads decide. `depthwise_tile` of microkernels.py
computes PIXELS neighbours of one output row, LANES channels after the other: a weight is loaded
once for all of them, and for the common windows so is each input. Padding costs no copy: lines
outside the image are left out of the window, columns outside it are read from a row of zeros.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..ops import Conv2d, TensorSpec, known
from ..step import Array, Options, Run, Step
from .epilogue import epilogue
from .jit import LANES, njit
from .microkernels import depthwise_tile
from .parallel import parallel_for
from .simd import at

PIXELS = 7      # divides the map sizes 112 .. 7; 7 accumulators hide the latency of an FMA
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
def depthwise2d(x, weight, bias, zeros, y, batch, geometry, low, high, threads):
    """Every output row of every group of channels, shared among the threads.

    x, y: flat NHWC; weight: [taps, padded channels]; bias, zeros: [padded channels];
    geometry: Geometry's numbers.
    """
    g = Geometry(*geometry)
    rows = batch * g.out_height
    parallel_for(depthwise_units, -(-g.channels // GROUP) * rows, threads, (
        x, weight, bias, zeros, y, rows, g, low, high))


@njit()
def depthwise_units(thread, first_unit, end_unit, x, weight, bias, zeros, y, rows, g, low, high):
    for unit in range(first_unit, end_unit):
        first_channel = unit // rows * GROUP
        end_channel = min(first_channel + GROUP, g.channels)
        column = 0
        while column < g.out_width:
            size = PIXELS if g.out_width >= PIXELS else 1
            column = min(column, g.out_width - size)    # the last tile moves back
            pixels(unit % rows, column, size, first_channel, end_channel, x, weight, bias,
                   zeros, y, g, low, high)
            column += size


@njit()
def pixels(row, column, size, first_channel, end_channel, x, weight, bias, zeros, y, g, low, high):
    """`size` neighbours (PIXELS or 1) in an output row, counted through the batch."""
    image, top = row // g.out_height, row % g.out_height * g.stride_height - g.top
    line = -(top // g.dilation_height) if top < 0 else 0    # first and end line inside the image
    end_line = min(g.kernel_height, (g.height - 1 - top) // g.dilation_height + 1)
    source = (image * g.height + top + line * g.dilation_height) * g.width * g.channels
    x_line = g.dilation_height * g.width * g.channels
    left = column * g.stride_width - g.left
    target = (row * g.out_width + column) * g.channels
    taps, padded, c = g.kernel_width, len(bias), first_channel
    inside = left >= 0 and left + (size - 1) * g.stride_width + taps <= g.width
    one_tile(size, (taps, g.stride_width, g.dilation_width), inside, (
        at(x, source + c), left, g.width, g.channels, end_line - line, x_line, at(zeros, 0),
        at(weight, line * taps * padded + c), padded, taps, g.dilation_width, g.stride_width,
        at(bias, c), at(y, target + c), end_channel - c, low, high))


def _tile(size, taps, stride, inside):
    """A function of its own for each micro-kernel: side by side in one, LLVM would keep the
    addresses of all of them at hand and spill, which took 48 ns a tile instead of 31."""
    @njit()
    def tile(arguments):
        depthwise_tile(size, taps, stride, inside, arguments)
    return tile


tile_3_1, inner_3_1 = _tile(PIXELS, 3, 1, 0), _tile(PIXELS, 3, 1, 1)
tile_3_2, inner_3_2 = _tile(PIXELS, 3, 2, 0), _tile(PIXELS, 3, 2, 1)
tile_5_1, inner_5_1 = _tile(PIXELS, 5, 1, 0), _tile(PIXELS, 5, 1, 1)
tile_5_2, inner_5_2 = _tile(PIXELS, 5, 2, 0), _tile(PIXELS, 5, 2, 1)
tile_any, one_pixel = _tile(PIXELS, 0, 0, 0), _tile(1, 0, 0, 0)


@njit()
def one_tile(size, window, inside, arguments):
    """The micro-kernel made for this (taps, stride, dilation) where there is one, else the
    general one; `inside`: no column of the tile's is outside the image."""
    if size == 1:
        one_pixel(arguments)
    elif window == (3, 1, 1):
        if inside:
            inner_3_1(arguments)
        else:
            tile_3_1(arguments)
    elif window == (3, 2, 1):
        if inside:
            inner_3_2(arguments)
        else:
            tile_3_2(arguments)
    elif window == (5, 1, 1):
        if inside:
            inner_5_1(arguments)
        else:
            tile_5_1(arguments)
    elif window == (5, 2, 1):
        if inside:
            inner_5_2(arguments)
        else:
            tile_5_2(arguments)
    else:
        tile_any(arguments)


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
    zeros, geometry = np.zeros(LANES, np.float32), tuple(g)
    low, high, finish, suffix = epilogue(op.activation)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        x, flat = arrays[0].reshape(-1), y.reshape(-1)

        def run() -> None:
            depthwise2d(x, packed, packed_bias, zeros, flat, batch, geometry, low, high,
                        options.threads)
            finish(flat, options.threads)
        return run

    return Step(f"depthwise_{kh}x{kw}_f32_{PIXELS}x{LANES}{suffix}", bind)
