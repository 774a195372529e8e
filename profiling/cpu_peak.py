"""What this CPU can do at best: products and sums from registers, and copying through memory."""
from __future__ import annotations

import time
from functools import partial

import numpy as np
from llvmlite import ir
from numba import float32, int64, njit
from numba.extending import intrinsic

from kernels.cpu import dot_simd, simd
from kernels.cpu.dot_instructions import SUMS, WORDS
from kernels.cpu.dot_units import COLUMNS, TILE_ROWS, TILE_WORDS
from kernels.cpu.host import unit_choice
from kernels.cpu.parallel import parallel_for
from kernels.cpu.sizes import LANES
from kernels.cpu.threads import team

CHAINS = 12             # independent sums: two units times a latency of 4 to 6 cycles
FMA_ROUNDS = 1 << 20
COPY_BYTES = 256 << 20  # far beyond any cache
REPEATS = 10
TILES = 4               # of sums, beside two of pixels and two of weights


@intrinsic
def fma_chains(typingctx, rounds):
    """(int64) -> float32: `rounds` times CHAINS vector multiply-adds that only use registers."""
    def codegen(context, builder, sig, args):
        factor, start = simd.splat(0.5), [simd.splat(i) for i in range(CHAINS)]

        def body(index, sums):
            return [simd.fma(builder, value, factor, factor) for value in sums]
        first, *rest = simd.counted_loop(builder, "chains", args[0], start, body)
        for value in rest:
            first = builder.fadd(first, value)
        return builder.extract_element(first, ir.Constant(ir.IntType(32), 0))
    return float32(int64), codegen


@intrinsic
def bf16_chains(typingctx, unit, rounds):
    """(Unit, int64) -> float32: `rounds` times TILES products of tiles, or CHAINS of vectors."""
    def codegen(context, builder, sig, args):
        known, _, instructions = dot_simd.MICRO_KERNELS[unit.instance_class]
        if known.has_tiles:
            tiles = instructions(builder, simd.i64(TILE_WORDS))
            for i in range(8):
                tiles.zero(i)

            def multiply(index, _):
                for i in range(TILES):
                    tiles.multiply(i, 4 + i // 2, 6 + i % 2)
                return []
            simd.counted_loop(builder, "chains", args[1], [], multiply)
            return ir.Constant(ir.FloatType(), 0)
        # Words and sums that are the same would be one chain to the compiler.
        words = [ir.Constant(WORDS, [i] * COLUMNS) for i in range(CHAINS)]

        def body(index, sums):
            return [instructions(builder, total, x, x)
                    for total, x in zip(sums, words, strict=True)]
        first, *rest = simd.counted_loop(builder, "chains", args[1],
                                         [ir.Constant(SUMS, None)] * CHAINS, body)
        for value in rest:
            first = builder.fadd(first, value)
        return builder.extract_element(first, ir.Constant(ir.IntType(32), 0))
    return float32(unit, int64), codegen


@njit()
def _multiply(results, rounds, threads):
    parallel_for(_multiply_units, len(results), threads, (results, rounds))


@njit()
def _multiply_units(thread, first, end, results, rounds):
    for i in range(first, end):
        results[i] = fma_chains(rounds)


@njit()
def _multiply_bf16(unit, results, rounds, threads):
    parallel_for(_multiply_bf16_units, len(results), threads, (unit, results, rounds))


@njit()
def _multiply_bf16_units(thread, first, end, unit, results, rounds):
    dot_simd.configure(unit, unit.depth)
    for i in range(first, end):
        results[i] = bf16_chains(unit, rounds)
    dot_simd.release(unit)


@njit()
def _copy(target, source, threads):
    parallel_for(_copy_units, len(target), threads, (target, source))


@njit()
def _copy_units(thread, first, end, target, source):
    for i in range(first, end):
        target[i] = source[i]


def _least(call) -> float:
    """Seconds of the fastest of REPEATS calls, after one that compiles."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(threads: int, dtype: str = "float32") -> tuple[float, float]:
    """(FLOP/s, bytes/s read plus written) on this many threads; dtype: what is multiplied, float32
    or bfloat16, summed in float32."""
    results = np.empty(threads, np.float32)
    source = np.ones((threads, COPY_BYTES // 8 // threads), np.float32)
    target = np.empty_like(source)
    macs, multiply = FMA_ROUNDS * CHAINS * LANES, partial(_multiply, results)
    if dtype == "bfloat16":
        unit = unit_choice.choose()
        of_tile, of_vector = TILE_ROWS * TILE_WORDS * 2, 2
        macs = FMA_ROUNDS * COLUMNS * (TILES * of_tile if unit.has_tiles else CHAINS * of_vector)
        multiply = partial(_multiply_bf16, unit, results)
    with team(threads):
        flops = threads * macs * 2 / _least(lambda: multiply(FMA_ROUNDS, threads))
        copied = 2 * source.nbytes / _least(lambda: _copy(target, source, threads))
    return flops, copied
