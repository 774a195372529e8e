"""Convolution of stride 1 and 64 channels from pixels in shared memory: when it serves, its strips,
its weights."""
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ...axes import pixel_step
from ...ops import Conv2d, Pair, TensorSpec, count, known
from ...step import Array, Step, weight_and_bias
from .. import conv_halo, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..conv_halo import ARCH, CHANNELS, OUTPUTS, REACH, RUN, HaloTile
from ..conv_sums import spread
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import Grid, part_unit
from .weights import stored

DTYPES = ("float16", "bfloat16")
TILE = HaloTile(256, 3, 2, 2)
LEAST_TAPS = 9              # so many that copying patches takes most of the time
MOST_TAPS = 5               # along either axis
MOST_WASTE = 1.2            # sums that are computed, for each of y
LEAST_BLOCKS = 2            # for each multiprocessor


def kernel_of(dtype: str, tile: HaloTile, kernel: Pair, activation: str) -> Kernel:
    name = (f"conv_halo_{vector.short(dtype)}_{tile.block_m}x{OUTPUTS}x{CHANNELS}"
            f"_{kernel[0]}x{kernel[1]}_t{tile.taps}_s{tile.stages}_{activation}")
    return Kernel(name, conv_halo.make, (dtype, tile, kernel, activation), conv_halo.SIGNATURE,
                  tile.threads, tile.shared_bytes, ARCH, tile.blocks)


def kernels(dtype: str) -> list[Kernel]:
    return [kernel_of(dtype, TILE, (3, 3), "clip")]


class Strips(NamedTuple):
    """How the images of a layer lie in rows of positions: see conv_halo.py."""
    number: int
    columns: int            # of y, in each
    pitch: int
    lines: int              # of an image
    positions: int          # of all images

    @classmethod
    def of(cls, op: Conv2d, inputs: Sequence[TensorSpec], output: TensorSpec) -> Strips:
        """The widest whose taps reach no further than a tile holds pixels."""
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
        return cls(number, columns, pitch, lines, batch * lines * pitch)

    def grid(self, tile: HaloTile, out_channels: int) -> Grid:
        n_tiles = -(-out_channels // OUTPUTS)
        return -(-self.positions // tile.block_m) * n_tiles, self.number, 1

    def further(self, positions: int, height: int, width: int) -> tuple[int, int, int]:
        """So many positions as (lines, columns, pixels of x), the lines of images left out of the
        first."""
        lines, columns = divmod(positions, self.pitch)
        images, lines = divmod(lines, self.lines)
        return lines, columns, (images * height + lines) * width + columns


def fits(op: Conv2d, inputs: Sequence[TensorSpec], dtype: str) -> bool:
    """Whether the kernel can compute the layer."""
    out_channels, kh, kw, channels = known(inputs[1].shape)
    top, left, bottom, right = op.padding
    return (dtype in DTYPES and op.stride == op.dilation == (1, 1) and op.groups == 1
            and kh * kw >= LEAST_TAPS and max(kh, kw) <= MOST_TAPS
            and max(top, bottom) < kh and max(left, right) < kw
            and channels == CHANNELS and out_channels % RUN == 0)


def serves(op: Conv2d, inputs: Sequence[TensorSpec], output: TensorSpec, options: CudaOptions
           ) -> bool:
    """Whether a layer is large enough for it, and the strips waste little. Of more outputs than a
    block computes it was no faster than conv_wgmma.py."""
    if options.arch != ARCH or not fits(op, inputs, options.dtype):
        return False
    out_channels = known(output.shape)[3]
    blocks = prod(Strips.of(op, inputs, output).grid(TILE, out_channels))
    sums = blocks * TILE.block_m * OUTPUTS
    return (out_channels <= OUTPUTS and blocks >= LEAST_BLOCKS * options.multiprocessors
            and sums < MOST_WASTE * count(output.shape))


def prepare_conv_halo(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: CudaOptions, tile: HaloTile = TILE
                      ) -> Step:
    """Inputs x, weight (O, KH, KW, C), [bias], [residual]; weight and bias are constants."""
    weight, bias = weight_and_bias(op.kind, weights)
    batch, height, width, _ = known(inputs[0].shape)
    out_channels, kh, kw, _ = known(inputs[1].shape)
    strips, dtype = Strips.of(op, inputs, output), options.dtype
    activation, low, high = activation_of(op.activation)
    kernel = kernel_of(dtype, tile, (kh, kw), activation)
    n_tiles = -(-out_channels // OUTPUTS)

    packed = options.pack(weight, f"conv_halo_{dtype}",
                          lambda w: options.upload(stored(pack(w, n_tiles), dtype)))
    padded = np.zeros(n_tiles * OUTPUTS, np.float32)
    if bias is not None:
        padded[:out_channels] = bias
    packed_bias = options.upload(padded)
    grid = strips.grid(tile, out_channels)
    sizes = low, high, batch, height, width, *known(output.shape)[1:]
    numbers = (*op.padding[:2], strips.columns, *strips.further(tile.round_rows, height, width),
               *divisor(n_tiles), *divisor(strips.pitch), *divisor(strips.lines))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        added = (arrays[3], 1) if len(arrays) > 3 else (arrays[0], 0)
        return [Launch(kernel, grid, (arrays[0], packed, packed_bias, *added, y, *sizes,
                                      pixel_step(y), *numbers))]

    # The kernel walks through y and residual in the same steps.
    return Step(kernel.name, bind, strided=0 if len(inputs) > 3 else part_unit(dtype))


def pack(weight: Array, n_tiles: int) -> Array:
    """float32 [tiles along n][taps][64 outputs in the order of columns][64 channels], zeros beyond
    the weights."""
    out_channels, kh, kw, channels = weight.shape
    rows = np.zeros((n_tiles * OUTPUTS, kh * kw, channels), np.float32)
    rows[:out_channels] = weight.reshape(out_channels, kh * kw, channels)
    tiles = spread(rows.reshape(len(rows), -1), RUN).reshape(n_tiles, OUTPUTS, kh * kw, channels)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3))
