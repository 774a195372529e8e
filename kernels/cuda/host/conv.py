"""Convolution on CUDA: which kernel, which grid, and how the weights are packed."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...ops import Conv2d, Pair, TensorSpec, Unary, known
from ...step import Array, Step
from .. import conv_fold, conv_mma, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..conv_mma import Tile
from ..index import divisor
from ..launch import CudaOptions, Launch
from . import depthwise
from .arguments import blocks, check_sizes
from .conv_choice import TILES, choose
from .splitk import reduction

MMA_DTYPES = ("float16", "bfloat16", "tf32")


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
    def depth(self) -> int:
        """Length of the sum behind each output."""
        return self.kernel[0] * self.kernel[1] * self.group_channels


def conv_kernel(dtype: str, tile: Tile, activation: str, partial: bool) -> Kernel:
    depth = tile.row_bytes // vector.STORAGE[conv_mma.STORED_AS[dtype]].bytes
    name = (f"conv_mma_{conv_mma.SHORT[dtype]}_{tile.block_m}x{tile.block_n}x{depth}"
            f"_s{tile.stages}_{'splitk' if partial else activation}")
    return Kernel(name, conv_mma.make, (dtype, tile, activation, partial), conv_mma.SIGNATURE,
                  tile.threads, tile.shared_bytes, "sm_80")


def fold_kernel(dtype: str) -> Kernel:
    bits = f"bits{8 * vector.STORAGE[conv_mma.STORED_AS[dtype]].bytes}"
    return Kernel(f"conv_fold_{bits}", conv_fold.make, (bits,), conv_fold.SIGNATURE,
                  conv_fold.THREADS)


def kernels(dtype: str) -> list[Kernel]:
    """All tiles, whole and split, for the activations that are compiled in; SiLU for the rest."""
    if dtype not in MMA_DTYPES:
        return []
    return [*(conv_kernel(dtype, tile, "clip", partial) for tile in TILES
              for partial in (False, True)),
            *(conv_kernel(dtype, tile, "silu", False) for tile in TILES), fold_kernel(dtype)]


def prepare_conv2d(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: CudaOptions, tile: Tile | None = None,
                   splits: int | None = None) -> Step:
    """Inputs x, weight (O, KH, KW, C / groups), [bias], [residual]; weight, bias are constants.

    tile and splits force the choice that `choose` makes otherwise. ValueError for tensors beyond
    32-bit indices, weights that are not constant, and kernels of more than 15 x 16 taps.
    """
    if depthwise.fits(op, inputs):
        return depthwise.prepare_depthwise(op, inputs, output, weights, options)
    if options.dtype not in MMA_DTYPES:
        raise ValueError(f"Conv2d: there is no tensor-core kernel for dtype {options.dtype!r}; "
                         f"use one of {MMA_DTYPES}")
    weight, bias = weights[1], weights[2] if len(weights) > 2 else None
    if weight is None or (len(inputs) > 2 and bias is None):
        raise ValueError("Conv2d: weight and bias must be constants of the network")
    check_sizes(op.kind, inputs[0], output)
    batch, height, width, channels = known(inputs[0].shape)
    _, out_height, out_width, out_channels = known(output.shape)
    plain = Conv(batch, height, width, channels, out_height, out_width, out_channels,
                 (weight.shape[1], weight.shape[2]), op.stride, *op.padding[:2], op.dilation,
                 op.groups)
    return prepare_mma(plain, op.activation, weight, bias, options, tile, splits)


def prepare_mma(plain: Conv, activation: Unary | None, weight: Array, bias: Array | None,
                options: CudaOptions, tile: Tile | None = None, splits: int | None = None) -> Step:
    """The step of a tensor-core convolution; weight: any shape that OHWI can be reshaped to."""
    dtype = options.dtype
    stored_as = conv_mma.STORED_AS[dtype]
    lanes = vector.lanes(stored_as)
    conv = folded(plain, lanes)
    if any(k > most for k, most in zip(conv.kernel, conv_mma.MOST_TAPS, strict=True)):
        raise ValueError(f"Conv2d: a kernel of {plain.kernel} is too large for the tensor-core "
                         f"convolution, which takes {conv_mma.MOST_TAPS}; run this network on the "
                         f"CPU")
    group_out = conv.out_channels // conv.groups
    if tile is None or splits is None:
        tile, splits = choose(conv.pixels, group_out, conv.depth, conv.groups, dtype, options,
                              tile, splits)
    row = tile.row_bytes // vector.STORAGE[stored_as].bytes
    slices = -(-conv.depth // row)
    split_slices = -(-slices // splits)
    splits = -(-slices // split_slices)
    n_tiles = -(-group_out // tile.block_n)
    padded_out = n_tiles * tile.block_n
    name, low, high = activation_of(activation)
    kernel = conv_kernel(dtype, tile, name if splits == 1 else "clip", splits > 1)

    packed = options.pack(weight, f"conv_mma_{dtype}_{tile.block_n}x{row}_{plain.kernel}"
                                  f"_{conv.fold}",
                          lambda w: options.upload(pack(w, plain, conv, padded_out, slices * row,
                                                        dtype)))
    biases = np.zeros((conv.groups, padded_out), np.float32)
    if bias is not None:
        biases[:, :group_out] = bias.reshape(conv.groups, group_out)
    # The reduction of a split sum knows no groups.
    packed_bias = options.upload(biases if splits == 1 else
                                 np.ascontiguousarray(biases[:, :group_out]))
    numbers = arguments(conv, lanes, padded_out, slices, split_slices, n_tiles)
    grid = (-(-conv.pixels // tile.block_m) * n_tiles, splits, conv.groups)
    image_bytes = conv.batch * conv.height * conv.width * conv.channels // lanes * 16
    image_bytes = -(-image_bytes // 256) * 256 if conv.fold else 0
    partial_bytes = splits * conv.pixels * conv.out_channels * 4 if splits > 1 else 0

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        launches = []
        x, residual = arrays[0], arrays[3] if len(arrays) > 3 else None
        if conv.fold:
            image = workspace[:image_bytes]
            launches.append(fold_launch(plain, conv, dtype, lanes, x, image))
            x = image
        if splits == 1:
            added = (x, 0) if residual is None else (residual, 1)
            launches.append(Launch(kernel, grid, (x, packed, packed_bias, *added, y, low, high,
                                                  *numbers)))
            return launches
        sums = workspace[image_bytes:image_bytes + partial_bytes].view(np.float32)
        launches.append(Launch(kernel, grid, (x, packed, packed_bias, x, 0, sums, low, high,
                                              *numbers)))     # the bias is not read here
        launches.append(reduction(stored_as, activation, sums, splits, conv.pixels,
                                  conv.out_channels, packed_bias, residual, y))
        return launches

    return Step(kernel.name, bind, image_bytes + partial_bytes)


def folded(conv: Conv, lanes: int) -> Conv:
    """The same convolution over whole chunks: see conv_fold.py."""
    if conv.group_channels % lanes == 0:
        return conv
    fold = conv.stride[1] if conv.groups == 1 and conv.dilation[1] == 1 else 1
    per_group = -(-conv.group_channels * fold // lanes) * lanes
    if fold == 1:
        return conv._replace(channels=per_group * conv.groups, fold=1)
    columns = -(-conv.kernel[1] // fold)
    return conv._replace(width=conv.out_width + columns - 1, channels=per_group,
                         kernel=(conv.kernel[0], columns), stride=(conv.stride[0], 1), left=0,
                         fold=fold, fold_left=conv.left)


def fold_launch(plain: Conv, conv: Conv, dtype: str, lanes: int, x: Array, image: Array) -> Launch:
    chunks = conv.channels // lanes
    count = conv.batch * conv.height * conv.width * chunks
    return Launch(fold_kernel(dtype), blocks(count, conv_fold.THREADS),
                  (x, image, count, plain.width, plain.channels,
                   plain.group_channels * conv.fold, conv.fold_left, conv.fold, *divisor(chunks),
                   *divisor(conv.width), *divisor(conv.group_channels),
                   *divisor(plain.group_channels)))


def pack(weight: Array, plain: Conv, conv: Conv, padded_out: int, padded_depth: int, dtype: str
         ) -> Array:
    """[groups][padded_out][padded_depth], zeros beyond the weights, so that the kernel copies
    whole tiles of it without a test."""
    group_out, fold = plain.out_channels // plain.groups, max(1, conv.fold)
    kh, kw = conv.kernel
    taps = np.zeros((plain.out_channels, kh, kw * fold, plain.group_channels), np.float32)
    taps[:, :, :plain.kernel[1]] = weight.reshape(plain.out_channels, *plain.kernel, -1)
    columns = np.zeros((plain.out_channels, kh, kw, conv.group_channels), np.float32)
    columns[..., :fold * plain.group_channels] = taps.reshape(plain.out_channels, kh, kw, -1)
    packed = np.zeros((plain.groups, padded_out, padded_depth), np.float32)
    packed[:, :group_out, :conv.depth] = columns.reshape(plain.groups, group_out, -1)
    if dtype == "tf32":
        return round_to_tf32(packed)
    with np.errstate(over="ignore"):            # beyond float16's range is infinity
        return packed.astype(dtype)


def round_to_tf32(array: Array) -> Array:
    """To nearest, halves away from zero: 10 explicit bits of mantissa are left."""
    bits = array.view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(array), rounded, array)


def arguments(conv: Conv, lanes: int, padded_out: int, slices: int, split_slices: int, n_tiles: int
              ) -> tuple[int, ...]:
    """The numbers at the end of conv_mma.SIGNATURE; steps that go back wrap around."""
    group_out = conv.out_channels // conv.groups
    chunks, group_chunks = conv.channels // lanes, conv.group_channels // lanes
    next_column = conv.dilation[1] * chunks - group_chunks
    next_row = (conv.dilation[0] * conv.width - conv.kernel[1] * conv.dilation[1]) * chunks
    return (conv.pixels, conv.out_channels, group_out, padded_out, int(group_out % lanes == 0),
            chunks, conv.height, conv.width, *conv.stride, conv.top, conv.left, *conv.dilation,
            conv.kernel[0], next_column % (1 << 32), next_row % (1 << 32), slices, split_slices,
            *divisor(n_tiles), *divisor(conv.out_width), *divisor(conv.out_height),
            *divisor(group_chunks), *divisor(conv.kernel[1]))
