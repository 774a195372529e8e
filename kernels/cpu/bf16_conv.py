"""Convolution with bfloat16 products and float32 sums, NHWC; input, residual and output are each
float32 or bfloat16.

One pass rounds the input to a bfloat16 image and makes its padding real; an input in bfloat16 that
needs no padding is the image. Then it is as in conv.py: tiles of consecutive pixels (at most the
unit's rows) times blocks of output channels (BLOCK), and the micro-kernel `multiply` walks the
image itself.

    direct   With NHWC the KW * C inputs under one kernel line are contiguous, and neighbouring
             output pixels lie stride * C apart: a tile is read in place. Steps are whole: channels
             are padded with zeros until KW * C is.
    gather   Where that would compute too much for nothing, and for dilated and grouped
             convolutions, the patches of a tile are copied first, into rows of a scratch buffer
             that stays in cache, each padded to whole steps. So are those of a direct tile whose
             rows would end beyond the input, where that is the image; the sums have the same bits.

Direct tiles end with their output row, or run on through the image where that fills them better:
then they also compute what a window sees that leaves one image line for the next. Neither that is
written, nor the rows of a tile beyond the last pixel. Depthwise convolutions have nothing to gain,
and run in float32.
"""
from __future__ import annotations

from .bf16_simd import configure, copy_bits, multiply, narrow, release, write_block
from .bf16_units import BLOCK, COLUMNS
from .geometry import ConvGeometry
from .jit import kernel, njit
from .parallel import parallel_for
from .simd import at, clear


@kernel
def conv2d(unit, image, weight, bias, residual, y, y_step, patches, sums, tiles, blocks, passes,
           geometry, pitch, low, high, threads):
    """Every pass over every tile, shared among the threads.

    image, weight, patches: bfloat16; y, residual: float32 or bfloat16, NHWC with pixels y_step
    numbers apart (residual may be empty); bias, sums: float32. weight, bias: packed by `pack`;
    patches, sums: scratch of each thread; tiles, blocks, passes: tables made by `cut_*` of
    host/bf16_conv.py; geometry: the numbers of that of the padded image; pitch: positions that
    tiles count to an output row, of which the first out_width are pixels.
    """
    g = ConvGeometry(*geometry)
    parallel_for(conv_units, len(passes) * len(tiles), threads, (
        unit, image, weight, bias, residual, y, y_step, patches, sums, tiles, blocks, passes, g,
        pitch, low, high))


@njit()
def conv_units(thread, first_unit, end_unit, unit, image, weight, bias, residual, y, y_step,
               patches, sums, tiles, blocks, passes, g, pitch, low, high):
    configure(unit)
    patch, own_sums = patches[thread], at(sums, thread * unit.rows * BLOCK)
    depth = -(-g.kernel_height * g.kernel_width * g.per_group // unit.depth) * unit.depth
    for index in range(first_unit, end_unit):
        first_block, end_block, group = passes[index // len(tiles)]
        rows, position, offset = tiles[index % len(tiles)]
        if offset >= 0:
            source, x_step = at(image, offset), g.stride_width * g.channels
            lines, x_line = g.kernel_height, g.width * g.channels
            steps = g.kernel_width * g.channels // unit.depth
        else:
            gather(image, patch, rows, position, pitch, group, depth, g)
            source, x_step = at(patch, 0), depth
            lines, x_line, steps = 1, 0, depth // unit.depth
        for block in range(first_block, end_block):
            channel, channels, w_offset = blocks[block]
            one_block(unit, rows, channels, (source, x_step, lines, x_line, steps,
                                             at(weight, w_offset), own_sums))
            write_tile(sums, thread * unit.rows, at(bias, block * BLOCK), residual, y, y_step,
                       rows, position, pitch, channel, channels, g, low, high)
    release(unit)


@njit()
def write_tile(sums, row_of_sums, bias, residual, y, y_step, rows, position, pitch, channel,
               channels, g, low, high):
    """Write what is a pixel of a tile's rows: a run for each output row, or all in one where every
    position is a pixel."""
    gap, done = pitch - g.out_width, 0
    row, column = position // pitch, position % pitch
    while done < rows:
        count = rows - done if gap == 0 else min(rows - done, g.out_width - column)
        offset = (row * g.out_width + column) * y_step + channel
        write_block((at(sums, (row_of_sums + done) * BLOCK), bias, at(residual, offset),
                     len(residual), at(y, offset), y_step, count, channels, low, high))
        done += count + gap
        row, column = row + 1, 0


@njit(inline="always")
def one_block(unit, rows, channels, arguments):
    """The micro-kernel of the wanted size, which it must know when it is compiled."""
    if channels > COLUMNS:
        if rows > unit.half:
            multiply(unit, 2, 2, arguments)
        elif rows > unit.least:
            multiply(unit, 1, 2, arguments)
        else:
            multiply(unit, 0, 2, arguments)
    elif rows > unit.half:
        multiply(unit, 2, 1, arguments)
    elif rows > unit.least:
        multiply(unit, 1, 1, arguments)
    else:
        multiply(unit, 0, 1, arguments)


@njit()
def gather(image, patch, rows, position, pitch, group, depth, g):
    """Copy the inputs under positions position .. position + rows of one group, [rows, depth]."""
    whole_lines = g.dilation_width == 1 and g.per_group == g.channels
    taps, length = g.kernel_width, g.per_group
    if whole_lines:
        taps, length = 1, g.kernel_width * g.channels
    for r in range(rows):
        p = position + r
        column = p % pitch * g.stride_width
        row = p // pitch % g.out_height * g.stride_height
        first = (p // (pitch * g.out_height) * g.height + row) * g.width + column
        target, end = r * depth, (r + 1) * depth
        for line in range(g.kernel_height):
            for tap in range(taps):
                tapped = first + line * g.dilation_height * g.width + tap * g.dilation_width
                source = tapped * g.channels + group * g.per_group
                copy_bits(at(patch, target), at(image, source), length,
                          source + length + BLOCK <= len(image))
                target += length
        clear(at(patch, target), end - target)


@kernel
def make_image(x, image, batch, geometry, padded, threads):
    """Copy x, float32 or bfloat16, of this geometry into the middle of a zeroed bfloat16 image of
    the other one, which may also have more channels, for a whole batch; of both the numbers."""
    g, p = ConvGeometry(*geometry), ConvGeometry(*padded)
    parallel_for(make_rows, batch * p.height, threads, (x, image, g, p))


@njit()
def make_rows(thread, first_row, end_row, x, image, g, p):
    line, before = p.width * p.channels, g.left * p.channels
    for row in range(first_row, end_row):
        target, h = row * line, row % p.height - g.top
        if not 0 <= h < g.height:
            clear(at(image, target), line)
            continue
        source = (row // p.height * g.height + h) * g.width * g.channels
        pixels, count, padded = g.width, g.channels, p.channels
        if count == padded:
            pixels, count, padded = 1, g.width * count, g.width * count
        clear(at(image, target), before)
        for pixel in range(pixels):
            narrow(at(image, target + before + pixel * padded), at(x, source + pixel * count),
                   count, padded)
        after = before + pixels * padded
        clear(at(image, target + after), line - after)
