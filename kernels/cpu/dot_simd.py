"""Micro-kernels of narrow numbers as LLVM IR, over the instructions of dot_instructions.py.

    multiply    the products behind a block of outputs of a convolution, Linear layer or matrix
    narrow      copies numbers as bfloat16, or as the codes of 8 bits
    scaled      copies numbers, times another, as bfloat16
    pair_rows   makes words of two rows of numbers

bfloat16 lies in memory as uint16, the upper halves of float32; codes are uint8, or int16 where AVX2
multiplies them, less their zero point. Weights are panels [inputs / together, vectors * COLUMNS,
together], for the instructions want words of neighbouring inputs; those for codes are int8, or
int16.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .convert import HALVES, load_bits, load_wide, nearest_code, rounded, store_bits
from .dot_instructions import (
    BYTES,
    I8,
    SUMS,
    WORDS,
    EmulatedTiles,
    Tiles,
    broadcast_word,
    dot,
    dot_int8,
    dot_int8_by_halves,
    dot_int8_by_quarters,
    dot_int16_by_halves,
    emulated_dot,
    emulated_dot_int8,
    emulated_dot_int8_less_128,
    load_words,
)
from .dot_units import (
    AMX_BF16,
    AMX_EMULATED_BF16,
    AMX_EMULATED_INT8,
    AMX_INT8,
    AVX2_INT8,
    AVX512_BF16,
    AVX512_EMULATED_BF16,
    AVXVNNI_INT8,
    BLOCK,
    COLUMNS,
    DOTPROD_EMULATED_INT8,
    DOTPROD_INT8,
    GROUP,
    TILE_ROWS,
    VNNI_EMULATED_INT8,
    VNNI_INT8,
    Amx,
    AmxInt8,
    Unit,
)
from .dot_write import Writer, write
from .simd import (
    F32,
    I32,
    INT_VECTOR,
    Builder,
    Value,
    advance,
    broadcast,
    choose,
    counted_loop,
    each_vector,
    first_lanes,
    fma,
    i64,
    keep_order,
    least,
    load,
    prefetch,
)
from .sizes import LANES

# Where LONG steps or more follow, a tile of pixels is stored every BREATH steps, to where sums will
# be: without that AMX was seen to take 128 cycles for a step instead of 99 in products of 36 steps,
# and 114 in those of 72.
LONG, BREATH = 24, 4
# A single pixel reads each weight once: they are fetched so many words before. 38 GB/s instead of
# 24 were seen where they come from main memory.
AHEAD = 2048


# ---- micro-kernels ----------------------------------------------------------------------------

class Products(NamedTuple):
    """What a micro-kernel multiplies: the first arguments of `multiply`."""
    x: Value
    x_step: Value
    taps: Value
    count: Value
    steps: Value
    depth: Value
    w: Value
    sums: Value


@intrinsic
def multiply(typingctx, unit, number, activation, arguments):
    """arguments: (x, x_step, taps, count, steps, depth, w, sums) and those of a Writer, whose
    activation stands before them

    sums[r, c] = sum over t, k of x[r*x_step + taps[t] + k] * w[t*steps*depth + k, c]

    for t < count, k < steps * depth, r < rows, c < vectors * COLUMNS; with `number` go the unit's
    sizes, each with one vector and with two. x points to the unit's inputs, and steps count these;
    sums are float32, or int32 of codes, BLOCK apart. Tiles take one step a tap. Meanwhile what the
    Writer has is written, which must be other sums.
    """
    def codegen(context, b, sig, args):
        known, emit, instructions = MICRO_KERNELS[unit.instance_class]
        sizes = [(rows, vectors) for rows in known.sizes for vectors in (1, 2)]
        values, count = cgutils.unpack_tuple(b, args[3]), len(Products._fields)
        if not known.has_tiles:
            # Sums fill the registers, and leave no room for a Writer's: it goes first, and is the
            # same for all sizes.
            write(b, activation, values[count:])
            values = values[:count]

        def micro_kernel(b, size, *values):
            writers = [Writer(b, values[count:], activation)] if known.has_tiles else []
            emit(b, known, instructions, *size, Products._make(values[:count]), *writers)

        choose(b, args[1], values, f"multiply_{known.constant.name}", sizes, micro_kernel)
        return context.get_dummy_value()

    return types.void(unit, types.int64, activation, arguments), codegen


def tile_products(b, unit, tiles_with, rows, vectors, given, writer):
    """Tiles 0 to 3 hold sums, 4 and 5 pixels, 6 and 7 weights."""
    tiles = tiles_with(b, b.sdiv(given.depth, i64(unit.together)))
    pixels, columns = range(rows // TILE_ROWS), range(vectors)
    sums = [(i, j) for i in pixels for j in columns]
    x_bytes = b.mul(given.x_step, i64(unit.itemsize))
    for i, j in sums:
        tiles.zero(2 * i + j)

    def step(k, meanwhile):
        inputs = b.gep(given.x, [b.load(b.gep(given.taps, [k]))])
        weights = advance(b, given.w, k, given.depth, vectors * COLUMNS)
        for i in pixels:
            tiles.load_pixels(4 + i, advance(b, inputs, given.x_step, i * TILE_ROWS), x_bytes)
        for j in columns:
            tiles.load_weights(6 + j, advance(b, weights, j * COLUMNS * unit.together),
                               i64(4 * vectors * COLUMNS))
        for number, (i, j) in enumerate(sums):
            tiles.multiply(2 * i + j, 4 + i, 6 + j)
            meanwhile(number * GROUP // len(sums), (number + 1) * GROUP // len(sums))
        return []

    def steps_alone(first, count):
        counted_loop(b, "step", count, [], lambda k, _: step(b.add(first, k), lambda *rows: None))

    def remaining_steps(first):
        left = b.sub(given.count, first)
        breaths = b.select(b.icmp_signed("<", left, i64(LONG)), i64(0), b.sdiv(left, i64(BREATH)))

        def breath(index, _):
            steps_alone(b.add(first, b.mul(index, i64(BREATH))), i64(BREATH))
            tiles.store(4, given.sums, i64(4 * BLOCK))
            return []

        counted_loop(b, "breath", breaths, [], breath)
        done = b.mul(breaths, i64(BREATH))
        steps_alone(b.add(first, done), b.sub(left, done))

    def all_steps(written):
        both = least(b, given.count, writer.groups)
        counted_loop(b, "step_and_rows", both, [], lambda k, _: step(
            k, lambda *rows: writer.rows(k, *rows, written)))
        with b.if_then(b.icmp_signed("<", both, given.count)):
            remaining_steps(both)
        writer.all_rows(both, written)

    writer.either(all_steps)
    for i, j in sums:
        target = advance(b, given.sums, i * TILE_ROWS * BLOCK + j * COLUMNS)
        tiles.store(2 * i + j, target, i64(4 * BLOCK))


def vector_products(b, unit, instruction, rows, vectors, given):
    """All sums stay in registers through both loops."""
    some_products(b, unit, instruction, range(rows), range(vectors), vectors, given)


def products_of(most_rows, most_vectors):
    """The same where there are registers for the sums of so many at a time."""
    def emit(b, unit, instruction, rows, vectors, given):
        for j in range(0, vectors, most_vectors):
            for i in range(0, rows, most_rows):
                some_products(b, unit, instruction, range(i, min(i + most_rows, rows)),
                              range(j, min(j + most_vectors, vectors)), vectors, given)
    return emit


def some_products(b, unit, instruction, rows, columns, vectors, given):
    """Of these rows, and of these vectors of a panel's."""
    panel = vectors * COLUMNS * unit.together

    def tap(t, carried):
        weights, *totals = carried
        first = b.gep(given.x, [b.load(b.gep(given.taps, [t]))])
        pixels = [b.bitcast(advance(b, first, given.x_step, r), I32.as_pointer()) for r in rows]

        def word(k, totals):
            inputs = advance(b, weights, k, panel)
            if len(rows) == 1:
                for j in columns:
                    prefetch(b, b.gep(inputs, [i64((AHEAD + j * COLUMNS) * unit.together)]))
            w_vectors = [load_words(b, advance(b, inputs, j * COLUMNS * unit.together))
                         for j in columns]
            result = []
            for i, pointer in enumerate(pixels):
                # LLVM would load pixels before there are registers for them.
                keep_order(b)
                pixel = b.load(b.gep(pointer, [k]))
                pixel.align = unit.itemsize
                x_word = broadcast_word(b, pixel)
                result += [instruction(b, totals[i * len(columns) + j], x_word, w)
                           for j, w in enumerate(w_vectors)]
            return result

        totals = counted_loop(b, "word", given.steps, totals, word)
        return [advance(b, weights, given.steps, panel), *totals]

    kind = WORDS if unit.is_int8 else SUMS
    start = [ir.Constant(kind, None)] * (len(rows) * len(columns))
    _, *totals = counted_loop(b, "tap", given.count, [given.w, *start], tap)
    for i, total in enumerate(totals):
        row, column = rows[i // len(columns)], columns[i % len(columns)]
        target = advance(b, given.sums, row * BLOCK + column * COLUMNS)
        b.store(total, b.bitcast(target, kind.as_pointer())).align = 4


def tiles(kind, instruction):
    """The tiles of a micro-kernel, where they hold so many words of inputs."""
    return lambda b, words: kind(b, words, instruction)


MICRO_KERNELS: dict[type[Unit], tuple[Unit, Callable[..., None], Any]] = {
    type(unit): (unit, emit, instructions) for unit, emit, instructions in (
        (AMX_BF16, tile_products, tiles(Tiles, "tdpbf16ps")),
        (AMX_EMULATED_BF16, tile_products, tiles(EmulatedTiles, "tdpbf16ps")),
        (AMX_INT8, tile_products, tiles(Tiles, "tdpbusd")),
        (AMX_EMULATED_INT8, tile_products, tiles(EmulatedTiles, "tdpbusd")),
        (AVX512_BF16, vector_products, dot),
        (AVX512_EMULATED_BF16, vector_products, emulated_dot),
        (VNNI_INT8, vector_products, dot_int8),
        (AVXVNNI_INT8, products_of(2, 2), dot_int8_by_halves),
        (AVX2_INT8, products_of(6, 1), dot_int16_by_halves),
        (DOTPROD_INT8, products_of(6, 1), dot_int8_by_quarters),
        (DOTPROD_EMULATED_INT8, products_of(6, 1), emulated_dot_int8_less_128),
        (VNNI_EMULATED_INT8, vector_products, emulated_dot_int8))}


@intrinsic
def configure(typingctx, unit, depth):
    """Before a thread uses the unit: AMX is told that all tiles have 16 rows of 64 bytes, but those
    of pixels and of weights only what holds `depth` inputs, which are whole words."""
    def codegen(context, b, sig, args):
        if unit.instance_class in (Amx, AmxInt8):
            together = MICRO_KERNELS[unit.instance_class][0].together
            palette, columns, rows = 1, [64, 0] * 8, [TILE_ROWS] * 8
            data = bytes([palette, *[0] * 15, *columns, *[0] * 16, *rows, *[0] * 8])
            block = cgutils.alloca_once_value(
                b, cgutils.make_bytearray(data), name="tile_configuration")
            start = b.bitcast(block, BYTES)
            words = b.trunc(b.sdiv(args[1], i64(together)), I8)
            for tile in (4, 5):
                b.store(b.mul(words, I8(4)), b.gep(start, [i64(16 + 2 * tile)]))
            for tile in (6, 7):
                b.store(words, b.gep(start, [i64(48 + tile)]))
            function = ir.FunctionType(ir.VoidType(), [BYTES])
            b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.ldtilecfg"),
                   [start])
        return context.get_dummy_value()
    return types.void(unit, types.int64), codegen


@intrinsic
def release(typingctx, unit):
    """When a thread is done with it: tiles in use would be saved at each switch of threads."""
    def codegen(context, b, sig, args):
        if unit.instance_class in (Amx, AmxInt8):
            function = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.tilerelease"), [])
        return context.get_dummy_value()
    return types.void(unit), codegen


# ---- moving narrow numbers ----------------------------------------------------------------------

@intrinsic
def narrow(typingctx, target, source, count, padded, inverse, zero_point):
    """target[i] = source[i] for i < count, 0 for count <= i < padded. target points to bfloat16, or
    to codes: those of float32 are source[i] * inverse + zero_point, rounded, from 0 to 255. What is
    of target's type already stays as it is. Of codes in int16 zero_point is taken off."""
    is_int16 = target.dtype == types.int16

    def codegen(context, b, sig, args):
        target, source, count, padded, inverse, zero_point = args
        wide, coded = source.type.pointee == F32, is_int16 or target.type.pointee == I8
        scaled, zero = broadcast(b, inverse), broadcast(b, b.sitofp(zero_point, F32))
        zero_16 = broadcast(b, b.trunc(zero_point, HALVES.element), LANES)

        def move(c, among=None, within=None):
            """LANES numbers; of a part of them, with masks of those that there are to be read and
            to be written."""
            pointer = b.gep(source, [c])
            if not wide:
                bits = load_bits(b, pointer, among)
            elif coded:
                bits = nearest_code(b, fma(b, load(b, pointer, among), scaled, zero))
            else:
                bits = rounded(b, load(b, pointer, among))
            if is_int16:
                bits = b.sub(b.zext(bits, HALVES), zero_16)
                bits = bits if among is None else b.select(among, bits, ir.Constant(HALVES, None))
            store_bits(b, bits, b.gep(target, [c]), within)

        def vector(index, _):
            move(b.mul(index, i64(LANES)))
            return []

        whole = b.sdiv(count, i64(LANES))
        counted_loop(b, "vector", whole, [], vector)
        done = b.mul(whole, i64(LANES))
        left = b.sub(padded, done)

        def rest(index, _):
            c = b.add(done, b.mul(index, i64(LANES)))
            move(c, first_lanes(b, b.sub(count, c)), first_lanes(b, b.sub(padded, c)))
            return []

        counted_loop(b, "rest", b.sdiv(b.add(left, i64(LANES - 1)), i64(LANES)), [], rest)
        return context.get_dummy_value()
    return types.void(target, source, types.intp, types.intp, types.float32, types.intp), codegen


@intrinsic
def scaled(typingctx, target, source, count, padded, factor):
    """target[i] = source[i] * factor for i < count, 0 for count <= i < padded: of float32 or
    bfloat16 bfloat16."""
    def codegen(context, b, sig, args):
        target, source, count, padded, factor = args
        factors = broadcast(b, factor)

        def vector(c, within):
            value = load_wide(b, b.gep(source, [c]), first_lanes(b, b.sub(count, c)))
            store_bits(b, rounded(b, b.fmul(value, factors)), b.gep(target, [c]), within)
        each_vector(b, padded, vector)
        return context.get_dummy_value()
    return types.void(target, source, types.intp, types.intp, types.float32), codegen


@intrinsic
def pair_rows(typingctx, target, first, second, of_first, of_second, width):
    """target[2 * i] = first[i] for i < of_first, target[2 * i + 1] = second[i] for i < of_second,
    and 0 else, for i < width, a multiple of COLUMNS: of float32 or bfloat16 bfloat16."""
    def codegen(context, b, sig, args):
        target, first, second, of_first, of_second, width = args
        words = b.bitcast(target, I32.as_pointer())

        def halves(source, count, c):
            return b.zext(narrow_bits(b, b.gep(source, [c]), first_lanes(b, b.sub(count, c))),
                          INT_VECTOR)

        def vector(index, _):
            c = b.mul(index, i64(LANES))
            upper = b.shl(halves(second, of_second, c), ir.Constant(INT_VECTOR, [16] * LANES))
            pointer = b.bitcast(b.gep(words, [c]), INT_VECTOR.as_pointer())
            b.store(b.or_(upper, halves(first, of_first, c)), pointer).align = 4
            return []

        counted_loop(b, "vector", b.sdiv(width, i64(LANES)), [], vector)
        return context.get_dummy_value()
    return types.void(target, first, second, *[types.intp] * 3), codegen


def narrow_bits(b: Builder, pointer: Value, mask: Value) -> Value:
    """LANES numbers as the bits of bfloat16."""
    if pointer.type.pointee == F32:
        return rounded(b, load(b, pointer, mask))
    return load_bits(b, pointer, mask)
