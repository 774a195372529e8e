"""Writes a block of finished sums to the output, as LLVM IR: adds bias and residual, applies the
activation and clips.

Micro-kernels do that for the block before their own, some rows after each product: what multiplies
and what adds then work at the same time, and few layers have so many products that their sums could
be forgotten.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .convert import CODES, ROUND, load_wide, store_bits, store_narrow
from .dot_instructions import I8
from .dot_units import BLOCK, COLUMNS, GROUP
from .jit import njit
from .packing import (
    CAN_PACK,
    add_saturated,
    broadcast_16,
    first_bytes,
    greatest,
    nearest,
    pack_halves,
    pack_words,
    store_bytes,
)
from .simd import (
    F32,
    I32,
    I64,
    INT_VECTOR,
    VECTOR,
    Builder,
    Value,
    advance,
    broadcast,
    clip,
    counted_loop,
    first_lanes,
    fma,
    i64,
    load,
    splat,
    store,
    widest_vectors,
)
from .sizes import LANES

Activate = Callable[..., None]      # (numbers, builder, pointer to them, a, b): in place


class Writer:
    """Of the arguments (sums, bias, residual, has_residual, y, places, spare, rows, channels, low,
    high, zero_point, residual_factor, a, b).

        y[places[r] + c] = clip(f(sums[r, c] + bias[c] + residual[places[r] + c] * residual_factor,
                                  a, b), low, high)

    for r < rows, c < channels <= BLOCK, in float32; f is the activation, if there is one. residual
    and y may each point to narrow numbers, to which y is then rounded. Rows of place -1 are written
    to `spare`, and so may be those up to a whole GROUP. sums and bias are BLOCK wide; of residual
    and y nothing beyond `channels` is touched.

    Sums of codes are int32, and are multiplied by bias[BLOCK + c] first. Where y points to codes,
    the result is rounded to a whole number, halves to even ones, and zero_point is added.
    """

    def __init__(self, b: Builder, arguments: list[Value], activate: Activate | None) -> None:
        (self.sums, bias, self.residual, has_residual, self.y, self.places, self.spare, rows,
         channels, low, high, zero_point, residual_factor, *self.numbers) = arguments
        self.b, self.activate = b, activate
        self.groups = b.sdiv(b.add(rows, i64(GROUP - 1)), i64(GROUP))
        self.low, self.high, self.residual_factor = (
            broadcast(b, number) for number in (low, high, residual_factor))
        self.is_half = b.icmp_signed("<=", channels, i64(COLUMNS))
        self.add_residual = b.icmp_signed("!=", has_residual, i64(0))
        self.of_codes, self.to_codes = (
            pointer.type.pointee == kind for pointer, kind in ((self.sums, I32), (self.y, I8)))
        if self.to_codes:
            # In the bits of a number to which ROUND was added.
            self.zero_point = broadcast(b, b.trunc(zero_point, I32))
        if self.to_codes and CAN_PACK:
            lowest = b.add(b.fptosi(low, I64), zero_point)
            self.zero_16, self.low_16 = (broadcast_16(b, number) for number in (zero_point, lowest))
            self.mask_32 = first_bytes(b, channels)
        self.columns = [(i64(c), first_lanes(b, b.sub(channels, i64(c))),
                         load(b, b.gep(bias, [i64(c)])),
                         load(b, b.gep(bias, [i64(BLOCK + c)])) if self.of_codes else None)
                        for c in range(0, BLOCK, LANES)]

    def either(self, emit: Callable[[bool], None]) -> None:
        """emit(whether there is a residual), chosen when it runs: once, and not for each row."""
        with self.b.if_else(self.add_residual) as (then, otherwise):
            with then:
                emit(True)
            with otherwise:
                emit(False)

    def rows(self, group: Value, first: int, end: int, add_residual: bool) -> None:
        """Write rows `first` to `end` of a group, of which there are two or a multiple of that."""
        start = self.b.mul(group, i64(GROUP))
        for r in range(first, end, 2):
            pair = [self.b.add(start, i64(r)), self.b.add(start, i64(r + 1))]
            if self.activate:
                for row in pair:
                    self._take(row, add_residual)
                self._apply(pair)
            if self.to_codes and CAN_PACK:
                self._packed(pair, add_residual)
            else:
                for row in pair:
                    self._row(row, add_residual)

    def all_rows(self, first_group: Value, add_residual: bool) -> None:
        """Write all groups from this one on."""
        def group(index: Value, _: list[Value]) -> list[Value]:
            self.rows(self.b.add(first_group, index), 0, GROUP, add_residual)
            return []
        counted_loop(self.b, "group", self.b.sub(self.groups, first_group), [], group)

    def _row(self, row: Value, add_residual: bool) -> None:
        if self.activate:
            numbers, y = self._numbers(row), self._place(row)[1]
            values = [load(self.b, self.b.gep(numbers, [c])) for c, *_ in self.columns]
        else:
            y, values = self._values(row, add_residual)
        for (c, mask, _, _), value in zip(self.columns, values, strict=True):
            self._store(clip(self.b, value, self.low, self.high), self.b.gep(y, [c]), mask)

    def _apply(self, pair: list[Value]) -> None:
        """The activation to two rows of numbers, of each to those that there may be."""
        b, pointers = self.b, [self._numbers(row) for row in pair]
        with b.if_else(self.is_half) as (then, otherwise):
            with then:
                for pointer in pointers:
                    self.activate(COLUMNS, b, pointer, *self.numbers)
            with otherwise:
                self.activate(2 * BLOCK, b, pointers[0], *self.numbers)

    def _take(self, row: Value, add_residual: bool) -> None:
        """Put the numbers of a row where its sums are."""
        numbers, (_, values) = self._numbers(row), self._values(row, add_residual)
        for (c, *_), value in zip(self.columns, values, strict=True):
            store(self.b, value, self.b.gep(numbers, [c]))

    def _numbers(self, row: Value) -> Value:
        sums = advance(self.b, self.sums, row, BLOCK)
        return self.b.bitcast(sums, F32.as_pointer())

    def _place(self, row: Value) -> tuple[Value, Value]:
        """Of a row's residual, and where it is written."""
        b = self.b
        place = b.load(b.gep(self.places, [row]))
        beside = b.icmp_signed("<", place, i64(0))
        place = b.select(beside, i64(0), place)
        return place, b.select(beside, self.spare, b.gep(self.y, [place]))

    def _values(self, row: Value, add_residual: bool) -> tuple[Value, list[Value]]:
        """Where a row is written, and its numbers, before they are clipped."""
        b, values, (place, y) = self.b, [], self._place(row)
        sums, residual = advance(b, self.sums, row, BLOCK), b.gep(self.residual, [place])
        for c, mask, bias, factor in self.columns:
            value = self._scaled(b.gep(sums, [c]), bias, factor)
            if add_residual:
                other = load_wide(b, b.gep(residual, [c]), mask)
                value = fma(b, other, self.residual_factor, value)
            values.append(value)
        return y, values

    def _packed(self, pair: list[Value], add_residual: bool) -> None:
        """Two rows to codes by what AVX-512 has for that. Numbers below `low` are found last, as
        whole ones of 16 bits; above `high` first, or they might not fit."""
        b, targets, halves = self.b, [], []
        for row in pair:
            y, values = self._values(row, add_residual)
            targets.append(y)
            bounded = [b.select(b.fcmp_ordered(">", value, self.high), self.high, value)
                       for value in values]
            codes = pack_words(b, *(nearest(b, value) for value in bounded))
            halves.append(greatest(b, add_saturated(b, codes, self.zero_16), self.low_16))
        for y, codes in zip(targets, pack_halves(b, *halves), strict=True):
            store_bytes(b, codes, y, self.mask_32)

    def _scaled(self, sums: Value, bias: Value, factor: Value | None) -> Value:
        """LANES sums with their bias, as float32."""
        b = self.b
        if factor is None:
            return b.fadd(load(b, sums), bias)
        whole = b.load(b.bitcast(sums, INT_VECTOR.as_pointer()))
        whole.align = 4
        return fma(b, b.sitofp(whole, VECTOR), factor, bias)

    def _store(self, value: Value, pointer: Value, mask: Value) -> None:
        b = self.b
        if not self.to_codes:
            store_narrow(b, value, pointer, mask)
            return
        whole = b.bitcast(b.fadd(value, splat(ROUND)), INT_VECTOR)
        store_bits(b, b.trunc(b.add(whole, self.zero_point), CODES), pointer, mask)


@intrinsic
def write_block(typingctx, activation, arguments):
    """All rows at once, of the arguments of Writer. activation: as of `activate`."""
    make = activate(typingctx, activation)

    def codegen(context, b, sig, args):
        writer = Writer(b, cgutils.unpack_tuple(b, args[1]), make(context))
        writer.either(lambda add_residual: writer.all_rows(i64(0), add_residual))
        return context.get_dummy_value()
    return types.void(activation, arguments), codegen


def activate(typingctx: Any, activation: Any) -> Callable[[Any], Activate | None]:
    """What makes, in a context of Numba's, the code of an activation: a function of scalar.py, or,
    where there is none, a number."""
    if not isinstance(activation, types.Dispatcher):
        return lambda context: None
    kinds, compiled = (types.CPointer(types.float32), types.float32, types.float32), {}
    for count in (COLUMNS, 2 * BLOCK):
        sweep = _sweep(activation.dispatcher, count)
        signature = typingctx.resolve_function_type(types.Dispatcher(sweep), kinds, {})
        compiled[count] = signature, sweep.overloads[signature.args]

    def of_context(context: Any) -> Activate:
        def emit(count: int, b: Builder, *arguments: Value) -> None:
            signature, sweep = compiled[count]
            context.add_linking_libs([sweep.library])
            context.call_internal_no_propagate(b, sweep.fndesc, signature, arguments)
        return emit
    return of_context


@cache
def _sweep(function: Any, count: int) -> Any:
    """A loop over so many numbers, of which LLVM makes vector code."""
    @njit(keep=False, fastmath={"contract"})
    def sweep(numbers, a, b):
        widest_vectors()
        for i in range(count):
            numbers[i] = function(numbers[i], a, b)
    return sweep
