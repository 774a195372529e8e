"""Whole numbers packed to bytes, as LLVM IR, by instructions of AVX-512 or AVX2: four vectors of
words at once, which are two rows of 32 or one."""
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .dot_units import BLOCK, has
from .simd import I32, I64, INT_VECTOR, Builder, Value, broadcast, counted_loop, i64
from .sizes import LANES

I8, I16 = ir.IntType(8), ir.IntType(16)
HALVES, BYTES = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)
BY_AVX512, BY_AVX2 = LANES == 16 and has("avx512bw"), LANES == 8 and has("avx2")
CAN_PACK = BY_AVX512 or BY_AVX2
ROWS = BYTES.count // BLOCK         # packed at once


def _call(b: Builder, name: str, result: ir.Type, *args: Value) -> Value:
    function = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}"), args)


def nearest(b: Builder, value: Value) -> Value:
    """LANES float32 as whole numbers of 32 bits, halves to even ones."""
    if BY_AVX2:
        return _call(b, "x86.avx.cvt.ps2dq.256", INT_VECTOR, value)
    return _call(b, "x86.avx512.mask.cvtps2dq.512", INT_VECTOR, value,
                 ir.Constant(INT_VECTOR, None), I16(-1), I32(4))


def pack_words(b: Builder, left: Value, right: Value) -> Value:
    """As 16 bits, from -32768 to 32767; four by four of the left and of the right."""
    name = "x86.avx2.packssdw" if BY_AVX2 else "x86.avx512.packssdw.512"
    return _call(b, name, HALVES, left, right)


def add_saturated(b: Builder, x: Value, y: Value) -> Value:
    return _call(b, f"sadd.sat.v{HALVES.count}i16", HALVES, x, y)


def greatest(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed(">", x, y), x, y)


def pack_halves(b: Builder, first: Value, second: Value) -> list[Value]:
    """As bytes, from 0 to 255, what pack_words made of four vectors: rows of BLOCK, in order."""
    name = "x86.avx2.packuswb" if BY_AVX2 else "x86.avx512.packuswb.512"
    mixed = b.bitcast(_call(b, name, BYTES, first, second), INT_VECTOR)
    # In each 128 bits lie four of each: first left, first right, second left, second right.
    order = [4 * part + which for which in range(4) for part in range(LANES // 4)]
    rows = b.bitcast(b.shuffle_vector(mixed, mixed, ir.Constant(INT_VECTOR, order)), BYTES)
    return [first_of(b, rows, BLOCK, BLOCK * i) for i in range(ROWS)]


def first_of(b: Builder, vector: Value, count: int, start: int = 0) -> Value:
    """So many of its numbers, from one on."""
    places = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
    return b.shuffle_vector(vector, vector, places)


def broadcast_16(b: Builder, number: Value) -> Value:
    return broadcast(b, b.trunc(number, I16), HALVES.count)


def which(b: Builder, count: Value) -> Value:
    """The first `count` bytes of a row, as `store_row` takes it."""
    if BY_AVX2:         # has no masks for bytes
        return count
    wanted = broadcast(b, b.trunc(count, I16), BLOCK)
    return b.icmp_signed("<", ir.Constant(wanted.type, list(range(BLOCK))), wanted)


def store_row(b: Builder, row: Value, pointer: Value, some: Value | int) -> None:
    """So many bytes of a row, or those of `which`; no other byte is touched."""
    if isinstance(some, int):
        value = first_of(b, row, some)
        b.store(value, b.bitcast(pointer, value.type.as_pointer())).align = 1
    elif BY_AVX2:
        _store_first(b, row, pointer, some)
    else:
        _call(b, f"masked.store.v{BLOCK}i8.p0", ir.VoidType(), row,
              b.bitcast(pointer, row.type.as_pointer()), I32(1), some)


def _store_first(b: Builder, row: Value, pointer: Value, count: Value) -> None:
    """By eights, and what is left one by one."""
    eights = b.bitcast(row, ir.VectorType(I64, BLOCK // 8))
    targets = b.bitcast(pointer, I64.as_pointer())
    for i in range(BLOCK // 8):
        with b.if_then(b.icmp_signed(">=", count, i64(8 * (i + 1)))):
            b.store(b.extract_element(eights, I32(i)), b.gep(targets, [i64(i)])).align = 1
    whole = b.and_(count, i64(-8))
    with b.if_then(b.icmp_signed("<", whole, count)):
        stack = cgutils.alloca_once(b, row.type)
        b.store(row, stack)
        bytes_ = b.bitcast(stack, I8.as_pointer())

        def one(index: Value, _: list[Value]) -> list[Value]:
            place = b.add(whole, index)
            b.store(b.load(b.gep(bytes_, [place])), b.gep(pointer, [place]))
            return []

        counted_loop(b, "byte", b.sub(count, whole), [], one)
