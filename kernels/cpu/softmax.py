"""Softmax along any axis and its logarithm, float32, with the maximum subtracted first."""
from __future__ import annotations

import numpy as np

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for
from .rows import exponentials, multiply_by
from .simd import at

ONE = np.float32(1)


def softmax_kernel(finish):
    """The kernel whose results `finish` makes of a column's exponentials, which lie in y, and their
    sum."""
    @njit(keep=False)
    def columns(thread, first_column, end_column, x, y, length, inner):
        for column in range(first_column, end_column):
            first = column // inner * length * inner + column % inner
            if inner == 1:
                greatest, total = exponentials(at(x, first), at(y, first), length)
            else:
                greatest, total = x[first], np.float32(0)
                for i in range(length):
                    value = x[first + i * inner]
                    greatest = value if (value > greatest) | (value != value) else greatest
                for i in range(length):
                    y[first + i * inner] = scalar.exp(x[first + i * inner] - greatest)
                    total += y[first + i * inner]
            finish(x, y, first, length, inner, greatest, total)

    @kernel
    def softmax(x, y, length, inner, threads):
        """x, y: flat (outer, length, inner); along `length`."""
        parallel_for(columns, len(x) // length, threads, (x, y, length, inner))

    return softmax


@njit(inline="always")
def softmax_row(row):
    """Of `row` and in its place."""
    _, total = exponentials(at(row, 0), at(row, 0), len(row))
    multiply_by(at(row, 0), len(row), ONE / total)


@njit(inline="always")
def shares(x, y, first, length, inner, greatest, total):
    if inner == 1:
        multiply_by(at(y, first), length, ONE / total)
    else:
        for i in range(length):
            y[first + i * inner] /= total


@njit(inline="always")
def logarithms(x, y, first, length, inner, greatest, total):
    total = scalar.log(total)
    for i in range(length):
        y[first + i * inner] = (x[first + i * inner] - greatest) - total


softmax, log_softmax = softmax_kernel(shares), softmax_kernel(logarithms)
