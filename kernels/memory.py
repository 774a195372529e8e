"""NumPy memory that begins where a cache line does, and photos copied into it."""
from __future__ import annotations

import numpy as np

ALIGNMENT = 64      # bytes: a cache line, the widest vector, and a row of an AMX tile

FEW_CHANNELS = 4


def aligned_zeros(size: int) -> np.ndarray:
    """`size` bytes that start at a multiple of ALIGNMENT."""
    block = np.zeros(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start:start + size]


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy in such memory: NumPy begins large arrays 16 bytes behind a page's start, where each
    vector of 64 bytes is read from two cache lines."""
    copy = aligned_zeros(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def copy_into(target: np.ndarray, array: np.ndarray) -> None:
    """target[...] = array; of a photo (N, H, W, C) that lies in planes, plane by plane: NumPy would
    go from plane to plane at each pixel, which takes three times as long."""
    if array.ndim == 4 and array.shape[3] <= FEW_CHANNELS and array.strides[3] > array.strides[2]:
        for channel in range(array.shape[3]):
            target[..., channel] = array[..., channel]
    else:
        target[...] = array
