"""Functions of float32 numbers, as plain arithmetic: loops over them become vector code, which a
call of the C library's expf would prevent, and traced.py makes vector code of them without a loop,
wherefore they have no branches. NaN and infinity come out as IEEE says.

Those of `ops.Unary` also take the two numbers of the op, a and b, for which most have no use.
"""
from __future__ import annotations

import numpy as np

from .jit import njit
from .simd import power_of_two, reciprocal, split_exponent, square_root

ZERO, ONE, TWO, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
THREE, SIX = np.float32(3), np.float32(6)
LOG2_E = np.float32(1.44269504088896341)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND = np.float32(1.5 * 2 ** 23)       # adding and subtracting it rounds to a whole number
MOST_CODE = np.float32(255)
# At these ends 2 ** n is 0 and infinity.
EXP_LOW, EXP_HIGH = np.float32(-88.0), np.float32(89.0)
TANH_SMALL = np.float32(0.625)
LOWEST = np.float32(2.0 ** -126)        # positive number that has all its digits
INFINITY, NAN = np.float32(np.inf), np.float32(np.nan)

# Polynomials of the Cephes library (S. L. Moshier), expf, logf, tanhf and erff: within 2 ulp.
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
L0, L1, L2 = np.float32(7.0376836292e-2), np.float32(-1.1514610310e-1), np.float32(1.1676998740e-1)
L3, L4, L5 = np.float32(-1.2420140846e-1), np.float32(1.4249322787e-1), np.float32(-1.6668057665e-1)
L6, L7, L8 = np.float32(2.0000714765e-1), np.float32(-2.4999993993e-1), np.float32(3.3333331174e-1)
T0, T1 = np.float32(-5.70498872745e-3), np.float32(2.06390887954e-2)
T2 = np.float32(-5.37397155531e-2)
T3, T4 = np.float32(1.33314422036e-1), np.float32(-3.33332819422e-1)
F0, F1 = np.float32(7.853861353153693e-5), np.float32(-8.010193625184903e-4)
F2, F3 = np.float32(5.188327685732524e-3), np.float32(-2.685381193529856e-2)
F4, F5 = np.float32(1.128358514861418e-1), np.float32(-3.761262582423300e-1)
F6 = np.float32(1.128379165726710)

# e ** (x * x / 2) * (x + CENTRE) * normal_tail(x) as a polynomial in (x - CENTRE) / (x + CENTRE),
# by Remez' algorithm, for x from 0 to 14.5: relative error 2 ** -26.
CENTRE = np.float32(3.75)
N0, N1, N2 = np.float32(4.434509028e-4), np.float32(5.096308305e-4), np.float32(-4.169017542e-3)
N3, N4, N5 = np.float32(1.200072351e-3), np.float32(3.749250621e-2), np.float32(-1.515208334e-1)
N6, N7, N8 = np.float32(3.529396057e-1), np.float32(-5.881882906e-1), np.float32(7.502940893e-1)
TAIL_END = np.float32(13.265)           # e ** (-x * x / 2) is 0 from here on, as at EXP_LOW
SPLIT = np.float32(1.5 * 2 ** 15)       # rounds to 12 bits, whose squares are exact, up to 16
ROOT_2 = np.float32(1.41421356237309505)

# For results that are rounded to bfloat16, by Remez' algorithm: 2 ** x as a polynomial for |x| <=
# 1/2, relative error 2 ** -13.7; and log2(p / (1 - p)) / x of the part p of a normal distribution
# that lies below x, as one in x * x, for |x| <= PART_END: by it p is within 2 ** -12 of itself.
P0, P1, P2, P3 = map(np.float32, (0.99992807289, 0.69326098604, 0.24261113312, 0.05517167117))
Q0, Q1, Q2 = map(np.float32, (2.30099776081, 0.10633016486, -6.50538079804e-4))
Q3, Q4, Q5 = map(np.float32, (-6.87144166040e-5, 4.13912974458e-6, -9.93104473726e-8))
Q6 = np.float32(9.04731119229e-10)
PART_END = np.float32(5.5)
MOST_BITS = np.float32(126)
# For results that become codes of 8 bits, by Lawson's algorithm: (p - 1/2) / x as a polynomial in
# x * x for |x| <= CODES_END, by which x * p is off by at most 2 ** -13.6.
C0, C1, C2 = np.float32(0.398546845), np.float32(-0.0656638965), np.float32(0.0093737077)
C3, C4, C5 = np.float32(-9.70276014e-4), np.float32(6.95865747e-5), np.float32(-3.23961444e-6)
C6, C7 = np.float32(8.71722037e-8), np.float32(-1.02185538e-9)
CODES_END = np.float32(4.16)
GELU_1, GELU_3 = np.float32(1.59576912160573071), np.float32(0.0713548162726002527)


@njit(inline="always")
def where(condition, x, y):
    """x where the condition holds, else y."""
    return x if condition else y


# ---- exponentials and logarithms --------------------------------------------------------------

@njit(inline="always")
def reduced(x):
    """(n, r) with x = n * ln(2) + r, n whole and |r| <= ln(2) / 2."""
    n = (x * LOG2_E + ROUND) - ROUND
    return n, (x - n * LN2_HIGH) - n * LN2_LOW


@njit(inline="always")
def growth(r):
    """e ** r - 1 for |r| <= ln(2) / 2"""
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return p * (r * r) + r


@njit(inline="always")
def exp(x):
    """e ** x = 2 ** n * e ** r. Below 2 ** -126 it gives 0."""
    n, r = reduced(clip(x, EXP_LOW, EXP_HIGH))
    return where(x != x, x, (growth(r) + ONE) * power_of_two(n))


@njit(inline="always")
def log(x):
    """ln(x) = e * ln(2) + ln(m) with e whole and m from sqrt(1/2) to sqrt(2). Below 2 ** -126 x
    counts as 0, and below 0 there is none: NaN."""
    e, m = split_exponent(x)
    n, f = np.float32(e), m - ONE
    z = f * f
    p = (((((((L0 * f + L1) * f + L2) * f + L3) * f + L4) * f + L5) * f + L6) * f + L7) * f + L8
    result = ((f * z * p + LN2_LOW * n) - HALF * z + f) + LN2_HIGH * n
    result = where(x < LOWEST, -INFINITY, result)
    result = where(x < ZERO, NAN, result)
    return where(x < INFINITY, result, x)


@njit(inline="always")
def gate(x, s):
    """x / (1 + e ** -s). Where s is below 0 it is x * t * t / (1 + t * t) with t = e ** (s / 2):
    t * t alone would underflow where the product with x does not yet."""
    t = exp(-HALF * abs(s))
    return where(s > ZERO, x, x * t * t) / (ONE + t * t)


@njit(inline="always")
def normal_tail(x):
    """How much of a normal distribution lies above x, which is at least 0, in all its digits: so x
    is split in two, lest the rounding of x * x move e ** (-x * x / 2)."""
    x = clip(x, ZERO, TAIL_END)
    high = (x + SPLIT) - SPLIT
    n, r = reduced(-HALF * (high * high))
    power = (growth(r - HALF * ((x - high) * (x + high))) + ONE) * power_of_two(n)
    q = ONE / (x + CENTRE)
    u = (x - CENTRE) * q
    p = (((((((N0 * u + N1) * u + N2) * u + N3) * u + N4) * u + N5) * u + N6) * u + N7) * u + N8
    return p * q * power


@njit(inline="always")
def narrow_gate(x, s):
    """x / (1 + 2 ** -s) within 2 ** -13 of itself, and of 2 ** -126 * x where s is less."""
    s = where(s > -MOST_BITS, s, -MOST_BITS)
    s = where(s < MOST_BITS, s, MOST_BITS)
    n = (s + ROUND) - ROUND
    f = n - s
    power = (((P3 * f + P2) * f + P1) * f + P0) * power_of_two(-n)
    return x * reciprocal(ONE + power)


# ---- functions of ops.Binary ------------------------------------------------------------------

@njit(inline="always")
def add(x, y):
    return x + y


@njit(inline="always")
def mul(x, y):
    return x * y


@njit(inline="always")
def div(x, y):
    return x / y


@njit(inline="always")
def divide(x, y):
    """y / x, for a kernel whose operands have changed places."""
    return y / x


# ---- functions of ops.Unary -------------------------------------------------------------------

@njit(inline="always")
def clip(x, low, high):
    """min(max(x, low), high); NaN stays NaN, because each comparison with it is false."""
    x = where(x < low, low, x)
    return where(x > high, high, x)


@njit(inline="always")
def sigmoid(x, a, b):
    """1 / (1 + e ** -x)"""
    return ONE / (ONE + exp(-x))


@njit(inline="always")
def tanh(x, a, b):
    """A polynomial near 0, where 1 - 2 / (e ** 2x + 1) would lose all digits."""
    z = x * x
    near = ((((T0 * z + T1) * z + T2) * z + T3) * z + T4) * z * x + x
    far = ONE - TWO / (exp(TWO * abs(x)) + ONE)
    return where(abs(x) < TANH_SMALL, near, where(x < ZERO, -far, far))


@njit(inline="always")
def silu(x, a, b):
    """x / (1 + e ** -x)"""
    return gate(x, x)


@njit(inline="always")
def hard_swish(x, a, b):
    """x * min(max(x + 3, 0), 6) / 6"""
    return x * clip(x + THREE, ZERO, SIX) / SIX


@njit(inline="always")
def hard_sigmoid(x, alpha, beta):
    """min(max(alpha * x + beta, 0), 1)"""
    return clip(alpha * x + beta, ZERO, ONE)


@njit(inline="always")
def leaky_relu(x, alpha, b):
    """x where it is above 0, else alpha * x: a sum, for LLVM would not write back an x that stays
    as it is, and such a store is slow."""
    return where(x > ZERO, x, ZERO) + alpha * where(x > ZERO, ZERO, x)


@njit(inline="always")
def elu(x, alpha, b):
    """x where it is above 0, else alpha * (e ** x - 1), a sum as in leaky_relu. Of the latter,
    (2 ** n - 1) + 2 ** n * (e ** r - 1), nothing cancels: near 0 n is 0."""
    n, r = reduced(clip(x, EXP_LOW, ZERO))
    power = power_of_two(n)
    return where(x > ZERO, x, ZERO) + alpha * (growth(r) * power + (power - ONE))


@njit(inline="always")
def sqrt(x, a, b):
    return square_root(x)


@njit(inline="always")
def star_relu(x, scale, bias):
    """scale * max(x, 0) ** 2 + bias; NaN stays NaN."""
    above = where(x < ZERO, ZERO, x)
    return scale * (above * above) + bias


@njit(inline="always")
def fake_quantize(x, scale, zero_point):
    """NaN stays NaN."""
    return nearest_code(x / scale, -zero_point, MOST_CODE - zero_point) * scale


@njit(inline="always")
def relu_fake_quantize(x, scale, zero_point):
    return nearest_code(x / scale, ZERO, MOST_CODE - zero_point) * scale


@njit(inline="always")
def gelu_fake_quantize(x, scale, zero_point):
    return fake_quantize(gelu(x, ZERO, ZERO), scale, zero_point)


@njit(inline="always")
def gelu_tanh_fake_quantize(x, scale, zero_point):
    return fake_quantize(gelu_tanh(x, ZERO, ZERO), scale, zero_point)


@njit(inline="always")
def silu_fake_quantize(x, scale, zero_point):
    return fake_quantize(silu(x, ZERO, ZERO), scale, zero_point)


@njit(inline="always")
def hard_swish_fake_quantize(x, scale, zero_point):
    return fake_quantize(hard_swish(x, ZERO, ZERO), scale, zero_point)


@njit(inline="always")
def nearest_code(n, low, high):
    """The code, less its zero point, next to n. Clipped first, as ROUND serves small numbers
    alone."""
    return (clip(n, low, high) + ROUND) - ROUND


@njit(inline="always")
def gelu(x, a, b):
    """x times how much of a normal distribution lies below x."""
    tail = normal_tail(abs(x))
    return x * where(x < ZERO, tail, ONE - tail)


@njit(inline="always")
def gelu_tanh(x, a, b):
    """x * (1 + tanh(s / 2)) / 2 with s = sqrt(8 / pi) * (x + 0.044715 * x ** 3), which is
    x / (1 + e ** -s)."""
    return gate(x, x * (GELU_1 + GELU_3 * (x * x)))


@njit(inline="always")
def erf(x, a, b):
    """A polynomial near 0, where 1 - erfc(x) would lose all digits."""
    z = x * x
    near = ((((((F0 * z + F1) * z + F2) * z + F3) * z + F4) * z + F5) * z + F6) * x
    far = ONE - TWO * normal_tail(ROOT_2 * abs(x))
    return where(abs(x) < ONE, near, where(x < ZERO, -far, far))


# ---- the same, for results that are rounded to bfloat16 ----------------------------------------

@njit(inline="always")
def narrow_silu(x, a, b):
    return narrow_gate(x, LOG2_E * x)


@njit(inline="always")
def narrow_gelu(x, a, b):
    z = squared(x, PART_END)
    u = (((((Q6 * z + Q5) * z + Q4) * z + Q3) * z + Q2) * z + Q1) * z + Q0
    return narrow_gate(x, x * u)


@njit(inline="always")
def narrow_gelu_tanh(x, a, b):
    return narrow_gate(x, LOG2_E * x * (GELU_1 + GELU_3 * squared(x, PART_END)))


# ---- the same, for results that become codes of 8 bits, before they are rounded ---------------

@njit(inline="always")
def code_of_silu(x, inverse, zero_point):
    return narrow_silu(x, ZERO, ZERO) * inverse + zero_point


@njit(inline="always")
def code_of_gelu(x, inverse, zero_point):
    z = squared(x, CODES_END)
    u = ((((((C7 * z + C6) * z + C5) * z + C4) * z + C3) * z + C2) * z + C1) * z + C0
    return x * inverse * clip(u * x + HALF, ZERO, ONE) + zero_point


@njit(inline="always")
def code_of_gelu_tanh(x, inverse, zero_point):
    return narrow_gelu_tanh(x, ZERO, ZERO) * inverse + zero_point


@njit(inline="always")
def code_of_hard_swish(x, inverse, zero_point):
    return hard_swish(x, ZERO, ZERO) * inverse + zero_point


@njit(inline="always")
def squared(x, end):
    """x * x, beyond `end` that of the end: what x is multiplied by is then 0 or 1 anyway."""
    z = x * x
    return where(z < end * end, z, end * end)
