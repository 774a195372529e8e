"""Convolution, NHWC float32, without an im2col buffer: the micro-kernel walks the image itself.

The output is cut into tiles of consecutive pixels (at most TILE_ROWS, or NARROW_ROWS where a group
has no more than one vector of outputs) and blocks of output channels (at most BLOCK). `conv_tile`
of microkernels.py computes one tile x block:

    direct   With NHWC the KW * C inputs under one kernel line are contiguous, those of a group or
             of a dilated kernel in runs, and neighbouring output pixels read the same memory
             shifted by stride * C. A tile whose pixels lie in one output row is read in place.
    gather   Any other tile (across rows of an odd width) first copies its patches, zeros included,
             into rows of a scratch buffer that stays in cache.

Padding under direct tiles is made real first: one copy of the input between zeros, which costs
about 2% of a 3x3 layer where gathering its border tiles cost 50%.

host/conv.py writes both cuts down as tables, so the kernel has no geometry left to decide. A Linear
layer is the same thing on an image of one row. Most 3x3 convolutions of stride 1 run in winograd.py
instead.
"""
from __future__ import annotations

from .geometry import ConvGeometry
from .jit import kernel, njit
from .microkernels import some_blocks
from .parallel import parallel_for
from .simd import at, clear, copy_numbers
from .sizes import BLOCK, BLOCK_VECTORS, LANES, NARROW_ROWS


@kernel
def conv2d(x, weight, bias, residual, y, y_step, scratch, tiles, band, passes, geometry, low, high,
           threads):
    """Every pass over every tile, shared among the threads.

    x, y, residual: flat NHWC (residual may be empty), y_step floats from pixel to pixel of y and
    residual; weight, bias: packed by `pack`; scratch: threads * NARROW_ROWS * depth floats; tiles,
    passes: tables made by `cut_*` of host/conv.py, as is band, how many tiles all passes go over
    before the next; geometry: ConvGeometry's numbers.
    """
    g = ConvGeometry(*geometry)
    parallel_for(conv_units, len(passes) * len(tiles), threads, (
        x, weight, bias, residual, y, y_step, scratch, tiles, band, passes, g, low, high))


@njit()
def conv_units(thread, first_unit, end_unit, x, weight, bias, residual, y, y_step, scratch, tiles,
               band, passes, g, low, high):
    """The tiles of a band share the fetching of the next pass's weights, or its first tile would
    wait for them; a single tile would wait anyway."""
    depth = g.kernel_height * g.kernel_width * g.per_group
    patch = scratch[thread * NARROW_ROWS * depth:(thread + 1) * NARROW_ROWS * depth]
    for unit in range(first_unit, end_unit):
        first = unit // (band * len(passes)) * band
        count = min(band, len(tiles) - first)
        number, within = divmod(unit - first * len(passes), count)
        share = -(-BLOCK // count) if count > 1 else 0      # floats of each line of a panel
        channel, full, vectors, valid, w_offset, bias_offset, group = passes[number]
        rows, pixel, x_offset = tiles[first + within]
        if x_offset >= 0:
            source, x_step = at(x, x_offset + group * g.per_group), g.stride_width * g.channels
            lines, x_line = g.kernel_height, g.dilation_height * g.width * g.channels
            runs, x_run, length = g.kernel_width, g.dilation_width * g.channels, g.per_group
            if x_run == length:         # the inputs under a line are one run
                runs, length = 1, runs * length
        else:
            gather(x, patch, rows, pixel, group, g)
            source, x_step = at(patch, 0), depth
            lines, x_line, runs, x_run, length = 1, 0, 1, 0, depth
        following, ahead_step, fetched = w_offset, 0, within * share
        if number + 1 < len(passes) and fetched < BLOCK:
            following, ahead_step = passes[number + 1, 4] + fetched * depth, share
        y_offset = pixel * y_step + channel
        if full > 0:
            some_blocks(rows, BLOCK_VECTORS, (
                source, x_step, lines, x_line, runs, x_run, length, full, at(weight, w_offset),
                at(weight, following), ahead_step, at(bias, bias_offset), at(residual, y_offset),
                len(residual), at(y, y_offset), y_step, LANES, low, high))
        if vectors > 0:
            done = full * BLOCK
            some_blocks(rows, vectors, (
                source, x_step, lines, x_line, runs, x_run, length, 1,
                at(weight, w_offset + done * depth), at(weight, following), 0,
                at(bias, bias_offset + done), at(residual, y_offset + done), len(residual),
                at(y, y_offset + done), y_step, valid, low, high))


@kernel
def pad2d(x, padded, batch, geometry, padded_geometry, threads):
    """Copy x into the middle of a zeroed image of the other geometry, for a whole batch."""
    g, p = ConvGeometry(*geometry), ConvGeometry(*padded_geometry)
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
            copy_numbers(at(padded, target + before), at(x, source), line)
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
                copy_numbers(at(patch, target + first * g.channels),
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
                        copy_numbers(into, at(x, first), g.per_group)
                    else:
                        clear(into, g.per_group)
            target += line_length
