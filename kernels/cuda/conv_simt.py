"""Convolution on CUDA cores, in strict fp32, on any GPU: how conv_gemm.py's slices multiply.

A thread sums up 8 x 8 outputs (8 x 4 in narrow tiles): for each k it reads 16 numbers and does 64
multiplications with them. Slices pass through two buffers in shared memory. cp.async does not
exist before sm_80, so a thread loads its chunks of the next slice into registers, multiplies the
present one, and only then stores them: the loads take as long as the products do.

In shared memory both tiles stand k first, so that a thread reads neighbouring rows of A, and
neighbouring columns of B, 16 bytes at a time. Weights are packed so; a chunk of x (4 channels of a
pixel) is turned by being stored as four single numbers.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .conv_epilogue import ending, first_sums, residual_request
from .conv_gemm import Tile, frame, keep, next_tap
from .conv_sums import Sums
from .ptx import (
    asm_op,
    cuda,
    float32,
    ld_shared_v4_f32,
    st_shared_v4_f32,
    uint32,
    uint64,
    wait_for_inputs,
)

WARP_M = 32         # 4 lanes of 8 rows; 8 lanes share the columns of a warp

st_shared_f32 = asm_op("st_shared_f32", "st.shared.f32 [$0], $1;", None, [uint32, float32],
                       memory=True)


def make(tile: Tile, activation_name: str, end: str) -> Callable:
    """end: one of conv_gemm.ENDINGS."""
    if (tile.chunks not in (2, 4) or tile.block_m % tile.rows or tile.block_n % tile.rows
            or tile.warp_m != WARP_M or tile.warp_n not in (32, 64) or tile.stages != 2):
        raise ValueError(f"{tile} can not be cut evenly: row_bytes must be 32 or 64, stages 2, "
                         f"warps 32x32 or 32x64, and a round of copies ({tile.rows} rows) a "
                         f"divisor of block_m and block_n")
    sums = sums_of(tile)
    return frame(tile, residual_request("float32", tile), first_sums(end, tile, sums),
                 *multiply_slices(tile), ending(end, "float32", tile, sums, activation_name))


def multiply_slices(tile: Tile) -> tuple[Callable, Callable]:
    """Device functions: the beginning and the sum over slices, as `frame` takes them."""
    block_m, block_n, row_bytes, _, warp_m, warp_n = tile[:6]
    threads, chunks, rows = tile.threads, tile.chunks, tile.rows
    a_rounds, b_rounds = block_m // rows, block_n // rows
    a_count, b_count = a_rounds * 4, b_rounds * 4
    a_bytes, b_bytes = block_m * row_bytes, block_n * row_bytes
    stage, warps_n = a_bytes + b_bytes, block_n // warp_n
    # "Shared with stores" although they are not: such loads stay before the products.
    load_x = vector.load("float32", 4, fill=0.0, shared_with_stores=True)
    load_weight = vector.load("float32", 4, shared_with_stores=True)
    advance, multiply = next_tap(chunks), multiply_slice(tile)

    @cuda.jit(device=True, inline="always")
    def load_slice(a, b, x, base, outside, tap, weight):
        """Start loading this thread's chunks of one slice; zeros where there is none."""
        _, offset, key_h, key_w = tap
        key = uint32(key_h | key_w)
        for i in range(a_rounds):
            load_x(a, i * 4, x + uint64(uint32(base[i] + offset)) * uint64(16),
                   outside[i] & key == uint32(0))
        for i in range(b_rounds):
            load_weight(b, i * 4, weight + uint64(i * threads * 16))

    @cuda.jit(device=True, inline="always")
    def store_slice(a_to, b_to, a, b):
        for i in range(a_rounds):
            for j in range(4):
                st_shared_f32(uint32(a_to + uint32((j * block_m + i * rows) * 4)), a[i * 4 + j])
        for i in range(b_rounds):
            st_shared_v4_f32(uint32(b_to + uint32(i * threads * 16)), b[i * 4], b[i * 4 + 1],
                             b[i * 4 + 2], b[i * 4 + 3])

    @cuda.jit(device=True, inline="always")
    def places(smem, tid):
        """Where a thread stores its chunks of either tile."""
        row, chunk = uint32(tid // uint32(chunks)), uint32(tid % uint32(chunks))
        column = uint32(row ^ bank_of_chunk(chunk))
        return (keep(uint32(smem + (chunk * uint32(4 * block_m) + column) * uint32(4))),
                keep(uint32(smem + uint32(a_bytes) + tid * uint32(16))))

    @cuda.jit(device=True, inline="always")
    def start(smem, tid, x, base, outside, tap, walk, weight, count):
        a = cuda.local.array(a_count, float32)
        b = cuda.local.array(b_count, float32)
        a_to, b_to = places(smem, tid)
        wait_for_inputs()
        load_slice(a, b, x, base, outside, tap, weight)
        store_slice(a_to, b_to, a, b)
        cuda.syncthreads()
        return tap, weight

    @cuda.jit(device=True, inline="always")
    def multiply_all(acc, smem, tid, x, base, outside, tap, walk, weight, count, norm):
        a = cuda.local.array(a_count, float32)
        b = cuda.local.array(b_count, float32)
        a_to, b_to = places(smem, tid)
        warp, lane_m, lane_n = uint32(tid >> uint32(5)), lane_row(tid), lane_column(tid)
        a_from = keep(uint32(smem + uint32(uint32(warp // uint32(warps_n)) * uint32(warp_m * 4))
                             + lane_m * uint32(16)))
        b_from = keep(uint32(smem + uint32(a_bytes) + lane_n * uint32(16)
                             + uint32(uint32(warp % uint32(warps_n)) * uint32(warp_n * 4))))
        slot = uint32(0)                        # byte offset of the slice to multiply
        done = uint32(0)
        while done < count:
            done = uint32(done + uint32(1))
            weight += uint64(b_bytes)
            tap = advance(tap, walk)
            load_slice(a, b, x, base, outside, tap, weight)
            multiply(acc, uint32(a_from + slot), uint32(b_from + slot))
            slot = uint32(uint32(stage) - slot)
            store_slice(uint32(a_to + slot), uint32(b_to + slot), a, b)
            cuda.syncthreads()                  # the next slice is here, and this one is used up

    return start, multiply_all


def multiply_slice(tile: Tile) -> Callable:
    """Device function: acc += one slice, whose first rows and columns stand at a_first, b_first."""
    block_m, block_n, depth = tile.block_m, tile.block_n, tile.row_bytes // 4
    columns = tile.warp_n // 8                  # of a thread

    @cuda.jit(device=True, inline="always")
    def multiply(acc, a_first, b_first):
        a = cuda.local.array(8, float32)
        b = cuda.local.array(columns, float32)
        for k in range(depth):
            # Undo bank_of_chunk: its 8 is a bit of the lane's row, its 16 changes the halves.
            line = uint32((a_first ^ uint32((k >> 3) * 32)) + uint32(k * block_m * 4))
            for p in range(2):
                v = ld_shared_v4_f32(uint32(line + uint32((p ^ ((k >> 2) & 1)) * 64)))
                a[p * 4] = v[0]                 # constant tuple indices only
                a[p * 4 + 1] = v[1]
                a[p * 4 + 2] = v[2]
                a[p * 4 + 3] = v[3]
            for q in range(columns // 4):
                v = ld_shared_v4_f32(uint32(b_first + uint32(k * block_n * 4 + q * 128)))
                b[q * 4] = v[0]
                b[q * 4 + 1] = v[1]
                b[q * 4 + 2] = v[2]
                b[q * 4 + 3] = v[3]
            for i in range(8):
                for j in range(columns):
                    acc[i * columns + j] += a[i] * b[j]

    return multiply


@cuda.jit(device=True, inline="always")
def bank_of_chunk(chunk):
    """By what the rows of a chunk's four k are exclusive-ored in shared memory: a warp copies 2 or
    4 chunks of 16 or 8 rows, and so they go to distinct banks."""
    return uint32(((chunk & uint32(1)) << uint32(4)) | ((chunk >> uint32(1)) << uint32(3)))


@cuda.jit(device=True, inline="always")
def lane_row(tid):
    """0 to 3: this lane's rows are 4 times that, and 3 more, and the same 16 on. Neighbouring lanes
    share columns and every second one shares rows: reads of 16 bytes are merged only within such
    pairs."""
    return uint32(((tid >> uint32(3)) & uint32(2)) | (tid & uint32(1)))


@cuda.jit(device=True, inline="always")
def lane_column(tid):
    """0 to 7: this lane's columns are 4 times that, and 3 more, and the same 32 on."""
    return uint32((tid >> uint32(1)) & uint32(7))


def sums_of(tile: Tile) -> Sums:
    """Where a lane's 8 rows and its runs of 4 columns lie in the warp's tile."""
    columns = tile.warp_n // 8

    @cuda.jit(device=True, inline="always")
    def row(lane, i):
        return uint32(uint32(i // 4 * 16 + i % 4) + lane_row(lane) * uint32(4))

    @cuda.jit(device=True, inline="always")
    def column(lane):
        return uint32(lane_column(lane) * uint32(4))

    @cuda.jit(device=True, inline="always")
    def take(value, acc, i, g):
        for k in range(4):
            value[k] = acc[i * columns + g * 4 + k]

    @cuda.jit(device=True, inline="always")
    def put(acc, i, g, value):
        for k in range(4):
            acc[i * columns + g * 4 + k] = value[k]

    return Sums(4, 8, 32, row, column, take, put)
