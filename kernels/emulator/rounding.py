"""Exact rounding of sums, products and fused multiply-adds on NumPy arrays.

A result computed in a wider format and rounded again is wrong where the first rounding hits a tie
of the second. Rounding to odd first avoids that: of the two neighbours of an inexact value it takes
the one whose last bit is 1, which is never a tie and remembers the side (Boldo and Melquiond,
"Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from .ptxtypes import U64, UINT, Array

# The bits of a float64 that a float32 lacks, and their value at a tie.
_LOST, _TIE = U64((1 << 29) - 1), U64(1 << 28)


def to_odd(nearest: Any, error: Any) -> Any:
    """nearest + error rounded to odd; nearest is that sum rounded to nearest."""
    even = (nearest.view(UINT[nearest.dtype.itemsize]) & 1) == 0
    toward = np.copysign(np.inf, error).astype(nearest.dtype)
    return np.where(even & (np.abs(error) > 0), np.nextafter(nearest, toward), nearest)


def sum_error(a: Any, b: Any, total: Any) -> Any:
    """a + b - total, exactly, where total is a + b rounded (Knuth's TwoSum)."""
    from_b = total - a
    return (a - (total - from_b)) + (b - from_b)


def product_error(a: Any, b: Any, product: Any) -> Any:
    """a * b - product, exactly, of float64 (Dekker), far from overflow and underflow."""
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    rest = product - a_high * b_high
    return a_low * b_low - ((rest - a_low * b_high) - a_high * b_low)


def _upper_half(x: Any) -> Any:
    """The upper 26 bits of a float64 (Veltkamp)."""
    scaled = x * 134217729.0
    return scaled - (scaled - x)


def odd_sum(a: Any, b: Any) -> Any:
    """a + b of float64, rounded to odd."""
    total = a + b
    return to_odd(total, sum_error(a, b, total))


def odd_fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float64, rounded to odd; a and b are narrower, so that a * b is exact."""
    return odd_sum(np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64))


def odd_float32(x: Any) -> Any:
    """A float64 as float32, rounded to odd."""
    nearest = x.astype(np.float32)
    return to_odd(nearest, x - nearest)


def fused(a: Any, b: Any, c: Any) -> Any:
    """fma: a * b + c, rounded once."""
    if a.dtype == np.float64:
        return _fused_float64(a, b, c)
    if a.dtype != np.float32:
        return odd_fused(a, b, c).astype(a.dtype)
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    if np.count_nonzero(
        (total.view(U64) & _LOST) == _TIE
    ):  # seldom: only then can rounding twice be wrong
        total = to_odd(total, sum_error(product, c, total))
    return total.astype(np.float32)


def _fused_float64(a: Any, b: Any, c: Any) -> Array:
    """Error-free transformations where they are safe, exact fractions where they are not."""
    a, b, c = np.broadcast_arrays(a, b, c)
    product = a * b
    rest = product_error(a, b, product)
    upper = c + rest
    lower = sum_error(c, rest, upper)
    total = product + upper
    below = sum_error(product, upper, total)
    result = np.array(total + odd_sum(lower, below))
    plain = (product == 0) & ((a == 0) | (b == 0))
    plain |= ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    result[plain] = (product + c)[plain]
    size = np.abs(product)
    safe = (size > 2.0**-900) & (size < 2.0**1000) & (np.abs(c) < 2.0**1000)
    safe &= (np.abs(a) < 2.0**990) & (np.abs(b) < 2.0**990)
    for i in np.flatnonzero(~(safe | plain)):
        result[i] = _nearest(Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i]))
    return result


def _nearest(exact: Fraction) -> float:
    """A fraction rounded to float64."""
    try:
        return float(exact)
    except OverflowError:
        return float(np.copysign(np.inf, exact.numerator))


def toward(mode: str, exact: Any, dtype: Any) -> Any:
    """Wider values, or such rounded to odd, in the dtype: rz (zero), rm (down), rp (up)."""
    nearest = exact.astype(dtype)
    if mode == "rz":
        beyond, limit = np.abs(nearest.astype(exact.dtype)) > np.abs(exact), 0.0
    elif mode == "rm":
        beyond, limit = nearest > exact, -np.inf
    else:
        beyond, limit = nearest < exact, np.inf
    return np.where(beyond, np.nextafter(nearest, dtype(limit)), nearest)
