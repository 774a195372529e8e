"""What this CPU can do at best: multiply-adds from registers, and copying through memory."""
from __future__ import annotations

import time

import numpy as np
from llvmlite import ir
from numba import float32, int64, njit
from numba.extending import intrinsic

from kernels.cpu import simd
from kernels.cpu.parallel import parallel_for
from kernels.cpu.sizes import LANES
from kernels.cpu.threads import team

CHAINS = 12             # independent sums: two units times a latency of 4 to 6 cycles
FMA_ROUNDS = 1 << 20
COPY_BYTES = 256 << 20  # far beyond any cache
REPEATS = 10


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


@njit()
def _multiply(results, rounds, threads):
    parallel_for(_multiply_units, len(results), threads, (results, rounds))


@njit()
def _multiply_units(thread, first, end, results, rounds):
    for i in range(first, end):
        results[i] = fma_chains(rounds)


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


def measure(threads: int) -> tuple[float, float]:
    """(FLOP/s, bytes/s read plus written) on this many threads."""
    results = np.empty(threads, np.float32)
    source = np.ones((threads, COPY_BYTES // 8 // threads), np.float32)
    target = np.empty_like(source)
    with team(threads):
        flops = threads * FMA_ROUNDS * CHAINS * LANES * 2 / _least(
            lambda: _multiply(results, FMA_ROUNDS, threads))
        copied = 2 * source.nbytes / _least(lambda: _copy(target, source, threads))
    return flops, copied
