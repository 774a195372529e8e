"""Batch norm that no convolution could take in, one multiply-add and a clip per element; norms of
the channels of each pixel, which lie in L1 meanwhile; and pixels as a network wants them."""
from __future__ import annotations

import numpy as np

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for
from .rows import layer_norm_rows, scale_shift_pixel
from .simd import at, square_root
from .sizes import HALF_ROWS

THREE_QUARTERS = np.float32(0.75)       # beta of all networks known, which needs square roots alone


@kernel
def scale_shift(x, x_step, scale, shift, y, activation, low, high, a, b, threads):
    """y[.., c] = clip(f(x[.., c] * scale[c] + shift[c], a, b), low, high) on flat arrays, pixels of
    x x_step numbers apart; x and y each of any dtype. f is the activation, see
    scale_shift_pixel."""
    parallel_for(scale_shift_rows, len(y) // len(scale), threads, (
        x, x_step, scale, shift, y, activation, low, high, a, b))


@njit(keep=False)       # it may be compiled for a function
def scale_shift_rows(thread, first_row, end_row, x, x_step, scale, shift, y, activation, low, high,
                     a, b):
    channels = len(scale)
    for row in range(first_row, end_row):
        scale_shift_pixel(activation, (
            at(x, row * x_step), at(scale, 0), at(shift, 0), at(y, row * channels), channels, low,
            high, a, b))


@kernel
def layer_norm(x, scale, bias, epsilon, y, threads):
    """y[.., c] = (x[.., c] - mean) / sqrt(variance + epsilon) * scale[c] + bias[c] on flat arrays,
    y of float32 or bfloat16."""
    parallel_for(layer_norm_units, len(x) // len(scale), threads, (x, scale, bias, epsilon, y))


@njit()
def layer_norm_units(thread, first_row, end_row, x, scale, bias, epsilon, y):
    channels, row = len(scale), first_row
    while row < end_row:
        start = row * channels
        pointers = at(x, start), at(scale, 0), at(bias, 0), at(y, start)
        if end_row - row >= HALF_ROWS:
            layer_norm_rows(HALF_ROWS, pointers, channels, epsilon)
            row += HALF_ROWS
        else:
            layer_norm_rows(1, pointers, channels, epsilon)
            row += 1


@kernel
def local_response_norm(x, channels, before, after, factor, beta, bias, y, threads):
    """y[.., c] = x[.., c] / (bias + factor * sum of x * x) ** beta on flat arrays; the sum is over
    the channels from c - before to c + after."""
    parallel_for(local_response_rows, len(x) // channels, threads, (
        x, channels, before, after, factor, beta, bias, y))


@njit()
def local_response_rows(thread, first_row, end_row, x, channels, before, after, factor, beta, bias,
                        y):
    for row in range(first_row, end_row):
        start, end = row * channels, (row + 1) * channels
        given, out = x[start:end], y[start:end]
        for c in range(channels):
            out[c] = given[c] * given[c]
        for distance in range(1, min(before, channels - 1) + 1):
            add_squares(out[distance:], given[:channels - distance])
        for distance in range(1, min(after, channels - 1) + 1):
            add_squares(out[:channels - distance], given[distance:])
        if beta == THREE_QUARTERS:
            for c in range(channels):
                root = scalar.ONE / square_root(bias + factor * out[c])
                out[c] = given[c] * root * square_root(root)
        else:
            for c in range(channels):
                out[c] = given[c] * scalar.exp(-beta * scalar.log(bias + factor * out[c]))


@njit()
def add_squares(sums, x):
    for i in range(len(sums)):
        sums[i] += x[i] * x[i]


@kernel
def normalise(pixels, mean, std, y, threads):
    """y = (pixels - mean) / std for rows of bytes; mean and std are of one row, and y float32."""
    parallel_for(normalise_rows, len(pixels), threads, (pixels, mean, std, y))


@njit()
def normalise_rows(thread, first_row, end_row, pixels, mean, std, y):
    for row in range(first_row, end_row):
        given, out = pixels[row], y[row]
        for i in range(len(mean)):
            out[i] = (np.float32(given[i]) - mean[i]) / std[i]
