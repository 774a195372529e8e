"""How convolutions are cut into tiles and passes for conv.py, and which kernel takes which."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...axes import flat_pixels
from ...groups import merge, merged
from ...memory import aligned
from ...ops import Conv2d, Pair, TensorSpec, Unary, known
from ...step import Array, Options, Step, weight_and_bias
from ..geometry import ConvGeometry
from ..launch import Kernel, Launch
from ..sizes import BLOCK, LANES, NARROW_ROWS, TILE_ROWS
from . import depthwise, winograd
from .epilogue import epilogue, is_clip

CONV2D, PAD2D = Kernel("conv", "conv2d"), Kernel("conv", "pad2d")

# One pass keeps this much of the weights in the L2 cache while it goes over all tiles. Where the
# input is so small that it stays there, passes are small, too: their weights are fetched ahead, but
# for those of the first.
PASS_BYTES, SMALL_PASS_BYTES = 256 * 1024, 32 * 1024
SMALL_BYTES = 256 * 1024
WORTH = 4       # bytes of weights that every thread may read so that it finds a byte of pixels in
                # its own cache


def cover(length: int, most: int = TILE_ROWS) -> list[tuple[int, int]]:
    """Cut `length` pixels into (start, rows) with rows `most`, half of that, or 1.

    A last tile moves back over its neighbour instead of needing a kernel of its own: computing
    a pixel twice gives the same bits twice.
    """
    half = most // 2
    tiles = [(start, most) for start in range(0, length - most + 1, most)]
    done = len(tiles) * most
    if length - done > half and tiles:
        return [*tiles, (length - most, most)]
    if length - done > half:
        tiles, done = [(0, half)], half
    if length == done:
        return tiles
    if length >= half:
        return [*tiles, (length - half, half)]
    return [*tiles, *((start, 1) for start in range(done, length))]


def cut_rows(batch: int, g: ConvGeometry, narrow: bool) -> Array | None:
    """Direct tiles [.., 3] of an image without padding: rows, first output pixel (counted through
    the batch), offset of its first input in x. None where tiles fit the row so badly that more
    than 15% of the work would be done twice. narrow: tiles may have NARROW_ROWS."""
    height, width = g.out_height, g.out_width
    if (g.kernel_width, g.stride_height, g.stride_width, g.width) == (1, 1, 1, width):
        height, width = 1, height * width       # a kernel of one column goes on from row to row
    cuts = [cover(width, most) for most in (NARROW_ROWS, TILE_ROWS)[not narrow:]]
    fitting = [cut for cut in cuts if sum(rows for _, rows in cut) <= 1.15 * width]
    if not fitting:
        return None
    start, rows = np.array(fitting[0], np.int64).T
    image, row = np.divmod(np.arange(batch * height), height)
    first_line = image * g.height + row * g.stride_height
    offset = (first_line[:, None] * g.width + start * g.stride_width) * g.channels
    pixel = (image * height + row)[:, None] * width + start
    table = np.stack([np.broadcast_to(rows, pixel.shape), pixel, offset], axis=-1)
    return np.ascontiguousarray(table.reshape(-1, 3))


def cut_across(batch: int, g: ConvGeometry) -> Array:
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


def cut_bands(tiles: int, threads: int, weight_bytes: int, moved_bytes: int) -> int:
    """Tiles that all passes go over before the next band. With a band for each thread they part the
    pixels, and each reads in its own cache what it wrote there in the layer before; else they part
    the passes, and so the weights, of which none is then read twice."""
    few = weight_bytes <= WORTH * moved_bytes and tiles >= threads
    return -(-tiles // threads) if few else tiles


def pack(weight: Array, groups: int) -> Array:
    """(O, ...) -> of each group panels [depth, BLOCK, or the vectors of a last, smaller block] one
    after the other, zero-padded."""
    rows = weight.reshape(groups, len(weight) // groups, -1)
    _, per_group, depth = rows.shape
    whole = per_group // BLOCK * BLOCK
    blocks = rows[:, :whole].reshape(groups, -1, BLOCK, depth).swapaxes(2, 3)
    last = np.zeros((groups, depth, -(-(per_group - whole) // LANES) * LANES), np.float32)
    last[:, :, :per_group - whole] = rows[:, whole:].swapaxes(1, 2)
    return aligned(np.hstack([blocks.reshape(groups, -1), last.reshape(groups, -1)]).ravel())


def prepare_tiled(name: str, batch: int, g: ConvGeometry, end_padding: Pair, groups: int,
                  activation: Unary | None, weight: Array, bias: Array | None, options: Options,
                  has_residual: bool = False) -> Step:
    """Step of a convolution or Linear layer of this geometry; inputs x, weight, [bias,
    [residual]]."""
    bottom, right = end_padding
    together = merged(g.out_channels, groups, LANES)
    g = g._replace(per_group=g.per_group * together)
    p = g._replace(height=g.height + g.top + bottom, width=g.width + g.left + right, top=0, left=0)
    direct = cut_rows(batch, p, narrow=g.out_channels * together <= LANES * groups)
    if direct is None:
        p = g
    tiles = cut_across(batch, g) if direct is None else direct
    small = batch * p.height * p.width * p.channels * 4 <= SMALL_BYTES
    pass_bytes = SMALL_PASS_BYTES if small else PASS_BYTES
    passes = cut_passes(g.out_channels, groups // together, g.depth,
                        max(1, pass_bytes // (g.depth * BLOCK * 4)))
    band = cut_bands(len(tiles), options.threads, weight.nbytes, 4 * batch * (
        p.height * p.width * p.channels + g.out_height * g.out_width * g.out_channels))
    packed = options.pack(weight, f"blocks of {groups} groups", lambda w: pack(
        merge(w, groups, together) if together > 1 else w, groups // together))
    if bias is None:
        bias = np.zeros(g.out_channels, np.float32)
    packed_bias = pack(bias, groups // together)
    low, high, finish, suffix = epilogue(activation)
    floats = batch * p.height * p.width * p.channels if p != g else 0
    if direct is None:
        floats = options.threads * NARROW_ROWS * g.depth

    geometry, padded = tuple(g), tuple(p)

    def bind(inputs: Sequence[Array], output: Array, workspace: Array) -> list[Launch]:
        x, (y, y_step) = inputs[0].reshape(-1), flat_pixels(output)
        residual = inputs[3].reshape(-1) if len(inputs) > 3 else np.empty(0, np.float32)
        scratch = workspace[:floats * 4].view(np.float32)
        pad = []
        if padded != geometry:
            pad = [PAD2D.bind(x, scratch, batch, geometry, padded, options.threads)]
            x = scratch
        return [*pad, CONV2D.bind(
            x, packed, packed_bias, residual, y, y_step, scratch, tiles, band, passes, padded, low,
            high, options.threads), *finish(y, options.threads)]

    # The micro-kernel walks through y and residual in the same steps.
    return Step(name + suffix, bind, 4 * floats,
                strided=int(is_clip(activation) and not has_residual))


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
    g = ConvGeometry(h, w, c, out_h, out_w, out_c, kh, kw, *op.stride, top, left, *op.dilation,
                 per_group)
    name = f"conv2d_{kh}x{kw}_f32_{TILE_ROWS}x{BLOCK}"
    return prepare_tiled(name, n, g, (bottom, right), op.groups, op.activation, weight, bias,
                         options, has_residual=len(inputs) > 3)
