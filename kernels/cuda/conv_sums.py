"""Which outputs a lane has summed up when a warp's tile of y is complete.

The epilogue wants neighbouring channels of a pixel, 16 bytes of y, so that residual and y move in
whole sectors straight from and to registers. CUDA cores can sum up as they like (conv_simt.py).
Tensor cores leave a lane two neighbouring columns of every 8; but which channel a column is,
weights decide: they are packed such that a lane's columns of a few neighbouring tiles are one run
of channels (`spread`).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .ptx import cuda, uint32


class Sums(NamedTuple):
    """How a warp's sums lie in the registers of its lanes.

    run      neighbouring channels of a row that a lane holds
    rows     of which it holds some
    columns  from a lane's run to its next one in the same row
    row      device function (lane, i): the i-th of its rows in the tile
    column   device function (lane): the first channel of its first run
    take     device function (value, acc, i, g): value[:run] = the g-th run of the i-th row
    put      device function (acc, i, g, value): the other way round
    """
    run: int
    rows: int
    columns: int
    row: Callable
    column: Callable
    take: Callable
    put: Callable


def tensor_core_sums(warp_m: int, warp_n: int, run: int) -> Sums:
    """Of mma.sync and wgmma: acc holds for each 16 rows and 8 columns two sums of row lane // 4,
    and two of the row 8 further. Four lanes hold 4 runs of a row."""
    tiles, of_run = warp_n // 8, run // 2

    @cuda.jit(device=True, inline="always")
    def row(lane, i):
        return uint32(uint32(i // 2 * 16 + i % 2 * 8) + (lane >> uint32(2)))

    @cuda.jit(device=True, inline="always")
    def column(lane):
        return uint32((lane & uint32(3)) * uint32(run))

    @cuda.jit(device=True, inline="always")
    def take(value, acc, i, g):
        for j in range(of_run):
            o = (i // 2 * tiles + g * of_run + j) * 4 + i % 2 * 2
            value[2 * j] = acc[o]
            value[2 * j + 1] = acc[o + 1]

    @cuda.jit(device=True, inline="always")
    def put(acc, i, g, value):
        for j in range(of_run):
            o = (i // 2 * tiles + g * of_run + j) * 4 + i % 2 * 2
            acc[o] = value[2 * j]
            acc[o + 1] = value[2 * j + 1]

    return Sums(run, warp_m // 8, 4 * run, row, column, take, put)


def spread(rows: Any, run: int) -> Any:
    """(..., channels, depth), the weights of channels in their order, a multiple of 4 * run of them
    -> those of the columns that tensor cores compute."""
    *outer, channels, depth = rows.shape
    lanes = rows.reshape(*outer, channels // (4 * run), 4, run // 2, 2, depth)
    return np.swapaxes(lanes, -4, -3).reshape(rows.shape)
