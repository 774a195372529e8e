"""What copy.py is called with, for ops that only move data."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from ...axes import as_matrices, dense_steps, flat_pixels, merge_axes, merge_padded
from ...ops import (
    Concat,
    Flatten,
    Pad,
    PadMode,
    Reshape,
    Slice,
    TensorSpec,
    Transpose,
    count,
    known,
    normal_axis,
)
from ...step import Array, Options, Step
from ..launch import Kernel, Launch, flat_bits
from ..sizes import CONSTANT, EDGE, REFLECT

COPY_COLUMNS, PAD = Kernel("copy", "copy_columns"), Kernel("copy", "pad")
TRANSPOSE_MATRICES = Kernel("copy", "transpose_matrices")
GATHER = Kernel("copy", "gather")
MODES: dict[PadMode, int] = {"constant": CONSTANT, "edge": EDGE, "reflect": REFLECT}


def prepare_concat(op: Concat, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    axis = normal_axis(op.axis, len(output.shape))
    bounds = list(accumulate((count(spec.shape[axis:]) for spec in inputs), initial=0))
    rows, width = count(output.shape[:axis]), bounds[-1]
    of_channels = axis == len(output.shape) - 1

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        memory, y_width = flat_pixels(y) if of_channels else (y, width)
        return [COPY_COLUMNS.bind(rows, end - start, flat_bits(array), end - start, 0,
                                  flat_bits(memory), y_width, start, options.threads)
                for array, (start, end) in zip(arrays, pairwise(bounds), strict=True)
                if end > start and array is not None]

    return Step("concat_f32", bind, strided=int(of_channels))


def prepare_slice(op: Slice, inputs: list[TensorSpec], output: TensorSpec,
                  weights: list[Array | None], options: Options) -> Step:
    shape = known(inputs[0].shape)
    axis = normal_axis(op.axis, len(shape))
    size, taken, inner = shape[axis], known(output.shape)[axis], count(shape[axis + 1:])
    rows, width, x_width = count(shape[:axis]), taken * inner, size * inner
    first = op.start * inner
    if op.step > 1 and taken * op.step == size:     # each element of the axis is a row of its own
        rows, width, x_width = rows * taken, inner, op.step * inner
    elif op.step > 1:
        sizes, steps = merge_axes((rows, taken, inner), (x_width, op.step * inner, 1))
        return _gather("slice_any_f32", first, sizes, steps[0], options)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [COPY_COLUMNS.bind(rows, width, arrays[0].reshape(-1), x_width, first,
                                  y.reshape(-1), width, 0, options.threads)]

    return Step("slice_f32", bind)


def prepare_pad(op: Pad, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: Options) -> Step:
    mode, value = MODES[op.mode], np.float32(op.value)
    mirrored = mode != CONSTANT
    axes = merge_padded(known(inputs[0].shape), op.before, op.after, mirrored)
    x_sizes, first, after = np.array(axes, np.int64).T.copy()
    y_sizes = first + x_sizes + after

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [PAD.bind(arrays[0].reshape(-1), x_sizes, first, y.reshape(-1), y_sizes, mode, value,
                         options.threads)]

    return Step(f"pad_{op.mode}_f32" if mirrored else "pad_f32", bind)


def prepare_transpose(op: Transpose, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: Options) -> Step:
    matrices = as_matrices(known(inputs[0].shape), op.permutation)
    if matrices is None:
        return _transpose_any(op, known(inputs[0].shape), options)
    batch, rows, columns = matrices

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [TRANSPOSE_MATRICES.bind(arrays[0].reshape(matrices),
                                        y.reshape(batch, columns, rows), options.threads)]

    return Step("transpose_f32", bind)


def _transpose_any(op: Transpose, shape: tuple[int, ...], options: Options) -> Step:
    """One that swaps more than two runs of axes."""
    steps = dense_steps(shape)
    sizes, moved = merge_axes([shape[axis] for axis in op.permutation],
                              [steps[axis] for axis in op.permutation])
    return _gather("transpose_any_f32", 0, sizes, moved[0], options)


def _gather(name: str, first: int, sizes: Sequence[int], steps: Sequence[int],
            options: Options) -> Step:
    """Element by element: the axes of the output step through the input, from `first` on."""
    of_y, of_x = np.array(sizes, np.int64), np.array(steps, np.int64)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [GATHER.bind(arrays[0].reshape(-1)[first:], y.reshape(-1), of_y, of_x,
                            options.threads)]

    return Step(name, bind)


def prepare_reshape(op: Reshape | Flatten, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    """The executor makes views of these; a copy is needed only where one is asked for alone."""
    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [COPY_COLUMNS.bind(1, y.size, arrays[0].reshape(-1), y.size, 0, y.reshape(-1),
                                  y.size, 0, options.threads)]

    return Step("copy_f32", bind)
