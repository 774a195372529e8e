"""Functions of one float32, as plain arithmetic: loops over them become vector code, which a call
of the C library's expf would prevent. NaN and infinity come out as IEEE says."""
from __future__ import annotations

import numpy as np

from .jit import njit
from .simd import power_of_two

ZERO, ONE, TWO, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
THREE, SIX = np.float32(3), np.float32(6)
LOG2_E = np.float32(1.44269504088896341)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND = np.float32(1.5 * 2 ** 23)       # adding and subtracting it rounds to a whole number
# At these ends 2 ** n is 0 and infinity.
EXP_LOW, EXP_HIGH = np.float32(-88.0), np.float32(89.0)
TANH_SMALL = np.float32(0.625)

# Polynomials of the Cephes library (S. L. Moshier), expf and tanhf: within 2 ulp.
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
T0, T1 = np.float32(-5.70498872745e-3), np.float32(2.06390887954e-2)
T2 = np.float32(-5.37397155531e-2)
T3, T4 = np.float32(1.33314422036e-1), np.float32(-3.33332819422e-1)


@njit(inline="always")
def clip(x, low, high):
    """min(max(x, low), high); NaN stays NaN, because each comparison with it is false."""
    x = low if x < low else x
    return high if x > high else x


@njit(inline="always")
def exp(x):
    """e ** x = 2 ** n * e ** r with n whole and |r| <= ln(2) / 2. Below 2 ** -126 it gives 0."""
    bounded = clip(x, EXP_LOW, EXP_HIGH)
    n = (bounded * LOG2_E + ROUND) - ROUND
    r = (bounded - n * LN2_HIGH) - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    result = (p * (r * r) + r + ONE) * power_of_two(np.int32(n))
    return x if x != x else result


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + e ** -x)"""
    return ONE / (ONE + exp(-x))


@njit(inline="always")
def tanh(x):
    """A polynomial near 0, where 1 - 2 / (e ** 2x + 1) would lose all digits."""
    z = x * x
    near = ((((T0 * z + T1) * z + T2) * z + T3) * z + T4) * z * x + x
    far = ONE - TWO / (exp(TWO * abs(x)) + ONE)
    return near if abs(x) < TANH_SMALL else (-far if x < 0 else far)


@njit(inline="always")
def silu(x):
    """x / (1 + e ** -x). Below 0 it is x * t * t / (1 + t * t) with t = e ** (x / 2): t * t alone
    would underflow where the product with x does not yet."""
    t = exp(-HALF * abs(x))
    return (x if x > 0 else x * t * t) / (ONE + t * t)


@njit(inline="always")
def hard_swish(x):
    """x * min(max(x + 3, 0), 6) / 6"""
    return x * clip(x + THREE, ZERO, SIX) / SIX
