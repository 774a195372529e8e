"""The micro-kernels: the few innermost loops that decide the speed.

Numba's own loops do not keep a block of accumulators in registers, so these are written as LLVM IR,
as intrinsics on raw pointers; those of depthwise convolutions are in depthwise_simd.py, those of
rows of any length in rows.py. Sizes that must be known when they are compiled are literal
ints, or chosen by number among a few (CONV_TILES, WINDOWS). The other arguments come as one tuple.
Intrinsics are module-level globals, which numba's disk cache needs.

    conv_tile       some pixels x some vectors of channels of a convolution or GEMM
    pool_window     mean, greatest or L2 norm of a window, any channels
    winograd_*      the transforms of Winograd convolution along one axis
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import winograd_matrices
from .convert import load_wide, store_narrow
from .jit import njit
from .simd import (
    Builder,
    Value,
    advance,
    broadcast,
    choose,
    clip,
    counted_loop,
    first_lanes,
    fma,
    i64,
    literal_ints,
    load,
    opaque,
    prefetch,
    splat,
    store,
    vector_call,
)
from .sizes import (
    BLOCK_VECTORS,
    GREATEST,
    GRID_ROWS,
    HALF_ROWS,
    L2_NORM,
    LANES,
    MEAN,
    NARROW_HALF_ROWS,
    NARROW_ROWS,
    TILE_ROWS,
)
from .traced import activate, function_of
from .winograd_matrices import Matrix

# Pixels that are reached from one pointer, at up to 4 steps from it: an instruction adds these by
# itself, where an addition would take a port of the products.
NEAR = 5
POOL_VECTORS = 4        # sums at work at once: what an addition takes, in additions


# ---- convolution and matrix product -----------------------------------------------------------

CONV_TILES = (*((rows, vectors) for vectors in (BLOCK_VECTORS, 1)
                for rows in (TILE_ROWS, HALF_ROWS, GRID_ROWS, 1)),
              (NARROW_ROWS, 1), (NARROW_HALF_ROWS, 1))


@intrinsic
def conv_tile(typingctx, number, arguments):
    """arguments: (x, x_step, lines, x_line, runs, x_run, length, blocks, w, ahead, ahead_step,
    bias, residual, has_residual, y, y_step, valid, low, high)

    y[r, c] = clip(sum over l, s, k of x[r*x_step + l*x_line + s*x_run + k] * w[i, c]
                      + bias[c] + residual[r*y_step + c], low, high),  i = (l*runs + s)*length + k

    for r < rows, c < vectors * LANES of CONV_TILES[number], l < lines, s < runs, k < length, and so
    on for `blocks` blocks of channels that lie one after the other in w, bias, residual and y. All
    accumulators stay in registers through all loops. Of the last vector of a block only the first
    `valid` channels are read from `residual` and written. Pointers are to float32; steps count
    floats. Each product also asks for ahead[i*ahead_step] to be fetched into the L2 cache, where
    `ahead` goes on with w: weights that come later.
    """
    def codegen(context, b, sig, args):
        choose(b, args[0], cgutils.unpack_tuple(b, args[1]), "conv_tile", CONV_TILES, _conv_tile)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@njit(inline="always")
def some_blocks(rows, vectors, arguments):
    """conv_tile of rows x vectors, one of CONV_TILES."""
    number = 0 if rows == TILE_ROWS else 1 if rows == HALF_ROWS else 2 if rows == GRID_ROWS else 3
    if vectors < BLOCK_VECTORS:
        number = 8 if rows == NARROW_ROWS else 9 if rows == NARROW_HALF_ROWS else number + 4
    conv_tile(number, arguments)


def _conv_tile(b: Builder, size: tuple[int, int], x: Value, x_step: Value, lines: Value,
               x_line: Value, runs: Value, x_run: Value, length: Value, blocks: Value, w: Value,
               ahead: Value, ahead_step: Value, bias: Value, residual: Value, has_residual: Value,
               y: Value, y_step: Value, valid: Value, low: Value, high: Value) -> None:
    rows, vectors = size
    width = vectors * LANES
    low, high = broadcast(b, low), broadcast(b, high)
    apart = [b.mul(x_step, i64(r)) for r in range(NEAR)]

    def products(w, ahead, acc):
        def kernel_line(line, carried):
            first = advance(b, x, line, x_line)

            def run(number, carried):
                start = advance(b, first, number, x_run)
                return _products(b, size, start, x_step, apart, length, ahead_step, carried)
            return counted_loop(b, "run", runs, carried, run)

        after, _, *acc = counted_loop(b, "kernel_line", lines, [w, ahead, *acc], kernel_line)
        return after, acc

    def write(acc, residual, y, mask, add_residual):
        for r in range(rows):
            for j in range(vectors):
                last = mask if j == vectors - 1 else None
                value = acc[r * vectors + j]
                if add_residual:
                    other = advance(b, advance(b, residual, y_step, r), j * LANES)
                    value = b.fadd(value, load(b, other, last))
                target = advance(b, advance(b, y, y_step, r), j * LANES)
                store(b, clip(b, value, low, high), target, last)

    def block(index, carried):
        w, ahead, bias, residual, y = carried
        start = [load(b, advance(b, bias, j * LANES)) for j in range(vectors)] * rows
        after, acc = products(w, ahead, start)
        with b.if_else(b.icmp_signed("!=", has_residual, i64(0))) as (then, otherwise):
            with then:
                _full_or_masked(b, valid, lambda mask: write(acc, residual, y, mask, True))
            with otherwise:
                _full_or_masked(b, valid, lambda mask: write(acc, residual, y, mask, False))
        return [after, advance(b, ahead, b.mul(b.mul(lines, runs), length), width),
                advance(b, bias, width), advance(b, residual, width), advance(b, y, width)]

    counted_loop(b, "block", blocks, [w, ahead, bias, residual, y], block)


def _products(b: Builder, size: tuple[int, int], start: Value, x_step: Value, apart: list[Value],
              length: Value, ahead_step: Value, carried: list[Value]) -> list[Value]:
    """The innermost loop, over `length` inputs of a run that begins at `start`. carried, and what
    is returned: the weights, what is to be fetched, the sums."""
    rows, vectors = size
    pixels = [advance(b, start, x_step, r) for r in range(0, rows, NEAR)]
    few = len(pixels)

    def product(_, values):
        pixels, (weights, wanted, *acc) = values[:few], values[few:]
        if vectors == BLOCK_VECTORS:
            prefetch(b, wanted)
        w_vectors = [load(b, advance(b, weights, j * LANES)) for j in range(vectors)]
        total = []
        for r in range(rows):
            pixel = broadcast(b, b.load(b.gep(pixels[r // NEAR], [apart[r % NEAR]])))
            total += [fma(b, pixel, w_vectors[j], acc[r * vectors + j]) for j in range(vectors)]
        following = [advance(b, pixel, 1) for pixel in pixels]
        if few > 1:
            following = [opaque(b, pixel) for pixel in following]
        return [*following, advance(b, weights, vectors * LANES), advance(b, wanted, ahead_step),
                *total]

    return counted_loop(b, "product", length, [*pixels, *carried], product)[few:]


def _full_or_masked(b: Builder, valid: Value, emit: Callable[[Value | None], None]) -> None:
    """emit(None) where all lanes are valid: plain stores are faster than masked ones."""
    with b.if_else(b.icmp_signed("==", valid, i64(LANES))) as (full, partial):
        with full:
            emit(None)
        with partial:
            emit(first_lanes(b, valid))


# ---- pooling ----------------------------------------------------------------------------------

@intrinsic(prefer_literal=True)
def pool_window(typingctx, kind, window, size):
    """window: (x, lines, x_line, taps, x_tap, y, channels)

    y[c] = sum / size, greatest, or root of the sum of squares, as kind is MEAN, GREATEST or
    L2_NORM, over l < lines, t < taps of x[l*x_line + t*x_tap + c]

    for c < channels; nothing beyond these is touched. NaN counts as greatest. Each line is summed
    up for itself, which keeps rounding small over large images. x and y each point to float32 or
    bfloat16.
    """
    literal = literal_ints(kind)
    if literal is None:
        return None
    (what,) = literal

    def codegen(context, b, sig, args):
        x, lines, x_line, taps, x_tap, y, channels = cgutils.unpack_tuple(b, args[1])
        divisor = broadcast(b, args[2])

        def merge(total, value):
            if what == MEAN:
                return b.fadd(total, value)
            if what == L2_NORM:
                return fma(b, value, value, total)
            wins = b.or_(b.fcmp_ordered(">", value, total), b.fcmp_unordered("uno", value, value))
            return b.select(wins, value, total)

        def finish(total):
            if what == MEAN:
                return b.fdiv(total, divisor)
            return vector_call(b, "sqrt", total) if what == L2_NORM else total

        def reduce(c, vectors, mask=None):
            def kernel_line(line, totals):
                first = b.gep(advance(b, x, line, x_line), [c])

                def tap(t, totals):
                    pixel = advance(b, first, t, x_tap)
                    return [merge(total, load_wide(b, advance(b, pixel, j * LANES), mask))
                            for j, total in enumerate(totals)]
                if what == GREATEST:
                    return counted_loop(b, "tap", taps, totals, tap)
                sums = counted_loop(b, "tap", taps, [splat(0.0)] * vectors, tap)
                return [b.fadd(*pair) for pair in zip(totals, sums, strict=True)]

            start = splat(float("-inf") if what == GREATEST else 0)
            totals = counted_loop(b, "kernel_line", lines, [start] * vectors, kernel_line)
            for j, total in enumerate(totals):
                store_narrow(b, finish(total), advance(b, b.gep(y, [c]), j * LANES), mask)

        def whole(first, end, vectors):
            """Vectors first .. end of the channels, `vectors` at a time; how many are done then."""
            trips = b.sdiv(b.sub(end, first), i64(vectors))

            def body(index, _):
                reduce(b.mul(b.add(first, b.mul(index, i64(vectors))), i64(LANES)), vectors)
                return []
            counted_loop(b, "vectors", trips, [], body)
            return b.add(first, b.mul(trips, i64(vectors)))

        end = b.sdiv(channels, i64(LANES))
        done = b.mul(whole(whole(i64(0), end, POOL_VECTORS), end, 1), i64(LANES))
        with b.if_then(b.icmp_signed("<", done, channels)):
            reduce(done, 1, first_lanes(b, b.sub(channels, done)))
        return context.get_dummy_value()

    return types.void(kind, window, size), codegen


# ---- Winograd transforms ----------------------------------------------------------------------

def combine(b: Builder, matrix: Matrix, vectors: list[Value]) -> list[Value]:
    """matrix @ vectors. Each row of these matrices has a 1, at which its sum starts."""
    totals = []
    for row in matrix:
        start = row.index(1)
        total = vectors[start]
        for k, factor in enumerate(row):
            if factor and k != start:
                total = fma(b, splat(factor), vectors[k], total)
        totals.append(total)
    return totals


def _transform(matrices: dict[int, Matrix], tile: Any, arguments: Any):
    """The intrinsic's body for both directions; see winograd_input."""
    sizes = literal_ints(tile)
    if sizes is None:
        return None
    matrix = matrices[sizes[0]]

    def codegen(context, b, sig, args):
        x, x_step, y, y_step, length = cgutils.unpack_tuple(b, args[1])

        def vector(index, _):
            first, target = advance(b, x, index, LANES), advance(b, y, index, LANES)
            vectors = [load_wide(b, advance(b, first, x_step, k)) for k in range(len(matrix[0]))]
            for i, total in enumerate(combine(b, matrix, vectors)):
                store(b, total, advance(b, target, y_step, i))
            return []

        counted_loop(b, "vector", b.sdiv(length, i64(LANES)), [], vector)
        return context.get_dummy_value()

    return types.void(tile, arguments), codegen


@intrinsic(prefer_literal=True)
def winograd_input(typingctx, tile, arguments):
    """arguments: (x, x_step, y, y_step, length)

    y[i*y_step + c] = sum over k of B^T[i, k] * x[k*x_step + c]

    for c < length, a multiple of LANES; B^T is that of F(tile, 3). x may point to bfloat16 or
    codes.
    """
    return _transform(winograd_matrices.INPUT, tile, arguments)


@intrinsic(prefer_literal=True)
def winograd_output(typingctx, tile, arguments):
    """As winograd_input, with A^T in place of B^T."""
    return _transform(winograd_matrices.OUTPUT, tile, arguments)


@intrinsic(prefer_literal=True)
def winograd_pixels(typingctx, tile, activation, arguments):
    """arguments: (x, x_step, bias, residual, residual_step, y, y_step, pixels, channels, low, high,
    factor, of, by)

    y[j*y_step + c] = clip(f(sum over k of A^T[j, k] * x[k*x_step + c] + bias[c]
                                 + residual[j*residual_step + c] * factor, of, by), low, high)

    for j < pixels <= tile, c < channels; f is the activation, a function of scalar.py, or there is
    none. x and bias are padded to whole vectors; of residual and y nothing beyond `channels` is
    touched, and each may point to bfloat16 or codes.
    """
    sizes = literal_ints(tile)
    if sizes is None:
        return None
    matrix = winograd_matrices.OUTPUT[sizes[0]]

    def codegen(context, b, sig, args):
        (x, x_step, bias, residual, residual_step, y, y_step, pixels, channels,
         *numbers) = cgutils.unpack_tuple(b, args[2])
        low, high, factor, *numbers = (broadcast(b, number) for number in numbers)

        def vector(index, _):
            c = b.mul(index, i64(LANES))
            first = b.gep(x, [c])
            totals = combine(b, matrix, [load(b, advance(b, first, x_step, k))
                                         for k in range(len(matrix[0]))])
            start, left = load(b, b.gep(bias, [c])), b.sub(channels, c)

            def write(mask):
                for j, total in enumerate(totals):
                    with b.if_then(b.icmp_signed("<", i64(j), pixels)):
                        other = b.gep(advance(b, residual, residual_step, j), [c])
                        value = fma(b, load_wide(b, other, mask), factor, b.fadd(total, start))
                        value = activate(b, function_of(activation), value, *numbers)
                        store_narrow(b, clip(b, value, low, high),
                                     b.gep(advance(b, y, y_step, j), [c]), mask)

            full = b.icmp_signed(">", left, i64(LANES))
            _full_or_masked(b, b.select(full, i64(LANES), left), write)
            return []

        vectors = b.sdiv(b.add(channels, i64(LANES - 1)), i64(LANES))
        counted_loop(b, "vector", vectors, [], vector)
        return context.get_dummy_value()

    return types.void(tile, activation, arguments), codegen
