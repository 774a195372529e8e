"""Batch norm that no convolution could take in, one multiply-add and a clip per element; and pixels
as a network wants them."""
from __future__ import annotations

import numpy as np

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for


@kernel
def scale_shift(x, scale, shift, y, low, high, threads):
    """y[.., c] = clip(x[.., c] * scale[c] + shift[c], low, high) on flat arrays."""
    parallel_for(scale_shift_rows, len(x) // len(scale), threads, (x, scale, shift, y, low, high))


@njit()
def scale_shift_rows(thread, first_row, end_row, x, scale, shift, y, low, high):
    channels = len(scale)
    for row in range(first_row, end_row):
        pixel, out = x[row * channels:][:channels], y[row * channels:][:channels]
        for c in range(channels):
            out[c] = scalar.clip(pixel[c] * scale[c] + shift[c], low, high)


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
