"""How an image is read and cut for bf16_conv.py, and what it is called with."""
from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np

from ...axes import flat_pixels
from ...memory import ALIGNMENT, aligned
from ...ops import Conv2d, Pair, TensorSpec, Unary, known
from ...step import Array, Options, Step, weight_and_bias
from ..bf16_units import BLOCK, COLUMNS, Unit
from ..geometry import ConvGeometry
from ..launch import Kernel, Launch, flat_bits
from . import bf16, depthwise
from .epilogue import epilogue, is_clip

CONV2D, MAKE_IMAGE = Kernel("bf16_conv", "conv2d"), Kernel("bf16_conv", "make_image")

# Weights of one pass over the tiles: half of the L2 cache of a CPU with AMX.
PASS_BYTES = 1024 * 1024
WASTE = 1.2             # products for nothing beyond this are not made: patches are gathered
SLACK = 64              # numbers behind a buffer that a vector or row may touch for nothing


class Way(NamedTuple):
    """How an image is read: its geometry, tiles, inputs behind an output with the zeros among them,
    and positions that tiles count to an output row."""
    image: ConvGeometry
    tiles: Array
    depth: int
    pitch: int


def cut_rows(batch: int, g: ConvGeometry, unit: Unit) -> Array:
    """Direct tiles [.., 3] of a padded image, a row of them for an output row: rows, first position
    (counted through the batch), offset of its first input in the image."""
    start = np.arange(0, g.out_width, unit.rows)
    image, row = np.divmod(np.arange(batch * g.out_height), g.out_height)
    line = (image * g.height + row * g.stride_height)[:, None] * g.width
    offset = (line + start * g.stride_width) * g.channels
    pixel = (image * g.out_height + row)[:, None] * g.out_width + start
    rows = np.broadcast_to(np.minimum(unit.rows, g.out_width - start), pixel.shape)
    return np.ascontiguousarray(np.stack([rows, pixel, offset], axis=-1).reshape(-1, 3))


def cut_images(batch: int, g: ConvGeometry, pitch: int, unit: Unit) -> Array:
    """The same, a row of tiles for an image: its lines are one, and an output row has `pitch`
    positions, as many as the image moves on from one to the next."""
    positions = (g.out_height - 1) * pitch + g.out_width
    start, image = np.arange(0, positions, unit.rows), np.arange(batch)[:, None]
    offset = (image * g.height * g.width + start * g.stride_width) * g.channels
    position = image * g.out_height * pitch + start
    rows = np.broadcast_to(np.minimum(unit.rows, positions - start), position.shape)
    return np.ascontiguousarray(np.stack([rows, position, offset], axis=-1).reshape(-1, 3))


def cut_across(pixels: int, unit: Unit) -> Array:
    """Gathered tiles [.., 3] that run on across rows and images: rows, first output pixel, -1."""
    return np.array([(min(unit.rows, pixels - start), start, -1)
                     for start in range(0, pixels, unit.rows)], np.int64)


def within(size: int, tiles: Array, p: ConvGeometry, unit: Unit) -> Array:
    """Direct tiles, but for those gathered whose micro-kernel would read beyond `size` numbers."""
    span = ((p.kernel_height - 1) * p.width + p.kernel_width) * p.channels
    last = tiles[:, 2] + (computed(tiles, unit) - 1) * p.stride_width * p.channels
    rows, position, offset = tiles.T
    return np.ascontiguousarray(
        np.stack([rows, position, np.where(last + span > size, -1, offset)], axis=-1))


def computed(tiles: Array, unit: Unit) -> Array:
    """Pixels that the micro-kernel for each of these tiles computes."""
    rows = tiles[:, 0]
    return np.where(rows > unit.half, unit.rows,
                    np.where(rows > unit.least, unit.half, unit.least))


def choose_way(batch: int, p: ConvGeometry, groups: int, unit: Unit) -> Way:
    """The way that computes least of an image with its padding. It looks at one image alone: the
    batch changes no bit."""
    pixels, depth = p.out_height * p.out_width, up_to(p.depth, unit.depth)
    gathered = Way(p, cut_across(batch * pixels, unit), depth, p.out_width)
    if groups > 1 or (p.dilation_height, p.dilation_width) != (1, 1):
        return gathered
    channels = up_to(p.channels, unit.depth // gcd(unit.depth, p.kernel_width))
    p = p._replace(channels=channels, per_group=channels)
    pitch, rest = divmod(p.stride_height * p.width, p.stride_width)
    if (p.kernel_height, p.kernel_width, p.stride_height, p.stride_width) == (1, 1, 1, 1):
        # Every pixel stands alone: all images are one.
        one = p._replace(out_height=batch * p.out_height)
        return Way(p, cut_images(1, one, pitch, unit), p.depth, pitch)
    rows, images = cut_rows(1, p, unit), cut_images(1, p, pitch, unit)
    through = rest == 0 and computed(images, unit).sum() <= computed(rows, unit).sum()
    most = WASTE * computed(cut_across(pixels, unit), unit).sum() * depth
    if computed(images if through else rows, unit).sum() * p.depth > most:
        return gathered
    if through:
        return Way(p, cut_images(batch, p, pitch, unit), p.depth, pitch)
    return Way(p, cut_rows(batch, p, unit), p.depth, p.out_width)


def cut_blocks(out_channels: int, groups: int, depth: int, at_once: int) -> tuple[Array, Array]:
    """blocks [.., 3]: first channel, channels, offset of its weights; passes [.., 3]: first
    block, end block, group; a pass has `at_once` blocks at most."""
    blocks: list[tuple[int, int, int]] = []
    passes: list[tuple[int, int, int]] = []
    offset, per_group = 0, out_channels // groups
    for group in range(groups):
        first = len(blocks)
        for channel in range(0, per_group, BLOCK):
            channels = min(per_group - channel, BLOCK)
            blocks.append((group * per_group + channel, channels, offset))
            offset += depth * -(-channels // COLUMNS) * COLUMNS
        passes += [(start, min(start + at_once, len(blocks)), group)
                   for start in range(first, len(blocks), at_once)]
    return np.array(blocks, np.int64), np.array(passes, np.int64)


def pack(weight: Array, blocks: Array, channels: int, depth: int) -> Array:
    """(O, KH, KW, C) -> the blocks' panels [depth / 2, vectors * COLUMNS, 2] of bfloat16 one after
    the other; padded with zeros to `channels` inputs a tap, and `depth` in all."""
    out_channels, kh, kw, given = weight.shape
    padded = np.zeros((out_channels, kh, kw, channels), np.float32)
    padded[..., :given] = weight
    rows = np.zeros((out_channels, depth), np.uint16)
    rows[:, :kh * kw * channels] = bf16.to_bits(padded).reshape(out_channels, -1)
    panels = []
    for channel, wanted, _ in blocks:
        panel = np.zeros((depth // 2, -(-wanted // COLUMNS) * COLUMNS, 2), np.uint16)
        pairs = rows[channel:channel + wanted].reshape(wanted, -1, 2)
        panel[:, :wanted] = pairs.transpose(1, 0, 2)
        panels.append(panel.ravel())
    return aligned(np.concatenate(panels))


def up_to(size: int, multiple: int) -> int:
    """The least multiple that is no less."""
    return -(-size // multiple) * multiple


def prepare_tiled(name: str, batch: int, g: ConvGeometry, end_padding: Pair, groups: int,
                  activation: Unary | None, weight: Array, bias: Array | None, options: Options,
                  unit: Unit, dtype: str, has_residual: bool = False) -> Step:
    """Step of a convolution or Linear layer of this geometry; weight (O, KH, KW, C / groups);
    inputs x, of this dtype, weight, [bias, [residual]]."""
    bottom, right = end_padding
    p, tiles, depth, pitch = choose_way(batch, g._replace(
        height=g.height + g.top + bottom, width=g.width + g.left + right, top=0, left=0), groups,
        unit)
    blocks_wanted = -(-g.out_channels // groups // BLOCK)
    at_once = min(PASS_BYTES // (2 * depth * BLOCK),
                  blocks_wanted * groups * len(tiles) // (2 * options.threads))
    blocks, passes = cut_blocks(g.out_channels, groups, depth, max(1, at_once))
    packed = options.pack(weight, f"bfloat16 {p.per_group} {depth} {groups}",
                          lambda w: pack(w.reshape(len(w), g.kernel_height, g.kernel_width, -1),
                                         blocks, p.per_group, depth))
    packed_bias = np.zeros((len(blocks), BLOCK), np.float32)
    if bias is not None:
        for row, (channel, channels, _) in zip(packed_bias, blocks, strict=True):
            row[:channels] = bias[channel:channel + channels]
    low, high, finish, suffix = epilogue(activation)
    geometry, padded = tuple(g), tuple(p)
    # Bytes of the image, of all patches and of all sums, one after the other in the workspace.
    size, beyond = batch * p.height * p.width * p.channels, unit.rows * g.stride_width * p.channels
    image_bytes = 2 * (size + beyond + SLACK)
    in_place = dtype == "bfloat16" and p == g
    if in_place:
        image_bytes = 0
        if tiles[0, 2] >= 0:
            tiles = within(size, tiles, p, unit)
    patch = unit.rows * depth + SLACK if tiles[:, 2].min() < 0 else 0
    ends = np.cumsum([up_to(size, ALIGNMENT) for size in (
        image_bytes, 2 * options.threads * patch, 4 * options.threads * unit.rows * BLOCK)])

    def bind(inputs: Sequence[Array], output: Array, workspace: Array) -> list[Launch]:
        memory, y_step = flat_pixels(output)
        x, y = flat_bits(inputs[0]), flat_bits(memory)
        residual = flat_bits(inputs[3]) if len(inputs) > 3 else y[:0]
        image = x if in_place else workspace[:ends[0]].view(np.uint16)
        patches = workspace[ends[0]:ends[0] + 2 * options.threads * patch].view(np.uint16)
        patches = patches.reshape(options.threads, patch)
        sums = workspace[ends[1]:ends[2]].view(np.float32)
        making = [] if in_place else [
            MAKE_IMAGE.bind(x, image, batch, geometry, padded, options.threads)]
        return [*making,
                CONV2D.bind(unit.constant, image, packed, packed_bias.reshape(-1), residual, y,
                            y_step, patches, sums, tiles, blocks, passes, padded, pitch, low, high,
                            options.threads), *finish(y, options.threads)]

    # Residual and y are walked through in the same steps.
    return Step(name + suffix, bind, int(ends[2]), is_clip(activation) and not has_residual)


def prepare_conv2d(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options, unit: Unit | None = None) -> Step:
    """A depthwise convolution by its float32 kernel, any other in bfloat16 by the unit: None asks
    for `bf16.choose`."""
    weight, bias = weight_and_bias(op.kind, weights)
    unit = unit or bf16.choose()
    n, h, w, c = known(inputs[0].shape)
    _, out_h, out_w, out_c = known(output.shape)
    if depthwise.fits(op, weight.shape, c) and len(inputs) < 4:
        return depthwise.prepare_depthwise(op, inputs, output, weight, bias, options)
    kh, kw, per_group = weight.shape[1:]
    top, left, bottom, right = op.padding
    g = ConvGeometry(h, w, c, out_h, out_w, out_c, kh, kw, *op.stride, top, left, *op.dilation,
                 per_group)
    name = f"conv2d_{kh}x{kw}_bf16_{unit.name}_{unit.rows}x{BLOCK}"
    return prepare_tiled(name, n, g, (bottom, right), op.groups, op.activation, weight, bias,
                         options, unit, inputs[0].dtype, has_residual=len(inputs) > 3)
