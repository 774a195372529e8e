"""Softmax along any axis and its logarithm, float32, with the maximum subtracted first."""
from __future__ import annotations

import numpy as np

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for
from .rows import exponentials, softmax_rows
from .simd import at
from .sizes import HALF_ROWS


@kernel
def softmax(x, y, length, inner, threads):
    """x, y: flat (outer, length, inner); along `length`."""
    parallel_for(softmax_columns, len(x) // length, threads, (x, y, length, inner))


@njit()
def softmax_columns(thread, first_column, end_column, x, y, length, inner):
    if inner == 1:
        start = first_column * length
        some_rows(x[start:], y[start:], end_column - first_column, length, length)
        return
    for column in range(first_column, end_column):
        first = column // inner * length * inner + column % inner
        _, total = strided_exponentials(x, y, first, length, inner)
        for i in range(length):
            y[first + i * inner] /= total


@njit(inline="always")
def some_rows(x, y, rows, step, length):
    """Of rows that are `step` numbers apart, several at a time; y as of softmax_rows."""
    row = 0
    while row < rows:
        if rows - row >= HALF_ROWS:
            softmax_rows(HALF_ROWS, at(x, row * step), at(y, row * step), step, length)
            row += HALF_ROWS
        else:
            softmax_rows(1, at(x, row * step), at(y, row * step), step, length)
            row += 1


@kernel
def log_softmax(x, y, length, inner, threads):
    """As `softmax`, of which it is the logarithm."""
    parallel_for(log_softmax_columns, len(x) // length, threads, (x, y, length, inner))


@njit()
def log_softmax_columns(thread, first_column, end_column, x, y, length, inner):
    for column in range(first_column, end_column):
        first = column // inner * length * inner + column % inner
        if inner == 1:
            greatest, total = exponentials(at(x, first), at(y, first), length)
        else:
            greatest, total = strided_exponentials(x, y, first, length, inner)
        total = scalar.log(total)
        for i in range(length):
            y[first + i * inner] = (x[first + i * inner] - greatest) - total


@njit(inline="always")
def strided_exponentials(x, y, first, length, inner):
    """As rows.exponentials, of a column."""
    greatest, total = x[first], np.float32(0)
    for i in range(length):
        value = x[first + i * inner]
        greatest = value if (value > greatest) | (value != value) else greatest
    for i in range(length):
        y[first + i * inner] = scalar.exp(x[first + i * inner] - greatest)
        total += y[first + i * inner]
    return greatest, total
