"""What dot_attention.py and the kernel of dot_matmul.py are called with."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from ...matrices import from_starts, nowhere, operands
from ...memory import ALIGNMENT
from ...ops import Attention, MatMul, TensorSpec, count
from ...step import Array, Options, Step
from ..dot_units import BLOCK, COLUMNS, GROUP, STEP, Unit
from ..launch import Kernel, Launch, flat_bits
from . import attention, matmul, unit_choice
from .dot_conv import up_to
from .matmul import cut_bands, steps_of

ATTENTION, MATMUL = Kernel("dot_attention", "attention"), Kernel("dot_matmul", "matmul")
ZEROS = np.zeros(BLOCK, np.float32)     # their bias


class Rows(NamedTuple):
    """The rows of a matrix cut into tiles [.., 3], each its first row, rows and number of its
    pattern; places [.., reach]: where the rows of each pattern are in the output, or -1."""
    tiles: Array
    places: Array

    @property
    def reach(self) -> int:
        """Rows that there is room for."""
        return self.places.shape[1]


def cut_rows(rows: int, step: int, unit: Unit) -> Rows:
    """Of an output whose rows are `step` numbers apart."""
    first = np.arange(0, rows, unit.rows)
    patterns, number = np.unique(np.minimum(unit.rows, rows - first), return_inverse=True)
    row = np.arange(up_to(unit.rows, GROUP))
    return Rows(np.stack([first, patterns[number], number.ravel()], axis=1),
                np.where(row < patterns[:, None], row * step, -1))


class Rooms(NamedTuple):
    """Parts of the workspace, of each thread: how many numbers of which dtype."""
    threads: int
    parts: tuple[tuple[int, Any], ...]

    @property
    def ends(self) -> list[int]:
        """Of the parts, in bytes."""
        return list(accumulate(up_to(self.threads * size * np.dtype(dtype).itemsize, ALIGNMENT)
                               for size, dtype in self.parts))

    @property
    def bytes(self) -> int:
        return self.ends[-1]

    def cut(self, workspace: Array) -> list[Array]:
        """Each [threads, numbers]."""
        starts = [0, *self.ends]
        return [workspace[start:end].view(dtype)[:self.threads * size].reshape(self.threads, size)
                for (start, end), (size, dtype) in zip(pairwise(starts), self.parts, strict=True)]


def prepare_attention(op: Attention, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: Options, unit: Unit | None = None
                      ) -> Step:
    """Inputs q, k, v, [bias]; in float32 where bfloat16 is not asked for."""
    unit = unit or asked_for(options)
    if unit is None:
        return attention.prepare_attention(op, inputs, output, weights, options)
    sizes, shapes, lies, starts = operands(op, inputs, output)
    (rows, depth), (keys, width) = shapes[0], shapes[2]
    if len(inputs) == 3:
        lies = (*lies[:3], nowhere(sizes), lies[3])
    cut, steps = cut_rows(rows, lies[4].row, unit), steps_of(*lies)
    deep, long = up_to(depth, STEP), up_to(keys, STEP)
    halves = (deep * (up_to(keys, COLUMNS) + cut.reach) + long * (up_to(width, COLUMNS) + cut.reach)
              + COLUMNS * max(deep, long))
    rooms = Rooms(options.threads, (
        (halves, np.uint16), (max(depth, 2 * BLOCK), np.float32), (cut.reach * long, np.float32),
        (2 * cut.reach * BLOCK, np.float32), (BLOCK, stored(output))))
    bands = cut_bands(sizes, len(cut.tiles), options.threads)
    lines, taps = np.arange(cut.reach) * long, np.arange(0, max(deep, long), STEP)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        q, k, v, *rest = map(flat_bits, from_starts(arrays, starts))
        own, line, scores, sums, spare = rooms.cut(workspace)
        return [ATTENTION.bind(
            unit.constant, q, k, v, rest[0] if rest else np.empty(0, np.float32), flat_bits(y),
            count(sizes), np.array(sizes, np.int64), steps, depth, keys, width, cut.tiles, bands,
            cut.places, lines, ZEROS, taps, np.float32(op.scale), own, own.view(np.float32), line,
            scores, sums, spare, options.threads)]

    return Step(f"attention_bf16_{unit.name}_{unit.rows}x{BLOCK}", bind, rooms.bytes)


def prepare_matmul(op: MatMul, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options, unit: Unit | None = None) -> Step:
    """y = scale * a @ b, as matmul.prepare_matmul; in float32 where bfloat16 is not asked for."""
    unit = unit or asked_for(options)
    if unit is None:
        return matmul.prepare_matmul(op, inputs, output, weights, options)
    sizes, (rows, depth, columns), (a, b, y), starts, swap = matmul.factors(op, inputs, output)
    cut, steps, deep = cut_rows(rows, y.row, unit), steps_of(a, b, y), up_to(depth, STEP)
    rooms = Rooms(options.threads, (
        (deep * (up_to(columns, COLUMNS) + COLUMNS + cut.reach), np.uint16),
        (max(depth, 2 * BLOCK), np.float32), (2 * cut.reach * BLOCK, np.float32),
        (BLOCK, stored(output))))
    bands = cut_bands(sizes, len(cut.tiles), options.threads)
    taps = np.arange(0, deep, STEP)

    def bind(arrays: Sequence[Array], out: Array, workspace: Array) -> list[Launch]:
        left, right = map(flat_bits, from_starts(arrays, starts)[::-1 if swap else 1])
        own, line, sums, spare = rooms.cut(workspace)
        return [MATMUL.bind(
            unit.constant, left, right, flat_bits(out), count(sizes), np.array(sizes, np.int64),
            steps, depth, columns, cut.tiles, bands, cut.places, ZEROS, taps, np.float32(op.scale),
            own, own.view(np.float32), line, sums, spare, options.threads)]

    return Step(f"matmul_bf16_{unit.name}_{unit.rows}x{BLOCK}", bind, rooms.bytes)


def asked_for(options: Options) -> Unit | None:
    """What multiplies bfloat16, where that is to be done."""
    return unit_choice.choose() if options.dtype == "bfloat16" else None


def stored(output: TensorSpec) -> Any:
    """What a kernel knows of its numbers."""
    return np.uint16 if output.dtype == "bfloat16" else np.float32
