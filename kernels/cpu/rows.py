"""Vector code for rows of numbers, of any length: what softmax needs, as LLVM IR.

Loops of Numba's would become vectors too, but for what is left of a row after blocks of several
vectors, which in a row of 49 is all of it; and their products and sums would not be fused.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import scalar
from .simd import (
    I32,
    INT_VECTOR,
    LANES,
    VECTOR,
    Builder,
    Value,
    broadcast,
    clip,
    counted_loop,
    each_vector,
    first_lanes,
    fma,
    i64,
    load,
    splat,
    store,
)

WAYS = 4        # sums at work at once: what an addition takes, in additions


def exp(b: Builder, x: Value) -> Value:
    """e ** x of a vector, as scalar.exp computes it."""
    bounded = clip(b, x, splat(scalar.EXP_LOW), splat(scalar.EXP_HIGH))
    n = fma(b, bounded, splat(scalar.LOG2_E), splat(scalar.ROUND))
    n = b.fsub(n, splat(scalar.ROUND))
    r = fma(b, n, splat(-scalar.LN2_HIGH), bounded)
    r = fma(b, n, splat(-scalar.LN2_LOW), r)
    p = splat(scalar.E0)
    for factor in (scalar.E1, scalar.E2, scalar.E3, scalar.E4, scalar.E5):
        p = fma(b, p, r, splat(factor))
    growth = fma(b, p, b.fmul(r, r), r)
    exponent = b.add(b.fptosi(n, INT_VECTOR), ir.Constant(INT_VECTOR, [127] * LANES))
    power = b.bitcast(b.shl(exponent, ir.Constant(INT_VECTOR, [23] * LANES)), VECTOR)
    result = b.fmul(b.fadd(growth, splat(1)), power)
    return b.select(b.fcmp_unordered("uno", x, x), x, result)


def _larger(b: Builder, x: Value, y: Value) -> Value:
    """The greater of two; of NaN and a number the one or the other."""
    return b.select(b.fcmp_ordered(">", y, x), y, x)


def _total(b: Builder, count: Value, start: float,
           vector: Callable[[Value, Value | None], Value],
           merge: Callable[[Builder, Value, Value], Value]) -> Value:
    """`merge` of vector(first, mask), for all vectors of `count` numbers, and of their lanes: WAYS
    vectors go on side by side, for one merge would wait for the one before."""
    def vectors(ways: int):
        def several(index, carried):
            first, *totals = carried
            totals = [merge(b, total, vector(b.add(first, i64(way * LANES)), None))
                      for way, total in enumerate(totals)]
            return [b.add(first, i64(ways * LANES)), *totals]
        return several

    whole = b.sdiv(count, i64(LANES))
    done, *totals = counted_loop(b, "vectors", b.sdiv(whole, i64(WAYS)),
                                 [i64(0), *[splat(start)] * WAYS], vectors(WAYS))
    total = reduce(lambda x, y: merge(b, x, y), totals)
    done, total = counted_loop(b, "vector", b.srem(whole, i64(WAYS)), [done, total], vectors(1))
    mask = first_lanes(b, b.sub(count, done))
    total = b.select(mask, merge(b, total, vector(done, mask)), total)
    for lanes in (LANES >> i for i in range(1, LANES.bit_length())):
        places = ir.Constant(INT_VECTOR, [lane ^ lanes for lane in range(LANES)])
        total = merge(b, total, b.shuffle_vector(total, total, places))
    return b.extract_element(total, ir.Constant(I32, 0))


@intrinsic
def exponentials(typingctx, x, y, count):
    """(the greatest of `count` numbers x, the sum of all y), with y[i] = e ** (x[i] - greatest). y
    may be x; both are pointers. NaN in x makes the sum NaN."""
    def codegen(context, b, sig, args):
        x, y, count = args
        top = _total(b, count, float("-inf"),
                     lambda first, mask: load(b, b.gep(x, [first]), mask), _larger)
        tops = broadcast(b, top)

        def exponential(first, mask):
            value = exp(b, b.fsub(load(b, b.gep(x, [first]), mask), tops))
            store(b, value, b.gep(y, [first]), mask)
            return value

        total = _total(b, count, 0.0, exponential, lambda b, sums, value: b.fadd(sums, value))
        return context.make_tuple(b, sig.return_type, [top, total])
    return types.UniTuple(types.float32, 2)(x, y, types.intp), codegen


@intrinsic
def multiply_by(typingctx, y, count, factor):
    """y[i] *= factor, for `count` numbers behind a pointer."""
    def codegen(context, b, sig, args):
        y, count, factor = args
        factors = broadcast(b, factor)

        def vector(first, mask):
            pointer = b.gep(y, [first])
            store(b, b.fmul(load(b, pointer, mask), factors), pointer, mask)
        each_vector(b, count, vector)
        return context.get_dummy_value()
    return types.void(y, types.intp, types.float32), codegen
