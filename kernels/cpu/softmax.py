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
        greatest = x[first]
        for i in range(length):
            value = x[first + i * inner]
            greatest = value if (value > greatest) | (value != value) else greatest
        for i in range(length):
            y[first + i * inner] = x[first + i * inner] - greatest
        if inner == 1:
            exponentials(y[first:first + length])
        else:
            for i in range(length):
                y[first + i * inner] = scalar.exp(y[first + i * inner])
        total = np.float32(0)
        for i in range(length):
            total += y[first + i * inner]
        for i in range(length):
            y[first + i * inner] /= total


@njit()
def exponentials(y):
    for i in range(len(y)):
        y[i] = scalar.exp(y[i])


def prepare_softmax(op: Softmax, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    shape = known(output.shape)
    axis = normal_axis(op.axis, len(shape))
    length, inner = shape[axis], count(shape[axis + 1:])

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        flat_x, flat_y = arrays[0].reshape(-1), y.reshape(-1)
        return lambda: softmax(flat_x, flat_y, length, inner, options.threads)

    return Step("softmax_f32", bind)
