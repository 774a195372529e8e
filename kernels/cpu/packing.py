"""Whole numbers packed to bytes, as LLVM IR, by instructions of AVX-512: two rows of 32 at once."""
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .dot_units import COLUMNS, has
from .simd import I1, I32, Builder, Value, broadcast
from .sizes import LANES

I8, I16 = ir.IntType(8), ir.IntType(16)
WORDS, HALVES, BYTES = (ir.VectorType(kind, 512 // kind.width) for kind in (I32, I16, I8))
ROW, MASK = ir.VectorType(I8, 2 * COLUMNS), ir.VectorType(I1, 2 * COLUMNS)
CAN_PACK = LANES == COLUMNS and has("avx512bw")


def _call(b: Builder, name: str, result: ir.Type, *args: Value) -> Value:
    function = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}"), args)


def nearest(b: Builder, value: Value) -> Value:
    """16 float32 as whole numbers of 32 bits, halves to even ones."""
    return _call(b, "x86.avx512.mask.cvtps2dq.512", WORDS, value, ir.Constant(WORDS, None), I16(-1),
                 I32(4))


def pack_words(b: Builder, left: Value, right: Value) -> Value:
    """As 16 bits, from -32768 to 32767; four by four of the left and of the right."""
    return _call(b, "x86.avx512.packssdw.512", HALVES, left, right)


def add_saturated(b: Builder, x: Value, y: Value) -> Value:
    return _call(b, "sadd.sat.v32i16", HALVES, x, y)


def greatest(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed(">", x, y), x, y)


def pack_halves(b: Builder, first: Value, second: Value) -> tuple[Value, Value]:
    """As bytes, from 0 to 255, each of two rows that pack_words made in order."""
    mixed = b.bitcast(_call(b, "x86.avx512.packuswb.512", BYTES, first, second), WORDS)
    # In each quarter lie four of each: first left, first right, second left, second right.
    order = [4 * quarter + which for which in range(4) for quarter in range(4)]
    rows = b.bitcast(b.shuffle_vector(mixed, mixed, ir.Constant(WORDS, order)), BYTES)
    half = len(order) * 2
    return tuple(b.shuffle_vector(rows, rows, ir.Constant(ir.VectorType(I32, half), list(
        range(start, start + half)))) for start in (0, half))


def broadcast_16(b: Builder, number: Value) -> Value:
    return broadcast(b, b.trunc(number, I16), HALVES.count)


def first_bytes(b: Builder, count: Value) -> Value:
    """Mask of the first `count` of 32 bytes."""
    wanted = broadcast_16(b, count)
    return b.icmp_signed("<", ir.Constant(HALVES, list(range(32))), wanted)


def store_bytes(b: Builder, value: Value, pointer: Value, mask: Value) -> None:
    """A row; bytes that the mask leaves out are not touched."""
    address = b.bitcast(pointer, ROW.as_pointer())
    function = ir.FunctionType(ir.VoidType(), [ROW, address.type, I32, MASK])
    masked = cgutils.get_or_insert_function(b.module, function, "llvm.masked.store.v32i8.p0")
    b.call(masked, [value, address, I32(1), mask])
