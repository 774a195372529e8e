"""bfloat16 micro-kernels as LLVM IR, over the instructions of bf16_instructions.py.

    multiply      the products behind a block of outputs of a convolution or Linear layer
    write_block   adds bias and residual to them, clips and writes
    narrow        copies float32, or bfloat16, as bfloat16

bfloat16 lies in memory as uint16, the upper halves of float32. Weights are panels
[depth / 2, vectors * COLUMNS, 2]: the two inputs of a pair are neighbours, as the instructions
want them.
"""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bf16_instructions import (
    BYTES,
    PAIRS,
    SUMS,
    EmulatedTiles,
    Tiles,
    broadcast_pair,
    dot,
    emulated_dot,
    load_pairs,
)
from .bf16_memory import load_bits, load_wide, rounded, store_bits, store_narrow
from .bf16_units import (
    AMX,
    AMX_EMULATED,
    AVX512,
    AVX512_EMULATED,
    BLOCK,
    COLUMNS,
    TILE_PAIRS,
    TILE_ROWS,
    Amx,
    AmxEmulated,
    Avx512,
    Avx512Emulated,
)
from .simd import (
    F32,
    I32,
    advance,
    broadcast,
    clip,
    counted_loop,
    each_vector,
    first_lanes,
    i64,
    literal_ints,
    load,
)
from .sizes import LANES

BITS = types.CPointer(types.uint16)


# ---- micro-kernels ----------------------------------------------------------------------------

@intrinsic(prefer_literal=True)
def multiply(typingctx, unit, size, vectors, arguments):
    """arguments: (x, x_step, lines, x_line, steps, w, sums)

    sums[r, c] = sum over l, k of x[r*x_step + l*x_line + k] * w[l*steps*depth + k, c]

    for r < rows, c < vectors * COLUMNS, l < lines, k < steps * depth, with the unit's `rows` (size
    2), `half` (1) or `least` (0). x points to bfloat16, and steps count these; sums are float32,
    BLOCK apart.
    """
    sizes = literal_ints(size, vectors)
    if sizes is None:
        return None
    known, emit, instructions = MICRO_KERNELS[unit.instance_class]
    rows = (known.least, known.half, known.rows)[sizes[0]]

    def codegen(context, b, sig, args):
        emit(b, instructions, rows, sizes[1], *cgutils.unpack_tuple(b, args[3]))
        return context.get_dummy_value()

    return types.void(unit, size, vectors, arguments), codegen


def tile_products(b, instructions, rows, vectors, x, x_step, lines, x_line, steps, w, sums):
    """Tiles 0 to 3 hold sums, 4 and 5 pixels, 6 and 7 weights."""
    tiles = instructions(b)
    pixels, columns = range(rows // TILE_ROWS), range(vectors)
    x_bytes, panel = b.mul(x_step, i64(2)), vectors * COLUMNS * 2
    for i in pixels:
        for j in columns:
            tiles.zero(2 * i + j)

    def kernel_line(line, carried):
        first = advance(b, x, line, x_line)

        def step(k, _):
            inputs = advance(b, first, k, 2 * TILE_PAIRS)
            weights = advance(b, carried[0], k, TILE_PAIRS * panel)
            for i in pixels:
                tiles.load(4 + i, advance(b, inputs, x_step, i * TILE_ROWS), x_bytes)
            for j in columns:
                tiles.load(6 + j, advance(b, weights, j * COLUMNS * 2), i64(2 * panel))
            for i in pixels:
                for j in columns:
                    tiles.multiply(2 * i + j, 4 + i, 6 + j)
            return []

        counted_loop(b, "step", steps, [], step)
        return [advance(b, carried[0], steps, TILE_PAIRS * panel)]

    counted_loop(b, "kernel_line", lines, [w], kernel_line)
    for i in pixels:
        for j in columns:
            target = advance(b, sums, i * TILE_ROWS * BLOCK + j * COLUMNS)
            tiles.store(2 * i + j, target, i64(4 * BLOCK))


def vector_products(b, instructions, rows, vectors, x, x_step, lines, x_line, steps, w, sums):
    """All sums stay in registers through both loops."""
    panel = vectors * COLUMNS * 2

    def kernel_line(line, carried):
        weights, *totals = carried
        first = advance(b, x, line, x_line)
        pixels = [b.bitcast(advance(b, first, x_step, r), I32.as_pointer()) for r in range(rows)]

        def pair(k, totals):
            inputs = advance(b, weights, k, panel)
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

        totals = counted_loop(b, "pair", steps, totals, pair)
        return [advance(b, weights, steps, panel), *totals]

    start = [ir.Constant(SUMS, None)] * (rows * vectors)
    _, *totals = counted_loop(b, "kernel_line", lines, [w, *start], kernel_line)
    for i, total in enumerate(totals):
        target = advance(b, sums, i // vectors * BLOCK + i % vectors * COLUMNS)
        b.store(total, b.bitcast(target, SUMS.as_pointer())).align = 4


MICRO_KERNELS = {Amx: (AMX, tile_products, Tiles),
                 AmxEmulated: (AMX_EMULATED, tile_products, EmulatedTiles),
                 Avx512: (AVX512, vector_products, dot),
                 Avx512Emulated: (AVX512_EMULATED, vector_products, emulated_dot)}


@intrinsic
def configure(typingctx, unit):
    """Before a thread uses the unit: AMX is told that all tiles have 16 rows of 64 bytes."""
    def codegen(context, b, sig, args):
        if unit.instance_class is Amx:
            palette, columns, rows = 1, [64, 0] * 8, [TILE_ROWS] * 8
            data = bytes([palette, *[0] * 15, *columns, *[0] * 16, *rows, *[0] * 8])
            block = cgutils.global_constant(b, "tile_configuration", cgutils.make_bytearray(data))
            function = ir.FunctionType(ir.VoidType(), [BYTES])
            b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.ldtilecfg"),
                   [b.bitcast(block, BYTES)])
        return context.get_dummy_value()
    return types.void(unit), codegen


@intrinsic
def release(typingctx, unit):
    """When a thread is done with it: tiles in use would be saved at each switch of threads."""
    def codegen(context, b, sig, args):
        if unit.instance_class is Amx:
            function = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.tilerelease"), [])
        return context.get_dummy_value()
    return types.void(unit), codegen


@intrinsic
def write_block(typingctx, arguments):
    """arguments: (sums, bias, residual, has_residual, y, y_step, rows, channels, low, high)

    y[r*y_step + c] = clip(sums[r, c] + bias[c] + residual[r*y_step + c], low, high)

    for r < rows, c < channels <= BLOCK, in float32. residual and y may each point to bfloat16: y is
    then rounded. sums and bias are BLOCK wide; of residual and y nothing beyond `channels` is
    touched.
    """
    def codegen(context, b, sig, args):
        (sums, bias, residual, has_residual, y, y_step, rows, channels, low,
         high) = cgutils.unpack_tuple(b, args[0])
        low, high = broadcast(b, low), broadcast(b, high)

        def columns(vectors, add_residual):
            """Of each row the vectors (first column, mask), one after the other."""
            starts = [load(b, b.gep(bias, [c])) for c, _ in vectors]

            def row(r, _):
                for start, (c, mask) in zip(starts, vectors, strict=True):
                    value = b.fadd(load(b, b.gep(advance(b, sums, r, BLOCK), [c])), start)
                    offset = b.add(b.mul(r, y_step), c)
                    if add_residual:
                        value = b.fadd(value, load_wide(b, b.gep(residual, [offset]), mask))
                    store_narrow(b, clip(b, value, low, high), b.gep(y, [offset]), mask)
                return []

            counted_loop(b, "row", rows, [], row)

        def block(add_residual):
            with b.if_else(b.icmp_signed("==", channels, i64(BLOCK))) as (whole, part):
                with whole:
                    columns([(i64(c), None) for c in range(0, BLOCK, LANES)], add_residual)
                with part:
                    each_vector(b, channels, lambda c, mask: columns([(c, mask)], add_residual))

        with b.if_else(b.icmp_signed("!=", has_residual, i64(0))) as (then, otherwise):
            with then:
                block(True)
            with otherwise:
                block(False)
        return context.get_dummy_value()

    return types.void(arguments), codegen


# ---- moving bfloat16 --------------------------------------------------------------------------

@intrinsic
def copy_bits(typingctx, target, source, count, beyond):
    """Copy `count` numbers, and where `beyond` allows it up to 31 more that happen to lie behind
    them: whole vectors are faster than a call of memcpy for the few bytes under a kernel line."""
    def codegen(context, b, sig, args):
        target, source, count, beyond = args

        def vector(index, _):
            value = load_pairs(b, advance(b, source, index, BLOCK))
            into = b.bitcast(advance(b, target, index, BLOCK), PAIRS.as_pointer())
            b.store(value, into).align = 2
            return []

        with b.if_else(beyond) as (then, otherwise):
            with then:
                vectors = b.sdiv(b.add(count, i64(BLOCK - 1)), i64(BLOCK))
                counted_loop(b, "vector", vectors, [], vector)
            with otherwise:
                cgutils.raw_memcpy(b, target, source, count, itemsize=2)
        return context.get_dummy_value()
    return types.void(BITS, BITS, types.intp, types.boolean), codegen


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
