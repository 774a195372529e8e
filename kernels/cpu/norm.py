"""Batch norm that no convolution could take in, one multiply-add and a clip per element; and pixels
as a network wants them."""
from __future__ import annotations

import numpy as np

from .jit import kernel, njit
from .microkernels import scale_shift_pixel
from .parallel import parallel_for
from .simd import at


@kernel
def scale_shift(x, scale, shift, y, low, high, threads):
    """y[.., c] = clip(x[.., c] * scale[c] + shift[c], low, high) on flat arrays, y of float32 or
    bfloat16."""
    parallel_for(scale_shift_rows, len(x) // len(scale), threads, (x, scale, shift, y, low, high))


@njit()
def scale_shift_rows(thread, first_row, end_row, x, scale, shift, y, low, high):
    channels = len(scale)
    for row in range(first_row, end_row):
        scale_shift_pixel((at(x, row * channels), at(scale, 0), at(shift, 0),
                           at(y, row * channels), channels, low, high))


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
