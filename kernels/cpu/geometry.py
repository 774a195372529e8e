"""The numbers of a convolution that its kernel needs, as host code writes them down for it; sizes
in elements. Kernels are called with plain tuples of them."""
from __future__ import annotations

import itertools
from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """Of any convolution, depthwise ones too, or of a Linear layer: an image of one row."""
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    top: int
    left: int
    dilation_height: int
    dilation_width: int
    per_group: int          # input channels of one group

    @property
    def depth(self) -> int:
        """Length of the sum behind each output."""
        return self.kernel_height * self.kernel_width * self.per_group


class WinogradGeometry(NamedTuple):
    """Of a Winograd convolution."""
    tile: int               # m
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    top: int
    left: int
    tiles_high: int         # tiles of one image
    tiles_wide: int
    tiles: int              # of the whole batch
    depth: int              # channels, padded to whole vectors
    rows: int               # tiles of a micro-kernel; the last of a block may have HALF_ROWS
    block_tiles: int        # whole micro-kernels
    group: int              # output channels, a multiple of BLOCK

    @property
    def reach(self) -> int:
        """Edge of the inputs of one tile."""
        return self.tile + 2

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the patch, lines, inputs and products of a thread end in its scratch, in floats."""
        positions = self.reach ** 2
        sizes = (positions * self.depth, positions * max(self.depth, self.group),
                 positions * self.block_tiles * self.depth,
                 positions * self.block_tiles * self.group)
        return tuple(itertools.accumulate(sizes))
