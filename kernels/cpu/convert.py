"""Vectors of float32 in memory that is float32, bfloat16 or codes of 8 bits, as LLVM IR; the type
that a pointer points to tells which. bfloat16 lies there as uint16, the upper halves of float32;
codes are uint8, and come as the numbers 0 to 255."""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .dot_instructions import I8, Bfloat
from .dot_units import AVX512_BF16, missing
from .simd import F32, I32, INT_VECTOR, MASK, VECTOR, Builder, Value, clip, load, splat, store
from .sizes import LANES

HALVES, CODES = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(I8, LANES)
ROUND = 1.5 * 2 ** 23       # added to a small number: in the last bits is the nearest whole one


def load_wide(b: Builder, pointer: Value, mask: Value | None = None) -> Value:
    """LANES numbers as float32; see `load`."""
    if pointer.type.pointee == F32:
        return load(b, pointer, mask)
    bits = b.zext(load_bits(b, pointer, mask), INT_VECTOR)
    if pointer.type.pointee == I8:
        return b.uitofp(bits, VECTOR)
    return b.bitcast(b.shl(bits, ir.Constant(INT_VECTOR, [16] * LANES)), VECTOR)


def store_narrow(b: Builder, value: Value, pointer: Value, mask: Value | None = None) -> None:
    """LANES float32, rounded where they are stored in bfloat16; see `store`."""
    if pointer.type.pointee == F32:
        store(b, value, pointer, mask)
    elif pointer.type.pointee == I8:
        store_code(b, value, pointer, mask)
    else:
        store_bits(b, rounded(b, value), pointer, mask)


def store_code(b: Builder, value: Value, pointer: Value, mask: Value | None = None) -> None:
    """LANES float32 as codes, see `nearest_code`."""
    store_bits(b, nearest_code(b, value), pointer, mask)


def nearest_code(b: Builder, value: Value) -> Value:
    """LANES float32, rounded to whole numbers, halves to even ones, from 0 to 255."""
    bounded = clip(b, value, splat(0), splat(255))
    return b.trunc(b.bitcast(b.fadd(bounded, splat(ROUND)), INT_VECTOR), CODES)


def rounded(b: Builder, value: Value) -> Value:
    """LANES float32 -> the bits of the nearest bfloat16, ties to even; a NaN stays one.

    The instruction for that, where the CPU has it, takes numbers below 2 ** -126 for 0.
    """
    if LANES == 16 and not missing(AVX512_BF16):
        narrow = b.fptrunc(value, ir.VectorType(Bfloat(), LANES))       # vcvtneps2bf16
        return b.bitcast(narrow, HALVES)

    def every(number):
        return ir.Constant(INT_VECTOR, [number] * LANES)
    bits = b.bitcast(value, INT_VECTOR)
    odd = b.and_(b.lshr(bits, every(16)), every(1))
    nearest = b.add(bits, b.add(odd, every(0x7FFF)))
    quiet = b.or_(bits, every(1 << 22))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.lshr(b.select(is_nan, quiet, nearest), every(16)), HALVES)


def load_bits(b: Builder, pointer: Value, mask: Value | None = None) -> Value:
    """LANES bfloat16 or codes as they are; lanes that the mask leaves out are 0 and are not
    touched."""
    kind, align, name = _in_memory(pointer)
    address = b.bitcast(pointer, kind.as_pointer())
    if mask is None:
        value = b.load(address)
        value.align = align
        return value
    function = ir.FunctionType(kind, [address.type, I32, MASK, kind])
    masked = cgutils.get_or_insert_function(b.module, function, f"llvm.masked.load.{name}.p0")
    return b.call(masked, [address, I32(align), mask, ir.Constant(kind, None)])


def store_bits(b: Builder, value: Value, pointer: Value, mask: Value | None = None) -> None:
    kind, align, name = _in_memory(pointer)
    address = b.bitcast(pointer, kind.as_pointer())
    if mask is None:
        b.store(value, address).align = align
        return
    function = ir.FunctionType(ir.VoidType(), [kind, address.type, I32, MASK])
    masked = cgutils.get_or_insert_function(b.module, function, f"llvm.masked.store.{name}.p0")
    b.call(masked, [value, address, I32(align), mask])


def _in_memory(pointer: Value) -> tuple[ir.VectorType, int, str]:
    """The vector that a pointer points to, its alignment, and what LLVM calls it."""
    if pointer.type.pointee == I8:
        return CODES, 1, f"v{LANES}i8"
    return HALVES, 2, f"v{LANES}i16"


@intrinsic
def wide(typingctx, number):
    """A float32, or a bfloat16 by its bits, as float32."""
    def codegen(context, b, sig, args):
        if sig.args[0] == types.float32:
            return args[0]
        return b.bitcast(b.shl(b.zext(args[0], I32), ir.Constant(I32, 16)), F32)
    return types.float32(number), codegen
