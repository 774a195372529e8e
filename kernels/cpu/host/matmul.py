"""Matrix products.

A Linear layer is a 1x1 convolution over an image of one row of samples. With one sample the
micro-kernel of one row streams each weight through once (a GEMV, bound by memory); with TILE_ROWS
samples or more it is the register-blocked GEMM of ../conv.py. Where both matrices are computed,
../matmul.py multiplies them.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...matrices import Lie, from_starts, operands
from ...ops import Linear, MatMul, TensorSpec, count, known
from ...step import Array, Options, Step, weight_and_bias
from ..geometry import ConvGeometry
from ..launch import Kernel, Launch
from ..sizes import BLOCK, LANES, TILE_ROWS
from .conv import cover, prepare_tiled

MATMUL = Kernel("matmul", "matmul")
PACKING = 0.05      # time that packing a matrix takes, of that of multiplying all rows by it
MOST_BANDS = 64


def prepare_linear(op: Linear, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    """y = activation(x @ weight.T + bias + residual) for x (..., in)."""
    weight, bias = weight_and_bias(op.kind, weights)
    features = known(inputs[0].shape)[-1]
    samples = count(inputs[0].shape[:-1])
    g = ConvGeometry(1, samples, features, 1, samples, len(weight), 1, 1, 1, 1, 0, 0, 1, 1,
                     features)
    kind = "gemv" if samples < TILE_ROWS // 2 else f"{TILE_ROWS}x{BLOCK}"
    return prepare_tiled(f"linear_f32_{kind}", 1, g, (0, 0), 1, op.activation, weight, bias,
                         options, has_residual=len(inputs) > 3)


def prepare_matmul(op: MatMul, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    """y = scale * a @ b."""
    sizes, (rows, depth, columns), (a, b, y), starts, swap = factors(op, inputs, output)
    tiles = np.array(cover(rows), np.int64)
    bands = cut_bands(sizes, len(tiles), options.threads)
    steps, zeros = steps_of(a, b, y), np.zeros(-(-columns // LANES) * LANES, np.float32)
    floats = options.threads * depth * (len(zeros) + TILE_ROWS)

    def bind(arrays: Sequence[Array], out: Array, workspace: Array) -> list[Launch]:
        left, right = from_starts(arrays, starts)[::-1 if swap else 1]
        return [MATMUL.bind(
            left, right, out.reshape(-1), count(sizes), np.array(sizes, np.int64), steps, depth,
            columns, tiles, bands, zeros, np.float32(op.scale),
            workspace[:4 * floats].view(np.float32), options.threads)]

    return Step(f"matmul_f32_{TILE_ROWS}x{BLOCK}", bind, 4 * floats)


class Factors(NamedTuple):
    """sizes, lies, starts: as of `operands`; swap: whether the two have changed places, turned, and
    the output is turned, too."""
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    lies: tuple[Lie, ...]
    starts: tuple[int, ...]
    swap: bool


def factors(op: MatMul, inputs: Sequence[TensorSpec], output: TensorSpec) -> Factors:
    """Of a product; shape: rows, depth and columns. A matrix of one column is made a row."""
    sizes, ((rows, depth), (_, columns), _), (a, b, y), starts = operands(op, inputs, output)
    if columns == 1 and y.row == 1:
        return Factors(sizes, (columns, depth, rows), (b.turned(), a.turned(), y.turned()), starts,
                       True)
    return Factors(sizes, (rows, depth, columns), (a, b, y), starts, False)


def cut_bands(sizes: Sequence[int], tiles: int, threads: int) -> int:
    """Into how many bands the tiles of one matrix are cut: as few as give all threads about equal
    shares, for each packs the other matrix anew."""
    def time(bands: int) -> float:
        return -(-count(tuple(sizes)) * bands // threads) * (1 / bands + PACKING)
    return min(range(1, min(tiles, MOST_BANDS) + 1), key=time)


def steps_of(*lies: Lie) -> Array:
    """As kernels take them, of each operand: along leading axes, then along rows and columns."""
    return np.array([(*lie.leading, lie.row, lie.column) for lie in lies], np.int64)
