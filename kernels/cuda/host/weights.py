"""Weights as the kernels of a compute type want them."""
from __future__ import annotations

import numpy as np

from ...step import Array


def stored(weight: Array, dtype: str) -> Array:
    """float32 as a compute type of backend.DTYPES stores it."""
    if dtype == "tf32":
        return round_to_tf32(weight)
    with np.errstate(over="ignore"):            # beyond float16's range is infinity
        return weight.astype(dtype, copy=False)


def round_to_tf32(array: Array) -> Array:
    """To nearest, halves away from zero: 10 explicit bits of mantissa are left."""
    bits = array.view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(array), rounded, array)
