"""Convolution, NHWC float32, without an im2col buffer: the micro-kernel walks the image itself.

The output is cut into tiles of consecutive pixels (at most TILE_ROWS) and blocks of output
channels (at most BLOCK). `conv_tile` of microkernels.py computes one tile x block:

    direct   With NHWC the KW * C inputs under one kernel line are contiguous, and neighbouring
             output pixels read the same memory shifted by stride * C. A tile whose pixels lie in
             one output row is read in place.
    gather   Any other tile (dilated, grouped, across rows of an odd width) first copies its
             patches, zeros included, into TILE_ROWS rows of a scratch buffer that stays in cache.

Padding under direct tiles is made real first: one copy of the input between zeros, which costs
about 2% of a 3x3 layer where gathering its border tiles cost 50%.

prepare() writes both cuts down as tables, so the kernel has no geometry left to decide. A Linear
layer is the same thing on an image of one row (see matmul.py). Most 3x3 convolutions of stride 1
run in winograd.py instead.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..axes import flat_pixels
from ..ops import Conv2d, Pair, TensorSpec, Unary, known
from ..step import Array, Options, Run, Step, weight_and_bias
from . import depthwise, winograd
from .epilogue import epilogue, is_clip
from .jit import LANES, njit
from .microkernels import BLOCK, BLOCK_VECTORS, HALF_ROWS, TILE_ROWS, some_blocks
from .parallel import parallel_for
from .simd import at, clear, copy_floats

# One pass keeps this much of the weights in the L2 cache while it goes over all tiles. Where the
# input is so small that it stays there, passes are small, too: their weights are fetched ahead, but
# for those of the first.
PASS_BYTES, SMALL_PASS_BYTES = 256 * 1024, 32 * 1024
SMALL_BYTES = 256 * 1024


class Geometry(NamedTuple):
    """The numbers of a convolution that its kernel needs; sizes in elements."""
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


# ---- the kernel -------------------------------------------------------------------------------

@njit()
def conv2d(x, weight, bias, residual, y, y_step, scratch, tiles, passes, geometry, low, high,
           threads):
    """Every pass over every tile, shared among the threads.

    x, y, residual: flat NHWC (residual may be empty), y_step floats from pixel to pixel of y and
    residual; weight, bias: packed by `pack`; scratch: threads * TILE_ROWS * depth floats; tiles,
    passes: tables made by `cut_*` below; geometry: Geometry's numbers, a plain tuple, which costs
    2 us less to call with.
    """
    g = Geometry(*geometry)
    parallel_for(conv_units, len(passes) * len(tiles), threads, (
        x, weight, bias, residual, y, y_step, scratch, tiles, passes, g, low, high))


@njit()
def conv_units(thread, first_unit, end_unit, x, weight, bias, residual, y, y_step, scratch, tiles,
               passes, g, low, high):
    """The tiles of a pass share the fetching of the next pass's weights, or its first tile would
    wait for them; a single tile would wait anyway."""
    depth = g.kernel_height * g.kernel_width * g.per_group
    share = -(-BLOCK // len(tiles)) if len(tiles) > 1 else 0    # floats of each line of a panel
    patch = scratch[thread * TILE_ROWS * depth:(thread + 1) * TILE_ROWS * depth]
    for unit in range(first_unit, end_unit):
        number = unit // len(tiles)
        channel, full, vectors, valid, w_offset, bias_offset, group = passes[number]
        rows, pixel, x_offset = tiles[unit % len(tiles)]
        if x_offset >= 0:
            source, x_step = at(x, x_offset), g.stride_width * g.channels
            lines, x_line = g.kernel_height, g.width * g.channels
            length = g.kernel_width * g.channels
        else:
            gather(x, patch, rows, pixel, group, g)
            source, x_step = at(patch, 0), depth
            lines, x_line, length = 1, 0, depth
        following, ahead_step, fetched = w_offset, 0, unit % len(tiles) * share
        if number + 1 < len(passes) and fetched < BLOCK:
            following, ahead_step = passes[number + 1, 4] + fetched * depth, share
        y_offset = pixel * y_step + channel
        if full > 0:
            some_blocks(rows, BLOCK_VECTORS, (
                source, x_step, lines, x_line, length, full, at(weight, w_offset),
                at(weight, following), ahead_step, at(bias, bias_offset), at(residual, y_offset),
                len(residual), at(y, y_offset), y_step, LANES, low, high))
        if vectors > 0:
            done = full * BLOCK
            some_blocks(rows, vectors, (
                source, x_step, lines, x_line, length, 1, at(weight, w_offset + done * depth),
                at(weight, following), 0, at(bias, bias_offset + done),
                at(residual, y_offset + done), len(residual), at(y, y_offset + done), y_step,
                valid, low, high))


@njit()
def pad2d(x, padded, batch, geometry, padded_geometry, threads):
    """Copy x into the middle of a zeroed image of the other geometry, for a whole batch."""
    g, p = Geometry(*geometry), Geometry(*padded_geometry)
    parallel_for(pad_rows, batch * p.height, threads, (x, padded, g, p))


@njit()
def pad_rows(thread, first_row, end_row, x, padded, g, p):
    line, padded_line = g.width * g.channels, p.width * p.channels
    before = g.left * g.channels
    for row in range(first_row, end_row):
        target = row * padded_line
        h = row % p.height - g.top
        if 0 <= h < g.height:
            source = (row // p.height * g.height + h) * line
            clear(at(padded, target), before)
            copy_floats(at(padded, target + before), at(x, source), line)
            clear(at(padded, target + before + line), padded_line - before - line)
        else:
            clear(at(padded, target), padded_line)


@njit(inline="always")
def gather(x, patch, rows, pixel, group, g):
    """Copy the inputs under output pixels pixel .. pixel + rows of one group, [rows, depth]."""
    whole_lines = g.dilation_width == 1 and g.per_group == g.channels
    line_length = g.kernel_width * g.per_group
    target = 0
    for p in range(pixel, pixel + rows):
        column = p % g.out_width * g.stride_width - g.left
        row = p // g.out_width % g.out_height * g.stride_height - g.top
        image = p // (g.out_width * g.out_height)
        for line in range(g.kernel_height):
            h = row + line * g.dilation_height
            source = (image * g.height + h) * g.width
            if not 0 <= h < g.height:
                clear(at(patch, target), line_length)
            elif whole_lines:
                first = min(max(-column, 0), g.kernel_width)
                end = max(first, min(g.kernel_width, g.width - column))
                clear(at(patch, target), first * g.channels)
                copy_floats(at(patch, target + first * g.channels),
                            at(x, (source + column + first) * g.channels),
                            (end - first) * g.channels)
                clear(at(patch, target + end * g.channels),
                            (g.kernel_width - end) * g.channels)
            else:
                for tap in range(g.kernel_width):
                    w = column + tap * g.dilation_width
                    into = at(patch, target + tap * g.per_group)
                    if 0 <= w < g.width:
                        first = (source + w) * g.channels + group * g.per_group
                        copy_floats(into, at(x, first), g.per_group)
                    else:
                        clear(into, g.per_group)
            target += line_length


# ---- host choices -----------------------------------------------------------------------------

def cover(length: int) -> list[tuple[int, int]]:
    """Cut `length` pixels into (start, rows) with rows TILE_ROWS, HALF_ROWS or 1.

    A last tile moves back over its neighbour instead of needing a kernel of its own: computing
    a pixel twice gives the same bits twice.
    """
    tiles = [(start, TILE_ROWS) for start in range(0, length - TILE_ROWS + 1, TILE_ROWS)]
    done = len(tiles) * TILE_ROWS
    if length - done > HALF_ROWS and tiles:
        return [*tiles, (length - TILE_ROWS, TILE_ROWS)]
    if length - done > HALF_ROWS:
        tiles, done = [(0, HALF_ROWS)], HALF_ROWS
    if length == done:
        return tiles
    if length >= HALF_ROWS:
        return [*tiles, (length - HALF_ROWS, HALF_ROWS)]
    return [*tiles, *((start, 1) for start in range(done, length))]


def cut_rows(batch: int, g: Geometry) -> Array | None:
    """Direct tiles [.., 3] of an image without padding: rows, first output pixel (counted through
    the batch), offset of its first input in x. None where tiles fit the row so badly that more
    than 15% of the work would be done twice."""
    per_row = cover(g.out_width)
    if sum(rows for _, rows in per_row) > 1.15 * g.out_width:
        return None
    start, rows = np.array(per_row, np.int64).T
    image, row = np.divmod(np.arange(batch * g.out_height), g.out_height)
    first_line = image * g.height + row * g.stride_height
    offset = (first_line[:, None] * g.width + start * g.stride_width) * g.channels
    pixel = (image * g.out_height + row)[:, None] * g.out_width + start
    table = np.stack([np.broadcast_to(rows, pixel.shape), pixel, offset], axis=-1)
    return np.ascontiguousarray(table.reshape(-1, 3))


def cut_across(batch: int, g: Geometry) -> Array:
    """Gathered tiles [.., 3] that run on across rows and images: rows, first output pixel, -1."""
    pixels = batch * g.out_height * g.out_width
    return np.array([(rows, start, -1) for start, rows in cover(pixels)], np.int64)


def cut_passes(out_channels: int, groups: int, depth: int, at_once: int) -> Array:
    """passes [.., 7], of at most `at_once` blocks: first channel, full blocks, vectors of a last,
    smaller block (0: there is none) and valid channels of the last of these, offset of the weights,
    offset of the bias, group."""
    passes, w_offset, bias_offset = [], 0, 0
    per_group = out_channels // groups
    for group in range(groups):
        for start in range(0, per_group, at_once * BLOCK):
            wanted = min(per_group - start, at_once * BLOCK)
            full, rest = divmod(wanted, BLOCK)
            vectors = -(-rest // LANES)
            valid = rest - (vectors - 1) * LANES if vectors else 0
            passes.append((group * per_group + start, full, vectors, valid, w_offset, bias_offset,
                           group))
            w_offset += (full * BLOCK + vectors * LANES) * depth
            bias_offset += full * BLOCK + vectors * LANES
    return np.array(passes, np.int64)


def pack(weight: Array, groups: int) -> Array:
    """(O, ...) -> panels [depth, BLOCK, or the vectors of a last, smaller block] one after the
    other, zero-padded."""
    panels = []
    for rows in np.split(weight.reshape(len(weight), -1), groups):
        for start in range(0, len(rows), BLOCK):
            block = rows[start:start + BLOCK]
            panel = np.zeros((rows.shape[1], -(-len(block) // LANES) * LANES), np.float32)
            panel[:, :len(block)] = block.T
            panels.append(panel.ravel())
    return np.concatenate(panels)


def prepare_tiled(name: str, batch: int, g: Geometry, end_padding: Pair, groups: int,
                  activation: Unary | None, weight: Array, bias: Array | None, options: Options,
                  has_residual: bool = False) -> Step:
    """Step of a convolution or Linear layer of this geometry; inputs x, weight, [bias,
    [residual]]."""
    simple = groups == 1 and (g.dilation_height, g.dilation_width) == (1, 1)
    bottom, right = end_padding
    p = g._replace(height=g.height + g.top + bottom, width=g.width + g.left + right, top=0, left=0)
    direct = cut_rows(batch, p) if simple else None
    if direct is None:
        p = g
    tiles = cut_across(batch, g) if direct is None else direct
    small = batch * p.height * p.width * p.channels * 4 <= SMALL_BYTES
    pass_bytes = SMALL_PASS_BYTES if small else PASS_BYTES
    passes = cut_passes(g.out_channels, groups, g.depth,
                        max(1, pass_bytes // (g.depth * BLOCK * 4)))
    packed = options.pack(weight, f"blocks of {groups} groups", lambda w: pack(w, groups))
    if bias is None:
        bias = np.zeros(g.out_channels, np.float32)
    packed_bias = pack(bias, groups)
    low, high, finish, suffix = epilogue(activation)
    floats = batch * p.height * p.width * p.channels if p != g else 0
    if direct is None:
        floats = options.threads * TILE_ROWS * g.depth

    geometry, padded = tuple(g), tuple(p)

    def bind(inputs: Sequence[Array], output: Array, workspace: Array) -> Run:
        x, (y, y_step) = inputs[0].reshape(-1), flat_pixels(output)
        residual = inputs[3].reshape(-1) if len(inputs) > 3 else np.empty(0, np.float32)
        scratch = workspace[:floats * 4].view(np.float32)

        def run() -> None:
            source = x
            if padded != geometry:
                pad2d(x, scratch, batch, geometry, padded, options.threads)
                source = scratch
            conv2d(source, packed, packed_bias, residual, y, y_step, scratch, tiles, passes,
                   padded, low, high, options.threads)
            finish(y, options.threads)
        return run

    # The micro-kernel walks through y and residual in the same steps.
    return Step(name + suffix, bind, 4 * floats, is_clip(activation) and not has_residual)


def prepare_conv2d(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options, tile: int | None = None) -> Step:
    """Depthwise, Winograd, pointwise (1x1) or any other convolution, each by its kernel or cut.

    tile forces the choice of `winograd.choose`: the edge of Winograd's tiles, 0 for none.
    """
    weight, bias = weight_and_bias(op.kind, weights)
    n, h, w, c = known(inputs[0].shape)
    _, out_h, out_w, out_c = known(output.shape)
    if tile is None:
        tile = winograd.choose(op, weight.shape, (out_h, out_w))
    if tile:
        return winograd.prepare_winograd(op, inputs, output, weight, bias, options, tile)
    if depthwise.fits(op, weight.shape, c) and len(inputs) < 4:
        return depthwise.prepare_depthwise(op, inputs, output, weight, bias, options)
    kh, kw, per_group = weight.shape[1:]
    top, left, bottom, right = op.padding
    pointwise = (kh, kw, op.stride, op.padding, op.groups) == (1, 1, (1, 1), (0, 0, 0, 0), 1)
    if pointwise:       # every pixel stands alone: one long row, where all tiles are direct
        n, h, w, out_h, out_w = 1, 1, n * h * w, 1, n * h * w
    g = Geometry(h, w, c, out_h, out_w, out_c, kh, kw, *op.stride, top, left, *op.dilation,
                 per_group)
    name = f"conv2d_{kh}x{kw}_f32_{TILE_ROWS}x{BLOCK}"
    return prepare_tiled(name, n, g, (bottom, right), op.groups, op.activation, weight, bias,
                         options, has_residual=len(inputs) > 3)
