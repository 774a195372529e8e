"""What copy.py is called with, for ops that only move data."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from ...axes import as_matrices, dense_steps, merge_axes
from ...ops import Concat, Flatten, Reshape, TensorSpec, Transpose, count, known, normal_axis
from ...step import Array, Options, Step
from ..launch import Kernel, Launch, flat_bits

COPY_COLUMNS = Kernel("copy", "copy_columns")
TRANSPOSE_MATRICES = Kernel("copy", "transpose_matrices")
TRANSPOSE_ANY = Kernel("copy", "transpose_any")


def prepare_concat(op: Concat, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    """Inputs that lie in the output already, where they belong, are not copied."""
    axis = normal_axis(op.axis, len(output.shape))
    bounds = list(accumulate((count(spec.shape[axis:]) for spec in inputs), initial=0))
    width = bounds[-1]

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [COPY_COLUMNS.bind(flat_bits(array), end - start, flat_bits(y), width, start,
                                  options.threads)
                for array, (start, end) in zip(arrays, pairwise(bounds), strict=True)
                if end > start and not np.may_share_memory(array, y)]

    return Step("concat_f32", bind)


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
    """One that swaps more than two runs of axes, element by element."""
    steps = dense_steps(shape)
    merged = merge_axes([shape[axis] for axis in op.permutation],
                        [steps[axis] for axis in op.permutation])
    sizes, moved = np.array(merged[0], np.int64), np.array(merged[1][0], np.int64)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [TRANSPOSE_ANY.bind(arrays[0].reshape(-1), y.reshape(-1), sizes, moved,
                                   options.threads)]

    return Step("transpose_any_f32", bind)


def prepare_reshape(op: Reshape | Flatten, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    """The executor makes views of these; a copy is needed only where one is asked for alone."""
    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [COPY_COLUMNS.bind(arrays[0].reshape(-1), y.size, y.reshape(-1), y.size, 0,
                                  options.threads)]

    return Step("copy_f32", bind)
