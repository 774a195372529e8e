"""Index arithmetic: division by a number known at launch, and the four axes of a strided array.

All of it is uint32: no tensor here has 2 ** 31 elements (host/arguments.py). A division is one
multiplication and one shift (Granlund and Montgomery 1994, "Division by Invariant Integers using
Multiplication"), where the hardware has none and the compiler would emit some 20 instructions.
"""
from __future__ import annotations

from .ptx import cuda, uint32, uint64

DIVISOR = ("uint32",) * 3       # in a kernel's signature: what `divisor` gives


def divisor(n: int) -> tuple[int, int, int]:
    """(n, multiplier, shift) for `split`; 1 <= n < 2 ** 31."""
    shift = (n - 1).bit_length()
    return n, (1 << 32) * ((1 << shift) - n) // n + 1, shift


@cuda.jit(device=True, inline="always")
def split(i, n, multiplier, shift):
    """(i // n, i % n) for 0 <= i < 2 ** 31, and n as `divisor` encoded it."""
    high = uint32(uint64(uint64(i) * uint64(multiplier)) >> uint64(32))
    quotient = uint32(uint32(high + i) >> shift)
    return quotient, uint32(i - quotient * n)


@cuda.jit(device=True, inline="always")
def thread_index(threads):
    """This thread's number in a one-dimensional grid of blocks of `threads`."""
    return uint32(uint32(cuda.blockIdx.x) * uint32(threads) + uint32(cuda.threadIdx.x))


AXES = DIVISOR * 3      # in a kernel's signature: the sizes of the last three of four axes


@cuda.jit(device=True, inline="always")
def split_axes(i, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s):
    """The four indices of element i of a dense array (.., n1, n2, n3)."""
    i, i3 = split(i, n3, n3_m, n3_s)
    i, i2 = split(i, n2, n2_m, n2_s)
    i, i1 = split(i, n1, n1_m, n1_s)
    return i, i1, i2, i3
