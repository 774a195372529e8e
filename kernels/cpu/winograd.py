"""Winograd convolution: 3x3 windows of stride 1 with fewer multiplications, NHWC, in float32. Its
input, residual and output may each be stored in bfloat16 or in codes of 8 bits.

F(m x m, 3x3), m being 2 or 4, computes tiles of m x m outputs by the identity that stands in
`winograd_matrices.py`. Its product is elementwise over the P = (m + 2)^2 positions of a
transformed tile and sums over input channels: P matrix products [tiles, C] x [C, O], which run on
the register-blocked micro-kernel of microkernels.py. That is P / m^2 multiplications an output
instead of 9: 2.25 times fewer for m = 2 and 4 times fewer for m = 4.

A thread takes a block of tiles and one group of output channels after the other:

    transform_inputs    B^T d B of the block, all input channels, once a block:  [P, tiles, C]
    multiply            P products for the group of output channels:             [P, tiles, group]
    transform_outputs   A^T [...] A, bias, residual, activation, into the image

Threads share blocks and groups, so that a map of few tiles keeps all of them busy; a block that is
cut between two threads is transformed by each, which costs little beside its products.

What it costs: packed weights are 1.8 (m = 2) or 4 times as large as the direct kernel's. With m = 4
rounding errors are 3 to 5 times the direct kernel's (root mean square; m = 2 is a little better
than direct). The transforms scale what lies between by up to 100 on the input's side and 361 on the
output's, so that sums within these factors of float32's greatest number overflow. A NaN or an
infinity is never lost, but what is infinite in the direct kernel may be NaN here, and reach all
outputs of the tiles that read it. CNN_WINOGRAD=0 in the environment keeps to the direct kernel.
"""
from __future__ import annotations

import numpy as np

from .geometry import WinogradGeometry
from .jit import kernel, njit
from .microkernels import some_blocks, winograd_input, winograd_output, winograd_pixels
from .parallel import parallel_for
from .simd import at, copy_numbers, fill
from .sizes import BLOCK, HALF_ROWS, LANES


@kernel
def winograd2d(x, weight, bias, zeros, residual, residual_step, y, y_step, scratch, transformed,
               ends, geometry, outside, activation, low, high, residual_factor, a, b, threads):
    """Every group of output channels of every block of tiles, shared among the threads.

    x, y, residual: flat NHWC, float32, bfloat16 or codes, so many numbers from pixel to pixel of y
    and residual, which is one pixel of zeros, with step 0, where there is none; weight: packed by
    `pack` of host/winograd.py; bias: padded to whole vectors; zeros: at least g.group of them;
    scratch: threads * ends[-1] floats; transformed: where each thread keeps which block it has
    transformed; geometry: WinogradGeometry's numbers; outside: every byte of what lies around x;
    activation and the rest: as of `winograd_pixels`.
    """
    g = WinogradGeometry(*geometry)
    groups = -(-g.out_channels // g.group)
    for thread in range(threads):
        transformed[thread] = -1
    # Of a tuple that begins with a function Numba would make one of functions.
    parallel_for(winograd_units, -(-g.tiles // g.block_tiles) * groups, threads, (
        x, weight, bias, zeros, residual, residual_step, y, y_step, scratch, transformed, ends,
        groups, g, outside, activation, (low, high, residual_factor, a, b)))


@njit(keep=False)       # it may be compiled for a function
def winograd_units(thread, first_unit, end_unit, x, weight, bias, zeros, residual, residual_step, y,
                   y_step, scratch, transformed, ends, groups, g, outside, activation, numbers):
    own = scratch[thread * ends[3]:(thread + 1) * ends[3]]
    patch, lines = own[:ends[0]].view(x.dtype), own[ends[0]:ends[1]]
    inputs, products = own[ends[1]:ends[2]], own[ends[2]:]
    for unit in range(first_unit, end_unit):
        first_tile, channel = unit // groups * g.block_tiles, unit % groups * g.group
        tiles = min(g.block_tiles, g.tiles - first_tile)
        if first_tile != transformed[thread]:
            transform_inputs(x, patch, lines, inputs, first_tile, tiles, g, outside)
            transformed[thread] = first_tile
        multiply(inputs, weight, zeros, products, channel, tiles, g)
        transform_outputs(products, lines, bias, residual, residual_step, y, y_step, first_tile,
                          tiles, channel, g, activation, numbers)


@njit(inline="always")
def transform_inputs(x, patch, lines, inputs, first_tile, tiles, g, outside):
    """inputs[position, tile, channel] = B^T d B for `tiles` tiles from first_tile on.

    Tiles inside the image are read where they lie, those at its border and those of channels that
    are no whole vectors from a copy.
    """
    reach = g.tile + 2
    line = reach * g.depth
    position_step = g.block_tiles * g.depth
    for t in range(tiles):
        image, row, column = place(first_tile + t, g)
        h, w = row - g.top, column - g.left
        inside = 0 <= h <= g.height - reach and 0 <= w <= g.width - reach
        if inside and g.depth == g.channels:
            source = at(x, ((image * g.height + h) * g.width + w) * g.channels)
            input_pass(g.tile, (source, g.width * g.channels, at(lines, 0), line, line))
        else:
            copy_patch(x, patch, image, h, w, g, outside)
            input_pass(g.tile, (at(patch, 0), line, at(lines, 0), line, line))
        for i in range(reach):      # B^T d is in lines; now each of its rows times B
            target = at(inputs, i * reach * position_step + t * g.depth)
            input_pass(g.tile, (at(lines, i * line), g.depth, target, position_step, g.depth))


@njit(inline="always")
def copy_patch(x, patch, image, h, w, g, outside):
    """patch[reach, reach, depth] = the inputs of a tile whose first is (h, w), and what is
    around the image."""
    reach = g.tile + 2
    fill(at(patch, 0), reach * reach * g.depth, outside)
    for i in range(max(h, 0), min(h + reach, g.height)):
        for j in range(max(w, 0), min(w + reach, g.width)):
            copy_numbers(at(patch, ((i - h) * reach + j - w) * g.depth),
                        at(x, ((image * g.height + i) * g.width + j) * g.channels), g.channels)


@njit(inline="always")
def multiply(inputs, weight, zeros, products, first_channel, tiles, g):
    """products[position, tile, channel] = inputs[position] @ weight[position], for one group.

    Weights come from far, each is used for few tiles, and the first micro-kernel of a panel would
    wait for them: all micro-kernels of a panel share the fetching of the next one. Rows of tiles
    that fill up the last micro-kernel hold anything, and nobody reads them.
    """
    end_channel = min(first_channel + g.group, -(-g.out_channels // LANES) * LANES)
    blocks = -(-(end_channel - first_channel) // BLOCK)
    panels = (g.tile + 2) ** 2 * blocks
    share = -(-BLOCK // -(-tiles // g.rows))
    infinity, nothing = np.float32(np.inf), at(zeros, 0)
    for panel in range(panels):
        position, channel = panel // blocks, first_channel + panel % blocks * BLOCK
        vectors = min(BLOCK, end_channel - channel) // LANES
        following = min(panel + 1, panels - 1)
        ahead = panel_offset(following // blocks, first_channel + following % blocks * BLOCK, g)
        for t in range(0, tiles, g.rows):
            rows = g.rows if tiles - t > HALF_ROWS else HALF_ROWS
            row = position * g.block_tiles + t
            some_blocks(rows, vectors, (
                at(inputs, row * g.depth), g.depth, 1, 0, 1, 0, g.channels, 1,
                at(weight, panel_offset(position, channel, g)), at(weight, ahead), share,
                nothing, nothing, 0, at(products, row * g.group + channel - first_channel), g.group,
                LANES, -infinity, infinity))
            ahead += share * g.channels


@njit(inline="always")
def panel_offset(position, channel, g):
    """Where `pack` puts the weights of a position and a block that begins with this channel."""
    return (position * (-(-g.out_channels // LANES) * LANES) + channel) * g.channels


@njit(inline="always")
def transform_outputs(products, lines, bias, residual, residual_step, y, y_step, first_tile, tiles,
                      channel, g, activation, numbers):
    """y = clip(f(A^T products A + bias + residual * its factor)) for one group of one block."""
    reach = g.tile + 2
    channels = min(g.group, g.out_channels - channel)
    length = -(-channels // LANES) * LANES
    position_step = g.block_tiles * g.group
    for t in range(tiles):
        image, row, column = place(first_tile + t, g)
        for j in range(reach):
            output_pass(g.tile, (at(products, j * position_step + t * g.group),
                                 reach * position_step, at(lines, j * g.group),
                                 reach * g.group, length))
        for i in range(min(g.tile, g.out_height - row)):    # A^T products, each row times A
            pixel = (image * g.out_height + row + i) * g.out_width + column
            write_pixels(g.tile, activation, (
                at(lines, i * reach * g.group), g.group, at(bias, channel),
                at(residual, pixel * residual_step + channel), residual_step,
                at(y, pixel * y_step + channel), y_step, min(g.tile, g.out_width - column),
                channels, *numbers))


@njit(inline="always")
def place(tile, g):
    """Image, first output row and first output column of a tile, counted through the batch."""
    per_image = g.tiles_high * g.tiles_wide
    return (tile // per_image, tile % per_image // g.tiles_wide * g.tile,
            tile % g.tiles_wide * g.tile)


@njit(inline="always")
def input_pass(tile, arguments):
    """The transform of this tile, whose size it must know when it is compiled."""
    if tile == 4:
        winograd_input(4, arguments)
    else:
        winograd_input(2, arguments)


@njit(inline="always")
def output_pass(tile, arguments):
    if tile == 4:
        winograd_output(4, arguments)
    else:
        winograd_output(2, arguments)


@njit(inline="always")
def write_pixels(tile, activation, arguments):
    if tile == 4:
        winograd_pixels(4, activation, arguments)
    else:
        winograd_pixels(2, activation, arguments)
