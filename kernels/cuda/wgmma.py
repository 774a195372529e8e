"""Matrix products of a warpgroup, four warps, from shared memory (wgmma; sm_90a alone).

    acc[64, n] += a[64, k] @ b[n, k].T

Rows of both operands are 128 bytes of k, at addresses that are multiples of 128, and their 16-byte
chunks exchanged as the 128-byte swizzle has it: chunk c of the row at address a lies at
c ^ a / 128 % 8. It is the address that counts and not the number of the row, so that an operand may
begin at any such row (measured on an H200, with 0 as the descriptor's base offset).
Warp w of the group holds rows 16 w to 16 w + 15 of the sums, as tiles of mma.sync have them: a lane
two neighbouring columns of row lane // 4, then of row lane // 4 + 8, and so on for each 8 columns.

Products run while the warps go on: groups of them are waited for, and before that nothing may
touch the sums. Accumulators are a `cuda.local.array`; each op here takes all of it.

Source: the PTX ISA, section 9.7.15.
"""
from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types

from .ptx import asm_op, cuda, int32, intrinsic, uint32, uint64

ROW_BYTES = 128                 # of an operand, the span of the swizzle
K_BYTES = 32                    # of a row that one instruction multiplies, 16 values
ALL_LANES = 0xFFFFFFFF
SHORT = {"float16": "f16", "bfloat16": "bf16"}
# Of a matrix descriptor all but the address: in units of 16 bytes, from 8 rows to the next 8 (bits
# 32 to 45) and along k (16 to 29, unused where a row is the span of the swizzle); the swizzle (62).
LAYOUT = 1 << 62 | 8 * ROW_BYTES // 16 << 32 | 1 << 16

# What threads, or their cp.async, have written to shared memory is there for wgmma to read: each
# thread executes it for its own writes, before the barrier.
fence_proxy_async = asm_op("fence_proxy_async", "fence.proxy.async.shared::cta;", memory=True)


@cuda.jit(device=True, inline="always")
def descriptor(address):
    """uint64, of the operand at a shared address. One that lies n bytes further: + n // 16."""
    return uint64(LAYOUT) | uint64(uint32((address & uint32(0x3FFFF)) >> uint32(4)))


@cuda.jit(device=True, inline="always")
def warpgroup(tid):
    """The thread's: number of its four warps. Taken from one lane, so that the compiler knows it to
    be the same in all of them, and descriptors cost the lanes no instructions."""
    return uint32(cuda.shfl_sync(ALL_LANES, int32(tid >> uint32(7)), 0))


def products(dtype: str, n: int) -> Callable:
    """Device function (acc, a, b): starts acc += the product of two slices, 128 bytes of k deep,
    whose descriptors are a and b, and makes a group of it."""
    count = n // 2
    sums = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    multiply = (f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{SHORT[dtype]}.{SHORT[dtype]} "
                f"{sums}, a, b, p, 1, 1, 0, 0;")
    further = f" add.s64 a, a, {K_BYTES // 16}; add.s64 b, b, {K_BYTES // 16}; "
    return _on_sums(f"products_{dtype}_{n}", (
        f"{{ .reg .pred p; .reg .b64 a, b; setp.eq.u32 p, 0, 0; mov.b64 a, ${2 * count}; "
        f"mov.b64 b, ${2 * count + 1}; wgmma.fence.sync.aligned; "
        + further.join([multiply] * (ROW_BYTES // K_BYTES))
        + " wgmma.commit_group.sync.aligned; }"), count, operands=2)


def wait(pending: int) -> Callable:
    """The op that waits until at most `pending` of the warpgroup's groups are in flight."""
    return asm_op(f"wgmma_wait_{pending}", f"wgmma.wait_group.sync.aligned {pending};", memory=True)


def wait_for_sums(n: int) -> Callable:
    """Device function (acc): waits for all groups. The compiler, to which the sums were there as
    soon as a product was issued, takes them from here instead."""
    return _on_sums(f"wgmma_wait_for_sums_{n}", "wgmma.wait_group.sync.aligned 0;", n // 2,
                    operands=0)


def _on_sums(name: str, template: str, count: int, operands: int) -> Callable:
    """Device function (acc, uint64 ...): inline PTX that reads and writes acc[0:count], registers
    $0 and on, with so many operands after them.

    An intrinsic, for written in Python it would be a tuple of `count` elements.
    """
    kind, wide = ir.FloatType(), ir.IntType(64)
    result = ir.LiteralStructType([kind] * count)
    asm = ir.InlineAsm(
        ir.FunctionType(result, [kind] * count + [wide] * operands), template,
        ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l"] * operands
                 + ["~{memory}"]), side_effect=True)

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        places = [builder.gep(data, [ir.Constant(ir.IntType(32), i)]) for i in range(count)]
        done = builder.call(asm, [*map(builder.load, places), *args[1:]])
        for i, place in enumerate(places):
            builder.store(builder.extract_value(done, i), place)
        return context.get_dummy_value()

    def on_two(typingctx, acc, a, b):
        return types.void(acc, uint64, uint64), codegen

    def on_none(typingctx, acc):
        return types.void(acc), codegen

    typing = on_two if operands else on_none
    typing.__name__ = typing.__qualname__ = name
    return intrinsic(typing)
