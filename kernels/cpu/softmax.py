"""Softmax along any axis, float32, with the maximum subtracted first."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops import Softmax, TensorSpec, count, known, normal_axis
from ..step import Array, Options, Run, Step
from . import scalar
from .jit import njit
from .parallel import parallel_for


@njit()
def softmax(x, y, length, inner, threads):
    """x, y: flat (outer, length, inner); along `length`."""
    parallel_for(softmax_columns, len(x) // length, threads, (x, y, length, inner))


@njit()
def softmax_columns(thread, first_column, end_column, x, y, length, inner):
    for column in range(first_column, end_column):
        first = column // inner * length * inner + column % inner
        end = first + length * inner
        greatest = x[first]
        for i in range(first, end, inner):
            greatest = x[i] if x[i] > greatest or x[i] != x[i] else greatest
        total = np.float32(0)
        for i in range(first, end, inner):
            y[i] = scalar.exp(x[i] - greatest)
            total += y[i]
        for i in range(first, end, inner):
            y[i] /= total


def prepare_softmax(op: Softmax, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    shape = known(output.shape)
    axis = normal_axis(op.axis, len(shape))
    length, inner = shape[axis], count(shape[axis + 1:])

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        flat_x, flat_y = arrays[0].reshape(-1), y.reshape(-1)
        return lambda: softmax(flat_x, flat_y, length, inner, options.threads)

    return Step("softmax_f32", bind)
