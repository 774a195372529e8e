"""Depthwise convolution (one filter per channel), NHWC, in float32; input and output may
each be stored in bfloat16 or codes of 8 bits.

There is little arithmetic per loaded value, so loads decide. `depthwise_tile` of depthwise_simd.py
computes PIXELS neighbours of one output row, LANES channels after the other: a weight is loaded
once for all of them, and for the common windows so is each input. Padding costs no copy: lines
outside the image are left out of the window, and so are columns; only those of uncommon windows,
which `depthwise_any` computes, are read from a row of zeros.
"""
from __future__ import annotations

from .depthwise_simd import depthwise_any, depthwise_tile
from .geometry import ConvGeometry
from .jit import kernel, njit
from .parallel import parallel_for
from .simd import at
from .sizes import COMMON, WIDE
from .sizes import DEPTHWISE_BAND as BAND
from .sizes import DEPTHWISE_GROUP as GROUP
from .sizes import DEPTHWISE_PIXELS as PIXELS


def depthwise2d(family):
    """The kernel that is fast for WINDOWS[family]. One each, so that a network compiles those that
    it has."""
    @njit(keep=False)
    def units(thread, first_unit, end_unit, x, weight, bias, zeros, y, rows, columns, g, activation,
              bounds):
        groups = -(-g.channels // GROUP)
        for unit in range(first_unit, end_unit):
            # Threads part the rows, and each goes down some of them group by group.
            band, within = unit // (groups * BAND), unit % (groups * BAND)
            row, first_channel = band * BAND + within % BAND, within // BAND * GROUP
            if row >= rows:
                continue
            for tile in range(len(columns)):
                number, common, others = tile_of(
                    row, columns[tile], first_channel, min(GROUP, g.channels - first_channel), x,
                    weight, bias, zeros, y, g)
                if number >= 0:
                    depthwise_tile(family, number, activation, common + bounds)
                elif columns[tile][1] == PIXELS:
                    depthwise_any(PIXELS, activation, others + bounds)
                else:
                    depthwise_any(1, activation, others + bounds)

    @kernel
    def rows_of_groups(x, weight, bias, zeros, y, batch, columns, geometry, activation, low, high,
                       a, b, zero, threads):
        """Every output row of every group of channels, shared among the threads.

        x, y: flat NHWC, each of any dtype; weight: [taps, padded channels]; bias: [padded
        channels]; zeros: [LANES] of what stands for 0 in x; columns: made by `cut_columns` of
        host/depthwise.py; geometry: ConvGeometry's numbers; activation and what follows: as of
        depthwise_tile.
        """
        g = ConvGeometry(*geometry)
        rows = batch * g.out_height
        parallel_for(units, -(-rows // BAND) * BAND * -(-g.channels // GROUP), threads, (
            x, weight, bias, zeros, y, rows, columns, g, activation, (low, high, a, b, zero)))

    return rows_of_groups


@njit(inline="always")
def tile_of(row, tile, c, count, x, weight, bias, zeros, y, g):
    """One tile of an output row, counted through the batch, and `count` channels from c on: (number
    of its window, arguments of depthwise_tile, arguments of depthwise_any, both without bounds)"""
    column, _, number, left = tile
    image, top = row // g.out_height, row % g.out_height * g.stride_height - g.top
    line = -(top // g.dilation_height) if top < 0 else 0    # first and end line inside the image
    end_line = min(g.kernel_height, (g.height - 1 - top) // g.dilation_height + 1)
    source = (image * g.height + top + line * g.dilation_height) * g.width * g.channels + c
    x_line = g.dilation_height * g.width * g.channels
    first = column * g.stride_width - g.left
    padded = len(bias)
    w = at(weight, line * g.kernel_width * padded + c)
    target = at(y, (row * g.out_width + column) * g.channels + c)
    return (number,
            (at(x, source + (first + left) * g.channels), g.channels, end_line - line, x_line, w,
             padded, at(bias, c), target, count),
            (at(x, source), first, g.width, g.channels, end_line - line, x_line, at(zeros, 0), w,
             padded, g.kernel_width, g.dilation_width, g.stride_width, at(bias, c), target, count))


depthwise_common, depthwise_wide = depthwise2d(COMMON), depthwise2d(WIDE)
