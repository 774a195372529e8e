"""Convolution of stride 1 from pixels in shared memory: when it serves, its strips, its weights."""
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ...ops import Conv2d, TensorSpec, count, known
from ...step import Array, Step, weight_and_bias
from .. import conv_halo, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..conv_halo import ARCH, CHANNELS, LEAST_TAPS, REACH, HaloTile
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import Grid
from .weights import stored

DTYPES = ("float16", "bfloat16")
TILES = (
    HaloTile(256, 64, 1, 4, 2),
    HaloTile(128, 64, 2, 3, 2),
    HaloTile(256, 128, 2, 4, 1),
    HaloTile(128, 128, 2, 3, 2),
)
MOST_TAPS = 5               # along either axis
MOST_WASTE = 1.2            # sums that are computed, for each of y
LEAST_BLOCKS = 2            # for each multiprocessor


def kernel_of(dtype: str, tile: HaloTile, activation: str) -> Kernel:
    name = (f"conv_halo_{vector.short(dtype)}_{tile.block_m}x{tile.block_n}x{CHANNELS}"
            f"_b{tile.buffers}_s{tile.stages}_{activation}")
    return Kernel(name, conv_halo.make, (dtype, tile, activation), conv_halo.SIGNATURE,
                  tile.threads, tile.shared_bytes, ARCH, tile.blocks)


def kernels(dtype: str) -> list[Kernel]:
    return [kernel_of(dtype, tile, "clip") for tile in TILES]


class Strips(NamedTuple):
    """How the images of a layer lie in rows of positions: see conv_halo.py."""
    number: int
    columns: int            # of y, in each
    pitch: int
    lines: int              # of an image
    positions: int          # of all images
    reach: int              # from the first tap of an output to its last

    @classmethod
    def of(cls, op: Conv2d, inputs: Sequence[TensorSpec], output: TensorSpec) -> Strips:
        """The widest whose reach fits a tile."""
        _, kh, kw, _ = known(inputs[1].shape)
        batch, out_height, out_width, _ = known(output.shape)
        top, left, bottom, right = op.padding
        # What pads the end of a line of the whole image pads the beginning of the next one, too,
        # and so do the lines between two images.
        lines = out_height + kh - 1 - min(top, bottom)
        number, columns, pitch = 1, out_width, out_width + kw - 1 - min(left, right)
        while (kh - 1) * pitch + kw - 1 > REACH:
            number += 1
            columns = -(-out_width // number)
            pitch = columns + kw - 1
        return cls(number, columns, pitch, lines, batch * lines * pitch, (kh - 1) * pitch + kw - 1)

    def grid(self, tile: HaloTile, out_channels: int) -> Grid:
        n_tiles = -(-out_channels // tile.block_n)
        return -(-self.positions // tile.block_m) * n_tiles, self.number, 1


def fits(op: Conv2d, inputs: Sequence[TensorSpec], dtype: str) -> bool:
    """Whether some tile can compute the layer."""
    out_channels, kh, kw, channels = known(inputs[1].shape)
    top, left, bottom, right = op.padding
    return (dtype in DTYPES and op.stride == op.dilation == (1, 1) and op.groups == 1
            and kh * kw >= LEAST_TAPS and max(kh, kw) <= MOST_TAPS
            and max(top, bottom) < kh and max(left, right) < kw
            and channels % CHANNELS == 0 and out_channels % vector.lanes(dtype) == 0)


def choose(op: Conv2d, inputs: Sequence[TensorSpec], output: TensorSpec, options: CudaOptions
           ) -> HaloTile | None:
    """The tile of a layer that is large enough for it, and of which the strips waste little."""
    if options.arch != ARCH or not fits(op, inputs, options.dtype):
        return None
    strips, sums = Strips.of(op, inputs, output), count(output.shape)
    channels, out_channels = known(inputs[0].shape)[3], known(output.shape)[3]
    block_n = 64 if out_channels <= 64 else 128
    for tile in TILES:
        blocks = prod(strips.grid(tile, out_channels))
        if (tile.block_n == block_n and (channels == CHANNELS or tile.buffers == 2)
                and blocks >= LEAST_BLOCKS * options.multiprocessors
                and blocks * tile.block_m * block_n < MOST_WASTE * sums):
            return tile
    return None


def prepare_conv_halo(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: CudaOptions, tile: HaloTile) -> Step:
    """Inputs x, weight (O, KH, KW, C), [bias], [residual]; weight and bias are constants."""
    weight, bias = weight_and_bias(op.kind, weights)
    _, height, width, channels = known(inputs[0].shape)
    _, kh, kw, _ = known(inputs[1].shape)
    _, out_height, out_width, out_channels = known(output.shape)
    strips, dtype = Strips.of(op, inputs, output), options.dtype
    activation, low, high = activation_of(op.activation)
    kernel = kernel_of(dtype, tile, activation)
    n_tiles = -(-out_channels // tile.block_n)

    def packing(w: Array) -> Array:
        return options.upload(stored(pack(w, tile.block_n, n_tiles), dtype))

    packed = options.pack(weight, f"conv_halo_{dtype}_{tile.block_n}", packing)
    padded = np.zeros(n_tiles * tile.block_n, np.float32)
    if bias is not None:
        padded[:out_channels] = bias
    packed_bias = options.upload(padded)
    rounds = -(-(tile.block_m + strips.reach) // tile.round_rows)
    grid = strips.grid(tile, out_channels)
    numbers = (low, high, strips.positions, height, width, channels // vector.lanes(dtype),
               out_height, out_width, out_channels, *op.padding[:2], strips.columns, kh * kw, kw,
               rounds, *divisor(n_tiles), *divisor(strips.pitch), *divisor(strips.lines))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        added = (arrays[3], 1) if len(arrays) > 3 else (arrays[0], 0)
        return [Launch(kernel, grid, (arrays[0], packed, packed_bias, *added, y, *numbers))]

    return Step(kernel.name, bind)


def pack(weight: Array, block_n: int, n_tiles: int) -> Array:
    """float32 [tiles along n][channels / 64][taps][block_n][64], zeros beyond the weights."""
    out_channels, kh, kw, channels = weight.shape
    rows = np.zeros((n_tiles * block_n, kh * kw, channels), np.float32)
    rows[:out_channels] = weight.reshape(out_channels, kh * kw, channels)
    tiles = rows.reshape(n_tiles, block_n, kh * kw, channels // CHANNELS, CHANNELS)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4))
