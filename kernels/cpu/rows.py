"""Vector code for rows of numbers, of any length: what softmax and norms need, as LLVM IR.

Loops of Numba's would become vectors too, but for what is left of a row after blocks of several
vectors, which in a row of 49 is all of it; and their products and sums would not be fused.
"""
from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import scalar
from .convert import load_wide, store_narrow
from .simd import (
    F32,
    I32,
    INT_VECTOR,
    LANES,
    Builder,
    Value,
    broadcast,
    clip,
    counted_loop,
    each_vector,
    first_lanes,
    fma,
    i64,
    literal_ints,
    load,
    root,
    splat,
    store,
)
from .traced import activate, function_of, traced


def _larger(b: Builder, x: Value, y: Value) -> Value:
    """The greater of two; of NaN and a number the one or the other."""
    return b.select(b.fcmp_ordered(">", y, x), y, x)


def _totals(b: Builder, count: Value, rows: int, start: float,
            vector: Callable[[int, Value, Value | None], Value],
            merge: Callable[[Builder, Value, Value], Value]) -> list[Value]:
    """Of each row `merge` of vector(row, first, mask), for all vectors of `count` numbers, and of
    their lanes. Rows go on side by side: a merge would wait for the one before."""
    def whole_vector(index, totals):
        first = b.mul(index, i64(LANES))
        return [merge(b, total, vector(row, first, None)) for row, total in enumerate(totals)]

    whole = b.sdiv(count, i64(LANES))
    totals = counted_loop(b, "vector", whole, [splat(start)] * rows, whole_vector)
    done = b.mul(whole, i64(LANES))
    mask = first_lanes(b, b.sub(count, done))
    totals = [b.select(mask, merge(b, total, vector(row, done, mask)), total)
              for row, total in enumerate(totals)]
    for lanes in (LANES >> i for i in range(1, LANES.bit_length())):
        places = ir.Constant(INT_VECTOR, [lane ^ lanes for lane in range(LANES)])
        totals = [merge(b, total, b.shuffle_vector(total, total, places)) for total in totals]
    return [b.extract_element(total, ir.Constant(I32, 0)) for total in totals]


def _exponentials(b: Builder, rows: int, x: Value, y: Value, step: Value, count: Value
                  ) -> tuple[list[Value], list[Value]]:
    """The greatest number of each row, and the sum of all y of it, with y = e ** (x - greatest)."""
    apart = [b.mul(step, i64(row)) for row in range(rows)]

    def place(array, row, first):
        return b.gep(array, [b.add(apart[row], first)])

    tops = _totals(b, count, rows, float("-inf"),
                   lambda row, first, mask: load(b, place(x, row, first), mask), _larger)
    spread = [broadcast(b, top) for top in tops]

    def exponential(row, first, mask):
        value = traced(b, scalar.exp, b.fsub(load(b, place(x, row, first), mask), spread[row]))
        store(b, value, place(y, row, first), mask)
        return value

    return tops, _totals(b, count, rows, 0.0, exponential,
                         lambda b, total, value: b.fadd(total, value))


@intrinsic
def exponentials(typingctx, x, y, count):
    """(the greatest of `count` numbers x, the sum of all y), with y[i] = e ** (x[i] - greatest). y
    may be x; both are pointers. NaN in x makes the sum NaN."""
    def codegen(context, b, sig, args):
        x, y, count = args
        tops, totals = _exponentials(b, 1, x, y, i64(0), count)
        return context.make_tuple(b, sig.return_type, [*tops, *totals])
    return types.UniTuple(types.float32, 2)(x, y, types.intp), codegen


@intrinsic(prefer_literal=True)
def softmax_rows(typingctx, rows, x, y, step, count):
    """The softmax of so many rows of `count` numbers, which are `step` numbers apart. Both are
    pointers; NaN in a row makes all of it NaN. y may be x, or point to bfloat16: then x is
    something else afterwards, and the rest of each row of y is 0."""
    literal = literal_ints(rows)
    if literal is None:
        return None

    def codegen(context, b, sig, args):
        _, x, y, step, count = args
        is_wide = y.type == x.type
        powers = y if is_wide else x
        _, totals = _exponentials(b, literal[0], x, powers, step, count)
        shares = [broadcast(b, b.fdiv(ir.Constant(F32, 1), total)) for total in totals]

        def vector(first, mask):
            valid = mask if is_wide else first_lanes(b, b.sub(count, first))
            for row, share in enumerate(shares):
                place = b.add(b.mul(step, i64(row)), first)
                value = b.fmul(load(b, b.gep(powers, [place]), valid), share)
                store_narrow(b, value, b.gep(y, [place]), mask)
        each_vector(b, count if is_wide else step, vector)
        return context.get_dummy_value()
    return types.void(rows, x, y, types.intp, types.intp), codegen


@intrinsic
def scale_shift_pixel(typingctx, activation, arguments):
    """arguments: (x, scale, shift, y, channels, low, high, a, b)

    y[c] = clip(f(x[c] * scale[c] + shift[c], a, b), low, high)

    for c < channels; nothing beyond these is touched. f is the activation, a function of
    scalar.py, or none, for a number; x and y each point to float32, bfloat16 or codes of 8 bits.
    """
    def codegen(context, b, sig, args):
        x, scale, shift, y, channels, *bounds = cgutils.unpack_tuple(b, args[1])
        low, high, *numbers = (broadcast(b, number) for number in bounds)

        def vector(c, mask):
            value, factor, term = (load_wide(b, b.gep(array, [c]), mask)
                                   for array in (x, scale, shift))
            value = activate(b, function_of(activation), b.fadd(b.fmul(value, factor), term),
                             *numbers)
            store_narrow(b, clip(b, value, low, high), b.gep(y, [c]), mask)

        each_vector(b, channels, vector)
        return context.get_dummy_value()

    return types.void(activation, arguments), codegen


@intrinsic(prefer_literal=True)
def layer_norm_rows(typingctx, rows, pointers, count, epsilon):
    """y[c] = (x[c] - mean) / sqrt(variance + epsilon) * scale[c] + bias[c] for c < count, of so
    many rows that lie one after the other. pointers: x, scale, bias and y, which may be x and may
    point to bfloat16."""
    literal = literal_ints(rows)
    if literal is None:
        return None

    def codegen(context, b, sig, args):
        _, pointers, count, epsilon = args
        x, scale, bias, y = cgutils.unpack_tuple(b, pointers)
        _layer_norm(b, literal[0], x, scale, bias, y, count, epsilon)
        return context.get_dummy_value()
    return types.void(rows, pointers, types.intp, types.float32), codegen


def _layer_norm(b: Builder, rows: int, x: Value, scale: Value, bias: Value, y: Value, count: Value,
                epsilon: Value) -> None:
    number, apart = b.sitofp(count, F32), [b.mul(count, i64(row)) for row in range(rows)]
    means: list[Value] = []

    def means_of(vector: Callable[[int, Value, Value | None], Value]) -> list[Value]:
        totals = _totals(b, count, rows, 0.0, vector, lambda b, sum, part: b.fadd(sum, part))
        return [b.fdiv(each, number) for each in totals]

    def given(row: int, first: Value, mask: Value | None) -> Value:
        return load(b, b.gep(x, [b.add(apart[row], first)]), mask)

    def deviation(row: int, first: Value, mask: Value | None) -> Value:
        return b.fsub(given(row, first, mask), means[row])

    def squared(row: int, first: Value, mask: Value | None) -> Value:
        value = deviation(row, first, mask)
        return b.fmul(value, value)

    means += [broadcast(b, mean) for mean in means_of(given)]
    factors = [broadcast(b, b.fdiv(ir.Constant(F32, 1), root(b, b.fadd(variance, epsilon))))
               for variance in means_of(squared)]

    def vector(first: Value, mask: Value | None) -> None:
        of_scale, of_bias = (load(b, b.gep(each, [first]), mask) for each in (scale, bias))
        for row, factor in enumerate(factors):
            value = fma(b, b.fmul(deviation(row, first, mask), factor), of_scale, of_bias)
            store_narrow(b, value, b.gep(y, [b.add(apart[row], first)]), mask)
    each_vector(b, count, vector)
