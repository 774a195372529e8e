"""Convolution of narrow numbers, NHWC: of bfloat16 with float32 sums, or of codes of 8 bits with
int32 sums. Input, residual and output may each be float32 or narrow.

One pass narrows the input to an image and makes its padding real; a narrow input that needs no
padding is the image. Then it is as in conv.py: tiles of consecutive pixels (at most the
unit's rows) times blocks of output channels (BLOCK), and the micro-kernel `multiply` walks the
image itself. Where the inputs behind an output lie, as seen from its pixel, says the table of taps:

    With NHWC the KW * C inputs under one kernel line are contiguous, those of a group or of a
    dilated kernel in runs, and neighbouring output pixels lie stride * C apart. Each run is cut
    into even steps, of at most the unit's depth; the tiles of AMX are as narrow as these. So no
    patch is gathered, and little is multiplied but what lies in the window: of 8 bits some of what
    lies behind a run, by zeros, where it is no whole words.

Tiles end with their output row, or run on through the image where that fills them better: then they
also compute what a window sees that leaves one image line for the next. That is not written, and
neither are the rows of a tile beyond the last pixel: the table of places says where each row goes.

The sums of a block are written while those of the next are multiplied (dot_write.py), so each
thread has two buffers of them. Depthwise convolutions have nothing to gain, and run in float32.
"""
from __future__ import annotations

from .dot_simd import configure, multiply, narrow, release
from .dot_units import BLOCK, COLUMNS
from .dot_write import write_block
from .geometry import ConvGeometry
from .jit import kernel, njit
from .parallel import parallel_for
from .simd import at, fill


@kernel
def conv2d(unit, activation, image, weight, bias, residual, y, y_step, places, reach, spare, sums,
           taps, steps, depth, tiles, blocks, passes, units, x_step, low, high, zero_point,
           residual_factor, a, b, threads):
    """Every pass over every tile, shared among the threads.

    activation: as of `write_block`, a and b are its numbers; image, weight: what the
    unit multiplies; y, residual: float32 or narrow, NHWC with pixels y_step
    numbers apart (residual may be empty); bias [blocks, BLOCK, or twice that with factors of codes]
    float32; sums: float32 or int32. weight: packed by `pack`; spare: BLOCK numbers of y's dtype,
    sums: 2 * reach * BLOCK, of each thread; places: reach numbers for each pattern of tiles; taps,
    tiles, blocks, passes: tables made by `cut_*` of host/dot_conv.py; units: the pairs of pass and
    tile; steps, depth: of a tap, and inputs of a step; x_step: from pixel to pixel of a tile;
    zero_point: of the codes in y; residual_factor: what the residual is multiplied by.
    """
    parallel_for(conv_units, len(units), threads, (
        unit, activation, image, weight, bias, residual, y, y_step, places, reach, spare, sums,
        taps, steps, depth, tiles, blocks, passes, units, x_step, low, high, zero_point,
        residual_factor, a, b))


@njit(keep=False)       # it may be compiled for a function
def conv_units(thread, first_unit, end_unit, unit, activation, image, weight, bias, residual, y,
               y_step, places, reach, spare, sums, taps, steps, depth, tiles, blocks, passes, units,
               x_step, low, high, zero_point, residual_factor, a, b):
    configure(unit, depth)
    mine = at(sums, 2 * thread * reach * BLOCK)
    other = at(sums, (2 * thread + 1) * reach * BLOCK)
    beside = at(spare, thread * BLOCK)
    done = (mine, at(bias, 0), at(residual, 0), len(residual), at(y, 0), at(places, 0), beside, 0,
            0, low, high, zero_point, residual_factor, a, b)    # there is none yet
    for index in range(first_unit, end_unit):
        first_block, end_block, group_offset = passes[units[index, 0]]
        rows, pixel, offset, pattern = tiles[units[index, 1]]
        for block in range(first_block, end_block):
            channel, channels, w_offset = blocks[block]
            multiply(unit, size(unit, rows, channels), activation, (
                at(image, offset + group_offset), x_step, at(taps, 0), len(taps), steps, depth,
                at(weight, w_offset), mine, *done))
            place = pixel * y_step + channel
            done = (mine, at(bias, block * bias.shape[1]), at(residual, place), len(residual),
                    at(y, place), at(places, pattern * reach), beside, rows, channels, low, high,
                    zero_point, residual_factor, a, b)
            mine, other = other, mine
    write_block(activation, done)
    release(unit)


@njit(inline="always")
def size(unit, rows, channels):
    """The number of the least micro-kernel for so many pixels and channels."""
    number = 0
    for smaller in unit.sizes[:-1]:
        number += rows > smaller
    return 2 * number + (channels > COLUMNS)


@kernel
def make_image(x, image, batch, geometry, padded, inverse, zero_point, outside, threads):
    """Copy x of this geometry into the middle of an image of the other one, which may also have
    more channels, for a whole batch; of both the numbers. inverse, zero_point: of codes, see
    `narrow`; outside: every byte of what lies around them."""
    g, p = ConvGeometry(*geometry), ConvGeometry(*padded)
    parallel_for(make_rows, batch * p.height, threads, (
        x, image, g, p, inverse, zero_point, outside))


@njit()
def make_rows(thread, first_row, end_row, x, image, g, p, inverse, zero_point, outside):
    line, before = p.width * p.channels, g.left * p.channels
    for row in range(first_row, end_row):
        target, h = row * line, row % p.height - g.top
        if not 0 <= h < g.height:
            fill(at(image, target), line, outside)
            continue
        source = (row // p.height * g.height + h) * g.width * g.channels
        pixels, count, padded = g.width, g.channels, p.channels
        if count == padded:
            pixels, count, padded = 1, g.width * count, g.width * count
        fill(at(image, target), before, outside)
        for pixel in range(pixels):
            narrow(at(image, target + before + pixel * padded), at(x, source + pixel * count),
                   count, padded, inverse, zero_point)
        after = before + pixels * padded
        fill(at(image, target + after), line - after, outside)


@kernel
def make_planes(x, image, batch, geometry, planes, phases, inverse, zero_point, outside,
                threads):
    """Copy every stride-th pixel of x of this geometry, from each of the phases [.., 2] on, into a
    plane of an image; of the geometries the numbers, and the rest as of make_image."""
    g, p = ConvGeometry(*geometry), ConvGeometry(*planes)
    parallel_for(make_plane_rows, batch * p.height, threads, (
        x, image, g, p, phases, inverse, zero_point, outside))


@njit()
def make_plane_rows(thread, first_row, end_row, x, image, g, p, phases, inverse, zero_point,
                    outside):
    rows = p.height // len(phases)
    for row in range(first_row, end_row):
        phase_row, phase_column = phases[row % p.height // rows]
        h = row % p.height % rows * g.stride_height + phase_row - g.top
        line = (row // p.height * g.height + h) * g.width
        for column in range(p.width):
            w = column * g.stride_width + phase_column - g.left
            target = at(image, (row * p.width + column) * p.channels)
            if 0 <= h < g.height and 0 <= w < g.width:
                narrow(target, at(x, (line + w) * g.channels), g.channels, p.channels, inverse,
                       zero_point)
            else:
                fill(target, p.channels, outside)
