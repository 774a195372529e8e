"""Convolutions as the kernels of conv_gemm.py see them: whole chunks, tiles of weights, numbers."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...ops import Pair
from ...step import Array
from .. import conv_fold
from ..compiler import Kernel
from ..conv_gemm import MOST_TAPS, Tile
from ..conv_sums import spread
from ..index import divisor
from ..launch import Launch
from .arguments import blocks


class Conv(NamedTuple):
    """The convolution that a kernel computes, after folding; channels and sizes in elements."""
    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel: Pair
    stride: Pair
    top: int
    left: int
    dilation: Pair
    groups: int
    fold: int = 0           # columns that were folded into one, 0 where x is read as it is
    fold_left: int = 0      # padding on the left that folding has made real

    @property
    def pixels(self) -> int:
        return self.batch * self.out_height * self.out_width

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_out(self) -> int:
        return self.out_channels // self.groups

    @property
    def depth(self) -> int:
        """Length of the sum behind each output."""
        return self.kernel[0] * self.kernel[1] * self.group_channels

    @property
    def pointwise(self) -> bool:
        """Whether a pixel of y is made of the same pixel of x."""
        return (self.kernel == self.stride == (1, 1) and self.top == self.left == 0
                and (self.height, self.width) == (self.out_height, self.out_width))


def problem(conv: Conv, dtype: str) -> str:
    """All that decides which choice is fastest on a GPU, as text: see tuned.py."""
    return (f"{dtype} {conv.batch}x{conv.height}x{conv.width}x{conv.channels} to "
            f"{conv.out_height}x{conv.out_width}x{conv.out_channels} by "
            f"{conv.kernel[0]}x{conv.kernel[1]} stride {conv.stride[0]}x{conv.stride[1]} from "
            f"-{conv.top}x-{conv.left} dilation {conv.dilation[0]}x{conv.dilation[1]} groups "
            f"{conv.groups}")


class Cut(NamedTuple):
    """How the sum over k and the output channels are cut up: slices of `row` elements, tiles of
    block_n channels, splits of split_slices slices."""
    row: int
    slices: int
    splits: int
    split_slices: int
    n_tiles: int
    padded_out: int

    @classmethod
    def of(cls, conv: Conv, tile: Tile, lanes: int, splits: int) -> Cut:
        row = tile.chunks * lanes
        slices = -(-conv.depth // row)
        split_slices = -(-slices // splits)
        n_tiles = -(-conv.group_out // tile.block_n)
        return cls(row, slices, -(-slices // split_slices), split_slices, n_tiles,
                   n_tiles * tile.block_n)


class Norm(NamedTuple):
    """A batch norm of x. before: one of conv_norm.BEFORE; scale, shift: float32, a channel each."""
    before: str
    scale: Array
    shift: Array

    def packed(self, cut: Cut) -> Array:
        """float32 [pairs of channels][2 scales, 2 shifts], zeros beyond the channels."""
        numbers = np.zeros((2, cut.slices * cut.row), np.float32)
        numbers[:, :len(self.scale)] = self.scale, self.shift
        return np.ascontiguousarray(numbers.reshape(2, -1, 2).swapaxes(0, 1))


def patched(conv: Conv) -> Conv:
    """The same convolution, of which a line under the kernel is one pixel where kernels lie side by
    side, as those of a ViT's patches do. Where these have more rows than the kernels' bit masks,
    a part of the rows counts as columns: in memory row 1 is as far from row 0 as is the pixel of a
    line twice as long that is a whole line further."""
    (kh, kw), (top, left) = conv.kernel, (conv.top, conv.left)
    if (conv.groups > 1 or left or conv.dilation != (1, 1) or kw != conv.stride[1]
            or conv.width != conv.out_width * kw):
        return conv
    width = conv.out_width
    conv = conv._replace(width=width, channels=conv.channels * kw, kernel=(kh, 1),
                         stride=(conv.stride[0], 1))
    rows, columns = MOST_TAPS
    parts = next((n for n in range(1, columns + 1) if kh % n == 0 and kh // n <= rows), 1)
    if parts == 1 or top or kh != conv.stride[0] or conv.height != conv.out_height * kh:
        return conv
    return conv._replace(height=conv.height // parts, width=width * parts,
                         kernel=(kh // parts, parts), stride=(kh // parts, 1), dilation=(1, width))


def folded(conv: Conv, lanes: int) -> Conv:
    """The same convolution over whole chunks of `lanes` elements: see conv_fold.py."""
    if conv.group_channels % lanes == 0:
        return conv
    candidates = [_fold(conv, lanes, 1)]
    if conv.groups == 1 and conv.dilation[1] == 1 and conv.stride[1] > 1:
        candidates.append(_fold(conv, lanes, conv.stride[1]))
    return min(candidates, key=lambda candidate: candidate.depth)


def _fold(conv: Conv, lanes: int, fold: int) -> Conv:
    per_group = -(-conv.group_channels * fold // lanes) * lanes
    if fold == 1:
        return conv._replace(channels=per_group * conv.groups, fold=1)
    columns = -(-conv.kernel[1] // fold)
    return conv._replace(width=conv.out_width + columns - 1, channels=per_group,
                         kernel=(conv.kernel[0], columns), stride=(conv.stride[0], 1), left=0,
                         fold=fold, fold_left=conv.left)


def fold_kernel(size: int) -> Kernel:
    """size: bytes of an element."""
    bits = f"bits{8 * size}"
    return Kernel(f"conv_fold_{bits}", conv_fold.make, (bits,), conv_fold.SIGNATURE,
                  conv_fold.THREADS)


def fold_launch(plain: Conv, conv: Conv, lanes: int, x: Array, image: Array) -> Launch:
    chunks = conv.channels // lanes
    count = conv.batch * conv.height * conv.width * chunks
    return Launch(fold_kernel(16 // lanes), blocks(count, conv_fold.THREADS),
                  (x, image, count, plain.width * plain.channels, plain.channels,
                   plain.group_channels, plain.group_channels * conv.fold, conv.fold_left,
                   conv.fold, *divisor(chunks), *divisor(conv.width),
                   *divisor(conv.group_channels)))


def pack(weight: Array, plain: Conv, conv: Conv, tile: Tile, cut: Cut, lanes: int,
         tensor_cores: bool) -> Array:
    """float32 [groups][tiles along n][slices][block_n][row], zeros beyond the weights: the channels
    that tensor cores want at each column. CUDA cores want k first, the last two swapped. A slice of
    zeros ends it, for a kernel may load one slice too many.

    lanes: elements of y in 16 bytes
    """
    fold, (kh, kw) = max(1, conv.fold), conv.kernel
    taps = np.zeros((plain.out_channels, kh, kw * fold, plain.group_channels), np.float32)
    taps[:, :, :plain.kernel[1]] = weight.reshape(plain.out_channels, *plain.kernel, -1)
    columns = np.zeros((plain.out_channels, kh, kw, conv.group_channels), np.float32)
    columns[..., :fold * plain.group_channels] = taps.reshape(plain.out_channels, kh, kw, -1)
    rows = np.zeros((plain.groups, cut.padded_out, cut.slices * cut.row), np.float32)
    rows[:, :plain.group_out, :conv.depth] = columns.reshape(plain.groups, plain.group_out, -1)
    if tensor_cores:
        rows = spread(rows, lanes)
    tiles = rows.reshape(plain.groups * cut.n_tiles, tile.block_n, cut.slices, cut.row)
    tiles = tiles.transpose(0, 2, 1, 3) if tensor_cores else tiles.transpose(0, 2, 3, 1)
    return np.append(tiles.reshape(-1), np.zeros(tile.block_n * cut.row, np.float32))


def pack_bias(bias: Array | None, conv: Conv, cut: Cut, padded: bool) -> Array:
    """float32 [groups][padded_out]; not padded, for the reduction of planes, which knows no groups,
    all of y's channels one after the other."""
    packed = np.zeros((conv.groups, cut.padded_out), np.float32)
    if bias is not None:
        packed[:, :conv.group_out] = bias.reshape(conv.groups, conv.group_out)
    return packed if padded else np.ascontiguousarray(packed[:, :conv.group_out])


def arguments(conv: Conv, lanes: int, cut: Cut, x_step: int) -> tuple[int, ...]:
    """The numbers of conv_gemm.SIGNATURE behind the step of y; steps that go back wrap around.
    x_step: elements from a pixel of x to the next."""
    chunks, group_chunks = x_step // lanes, conv.group_channels // lanes
    next_column = conv.dilation[1] * chunks - group_chunks
    next_row = (conv.dilation[0] * conv.width - conv.kernel[1] * conv.dilation[1]) * chunks
    return (conv.group_out, cut.padded_out, int(conv.group_out % lanes == 0), int(conv.pointwise),
            chunks, conv.height, conv.width, *conv.stride, conv.top, conv.left, *conv.dilation,
            conv.kernel[0], next_column % (1 << 32), next_row % (1 << 32), cut.slices,
            cut.split_slices, *divisor(cut.n_tiles), *divisor(conv.out_width),
            *divisor(conv.out_height), *divisor(group_chunks), *divisor(conv.kernel[1]))
