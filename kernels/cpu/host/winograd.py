"""Where Winograd convolution pays, and what winograd.py is called with."""
from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ...axes import flat_pixels
from ...memory import aligned
from ...ops import Conv2d, Pair, TensorSpec, known
from ...step import Array, Options, Step
from ..geometry import WinogradGeometry
from ..launch import Kernel, Launch, flat_bits
from ..sizes import BLOCK, GRID_ROWS, HALF_ROWS, LANES, TILE_ROWS
from ..winograd_matrices import WEIGHT
from .codes import code_bounds, divisor, meaning
from .epilogue import epilogue, in_registers

WINOGRAD2D = Kernel("winograd", "winograd2d")

# With 64 channels the inputs of a block and the products of a group share the L2 cache, 250 KB each
# for tiles of 4. With more channels the inputs overflow into the L3, and each is read once a group.
BLOCK_TILES = 9 * HALF_ROWS
GROUP = 64
# From where a tile of this edge gains 1.2 times the speed: input and output channels, so that the
# products outweigh the transforms; tiles of one image, among which the larger weights are shared;
# and multiplications of the direct kernel for each one here (tiles may stick out of the map).
CHANNELS = {4: 16, 2: 64}
TILES = 9
SAVING = 1.5
# Of two such edges that one serves better which takes less time for a pair of channels: a weight is
# multiplied once for each tile, and fetched, from the L3 cache or beyond, in the time of so many.
FETCH = 28


def pack(weight: Array, tile: int) -> Array:
    """(O, 3, 3, C) -> G g G^T as panels [position][block][C, vectors * LANES], zero-padded.

    Computed in float64 and rounded once.
    """
    out_channels, _, _, channels = weight.shape
    out_depth = -(-out_channels // LANES) * LANES
    both_axes = np.kron(WEIGHT[tile], WEIGHT[tile])        # [positions, 9 taps]
    packed = np.empty((len(both_axes), channels * out_depth), np.float32)
    for start in range(0, out_depth, BLOCK):
        block = np.zeros((9, channels, min(BLOCK, out_depth - start)))
        given = weight[start:start + BLOCK].reshape(-1, 9, channels)
        block[:, :, :len(given)] = given.transpose(1, 2, 0)
        panel = both_axes @ block.reshape(9, -1)
        packed[:, start * channels:start * channels + panel.shape[1]] = panel
    return aligned(packed.ravel())


def choose(op: Conv2d, weight_shape: tuple[int, ...], map_size: Pair) -> int:
    """Edge of the output tiles that serve a convolution best, 0 where the direct kernel does.

    It looks at one image alone, and not at the threads: neither changes a result. ValueError for
    an environment variable CNN_WINOGRAD that is neither 0, which keeps to the direct kernel, nor 1.
    """
    asked = os.environ.get("CNN_WINOGRAD", "1")
    if asked not in ("0", "1"):
        raise ValueError(f"CNN_WINOGRAD is {asked!r}; it must be 0 or 1")
    if asked == "0" or not fits(op, weight_shape):
        return 0
    height, width = map_size
    channels, times = min(weight_shape[0], weight_shape[3]), dict[int, int]()
    for tile, least in CHANNELS.items():
        tiles, weights = -(-height // tile) * -(-width // tile), (tile + 2) ** 2
        saving = 9 * height * width / (tiles * weights)
        if channels >= least and tiles >= TILES and saving >= SAVING:
            times[tile] = weights * max(tiles, FETCH)
    return min(times, key=times.__getitem__, default=0)


def fits(op: Conv2d, weight_shape: tuple[int, ...]) -> bool:
    """3x3 windows of stride 1, neither dilated nor grouped."""
    return weight_shape[1:3] == (3, 3) and op.stride == op.dilation == (1, 1) and op.groups == 1


def cut_blocks(tiles: int, blocks: int) -> tuple[int, int]:
    """(tiles of a micro-kernel, tiles of a block) for so many even blocks, so that the fewest rows
    of micro-kernels are empty."""
    def whole(rows: int) -> int:
        most = -(-tiles // blocks)
        done = most // rows * rows
        left = most - done
        return done + (0 if left == 0 else HALF_ROWS if left <= HALF_ROWS else rows)
    rows = min((TILE_ROWS, GRID_ROWS), key=whole)
    return rows, whole(rows)


def prepare_winograd(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec, weight: Array,
                     bias: Array | None, options: Options, tile: int) -> Step:
    """Step of F(tile x tile, 3x3); inputs x, weight (O, 3, 3, C), [bias, [residual]]; x, residual
    and output in float32, bfloat16 or codes. Weights and bias take on the scales of codes, and the
    bias their zero points.

    ValueError for a convolution that is no 3x3 of stride 1, and a tile that is not 2 or 4.
    """
    if not fits(op, weight.shape) or tile not in WEIGHT:
        raise ValueError(f"Winograd takes 3x3 weights, stride 1, dilation 1, groups 1 and tiles of "
                         f"{tuple(WEIGHT)}, not weight {weight.shape}, {op} and tile {tile}; use "
                         f"the direct kernel")
    batch, height, width, channels = known(inputs[0].shape)
    _, out_height, out_width, out_channels = known(output.shape)
    tiles_high, tiles_wide = -(-out_height // tile), -(-out_width // tile)
    tiles = batch * tiles_high * tiles_wide
    depth, out_depth = (-(-c // LANES) * LANES for c in (channels, out_channels))
    blocks = -(-tiles // BLOCK_TILES)
    # Blocks * groups are at least 2 a thread, where there are channels enough; with few of them the
    # tiles of a map are shared.
    wanted = 2 * options.threads
    group = min(GROUP, -(-out_depth * min(blocks, wanted) // wanted // BLOCK) * BLOCK)
    blocks = max(blocks, -(-options.threads // -(-out_channels // group)))
    rows, block_tiles = cut_blocks(tiles, blocks)
    g = WinogradGeometry(tile, height, width, channels, out_height, out_width, out_channels,
                 *op.padding[:2], tiles_high, tiles_wide, tiles, depth, rows, block_tiles, group)
    ends = g.ends
    floats = options.threads * ends[-1]
    (x_scale, x_zero), (y_scale, y_zero) = meaning(inputs[0]), divisor(output, op.activation)
    (other_scale, other_zero) = meaning(inputs[3]) if len(inputs) > 3 else (np.float32(1), 0)
    factor, residual_factor = x_scale / y_scale, other_scale / y_scale
    packed = options.pack(weight, f"winograd {tile} {factor}", lambda w: pack(w * factor, tile))
    packed_bias = np.zeros(out_depth, np.float32)
    if bias is not None:
        packed_bias[:out_channels] = bias / y_scale
    packed_bias[:out_channels] += y_zero - other_zero * residual_factor
    if x_zero:
        packed_bias[:out_channels] -= x_zero * factor * weight.sum(axis=(1, 2, 3), dtype=float)
    zeros, geometry = np.zeros(max(group, out_channels), np.float32), tuple(g)
    low, high, _, suffix = epilogue(op.activation)
    activation, a, b = in_registers(op.activation, output.dtype)
    if output.dtype == "uint8":
        low, high = code_bounds(op.activation)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        memory, y_step = flat_pixels(y)
        residual, residual_step = zeros, 0
        if len(arrays) > 3:
            residual, residual_step = flat_bits(arrays[3]), out_channels
        scratch = workspace[:4 * floats].view(np.float32)
        transformed = np.empty(options.threads, np.int64)
        return [WINOGRAD2D.bind(
            flat_bits(arrays[0]), packed, packed_bias, zeros, residual, residual_step,
            flat_bits(memory), y_step, scratch, transformed, ends, geometry, int(x_zero),
            activation, low, high, residual_factor, a, b, options.threads)]

    name = f"winograd_{tile}x{tile}_3x3_f32_{TILE_ROWS}x{BLOCK}"
    return Step(name + suffix, bind, 4 * floats, strided=1)
