"""Convolution on tensor cores (mma.sync, sm_80 and later): how conv_gemm.py's slices multiply.

Slices pass through a ring of `stages` buffers in shared memory, filled by cp.async. To ldmatrix a
16-byte chunk is a row of an 8x8 matrix of 16-bit values; where the chunk holds 4 floats (tf32),
each lane gets just the float that m16n8k8.tf32 wants from it. So one text serves all three dtypes.

tf32 weights are rounded to nearest on the host; of activations the tensor core ignores the lowest
13 bits (it truncates).
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .conv_epilogue import ending, first_sums, residual_request
from .conv_gemm import Tile, frame, keep, next_tap
from .conv_norm import normaliser
from .conv_sums import tensor_core_sums
from .ptx import (
    cp_async_16,
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    ldmatrix_x4,
    mma_bf16,
    mma_f16,
    mma_tf32,
    uint32,
    uint64,
    wait_for_inputs,
)

MMA = {"float16": mma_f16, "bfloat16": mma_bf16, "tf32": mma_tf32}
SHORT = {"float16": "f16", "bfloat16": "bf16", "tf32": "tf32"}
STORED_AS = {"float16": "float16", "bfloat16": "bfloat16", "tf32": "float32"}



def make(dtype: str, tile: Tile, activation_name: str, end: str, before: str = "") -> Callable:
    """end: one of conv_gemm.ENDINGS; before: one of conv_norm.BEFORE."""
    if (tile.chunks not in (4, 8) or tile.rows % 8 or tile.block_m % tile.rows
            or tile.block_n % tile.rows or tile.warp_m % 16 or tile.warp_n % 32 or tile.stages < 2):
        raise ValueError(f"{tile} can not be cut evenly: row_bytes must be 64 or 128, warps "
                         f"multiples of 16x32, and a round of copies ({tile.rows} rows) a "
                         f"multiple of 8 and a divisor of block_m and block_n")
    stored_as = STORED_AS[dtype]
    sums = tensor_core_sums(tile.warp_m, tile.warp_n, vector.lanes(stored_as))
    return frame(tile, residual_request(stored_as, tile), first_sums(end, tile, sums),
                 *multiply_slices(dtype, tile, before),
                 ending(end, stored_as, tile, sums, activation_name))


def multiply_slices(dtype: str, tile: Tile, before: str) -> tuple[Callable, Callable]:
    """Device functions: the beginning and the sum over slices, as `frame` takes them."""
    block_m, block_n, row_bytes, stages, warp_m, warp_n = tile[:6]
    stage, warps_n = (block_m + block_n) * row_bytes, block_n // warp_n
    wait_for_oldest = cp_async_wait(stages - 2)
    place, start, next_slice = ring_copies(tile, stages - 1)
    fragment_addresses, multiply = fragments(tile), multiply_slice(dtype, tile, before)
    norm_bytes = tile.norm_bytes

    @cuda.jit(device=True, inline="always")
    def multiply_all(acc, smem, tid, x, base, outside, tap, walk, weight, count, norm):
        copy_to = place(smem, tid)
        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        a_lane, b_lane = fragment_addresses(
            smem, lane, uint32(uint32(warp // uint32(warps_n)) * uint32(warp_m)),
            uint32(uint32(warp % uint32(warps_n)) * uint32(warp_n)))
        slot, free = uint32(0), uint32((stages - 1) * stage)    # byte offsets into the ring
        done = uint32(0)
        while done < count:
            wait_for_oldest()
            cuda.syncthreads()                  # this slice is here, and the one before is used up
            tap, weight = next_slice(uint32(copy_to + free), x, base, outside, tap, walk, weight,
                                     uint32(done + uint32(stages - 1)) < count)
            multiply(acc, uint32(a_lane + slot), uint32(b_lane + slot), norm)
            norm += uint64(norm_bytes)
            free = slot
            slot = uint32(slot + uint32(stage))
            if slot == uint32(stages * stage):
                slot = uint32(0)
            done = uint32(done + uint32(1))

    return start, multiply_all


def swizzle(tile: Tile) -> tuple[int, int]:
    """(shift, mask): chunk c of row r is stored at chunk c ^ (r >> shift & mask), so that the eight
    rows which one phase of ldmatrix reads, and eight neighbouring chunks being written, lie in
    distinct banks. Of 128 bytes it is the one that wgmma wants."""
    return {4: 1, 8: 0}[tile.chunks], tile.chunks - 1


def ring_copies(tile: Tile, ahead: int) -> tuple[Callable, Callable, Callable]:
    """Device functions that start copies into the ring, a group a slice, also an empty one, which
    keeps the count of groups. The latter two give the tap and the weights of the slice after.

    place       (smem, tid): where a thread's first chunk goes in the first slot
    start       as `frame` takes it, of the first `ahead` slices, if there are so many; it waits
                for the inputs, which weights are none of
    next_slice  (target, x, base, outside, tap, walk, weight, more): of one slice, if there is one
    """
    copy_weights, copy_patches = weight_copy(tile), patch_copy(tile)
    advance, (shift, mask) = next_tap(tile.chunks), swizzle(tile)
    row_bytes, chunks, b_bytes = tile.row_bytes, tile.chunks, tile.block_n * tile.row_bytes
    stage = tile.block_m * row_bytes + b_bytes

    @cuda.jit(device=True, inline="always")
    def place(smem, tid):
        row, chunk = uint32(tid // uint32(chunks)), uint32(tid % uint32(chunks))
        swizzled = uint32(chunk ^ ((row >> uint32(shift)) & uint32(mask)))
        return keep(uint32(smem + row * uint32(row_bytes) + (swizzled << uint32(4))))

    @cuda.jit(device=True, inline="always")
    def start(smem, tid, x, base, outside, tap, walk, weight, count):
        copy_to = place(smem, tid)
        for s in range(ahead):
            if uint32(s) < count:
                copy_weights(uint32(copy_to + uint32(s * stage)), weight)
                weight += uint64(b_bytes)
        wait_for_inputs()
        for s in range(ahead):
            if uint32(s) < count:
                copy_patches(uint32(copy_to + uint32(s * stage)), x, base, outside, tap)
                tap = advance(tap, walk)
            cp_async_commit()
        return tap, weight

    @cuda.jit(device=True, inline="always")
    def next_slice(target, x, base, outside, tap, walk, weight, more):
        if more:
            copy_patches(target, x, base, outside, tap)
            copy_weights(target, weight)
            weight += uint64(b_bytes)
            tap = advance(tap, walk)
        cp_async_commit()
        return tap, weight

    return place, start, next_slice


def patch_copy(tile: Tile) -> Callable:
    """Device function: start copying one slice of patches, this thread's chunks to `target`."""
    row_bytes, rows = tile.row_bytes, tile.rows
    rounds = tile.block_m // rows

    @cuda.jit(device=True, inline="always")
    def copy_patches(target, x, base, outside, tap):
        _, offset, key_h, key_w = tap
        key = uint32(key_h | key_w)
        for i in range(rounds):
            size = uint32(0) if outside[i] & key else uint32(16)
            cp_async_16_zfill(uint32(target + uint32(i * rows * row_bytes)),
                              x + uint64(uint32(base[i] + offset)) * uint64(16), size)

    return copy_patches


def weight_copy(tile: Tile) -> Callable:
    """Device function: start copying one slice of weights, this thread's chunks to where they
    belong in the slot whose chunks of patches go to `target`."""
    row_bytes, threads, rows = tile.row_bytes, tile.threads, tile.rows
    b_rounds = tile.block_n // rows
    a_bytes, left = tile.block_m * row_bytes, tile.block_n % rows * tile.chunks

    @cuda.jit(device=True, inline="always")
    def copy_weights(target, weight):
        for i in range(b_rounds):
            cp_async_16(uint32(target + uint32(a_bytes + i * rows * row_bytes)),
                        weight + uint64(i * threads * 16))
        if uint32(cuda.threadIdx.x) < uint32(left):     # where a round is more than what is left
            cp_async_16(uint32(target + uint32(a_bytes + b_rounds * rows * row_bytes)),
                        weight + uint64(b_rounds * threads * 16))

    return copy_weights


def fragments(tile: Tile) -> Callable:
    """Device function: shared addresses of the first chunks that this lane names to ldmatrix.

    One ldmatrix.x4 reads 16 rows x 2 chunks of A, or 2 n8 tiles x 2 chunks of B.
    """
    (shift, mask), row_bytes = swizzle(tile), tile.row_bytes
    a_bytes = tile.block_m * row_bytes

    @cuda.jit(device=True, inline="always")
    def fragment_addresses(smem, lane, warp_row, warp_col):
        a_row = uint32(warp_row + (lane & uint32(15)))
        a_chunk = uint32((lane >> uint32(4)) ^ ((a_row >> uint32(shift)) & uint32(mask)))
        b_row = uint32(warp_col + (lane & uint32(7)) + ((lane >> uint32(4)) << uint32(3)))
        b_chunk = uint32(((lane >> uint32(3)) & uint32(1))
                         ^ ((b_row >> uint32(shift)) & uint32(mask)))
        a_lane = uint32(smem + a_row * uint32(row_bytes) + (a_chunk << uint32(4)))
        b_lane = uint32(smem + uint32(a_bytes) + b_row * uint32(row_bytes)
                        + (b_chunk << uint32(4)))
        return keep(a_lane), keep(b_lane)

    return fragment_addresses


def multiply_slice(dtype: str, tile: Tile, before: str) -> Callable:
    """Device function: acc += one slice, whose first fragments stand at a_first and b_first."""
    row_bytes = tile.row_bytes
    mi_count, ni_count = tile.warp_m // 16, tile.warp_n // 8
    a_count, b_count = mi_count * 4, ni_count * 2
    steps = row_bytes // 32                     # an mma is two chunks deep
    mma, normalise = MMA[dtype], normaliser(dtype, mi_count, before)

    @cuda.jit(device=True, inline="always")
    def multiply(acc, a_first, b_first, norm):
        a_frag = cuda.local.array(a_count, uint32)
        b_frag = cuda.local.array(b_count, uint32)
        for step in range(steps):
            # Chunk 2 * step of the row; the swizzle is an xor, so it is reached by one.
            a_base = uint32(a_first ^ uint32(step * 32))
            b_base = uint32(b_first ^ uint32(step * 32))
            for mi in range(mi_count):
                v = ldmatrix_x4(uint32(a_base + uint32(mi * 16 * row_bytes)))
                a_frag[mi * 4] = v[0]           # constant tuple indices only
                a_frag[mi * 4 + 1] = v[1]
                a_frag[mi * 4 + 2] = v[2]
                a_frag[mi * 4 + 3] = v[3]
            normalise(a_frag, step, norm)
            for nj in range(ni_count // 2):
                v = ldmatrix_x4(uint32(b_base + uint32(nj * 16 * row_bytes)))
                b_frag[nj * 4] = v[0]
                b_frag[nj * 4 + 1] = v[1]
                b_frag[nj * 4 + 2] = v[2]
                b_frag[nj * 4 + 3] = v[3]
            for mi in range(mi_count):
                for ni in range(ni_count):
                    o = (mi * ni_count + ni) * 4
                    d = mma((acc[o], acc[o + 1], acc[o + 2], acc[o + 3]),
                            (a_frag[mi * 4], a_frag[mi * 4 + 1],
                             a_frag[mi * 4 + 2], a_frag[mi * 4 + 3]),
                            (b_frag[ni * 2], b_frag[ni * 2 + 1]))
                    acc[o] = d[0]
                    acc[o + 1] = d[1]
                    acc[o + 2] = d[2]
                    acc[o + 3] = d[3]

    return multiply
