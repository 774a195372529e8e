"""bfloat16 micro-kernels as LLVM IR, over the instructions of bf16_instructions.py.

    multiply    the products behind a block of outputs of a convolution or Linear layer
    narrow      copies float32, or bfloat16, as bfloat16

bfloat16 lies in memory as uint16, the upper halves of float32. Weights are panels
[inputs / 2, vectors * COLUMNS, 2]: the two inputs of a pair are neighbours, as the instructions
want them.
"""
from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bf16_instructions import (
    BYTES,
    I8,
    SUMS,
    EmulatedTiles,
    Tiles,
    broadcast_pair,
    dot,
    emulated_dot,
    load_pairs,
)
from .bf16_memory import load_bits, rounded, store_bits
from .bf16_units import (
    AMX,
    AMX_EMULATED,
    AVX512,
    AVX512_EMULATED,
    BLOCK,
    COLUMNS,
    GROUP,
    TILE_ROWS,
    Amx,
    AmxEmulated,
    Avx512,
    Avx512Emulated,
)
from .bf16_write import Writer
from .simd import (
    F32,
    I32,
    Value,
    advance,
    choose,
    counted_loop,
    first_lanes,
    i64,
    least,
    load,
    prefetch,
)
from .sizes import LANES

# Where LONG steps or more follow, a tile of pixels is stored every BREATH steps, to where sums will
# be: without that AMX was seen to take 128 cycles for a step instead of 99 in products of 36 steps,
# and 114 in those of 72.
LONG, BREATH = 24, 4
# A single pixel reads each weight once: they are fetched so many numbers before. 38 GB/s instead of
# 24 were seen where they come from main memory.
AHEAD = 4096

BITS = types.CPointer(types.uint16)


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
def multiply(typingctx, unit, number, arguments):
    """arguments: (x, x_step, taps, count, steps, depth, w, sums) and those of a Writer

    sums[r, c] = sum over t, k of x[r*x_step + taps[t] + k] * w[t*steps*depth + k, c]

    for t < count, k < steps * depth, r < rows, c < vectors * COLUMNS; with `number` go the unit's
    sizes, each with one vector and with two. x points to bfloat16, and steps count these; sums are
    float32, BLOCK apart. Tiles take one step a tap. Meanwhile what the Writer has is written, which
    must be other sums.
    """
    def codegen(context, b, sig, args):
        known, emit, instructions = MICRO_KERNELS[unit.instance_class]
        sizes = [(rows, vectors) for rows in known.sizes for vectors in (1, 2)]

        def micro_kernel(b, size, *values):
            (rows, vectors), count = size, len(Products._fields)
            emit(b, instructions, rows, vectors, Products._make(values[:count]),
                 Writer(b, list(values[count:])))

        choose(b, args[1], args[2], f"multiply_{known.name}", sizes, micro_kernel)
        return context.get_dummy_value()

    return types.void(unit, types.int64, arguments), codegen


def tile_products(b, instructions, rows, vectors, given, writer):
    """Tiles 0 to 3 hold sums, 4 and 5 pixels, 6 and 7 weights."""
    tiles = instructions(b, b.sdiv(given.depth, i64(2)))
    pixels, columns = range(rows // TILE_ROWS), range(vectors)
    sums = [(i, j) for i in pixels for j in columns]
    x_bytes, panel = b.mul(given.x_step, i64(2)), vectors * COLUMNS * 2
    for i, j in sums:
        tiles.zero(2 * i + j)

    def step(k, meanwhile):
        inputs = b.gep(given.x, [b.load(b.gep(given.taps, [k]))])
        weights = advance(b, given.w, k, given.depth, vectors * COLUMNS)
        for i in pixels:
            tiles.load_pixels(4 + i, advance(b, inputs, given.x_step, i * TILE_ROWS), x_bytes)
        for j in columns:
            tiles.load_weights(6 + j, advance(b, weights, j * COLUMNS * 2), i64(2 * panel))
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

    def all_steps(add_residual):
        both = least(b, given.count, writer.groups)
        counted_loop(b, "step_and_rows", both, [], lambda k, _: step(
            k, lambda *rows: writer.rows(k, *rows, add_residual)))
        with b.if_then(b.icmp_signed("<", both, given.count)):
            remaining_steps(both)
        writer.all_rows(both, add_residual)

    writer.either(all_steps)
    for i, j in sums:
        target = advance(b, given.sums, i * TILE_ROWS * BLOCK + j * COLUMNS)
        tiles.store(2 * i + j, target, i64(4 * BLOCK))


def vector_products(b, instructions, rows, vectors, given, writer):
    """All sums stay in registers through both loops, and there is no room for the Writer's."""
    writer.either(lambda add_residual: writer.all_rows(i64(0), add_residual))
    panel = vectors * COLUMNS * 2

    def tap(t, carried):
        weights, *totals = carried
        first = b.gep(given.x, [b.load(b.gep(given.taps, [t]))])
        pixels = [b.bitcast(advance(b, first, given.x_step, r), I32.as_pointer())
                  for r in range(rows)]

        def pair(k, totals):
            inputs = advance(b, weights, k, panel)
            if rows == 1:
                for j in range(vectors):
                    prefetch(b, b.gep(inputs, [i64(AHEAD + j * COLUMNS * 2)]))
            w_vectors = [load_pairs(b, advance(b, inputs, j * COLUMNS * 2))
                         for j in range(vectors)]
            result = []
            for r in range(rows):
                pixel = b.load(b.gep(pixels[r], [k]))
                pixel.align = 2
                x_pair = broadcast_pair(b, pixel)
                result += [instructions(b, totals[r * vectors + j], x_pair, w_vectors[j])
                           for j in range(vectors)]
            return result

        totals = counted_loop(b, "pair", given.steps, totals, pair)
        return [advance(b, weights, given.steps, panel), *totals]

    start = [ir.Constant(SUMS, None)] * (rows * vectors)
    _, *totals = counted_loop(b, "tap", given.count, [given.w, *start], tap)
    for i, total in enumerate(totals):
        target = advance(b, given.sums, i // vectors * BLOCK + i % vectors * COLUMNS)
        b.store(total, b.bitcast(target, SUMS.as_pointer())).align = 4


MICRO_KERNELS = {Amx: (AMX, tile_products, Tiles),
                 AmxEmulated: (AMX_EMULATED, tile_products, EmulatedTiles),
                 Avx512: (AVX512, vector_products, dot),
                 Avx512Emulated: (AVX512_EMULATED, vector_products, emulated_dot)}


@intrinsic
def configure(typingctx, unit, depth):
    """Before a thread uses the unit: AMX is told that all tiles have 16 rows of 64 bytes, but those
    of pixels and of weights only what holds `depth` inputs, an even number."""
    def codegen(context, b, sig, args):
        if unit.instance_class is Amx:
            palette, columns, rows = 1, [64, 0] * 8, [TILE_ROWS] * 8
            data = bytes([palette, *[0] * 15, *columns, *[0] * 16, *rows, *[0] * 8])
            block = cgutils.alloca_once_value(
                b, cgutils.make_bytearray(data), name="tile_configuration")
            start = b.bitcast(block, BYTES)
            pairs = b.trunc(b.sdiv(args[1], i64(2)), I8)
            for tile in (4, 5):
                b.store(b.mul(pairs, I8(4)), b.gep(start, [i64(16 + 2 * tile)]))
            for tile in (6, 7):
                b.store(pairs, b.gep(start, [i64(48 + tile)]))
            function = ir.FunctionType(ir.VoidType(), [BYTES])
            b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.ldtilecfg"),
                   [start])
        return context.get_dummy_value()
    return types.void(unit, types.int64), codegen


@intrinsic
def release(typingctx, unit):
    """When a thread is done with it: tiles in use would be saved at each switch of threads."""
    def codegen(context, b, sig, args):
        if unit.instance_class is Amx:
            function = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.tilerelease"), [])
        return context.get_dummy_value()
    return types.void(unit), codegen


# ---- moving bfloat16 --------------------------------------------------------------------------

@intrinsic
def narrow(typingctx, target, source, count, padded):
    """target[i] = bfloat16(source[i]) for i < count, 0 for count <= i < padded; source points to
    float32, or to bfloat16, which stays as it is."""
    def codegen(context, b, sig, args):
        target, source, count, padded = args
        wide = source.type.pointee == F32

        def bits(c, mask=None):
            pointer = b.gep(source, [c])
            return rounded(b, load(b, pointer, mask)) if wide else load_bits(b, pointer, mask)

        def vector(index, _):
            c = b.mul(index, i64(LANES))
            store_bits(b, bits(c), b.gep(target, [c]))
            return []

        whole = b.sdiv(count, i64(LANES))
        counted_loop(b, "vector", whole, [], vector)
        done = b.mul(whole, i64(LANES))
        left = b.sub(padded, done)

        def rest(index, _):
            c = b.add(done, b.mul(index, i64(LANES)))
            value = bits(c, first_lanes(b, b.sub(count, c)))
            store_bits(b, value, b.gep(target, [c]), first_lanes(b, b.sub(padded, c)))
            return []

        counted_loop(b, "rest", b.sdiv(b.add(left, i64(LANES - 1)), i64(LANES)), [], rest)
        return context.get_dummy_value()
    return types.void(BITS, source, types.intp, types.intp), codegen
