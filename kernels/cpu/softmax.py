"""Softmax along any axis and its logarithm, float32, with the maximum subtracted first."""
from __future__ import annotations

import numpy as np

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for


@kernel
def softmax(log, x, y, length, inner, threads):
    """x, y: flat (outer, length, inner); along `length`. log: the logarithm of softmax."""
    parallel_for(softmax_columns, len(x) // length, threads, (log, x, y, length, inner))


@njit()
def softmax_columns(thread, first_column, end_column, log, x, y, length, inner):
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
        if log:
            total = scalar.log(total)
            for i in range(length):
                y[first + i * inner] = (x[first + i * inner] - greatest) - total
        else:
            for i in range(length):
                y[first + i * inner] /= total


@njit()
def exponentials(y):
    for i in range(len(y)):
        y[i] = scalar.exp(y[i])
