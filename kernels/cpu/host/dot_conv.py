"""How an image is read and cut for dot_conv.py, and what it is called with."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ...axes import flat_pixels
from ...groups import merge, merged
from ...memory import ALIGNMENT, aligned
from ...ops import Conv2d, Pair, TensorSpec, known
from ...step import Array, Options, Step, weight_and_bias
from ..dot_units import BLOCK, COLUMNS, GROUP, Unit
from ..geometry import ConvGeometry
from ..launch import Kernel, Launch, flat_bits
from . import conv, depthwise, winograd
from .numbers import Numbers, numbers_of, unit_for

CONV2D, MAKE_IMAGE = Kernel("dot_conv", "conv2d"), Kernel("dot_conv", "make_image")
MAKE_PLANES = Kernel("dot_conv", "make_planes")

# Weights of one pass over the tiles: half of the L2 cache of a CPU with AMX.
PASS_BYTES = 1024 * 1024
FEW_MORE = 1.25         # so many times the steps are taken before channels or runs are padded
FASTER = 1.2            # how much less Winograd's algorithm must multiply, in the unit's time
APART = 1.2             # how much work an image in planes must save
ALONE = 4               # a pixel multiplied alone takes as long as so many that are multiplied
                        # together, for its sums wait for each other
EVEN = 1.05             # the longest share of work by the shortest, where it is not cut further
WORTH = 2               # bytes of weights that every thread may read so that it finds a byte of
                        # activations in its own cache
SLACK = 64              # numbers behind an image that a step may read for nothing


# ---- what lies behind an output ---------------------------------------------------------------

class Taps(NamedTuple):
    """starts: of what is multiplied, as seen from the first input of a window, in the order of the
    weights; steps: of each tap, which lie together; depth: inputs of a step."""
    starts: Array
    steps: int
    depth: int

    @property
    def run(self) -> int:
        """Inputs that are multiplied of a run; what lies beyond its end by zeros."""
        return self.steps * self.depth

    @property
    def inputs(self) -> int:
        """That are multiplied for an output."""
        return len(self.starts) * self.run

    @property
    def span(self) -> int:
        """How far behind the first input of a window its last one ends."""
        return int(self.starts.max()) + self.run


def cut_taps(g: ConvGeometry, unit: Unit) -> Taps:
    """Those of an image whose runs are whole words, or of codes."""
    lines = np.arange(g.kernel_height) * g.dilation_height * g.width * g.channels
    columns, length = np.arange(g.kernel_width) * g.dilation_width * g.channels, run(g)
    if length != g.per_group:           # a line is one run
        columns = columns[:1]
    return cut_runs((lines[:, None] + columns).ravel(), length, unit)


def cut_runs(starts: Array, length: int, unit: Unit) -> Taps:
    """Of runs that begin there, of whole words, or of codes."""
    if unit.is_int8:        # bfloat16 beyond a run might be NaN
        length = padded(length, unit, lambda length: length)
    depth = step_depth(length, unit)
    if unit.has_tiles:
        return Taps((starts[:, None] + np.arange(0, length, depth)).ravel(), 1, depth)
    return Taps(starts, length // depth, depth)


def run(g: ConvGeometry) -> int:
    """How many inputs of a window lie together."""
    whole_lines = g.dilation_width == 1 and g.per_group == g.channels
    return g.kernel_width * g.channels if whole_lines else g.per_group


def step_depth(length: int, unit: Unit) -> int:
    """The greatest divisor of a run of whole words, itself of whole words, that a step can take."""
    depths = range(unit.together, unit.depth + 1, unit.together)
    return max(depth for depth in depths if length % depth == 0)


def padded_channels(g: ConvGeometry, groups: int, unit: Unit) -> int:
    """Channels that the image has for each group. It looks at the weights alone: no batch changes a
    bit."""
    if unit.is_int8:        # whose runs are padded where they are multiplied
        return g.per_group
    return padded(g.per_group, unit, lambda channels: run(
        g._replace(channels=channels * groups, per_group=channels)))


def padded(size: int, unit: Unit, run_of: Callable[[int], int]) -> int:
    """This many numbers, and some more where runs of them are no whole words, or where much fewer
    steps do for longer ones."""
    steps = {}
    multiple = 1
    while multiple <= unit.depth:
        length = run_of(up_to(size, multiple))
        if length % unit.together == 0:
            steps[up_to(size, multiple)] = length // step_depth(length, unit)
        multiple *= 2
    return next(size for size, count in sorted(steps.items())
                if count <= FEW_MORE * min(steps.values()))


# ---- planes -----------------------------------------------------------------------------------

class Planes(NamedTuple):
    """An image taken apart for a stride: each plane holds every stride-th pixel of every stride-th
    row, from one of the phases [.., 2] on, so that neighbouring outputs read neighbours. The
    geometry has the planes of an image one below the other, and stride 1."""
    image: ConvGeometry
    phases: Array
    taps: Taps


def cut_planes(p: ConvGeometry, unit: Unit) -> Planes:
    """Those planes of a padded image that the taps of a window lie in."""
    rows = np.arange(p.kernel_height) * p.dilation_height
    columns = np.arange(p.kernel_width) * p.dilation_width
    taps = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    stride = np.array([p.stride_height, p.stride_width])
    phases, plane = np.unique(taps % stride, axis=0, return_inverse=True)
    height, width = -(-p.height // p.stride_height), -(-p.width // p.stride_width)
    row, column = (taps // stride).T
    starts = ((plane.ravel() * height + row) * width + column) * p.channels
    image = p._replace(height=len(phases) * height, width=width, stride_height=1, stride_width=1)
    return Planes(image, phases, cut_runs(starts, p.per_group, unit))


def planes_if_faster(p: ConvGeometry, groups: int, unit: Unit) -> Planes | None:
    """Where tiles fill so much better. It looks at one image alone: no batch changes a bit."""
    if groups > 1 or p.per_group % unit.together or (p.stride_height, p.stride_width) == (1, 1):
        return None
    planes = cut_planes(p, unit)

    def work(image: ConvGeometry, taps: Taps) -> int:
        return cut_tiles(1, image, unit).work(unit) * len(taps.starts) * taps.steps

    better = work(p, cut_taps(p, unit)) > APART * work(planes.image, planes.taps)
    return planes if better else None


# ---- tiles ------------------------------------------------------------------------------------

class Tiles(NamedTuple):
    """A tile a row: rows, first pixel, offset of its first input, number of its pattern; and of
    each pattern the places of `reach` rows, counted in pixels from the first, or -1."""
    table: Array
    patterns: Array


class Cut(NamedTuple):
    """Of each tile its rows, first position (counted through the batch) and offset of the first
    input; of an output row so many positions, of which the first out_width are pixels."""
    rows: Array
    position: Array
    offset: Array
    pitch: int

    def computed(self, unit: Unit) -> Array:
        """Pixels that the micro-kernel for each of these tiles computes."""
        sizes = np.array(unit.sizes)
        return sizes[np.searchsorted(sizes, self.rows)]

    def work(self, unit: Unit) -> int:
        """The time of all tiles, in that of a pixel."""
        return int(np.maximum(self.computed(unit), ALONE).sum())


def cut_rows(batch: int, g: ConvGeometry, unit: Unit) -> Cut:
    """A row of tiles for an output row of a padded image."""
    start = np.arange(0, g.out_width, unit.rows)
    image, row = np.divmod(np.arange(batch * g.out_height), g.out_height)
    line = (image * g.height + row * g.stride_height)[:, None] * g.width
    offset = (line + start * g.stride_width) * g.channels
    pixel = (image * g.out_height + row)[:, None] * g.out_width + start
    rows = np.broadcast_to(np.minimum(unit.rows, g.out_width - start), pixel.shape)
    return Cut(rows.ravel(), pixel.ravel(), offset.ravel(), g.out_width)


def cut_images(batch: int, g: ConvGeometry, unit: Unit) -> Cut | None:
    """A row of tiles for an image: its lines are one, and an output row has as many positions as
    the image moves on from one to the next; None where that is no whole number."""
    pitch, rest = divmod(g.stride_height * g.width, g.stride_width)
    if rest:
        return None
    positions = (g.out_height - 1) * pitch + g.out_width
    start, image = np.arange(0, positions, unit.rows), np.arange(batch)[:, None]
    offset = (image * g.height * g.width + start * g.stride_width) * g.channels
    position = image * g.out_height * pitch + start
    rows = np.broadcast_to(np.minimum(unit.rows, positions - start), position.shape)
    return Cut(rows.ravel(), position.ravel(), offset.ravel(), pitch)


def cut_tiles(batch: int, g: ConvGeometry, unit: Unit) -> Cut:
    """The way that takes the least time of a padded image."""
    if (g.kernel_height, g.kernel_width, g.stride_height, g.stride_width) == (1, 1, 1, 1):
        # Every pixel stands alone: all images are one.
        batch, g = 1, g._replace(height=batch * g.height, out_height=batch * g.out_height)
    rows, images = cut_rows(batch, g, unit), cut_images(batch, g, unit)
    if images and images.work(unit) <= rows.work(unit):
        return images
    return rows


def beyond(cut: Cut, size: int, span: int, x_step: int, unit: Unit) -> Array:
    """By how many positions each tile must begin earlier, to read nothing beyond `size` numbers."""
    end = cut.offset + (cut.computed(unit) - 1) * x_step + span
    return np.maximum(0, -(-(end - size) // x_step))


def tabulate(cut: Cut, back: Array, g: ConvGeometry, unit: Unit) -> Tiles:
    """Tables of tiles that begin `back` positions earlier."""
    row_of_tile, rows = np.arange(up_to(unit.rows, GROUP)), cut.rows + back
    position = (cut.position - back)[:, None] + row_of_tile
    row, column = np.divmod(position, cut.pitch)
    wanted = (row_of_tile >= back[:, None]) & (row_of_tile < rows[:, None])
    wanted &= column < g.out_width
    pixel = row * g.out_width + column
    first = np.take_along_axis(pixel, wanted.argmax(axis=1)[:, None], axis=1)
    patterns, number = np.unique(np.where(wanted, pixel - first, -1), axis=0, return_inverse=True)
    offset = cut.offset - back * g.stride_width * g.channels
    return Tiles(np.stack([rows, first[:, 0], offset, number.ravel()], axis=1), patterns)


# ---- blocks of outputs ------------------------------------------------------------------------

def cut_blocks(out_channels: int, groups: int, inputs: int) -> Array:
    """blocks [.., 3]: first channel, channels, offset of its weights, of so many `inputs` each."""
    blocks, offset, per_group = [], 0, out_channels // groups
    for group in range(groups):
        for channel in range(0, per_group, BLOCK):
            channels = min(per_group - channel, BLOCK)
            blocks.append((group * per_group + channel, channels, offset))
            offset += inputs * up_to(channels, COLUMNS)
    return np.array(blocks, np.int64)


def cut_passes(blocks: int, groups: int, most: int, tiles: int, threads: int,
               group_step: int) -> Array:
    """passes [.., 3]: first block, end block, offset of the group's inputs. A pass has at most
    `most` of the blocks, all groups' together; there are the fewest that give threads even shares,
    and two to choose from."""
    of_group = blocks // groups

    def longest(count: int) -> int:
        return -(-count * groups * tiles // threads) * -(-of_group // count)

    counts = range(-(-of_group // most), of_group + 1)
    shortest = min(map(longest, counts))
    count = next(count for count in counts if longest(count) <= EVEN * shortest
                 and (count == of_group or count * groups * tiles >= 2 * threads))
    ends = [of_group * i // count for i in range(count + 1)]
    return np.array([(group * of_group + first, group * of_group + end, group * group_step)
                     for group in range(groups)
                     for first, end in pairwise(ends)], np.int64)


def order_units(passes: int, tiles: int, by_tile: bool) -> Array:
    """units [.., 2]: pass, tile. Threads have equal parts of it: with all passes of a tile together
    they part the pixels, else the outputs."""
    number, tile = np.divmod(np.arange(passes * tiles), tiles)
    if by_tile:
        tile, number = np.divmod(np.arange(passes * tiles), passes)
    return np.stack([number, tile], axis=1)


def pack(weight: Array, blocks: Array, channels: int, runs: int, inputs: int,
         together: int) -> Array:
    """Narrow (O, KH, KW, C) -> the blocks' panels [inputs / together, vectors * COLUMNS, together]
    one after the other; padded with zeros to `channels` a pixel, and so many inputs in all."""
    rows = np.pad(weight, [(0, 0)] * 3 + [(0, channels - weight.shape[3])])
    rows = rows.reshape(len(weight), runs, -1)
    rows = np.pad(rows, [(0, 0)] * 2 + [(0, inputs // runs - rows.shape[2])])
    rows = rows.reshape(len(weight), inputs)
    panels = []
    for channel, wanted, _ in blocks:
        panel = np.zeros((rows.shape[1] // together, up_to(wanted, COLUMNS), together), rows.dtype)
        words = rows[channel:channel + wanted].reshape(wanted, -1, together)
        panel[:, :wanted] = words.transpose(1, 0, 2)
        panels.append(panel.ravel())
    return aligned(np.concatenate(panels))


def up_to(size: int, multiple: int) -> int:
    """The least multiple that is no less."""
    return -(-size // multiple) * multiple


# ---- steps ------------------------------------------------------------------------------------

class Image(NamedTuple):
    """What tiles read: its geometry with real padding, taps and tiles; numbers from pixel to pixel
    of a tile, and of a whole batch; the planes' phases, None of a plain image; and whether the
    input is the image."""
    geometry: ConvGeometry
    taps: Taps
    tiles: Tiles
    x_step: int
    size: int
    phases: Array | None
    in_place: bool


def lay_out(batch: int, g: ConvGeometry, end_padding: Pair, groups: int, unit: Unit,
            dtype: str) -> Image:
    """The image of an input of this geometry and dtype."""
    channels, (bottom, right) = padded_channels(g, groups, unit), end_padding
    p = g._replace(height=g.height + g.top + bottom, width=g.width + g.left + right, top=0, left=0,
                   channels=channels * groups, per_group=channels)
    planes, taps, phases = planes_if_faster(p, groups, unit), cut_taps(p, unit), None
    in_place = dtype == unit.stored and p == g and planes is None
    if planes:
        p, taps, phases = planes.image, planes.taps, planes.phases
    cut, x_step = cut_tiles(batch, p, unit), p.stride_width * p.channels
    size = batch * p.height * p.width * p.channels
    back = beyond(cut, size - (groups - 1) * channels, taps.span, x_step, unit)
    has_room = (back * x_step <= cut.offset) & (cut.rows + back <= cut.computed(unit))
    in_place &= bool(has_room.all())
    tiles = tabulate(cut, back if in_place else 0 * back, p, unit)
    return Image(p, taps, tiles, x_step, size, phases, in_place)


def prepare_tiled(name: str, batch: int, g: ConvGeometry, end_padding: Pair, groups: int,
                  numbers: Numbers, options: Options, unit: Unit, dtype: str,
                  has_residual: bool = False) -> Step:
    """Step of a convolution or Linear layer of this geometry, with these numbers; inputs x, of this
    dtype, weight (O, KH, KW, C / groups), [bias, [residual]]."""
    together = merged(g.out_channels, groups, BLOCK if unit.has_tiles else COLUMNS)
    groups, g = groups // together, g._replace(per_group=g.per_group * together)
    p, taps, tiles, x_step, size, phases, in_place = lay_out(batch, g, end_padding, groups, unit,
                                                             dtype)
    channels = p.per_group
    blocks = cut_blocks(g.out_channels, groups, taps.inputs)
    at_once = max(1, PASS_BYTES // (unit.itemsize * taps.inputs * BLOCK))
    passes = cut_passes(len(blocks), groups, at_once, len(tiles.table), options.threads, channels)
    # Where pixels are parted, each thread reads in its own cache what it wrote there itself.
    weight_bytes = unit.itemsize * up_to(g.out_channels, BLOCK) * taps.inputs
    moved = unit.itemsize * batch * (g.height * g.width * g.channels + g.out_height * g.out_width
                                     * g.out_channels)
    units = order_units(len(passes), len(tiles.table),
                        weight_bytes <= min(PASS_BYTES, moved * WORTH))
    runs = p.depth // run(p)
    packed = options.pack(
        numbers.weight, f"{unit.dtype} {channels} {taps.inputs} {groups} {together}",
        lambda w: pack(
            merge(numbers.narrow(w).reshape(len(w), g.kernel_height, g.kernel_width, -1),
                  groups * together, together), blocks, channels, runs, taps.inputs,
            unit.together))
    bias = np.stack([of_blocks(row, blocks) for row in numbers.rows], axis=1)
    bias = bias.reshape(len(blocks), -1)
    # Bytes of the image, of what is written for nothing and of all sums, in the workspace.
    reach = tiles.patterns.shape[1]
    image_bytes = 0 if in_place else unit.itemsize * (size + unit.rows * x_step + SLACK)
    ends = np.cumsum([up_to(size, ALIGNMENT) for size in (
        image_bytes, 4 * options.threads * BLOCK, 8 * options.threads * reach * BLOCK)])
    # The image is made group by group, as if each were a pixel.
    making = [tuple(image._replace(width=image.width * groups, left=image.left * groups,
                                   channels=image.per_group)) for image in (g, p)]
    maker, extra = (MAKE_IMAGE, []) if phases is None else (MAKE_PLANES, [phases])

    def bind(inputs: Sequence[Array], output: Array, workspace: Array) -> list[Launch]:
        memory, y_step = flat_pixels(output)
        x, y = flat_bits(inputs[0]), flat_bits(memory)
        residual = flat_bits(inputs[3]) if len(inputs) > 3 else y[:0]
        image = x if in_place else workspace[:ends[0]].view(numbers.dtype)
        spare = workspace[ends[0]:ends[1]].view(y.dtype)[:options.threads * BLOCK]
        sums = workspace[ends[1]:ends[2]].view(np.int32 if unit.is_int8 else np.float32)
        places = np.where(tiles.patterns < 0, -1, tiles.patterns * y_step).ravel()
        make = [] if in_place else [
            maker.bind(x, image, batch, *making, *extra, *numbers.reading, options.threads)]
        return [*make,
                CONV2D.bind(unit.constant, numbers.activation, image, packed, bias, residual, y,
                            y_step, places, reach, spare, sums, taps.starts, taps.steps, taps.depth,
                            tiles.table, blocks, passes, units, x_step, *numbers.writing,
                            options.threads)]

    # Residual and y are walked through in the same steps.
    return Step(name + numbers.suffix, bind, int(ends[2]), strided=int(not has_residual))


def winograd_tile(op: Conv2d, weight: Array, map_size: Pair, unit: Unit) -> int:
    """Edge of Winograd's tiles in float32 where they are faster than the unit, else 0. They
    multiply 4 or 2.25 times less, and round no weight."""
    tile = winograd.choose(op, weight.shape, map_size)
    return tile if 9 * tile * tile >= FASTER * unit.speed * (tile + 2) ** 2 else 0


def of_blocks(row: Array, blocks: Array) -> Array:
    """(O,) -> [blocks, BLOCK], padded with zeros."""
    result = np.zeros((len(blocks), BLOCK), np.float32)
    for of_block, (channel, count, _) in zip(result, blocks, strict=True):
        of_block[:count] = row[channel:channel + count]
    return result


def prepare_conv2d(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options, unit: Unit | None = None) -> Step:
    """A depthwise convolution by its own kernel, any other by the unit: None asks for `unit_for`,
    or for Winograd's algorithm. Where there is no unit for numbers that float32 has to multiply,
    conv.py does."""
    weight, bias = weight_and_bias(op.kind, weights)
    n, h, w, c = known(inputs[0].shape)
    _, out_h, out_w, out_c = known(output.shape)
    if depthwise.fits(op, weight.shape, c) and len(inputs) < 4:
        return depthwise.prepare_depthwise(op, inputs, output, weight, bias, options)
    asked, unit = unit, unit or unit_for(inputs[0], weight, options)
    if unit is None:
        return conv.prepare_conv2d(op, inputs, output, weights, options)
    tile = winograd_tile(op, weight, (out_h, out_w), unit) if asked is None else 0
    if tile:
        return winograd.prepare_winograd(op, inputs, output, weight, bias, options, tile)
    unit = unit.for_sums_of(weight[0].size)
    kh, kw, per_group = weight.shape[1:]
    top, left, bottom, right = op.padding
    g = ConvGeometry(h, w, c, out_h, out_w, out_c, kh, kw, *op.stride, top, left, *op.dilation,
                     per_group)
    numbers = numbers_of(unit, op.activation, inputs, output, weight, bias, options)
    name = f"conv2d_{kh}x{kw}_{unit.dtype}_{unit.name}_{unit.rows}x{BLOCK}"
    return prepare_tiled(name, n, g, (bottom, right), op.groups, numbers, options, unit,
                         inputs[0].dtype, has_residual=len(inputs) > 3)
