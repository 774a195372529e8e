"""Vectors of float32 in memory that is float32 or bfloat16, as LLVM IR; the type that a pointer
points to tells which. bfloat16 lies there as uint16, the upper halves of float32."""
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .bf16_instructions import Bfloat
from .bf16_units import missing
from .simd import F32, I32, INT_VECTOR, MASK, VECTOR, Builder, Value, load, store
from .sizes import LANES

HALVES = ir.VectorType(ir.IntType(16), LANES)


def load_wide(b: Builder, pointer: Value, mask: Value | None = None) -> Value:
    """LANES numbers as float32; see `load`."""
    if pointer.type.pointee == F32:
        return load(b, pointer, mask)
    bits = b.zext(load_bits(b, pointer, mask), INT_VECTOR)
    return b.bitcast(b.shl(bits, ir.Constant(INT_VECTOR, [16] * LANES)), VECTOR)


def store_narrow(b: Builder, value: Value, pointer: Value, mask: Value | None = None) -> None:
    """LANES float32, rounded where they are stored in bfloat16; see `store`."""
    if pointer.type.pointee == F32:
        store(b, value, pointer, mask)
    else:
        store_bits(b, rounded(b, value), pointer, mask)


def rounded(b: Builder, value: Value) -> Value:
    """LANES float32 -> the bits of the nearest bfloat16, ties to even; a NaN stays one.

    The instruction for that, where the CPU has it, takes numbers below 2 ** -126 for 0.
    """
    if LANES == 16 and not missing("avx512"):
        narrow = b.fptrunc(value, ir.VectorType(Bfloat(), LANES))       # vcvtneps2bf16
        return b.bitcast(narrow, HALVES)

    def splat(number):
        return ir.Constant(INT_VECTOR, [number] * LANES)
    bits = b.bitcast(value, INT_VECTOR)
    odd = b.and_(b.lshr(bits, splat(16)), splat(1))
    nearest = b.add(bits, b.add(odd, splat(0x7FFF)))
    quiet = b.or_(bits, splat(1 << 22))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.lshr(b.select(is_nan, quiet, nearest), splat(16)), HALVES)


def load_bits(b: Builder, pointer: Value, mask: Value | None = None) -> Value:
    """LANES bfloat16 as they are; lanes that the mask leaves out are 0 and are not touched."""
    address = b.bitcast(pointer, HALVES.as_pointer())
    if mask is None:
        value = b.load(address)
        value.align = 2
        return value
    function = ir.FunctionType(HALVES, [address.type, I32, MASK, HALVES])
    masked = cgutils.get_or_insert_function(b.module, function, f"llvm.masked.load.v{LANES}i16.p0")
    return b.call(masked, [address, I32(2), mask, ir.Constant(HALVES, None)])


def store_bits(b: Builder, value: Value, pointer: Value, mask: Value | None = None) -> None:
    address = b.bitcast(pointer, HALVES.as_pointer())
    if mask is None:
        b.store(value, address).align = 2
        return
    function = ir.FunctionType(ir.VoidType(), [HALVES, address.type, I32, MASK])
    masked = cgutils.get_or_insert_function(b.module, function,
                                            f"llvm.masked.store.v{LANES}i16.p0")
    b.call(masked, [value, address, I32(2), mask])
