"""Convolution on Hopper's tensor cores (wgmma, sm_90a alone): how conv_gemm.py's slices multiply.

As in conv_mma.py all threads copy slices into a ring by cp.async; their 128-byte rows lie swizzled
as wgmma wants them. But nothing is read back into registers: each warpgroup multiplies its 64 rows
by all of block_n straight from shared memory, so that a thread holds block_n / 2 sums and little
else, and more warps fit a multiprocessor.

The tensor cores read a slot after the threads have gone on, and so it is free for the next copies
only after a wait and a barrier. A block that shares its multiprocessor waits for each product, and
meanwhile others multiply. One that is alone keeps a product in flight over the barrier, for which
one slot more is not free.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .conv_epilogue import ending, first_sums, residual_request
from .conv_gemm import Tile, frame
from .conv_mma import ring_copies
from .conv_sums import tensor_core_sums
from .ptx import cp_async_wait, cuda, uint32, uint64
from .wgmma import (
    ROW_BYTES,
    descriptor,
    fence_proxy_async,
    products,
    wait,
    wait_for_sums,
    warpgroup,
)

DTYPES = ("float16", "bfloat16")
ARCH = "sm_90a"


def make(dtype: str, tile: Tile, activation_name: str, end: str) -> Callable:
    """end: one of conv_gemm.ENDINGS."""
    if (not tile.wgmma or tile.row_bytes != ROW_BYTES or tile.block_n not in (64, 128, 256)
            or tile.block_m % 64 or tile.block_m % tile.rows or tile.warp_m != 16
            or tile.warp_n != tile.block_n or ahead(tile) < 1):
        raise ValueError(f"{tile} can not be cut evenly: row_bytes must be {ROW_BYTES}, block_n "
                         f"64, 128 or 256, block_m a multiple of 64 and of a round of copies "
                         f"({tile.rows} rows), warps 16 x block_n, and stages 2, or 3 for one "
                         f"block, or more")
    sums = tensor_core_sums(tile.warp_m, tile.warp_n, vector.lanes(dtype))
    return frame(tile, residual_request(dtype, tile), first_sums(end, tile, sums),
                 *multiply_slices(dtype, tile), ending(end, dtype, tile, sums, activation_name))


def in_flight(tile: Tile) -> int:
    """Products that a warpgroup does not wait for before the next barrier."""
    return 1 if tile.blocks == 1 else 0


def ahead(tile: Tile) -> int:
    """Slices that are being copied while one is multiplied."""
    return tile.stages - 1 - in_flight(tile)


def multiply_slices(dtype: str, tile: Tile) -> tuple[Callable, Callable]:
    """Device functions: the beginning and the sum over slices, as `frame` takes them."""
    a_bytes, b_bytes = tile.block_m * ROW_BYTES, tile.block_n * ROW_BYTES
    stage, first = a_bytes + b_bytes, ahead(tile)
    ring = tile.stages * stage
    wait_for_oldest, wait_for_older = cp_async_wait(first - 1), wait(in_flight(tile))
    place, start, next_slice = ring_copies(tile, first)
    multiply, wait_for_all = products(dtype, tile.block_n), wait_for_sums(tile.block_n)

    @cuda.jit(device=True, inline="always")
    def multiply_all(acc, smem, tid, x, base, outside, tap, walk, weight, count, norm):
        copy_to = place(smem, tid)
        a_first = descriptor(uint32(smem + warpgroup(tid) * uint32(64 * ROW_BYTES)))
        b_first = descriptor(uint32(smem + uint32(a_bytes)))
        slot, free = uint32(0), uint32(first * stage)           # byte offsets into the ring
        done = uint32(0)
        while done < count:
            wait_for_oldest()
            fence_proxy_async()
            cuda.syncthreads()                  # this slice is here, and `free` is used up
            further = uint64(slot >> uint32(4))
            multiply(acc, a_first + further, b_first + further)
            tap, weight = next_slice(uint32(copy_to + free), x, base, outside, tap, walk, weight,
                                     uint32(done + uint32(first)) < count)
            wait_for_older()
            slot, free = uint32(slot + uint32(stage)), uint32(free + uint32(stage))
            if slot == uint32(ring):
                slot = uint32(0)
            if free == uint32(ring):
                free = uint32(0)
            done = uint32(done + uint32(1))
        wait_for_all(acc)

    return start, multiply_all
