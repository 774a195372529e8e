"""Integer and bit operations on NumPy arrays (PTX ISA 9.7.1, 9.7.8).

Functions take arrays or NumPy scalars of one dtype and wrap around as the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .ptxtypes import U32, U64


def width(a: Any) -> int:
    return int(a.dtype.itemsize) * 8


def divide(a: Any, b: Any) -> Any:
    """Rounds toward zero; NumPy rounds down."""
    q = a // b
    if a.dtype.kind == "u":
        return q
    return q + ((a - q * b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def remainder(a: Any, b: Any) -> Any:
    """Has the sign of a."""
    return a - divide(a, b) * b


def multiply_wide(dtype: Any) -> Callable[[Any, Any], Any]:
    """The whole product, in the dtype that is twice as wide."""
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


def multiply_high(a: Any, b: Any) -> Any:
    """The upper half of the product."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else U64
        return (a.astype(wide) * b.astype(wide) >> wide(width(a))).astype(a.dtype)
    x, y, low, half = a.astype(U64), b.astype(U64), U64(0xFFFFFFFF), U64(32)
    x_low, x_high, y_low, y_high = x & low, x >> half, y & low, y >> half
    middle = (x_low * y_low >> half) + (x_high * y_low & low) + x_low * y_high
    high = x_high * y_high + (x_high * y_low >> half) + (middle >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.astype(a.dtype)


def add_saturating(a: Any, b: Any) -> Any:
    """add.sat.s32"""
    return np.clip(a.astype(np.int64) + b, -(1 << 31), (1 << 31) - 1).astype(a.dtype)


def subtract_saturating(a: Any, b: Any) -> Any:
    """sub.sat.s32"""
    return np.clip(a.astype(np.int64) - b, -(1 << 31), (1 << 31) - 1).astype(a.dtype)


def shift_left(a: Any, b: Any) -> Any:
    """Amounts beyond the width give 0; NumPy leaves them undefined."""
    shifted = np.left_shift(a, np.minimum(b, width(a) - 1).astype(a.dtype))
    return np.where(b >= width(a), a.dtype.type(0), shifted)


def shift_right(a: Any, b: Any) -> Any:
    """Amounts beyond the width give 0, or the sign."""
    shifted = np.right_shift(a, np.minimum(b, width(a) - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(b >= width(a), a.dtype.type(0), shifted)


def funnel_shift(left: bool, wrap: bool) -> Callable[[Any, Any, Any], Any]:
    """shf: shift of the pair (b, a), of which the upper (left) or lower half is the result."""

    def shift(a: Any, b: Any, c: Any) -> Any:
        amount = (c & U32(31) if wrap else np.minimum(c, U32(32))).astype(U64)
        pair = (b.astype(U64) << U64(32)) | a.astype(U64)
        return ((pair << amount) >> U64(32) if left else pair >> amount).astype(U32)

    return shift


def bit_field_extract(a: Any, position: Any, length: Any) -> Any:
    """bfe: shift the field to the top, then back down, which fills with the sign or with 0."""
    n = width(a)
    start, count = (x.astype(np.int64) & 255 for x in (position, length))
    end = np.minimum(start + count, n)
    up = np.where(count == 0, n - 1, n - end)
    top = np.left_shift(a, np.minimum(up, n - 1).astype(a.dtype))
    field = shift_right(top, np.minimum(up + start, n - 1).astype(U32))
    nothing = (count == 0) | (start >= n) & (a.dtype.kind == "u")
    return np.where(nothing, a.dtype.type(0), field)


def bit_field_insert(a: Any, b: Any, position: Any, length: Any) -> Any:
    """bfi: the low bits of a into b."""
    n = width(a)
    start, count = (x.astype(U64) & U64(255) for x in (position, length))
    ones = (U64(1) << np.minimum(count, U64(63))) - U64(1)
    ones = np.where(count >= n, U64(2**64 - 1), ones) << np.minimum(start, U64(63))
    mask = np.where(start >= n, U64(0), ones).astype(a.dtype)
    moved = a << np.minimum(start, U64(n - 1)).astype(a.dtype)
    return (b & ~mask) | (moved & mask)


def permute_bytes(a: Any, b: Any, selector: Any) -> Any:
    """prmt, default mode: each nibble chooses a byte of (b, a), or replicates its sign."""
    pair = (b.astype(U64) << U64(32)) | a
    result: Any = U64(0)
    for i in range(4):
        nibble = (selector >> U32(4 * i)).astype(U64)
        byte = (pair >> ((nibble & U64(7)) * U64(8))) & U64(255)
        sign = np.where(byte & U64(128), U64(255), U64(0))
        result = result | (np.where(nibble & U64(8), sign, byte) << U64(8 * i))
    return result.astype(U32)


def lookup3(a: Any, b: Any, c: Any, table: Any) -> Any:
    """lop3: any function of three bits, given as its truth table (an immediate)."""
    result: Any = U32(0)
    function = int(np.max(table))
    for i in range(8):
        if function >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def population_count(a: Any) -> Any:
    return np.bitwise_count(a).astype(U32)


def count_leading_zeros(a: Any) -> Any:
    zeros = np.zeros(np.shape(a), U32)
    for i in range(width(a)):
        zeros += (a >> a.dtype.type(i)) == 0
    return zeros


def find_bit(a: Any) -> Any:
    """bfind: position of the highest bit that differs from the sign; 0xffffffff without one."""
    unsigned = np.where(a < 0, ~a, a).astype(f"u{a.dtype.itemsize}")
    return U32(width(a) - 1) - count_leading_zeros(unsigned)


def find_shift(a: Any) -> Any:
    """bfind.shiftamt: how far to shift left to bring that bit to the top."""
    position = find_bit(a)
    return np.where(position == U32(0xFFFFFFFF), position, U32(width(a) - 1) - position)


def reverse_bits(a: Any) -> Any:
    n, one = width(a), a.dtype.type(1)
    result = np.zeros(np.shape(a), a.dtype)
    for i in range(n):
        result |= ((a >> a.dtype.type(i)) & one) << a.dtype.type(n - 1 - i)
    return result


def absolute_difference(a: Any, b: Any, c: Any) -> Any:
    """sad"""
    return c + np.where(a < b, b - a, a - b)


def logical_not(a: Any) -> Any:
    """cnot"""
    return (a == 0).astype(a.dtype)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.absolute,
    "div": divide,
    "rem": remainder,
    "sad": absolute_difference,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "cnot": logical_not,
    "shl": shift_left,
    "shr": shift_right,
    "bfe": bit_field_extract,
    "bfi": bit_field_insert,
    "bfind": find_bit,
    "popc": population_count,
    "clz": count_leading_zeros,
    "brev": reverse_bits,
    "prmt": permute_bytes,
    "lop3": lookup3,
}
