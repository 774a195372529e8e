"""Neighbouring elements in memory <-> registers, by accesses of up to 16 bytes.

What makes one kernel text serve every dtype: in registers an element is always fp32, so only
`load` and `store` know how it is stored. "bits16" and "bits32" move elements as they are (no
NaN changes its payload), "uint8" can be loaded only.

The accesses are inline PTX, for Numba reads a vector as so many single elements. Registers are
`cuda.local.array`s; they cost no memory as long as every index is constant after unrolling.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from .ptx import intrinsic


class Storage(NamedTuple):
    """How one dtype lies in memory. widen and narrow are PTX between a 32-bit word {w} and the
    registers of the elements it holds, {0}, {1} ..."""
    bytes: int
    register: types.Type
    widen: str
    narrow: str = ""


STORAGE = {
    "float32": Storage(4, types.float32, "mov.b32 {0}, {w};", "mov.b32 {w}, {0};"),
    "float16": Storage(2, types.float32, "mov.b32 {{lo, hi}}, {w}; cvt.f32.f16 {0}, lo; "
                       "cvt.f32.f16 {1}, hi;", "cvt.rn.f16x2.f32 {w}, {1}, {0};"),
    # A bfloat16 is the upper half of the float32 of the same value.
    "bfloat16": Storage(2, types.float32, "shl.b32 {0}, {w}, 16; and.b32 {1}, {w}, 0xffff0000;",
                        "cvt.rn.bf16x2.f32 {w}, {1}, {0};"),
    "bits32": Storage(4, types.uint32, "mov.b32 {0}, {w};", "mov.b32 {w}, {0};"),
    "bits16": Storage(2, types.uint32, "and.b32 {0}, {w}, 0xffff; shr.u32 {1}, {w}, 16;",
                      "prmt.b32 {w}, {0}, {1}, 0x5410;"),
    "uint8": Storage(1, types.float32, " ".join(
        f"bfe.u32 t, {{w}}, {8 * i}, 8; cvt.rn.f32.u32 {{{i}}}, t;" for i in range(4))),
}
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "bits32": "b32", "bits16": "b16",
         "uint8": "u8"}
ACCESS = {1: "u8", 2: "u16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}   # by its bytes
LEAST_ARCH = {"float16": "sm_80", "bfloat16": "sm_80"}          # cvt.rn.f16x2, cvt.rn.bf16x2


def arch(*dtypes: str) -> str:
    """The least architecture that converts these dtypes."""
    return max(LEAST_ARCH.get(dtype, "sm_75") for dtype in dtypes)


def short(*dtypes: str) -> str:
    """The dtypes as they stand in a kernel's name: "f16", or "f32_f16" for a conversion."""
    return "_".join(dict.fromkeys(SHORT[dtype] for dtype in dtypes))


def lanes(dtype: str, *counts: int) -> int:
    """Elements of the widest access, 16 bytes at most, that divides all these counts."""
    size = 16 // STORAGE[dtype].bytes
    while any(count % size for count in counts):
        size //= 2
    return size


def _words(dtype: str, lanes: int, registers: list[str], convert: str) -> str:
    """PTX that converts every word of an access; a last word may hold less than it could."""
    size = 4 // STORAGE[dtype].bytes
    lines = []
    for word in range(-(-lanes // size)):
        held = registers[word * size:word * size + size]
        spare = ["t" if convert == "widen" else held[0]] * (size - len(held))
        lines.append(getattr(STORAGE[dtype], convert).format(*held, *spare, w=f"w{word}"))
    return " ".join(lines)


def _vector(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"


def _load_ptx(dtype: str, lanes: int, path: str, fill: float | None) -> str:
    size = lanes * STORAGE[dtype].bytes
    words = [f"w{i}" for i in range(max(1, size // 4))]
    registers = [f"${i}" for i in range(lanes)]
    guard = ""
    if fill is not None:
        pattern = _pattern(dtype, fill)
        guard = (f".reg .pred p; setp.ne.b32 p, ${lanes + 1}, 0; "
                 + " ".join(f"mov.b32 {word}, {pattern:#x};" for word in words) + " @p ")
    return (f"{{ .reg .b32 w<{len(words)}>, t; .reg .b16 lo, hi; {guard}"
            f"ld.global{path}.{ACCESS[size]} {_vector(words)}, [${lanes}]; "
            f"{_words(dtype, lanes, registers, 'widen')} }}")


def _store_ptx(dtype: str, lanes: int) -> str:
    size = lanes * STORAGE[dtype].bytes
    words = [f"w{i}" for i in range(max(1, size // 4))]
    registers = [f"${i + 1}" for i in range(lanes)]
    return (f"{{ .reg .b32 w<{len(words)}>; {_words(dtype, lanes, registers, 'narrow')} "
            f"st.global.{ACCESS[size]} [$0], {_vector(words)}; }}")


def _pattern(dtype: str, value: float) -> int:
    """The 32-bit word whose elements all hold `value`."""
    if dtype == "float16":
        return int(np.array([value] * 2, np.float16).view(np.uint32)[0])
    word = int(np.float32(value).view(np.uint32))
    return word if dtype == "float32" else word >> 16 | word & 0xFFFF0000


def _elements(context, builder, array_type, array, first, lanes):
    """LLVM pointers to array[first], array[first + 1] ..."""
    data = context.make_array(array_type)(context, builder, array).data
    start = builder.gep(data, [first])
    return [builder.gep(start, [ir.Constant(_I32, i)]) for i in range(lanes)]


_I32, _I64 = ir.IntType(32), ir.IntType(64)
_LLVM = {types.float32: (ir.FloatType(), "f"), types.uint32: (_I32, "r")}


@cache
def load(dtype: str, lanes: int, fill: float | None = None, shared_with_stores: bool = False
         ) -> Callable:
    """Device function (array, first, address): array[first:first + lanes] = the elements at the
    global byte `address`, a multiple of their size together.

    fill                with a value, the function takes a fourth argument, a boolean: where it
                        is false nothing is read and the elements are `fill`. No branch, so that
                        loads that depend on nothing else are all in flight at once
    shared_with_stores  the kernel may also write this memory (it works in place); otherwise
                        reads go through the read-only path, ld.global.nc
    """
    kind, letter = _LLVM[STORAGE[dtype].register]
    size = min(lanes, 16 // STORAGE[dtype].bytes)       # elements of one access
    inputs = [_I64] + ([] if fill is None else [_I32])
    asm = ir.InlineAsm(
        ir.FunctionType(ir.LiteralStructType([kind] * size) if size > 1 else kind, inputs),
        _load_ptx(dtype, size, "" if shared_with_stores else ".nc", fill),
        ",".join([f"={letter}"] * size + ["l"] + ["r"] * (len(inputs) - 1)
                 + ["~{memory}"] * shared_with_stores), side_effect=shared_with_stores)

    def codegen(context, builder, sig, args):
        array, first, address, *guard = args
        guard = [builder.zext(where, _I32) for where in guard]
        for i, element in enumerate(_elements(context, builder, sig.args[0], array, first, lanes)):
            if i % size == 0:
                offset = ir.Constant(_I64, i * STORAGE[dtype].bytes)
                result = builder.call(asm, [builder.add(address, offset), *guard])
            builder.store(builder.extract_value(result, i % size) if size > 1 else result, element)
        return context.get_dummy_value()

    def load_always(typingctx, array, first, address):
        return types.void(array, first, types.uint64), codegen

    def load_where(typingctx, array, first, address, where):
        return types.void(array, first, types.uint64, types.boolean), codegen

    return intrinsic(load_always if fill is None else load_where)


@cache
def store(dtype: str, lanes: int) -> Callable:
    """Device function (address, array, first): the elements at the global byte `address`, a
    multiple of their size together, become array[first:first + lanes], rounded to nearest."""
    kind, letter = _LLVM[STORAGE[dtype].register]
    size = min(lanes, 16 // STORAGE[dtype].bytes)
    asm = ir.InlineAsm(ir.FunctionType(ir.VoidType(), [_I64] + [kind] * size),
                       _store_ptx(dtype, size), ",".join(["l"] + [letter] * size + ["~{memory}"]),
                       side_effect=True)

    def codegen(context, builder, sig, args):
        address, array, first = args
        elements = _elements(context, builder, sig.args[1], array, first, lanes)
        for i in range(0, lanes, size):
            offset = ir.Constant(_I64, i * STORAGE[dtype].bytes)
            values = [builder.load(element) for element in elements[i:i + size]]
            builder.call(asm, [builder.add(address, offset), *values])
        return context.get_dummy_value()

    def store_always(typingctx, address, array, first):
        return types.void(types.uint64, array, first), codegen

    return intrinsic(store_always)
