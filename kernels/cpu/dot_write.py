"""Writes a block of finished sums to the output, as LLVM IR: adds bias and residual, applies the
activation and clips.

Micro-kernels do that for the block before their own, some rows after each product: what multiplies
and what adds then work at the same time, and few layers have so many products that their sums could
be forgotten.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .convert import CODES, ROUND, load_wide, store_bits, store_narrow
from .dot_instructions import I8
from .dot_units import BLOCK, COLUMNS, GROUP
from .packing import (
    CAN_PACK,
    ROWS,
    add_saturated,
    broadcast_16,
    greatest,
    nearest,
    pack_halves,
    pack_words,
    store_row,
    which,
)
from .simd import (
    I32,
    I64,
    INT_VECTOR,
    VECTOR,
    Builder,
    Value,
    advance,
    apart,
    broadcast,
    clip,
    counted_loop,
    first_lanes,
    fma,
    i64,
    load,
    splat,
)
from .sizes import LANES
from .traced import activate, function_of


class Column(NamedTuple):
    """LANES outputs: the first of them, which there are (None: all), their biases and, of codes,
    factors."""
    first: Value
    mask: Value | None
    bias: Value
    factor: Value | None


class Rows(NamedTuple):
    """What there is in all rows of a block."""
    columns: list[Column]
    add_residual: bool


class Writer:
    """Of the arguments (sums, bias, residual, has_residual, y, places, spare, rows, channels, low,
    high, zero_point, residual_factor, a, b).

        y[places[r] + c] = clip(f(sums[r, c] + bias[c] + residual[places[r] + c] * residual_factor,
                                  a, b), low, high)

    for r < rows, c < channels <= BLOCK, in float32; f is the activation, if there is one. residual
    and y may each point to narrow numbers, to which y is then rounded. Rows of place -1 are written
    to `spare`, and so may be those up to a whole group. sums and bias are BLOCK wide; of residual
    and y nothing beyond `channels` is touched.

    Sums of codes are int32, and are multiplied by bias[BLOCK + c] first. Where y points to codes,
    the result is rounded to a whole number, halves to even ones, and zero_point is added.
    """

    def __init__(self, b: Builder, arguments: Sequence[Value], activation: Any,
                 group: int = GROUP, maskless: bool = False) -> None:
        """group: rows written together; maskless: whether blocks whose columns are all there are
        written without masks, by code of their own."""
        (self.sums, bias, self.residual, has_residual, self.y, self.places, self.spare, rows,
         channels, low, high, zero_point, residual_factor, *numbers) = arguments
        self.b, self.activation, self.group = b, function_of(activation), group
        self.numbers = [broadcast(b, number) for number in numbers]
        self.groups = b.sdiv(b.add(rows, i64(group - 1)), i64(group))
        self.low, self.high, self.residual_factor = (
            broadcast(b, number) for number in (low, high, residual_factor))
        self.channels, self.maskless = channels, maskless
        self.add_residual = b.icmp_signed("!=", has_residual, i64(0))
        self.of_codes, self.to_codes = (
            pointer.type.pointee == kind for pointer, kind in ((self.sums, I32), (self.y, I8)))
        if self.to_codes:
            # In the bits of a number to which ROUND was added.
            self.zero_point = broadcast(b, b.trunc(zero_point, I32))
        if self.to_codes and CAN_PACK:
            lowest = b.add(b.fptosi(low, I64), zero_point)
            self.zero_16, self.low_16 = (broadcast_16(b, number) for number in (zero_point, lowest))
            self.some = which(b, channels)
        self.columns = [Column(i64(c), first_lanes(b, b.sub(channels, i64(c))),
                               load(b, b.gep(bias, [i64(c)])),
                               load(b, b.gep(bias, [i64(BLOCK + c)])) if self.of_codes else None)
                        for c in range(0, BLOCK, LANES)]

    def either(self, emit: Callable[[Rows], None]) -> None:
        """emit(rows as they all are), chosen when it runs: once, and not for each row."""
        def for_columns(columns: list[Column]) -> None:
            with self.b.if_else(self.add_residual) as (then, otherwise):
                with then:
                    emit(Rows(columns, True))
                with otherwise:
                    emit(Rows(columns, False))

        def first_that_holds(cases: list[tuple[Value, list[Column]]]) -> None:
            if not cases:
                for_columns(self.columns)
                return
            (condition, columns), *others = cases
            with self.b.if_else(condition) as (then, otherwise):
                with then:
                    for_columns(columns)
                with otherwise:
                    first_that_holds(others)

        first_that_holds(self._cases())

    def _cases(self) -> list[tuple[Value, list[Column]]]:
        """Columns that are written by code of their own, and when."""
        half = self.columns[:COLUMNS // LANES]
        if self.maskless:
            return [(self.b.icmp_signed("==", self.channels, i64(LANES * len(columns))),
                     [column._replace(mask=None) for column in columns])
                    for columns in (self.columns, half)]
        is_half = self.b.icmp_signed("<=", self.channels, i64(COLUMNS))
        return [] if self.activation is None else [(is_half, half)]

    def rows(self, group: Value, first: int, end: int, rows: Rows) -> None:
        """Write rows `first` to `end` of a group, of which there are two or a multiple of that."""
        start = self.b.mul(group, i64(self.group))
        numbers = [self.b.add(start, i64(r)) for r in range(first, end)]
        if self.to_codes and CAN_PACK:
            for r in range(0, len(numbers), ROWS):
                self._packed(numbers[r:r + ROWS], rows)
        else:
            for number in numbers:
                self._row(number, rows)

    def all_rows(self, first_group: Value, rows: Rows) -> None:
        """Write all groups from this one on."""
        def group(index: Value, _: list[Value]) -> list[Value]:
            self.rows(self.b.add(first_group, index), 0, self.group, rows)
            return []
        counted_loop(self.b, "group", self.b.sub(self.groups, first_group), [], group)

    def _row(self, row: Value, rows: Rows) -> None:
        y, values = self._values(row, rows)
        for column, value in zip(rows.columns, values, strict=True):
            self._store(clip(self.b, value, self.low, self.high), self.b.gep(y, [column.first]),
                        column.mask)

    def _place(self, row: Value) -> tuple[Value, Value]:
        """Of a row's residual, and where it is written."""
        b = self.b
        place = b.load(b.gep(self.places, [row]))
        beside = b.icmp_signed("<", place, i64(0))
        place = b.select(beside, i64(0), place)
        return place, b.select(beside, self.spare, b.gep(self.y, [place]))

    def _values(self, row: Value, rows: Rows) -> tuple[Value, list[Value]]:
        """Where a row is written, and its numbers, before they are clipped."""
        b, values, (place, y) = self.b, [], self._place(row)
        sums, residual = advance(b, self.sums, row, BLOCK), b.gep(self.residual, [place])
        for column in rows.columns:
            value = self._scaled(b.gep(sums, [column.first]), column)
            if rows.add_residual:
                other = load_wide(b, b.gep(residual, [column.first]), column.mask)
                value = fma(b, other, self.residual_factor, value)
            values.append(activate(b, self.activation, value, *self.numbers))
        return y, values

    def _packed(self, some: list[Value], rows: Rows) -> None:
        """Rows to codes by what AVX-512 and AVX2 have for that. Numbers below `low` are found last,
        as whole ones of 16 bits; above `high` first, or they might not fit."""
        b, targets, words = self.b, list[Value](), list[Value]()
        for row in some:
            y, values = self._values(row, rows)
            targets.append(y)
            found = [nearest(b, b.select(b.fcmp_ordered(">", value, self.high), self.high, value))
                     for value in values]
            words += found * (4 // (len(found) * ROWS))     # of which half are left out
        halves = [greatest(b, add_saturated(b, pack_words(b, *pair), self.zero_16), self.low_16)
                  for pair in (words[:2], words[2:])]
        count = LANES * len(rows.columns) if rows.columns[0].mask is None else self.some
        for y, codes in zip(targets, pack_halves(b, *halves), strict=True):
            store_row(b, codes, y, count)

    def _scaled(self, sums: Value, column: Column) -> Value:
        """LANES sums with their bias, as float32."""
        b = self.b
        if column.factor is None:
            return b.fadd(load(b, sums), column.bias)
        whole = b.load(b.bitcast(sums, INT_VECTOR.as_pointer()))
        whole.align = 4
        return fma(b, b.sitofp(whole, VECTOR), column.factor, column.bias)

    def _store(self, value: Value, pointer: Value, mask: Value) -> None:
        b = self.b
        if not self.to_codes:
            store_narrow(b, value, pointer, mask)
            return
        whole = b.bitcast(b.fadd(value, splat(ROUND)), INT_VECTOR)
        store_bits(b, b.trunc(b.add(whole, self.zero_point), CODES), pointer, mask)


def write(b: Builder, activation: Any, arguments: list[Value]) -> None:
    """All rows at once, by a function that micro-kernels share. activation: the type of a function
    of scalar.py, or of a number where there is none."""
    function = function_of(activation)

    def all_rows(b: Builder, *values: Value) -> None:
        writer = Writer(b, values, activation, group=2, maskless=LANES < COLUMNS)
        writer.either(lambda rows: writer.all_rows(i64(0), rows))

    name = "write_block" if function is None else f"write_block_{function.py_func.__name__}"
    b.call(apart(b, name, arguments, all_rows), arguments)


@intrinsic
def write_block(typingctx, activation, arguments):
    """`write`, of the arguments of Writer."""
    def codegen(context, b, sig, args):
        write(b, activation, cgutils.unpack_tuple(b, args[1]))
        return context.get_dummy_value()
    return types.void(activation, arguments), codegen
