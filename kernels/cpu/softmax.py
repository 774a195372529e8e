"""Softmax along any axis and its logarithm, float32, with the maximum subtracted first."""
from __future__ import annotations

import numpy as np

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for


def softmax_kernel(finish):
    """The kernel whose results `finish` makes of a column's exponentials, which lie in y, and their
    sum."""
    @njit(keep=False)
    def columns(thread, first_column, end_column, x, y, length, inner):
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
            finish(x, y, first, length, inner, greatest, total)

    @kernel
    def softmax(x, y, length, inner, threads):
        """x, y: flat (outer, length, inner); along `length`."""
        parallel_for(columns, len(x) // length, threads, (x, y, length, inner))

    return softmax


@njit()
def exponentials(y):
    for i in range(len(y)):
        y[i] = scalar.exp(y[i])


@njit(inline="always")
def shares(x, y, first, length, inner, greatest, total):
    for i in range(length):
        y[first + i * inner] /= total


@njit(inline="always")
def logarithms(x, y, first, length, inner, greatest, total):
    total = scalar.log(total)
    for i in range(length):
        y[first + i * inner] = (x[first + i * inner] - greatest) - total


softmax, log_softmax = softmax_kernel(shares), softmax_kernel(logarithms)
