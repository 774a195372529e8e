"""What a convolution's sums begin with, and how they end: y = activation(sums + residual).

They begin as the bias, which comes while the first slices do. In the end a lane has runs of
neighbouring channels in its registers (conv_sums.py), and moves 16 bytes of residual and y for
each. Nothing passes through shared memory, and no warp waits for another one.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .conv_cluster import cluster_epilogue
from .conv_gemm import CLUSTER, PLANE, WHOLE, Tile
from .conv_sums import Sums
from .ptx import asm_op, cuda, float32, uint32, uint64

prefetch_l2 = asm_op("prefetch_l2", "prefetch.global.L2 [$0];", None, [uint64], memory=True)
LINE = 128          # bytes of a line of L2


def residual_request(stored_as: str, tile: Tile) -> Callable:
    """Device function: has the block's part of the residual brought into L2, so that it comes while
    the block multiplies."""
    size = vector.STORAGE[stored_as].bytes
    lines = max(1, tile.block_n * size // LINE)     # of a row
    rows = tile.threads // lines                    # at a time
    rounds = -(-tile.block_m // rows)
    last = min(tile.block_m, rows)

    @cuda.jit(device=True, inline="always")
    def request(tid, first_m, first_n, group, residual, pixels, y_step, group_out):
        row = uint32(tid // uint32(lines))
        column = uint32(first_n + uint32(tid % uint32(lines)) * uint32(LINE // size))
        if row < uint32(last) and column < group_out:
            for i in range(rounds):
                m = uint32(first_m + row + uint32(i * rows))
                if m < pixels:
                    at = uint64(m) * uint64(y_step) + uint64(uint32(group * group_out))
                    prefetch_l2(residual + uint64(at + uint64(column)) * uint64(size))

    return request


def first_sums(how: str, tile: Tile, sums: Sums) -> Callable:
    """Device function: acc = the bias, or zeros where only the end adds it; how: one of
    conv_gemm.ENDINGS."""
    warps_n, warp_n, runs = tile.block_n // tile.warp_n, tile.warp_n, tile.warp_n // sums.columns
    run, rows, columns, column_of, put = sums.run, sums.rows, sums.columns, sums.column, sums.put
    whole, load = how == WHOLE, vector.load("float32", run)

    @cuda.jit(device=True, inline="always")
    def begin_sums(acc, tid, first_n, bias):
        column = uint32(first_n + column_of(uint32(tid & uint32(31)))
                        + uint32((tid >> uint32(5)) % uint32(warps_n)) * uint32(warp_n))
        value = cuda.local.array(run, float32)
        for k in range(run):
            value[k] = float32(0)
        for g in range(runs):
            if whole:
                load(value, 0, bias + uint64(uint32(column + uint32(g * columns))) * uint64(4))
            for i in range(rows):
                put(acc, i, g, value)

    return begin_sums


def ending(how: str, stored_as: str, tile: Tile, sums: Sums, activation_name: str) -> Callable:
    """Device function: what `frame` finishes with; how: one of conv_gemm.ENDINGS."""
    if how == CLUSTER:
        return cluster_epilogue(stored_as, tile, sums, activation_name)
    return epilogue("float32" if how == PLANE else stored_as, tile, sums, activation_name,
                    how == PLANE)


def epilogue(stored_as: str, tile: Tile, sums: Sums, activation_name: str, partial: bool
             ) -> Callable:
    """Device function: a warp's part of y.

    partial   y is one plane of split sums: no residual, no activation
    """
    size, warps_n = vector.STORAGE[stored_as].bytes, tile.block_n // tile.warp_n
    warp_m, warp_n, column_of = tile.warp_m, tile.warp_n, sums.column
    place = run_places(size, sums)
    shape = stored_as, warp_n // sums.columns * sums.rows, sums, place, activation_name, partial
    # Fewer where sums leave few registers free.
    at_once = 2 if warp_n > 128 or tile.threads * tile.blocks > 512 else 4
    store_runs, store_elements = whole_runs(*shape, at_once), single_elements(*shape)

    @cuda.jit(device=True, inline="always")
    def finish(acc, smem, tid, first_m, first_n, group, bias, residual, has_residual, y, low, high,
               pixels, y_step, group_out, padded_out, whole):
        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        first_m = uint32(first_m + uint32(warp // uint32(warps_n)) * uint32(warp_m))
        first_n = uint32(first_n + uint32(warp % uint32(warps_n)) * uint32(warp_n)
                         + column_of(lane))
        # Elements of y before this group's columns; a split has a plane of its own.
        plane = uint64(group) * uint64(group_out)
        if partial:
            plane += uint64(cuda.blockIdx.y) * uint64(pixels) * uint64(y_step)
        where = lane, first_m, first_n, plane, pixels, y_step, group_out
        if whole:
            store_runs(acc, where, residual, has_residual, y, low, high)
        else:
            store_elements(acc, where, residual, has_residual, y, low, high)

    return finish


def run_places(size: int, sums: Sums) -> Callable:
    """Device function (n, where): of a lane's n-th run the bytes from the beginning of y, its first
    channel, and whether it is there. Runs of the same columns follow one another."""
    rows, columns, row_of = sums.rows, sums.columns, sums.row

    @cuda.jit(device=True, inline="always")
    def place(n, where):
        lane, first_m, first_n, plane, pixels, y_step, group_out = where
        column = uint32(first_n + uint32(n // rows * columns))
        pixel = uint32(first_m + row_of(lane, n % rows))
        at = uint64(plane + uint64(pixel) * uint64(y_step) + uint64(column))
        return at * uint64(size), column, pixel < pixels and column < group_out

    return place


def whole_runs(stored_as: str, runs: int, sums: Sums, place: Callable, activation_name: str,
               partial: bool, at_once: int) -> Callable:
    """Device function: all runs of a lane, each by one access.

    at_once  runs whose residual is loaded together, so that its latency passes once for them
    """
    run, rows, take = sums.run, sums.rows, sums.take
    at_once = min(runs, at_once)
    added_count = at_once * run
    load, store = vector.load(stored_as, run, fill=0.0), vector.store(stored_as, run)
    activate = activation(activation_name, vector.arch(stored_as))

    @cuda.jit(device=True, inline="always")
    def store_runs(acc, where, residual, has_residual, y, low, high):
        value = cuda.local.array(run, float32)
        added = cuda.local.array(added_count, float32)
        for first in range(0, runs, at_once):
            if not partial and has_residual:
                for p in range(at_once):
                    at, _, inside = place(first + p, where)
                    load(added, p * run, residual + at, inside)
            for p in range(at_once):
                at, _, inside = place(first + p, where)
                take(value, acc, (first + p) % rows, (first + p) // rows)
                if not partial:
                    if has_residual:
                        for k in range(run):
                            value[k] += added[p * run + k]
                    for k in range(run):
                        value[k] = activate(value[k], low, high)
                if inside:
                    store(y + at, value, 0)

    return store_runs


def single_elements(stored_as: str, runs: int, sums: Sums, place: Callable, activation_name: str,
                    partial: bool) -> Callable:
    """Device function: the same where rows of y are not aligned to 16 bytes, one element at a
    time."""
    size, run, rows, take = vector.STORAGE[stored_as].bytes, sums.run, sums.rows, sums.take
    load, store = vector.load(stored_as, 1), vector.store(stored_as, 1)
    activate = activation(activation_name, vector.arch(stored_as))

    @cuda.jit(device=True, inline="always")
    def store_elements(acc, where, residual, has_residual, y, low, high):
        group_out = where[-1]
        value = cuda.local.array(run, float32)
        added = cuda.local.array(1, float32)
        for n in range(runs):
            at, column, inside = place(n, where)
            take(value, acc, n % rows, n // rows)
            for k in range(run):
                there, here = at + uint64(k * size), uint32(column + uint32(k))
                if inside and here < group_out:
                    if not partial:
                        if has_residual:
                            load(added, 0, residual + there)
                            value[k] += added[0]
                        value[k] = activate(value[k], low, high)
                    store(y + there, value, k)

    return store_elements
