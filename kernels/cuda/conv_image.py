"""Convolution of an image of few channels on tensor cores: the first layer of a network.

    y[n, i, j, o] = sum over h, w, c of x[n, i * stride + h, j * stride + w, c] * weight[o, h, w, c]

conv_mma.py copies each patch anew, a pixel for every tap that reads it, which is where the time of
such a layer goes: 49 taps of 3 channels. Here a block keeps the part of the image that TILE_H x
TILE_W outputs see in shared memory, and ldmatrix takes the patches from there: what a lane names to
it is an address, and a patch of the next output is the same one a column further.

In shared memory a pixel has 4 channels, of which the last are zero, and a chunk of 16 bytes is two
neighbouring pixels. One begins at each column where an output begins. Kernel rows are filled up to
whole steps of the tensor cores, 4 columns, by weights of zero: an infinite pixel there makes a NaN
of one output more than IEEE arithmetic would.

The weights of all channels of y lie in shared memory from beginning to end, while the block goes
from one part of the image to another.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import vector
from .conv_epilogue import epilogue, first_sums
from .conv_gemm import WHOLE, Tile
from .conv_mma import MMA
from .conv_sums import tensor_core_sums
from .index import DIVISOR, split
from .ptx import (
    asm_op,
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    cuda,
    dynamic_smem,
    float32,
    ldmatrix_x4,
    let_next_begin,
    uint32,
    uint64,
    wait_for_inputs,
)

TILE_H, TILE_W = 8, 16      # outputs of a block: 2 rows of 16 for each warp
WARPS = TILE_H // 2
THREADS = WARPS * 32
MOST_CHANNELS = 4

# x, weight [tiles along o][block_n][pitch of a row], bias (fp32, padded to block_n), y, low, high,
# height, width, out_height, out_width, out_channels, top, left, count of tiles, divisors: tiles of
# a row of y, of a column.  Grid: blocks that share the tiles, tiles along o.
SIGNATURE = ("pointer",) * 4 + ("float32",) * 2 + ("uint32",) * 8 + DIVISOR * 2

st_shared_v4_b32 = asm_op("st_shared_v4_b32", "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", None,
                          [uint32] * 5, memory=True)
cp_async_wait_all = cp_async_wait(0)


class Window(NamedTuple):
    """What a kernel is compiled for, beside its dtype; kernel and stride are (h, w), stride[1] 1
    or 2."""
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    block_n: int

    @property
    def row_chunks(self) -> int:
        """Of one row of the kernel: an even number, for a step of the tensor cores takes two."""
        return -(-self.kernel[1] // 4) * 2

    @property
    def chunks(self) -> int:
        """Of the sum behind an output."""
        return self.kernel[0] * self.row_chunks

    @property
    def pitch(self) -> int:
        """Chunks from one row of weights to the next: an odd number, so that the eight rows which
        one phase of ldmatrix reads lie in distinct banks."""
        return self.chunks + 1

    @property
    def chunk_step(self) -> int:
        """Chunks of the image from one of an output to its next."""
        return 2 // self.stride[1]

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and chunks of the image that a block sees."""
        return ((TILE_H - 1) * self.stride[0] + self.kernel[0],
                TILE_W + (self.row_chunks - 1) * self.chunk_step)

    @property
    def shared_bytes(self) -> int:
        rows, columns = self.patch
        return (self.block_n * self.pitch + rows * columns) * 16


def make(dtype: str, window: Window, activation_name: str) -> Callable:
    columns = window.patch[1]
    weight_chunks = window.block_n * window.pitch
    patch_at = weight_chunks * 16
    acc_count = window.block_n // 2                 # 16 outputs of a warp
    (stride_h, stride_w), block_n = window.stride, window.block_n
    chunk_step, pitch = window.chunk_step, window.pitch
    copy_weights = weight_copy(window)
    copy_image, multiply = image_copy(window), multiply_patches(dtype, window)
    # To the epilogue 16 pixels of each warp are a tile, those of a warp 16 after those of the one
    # before: `first` takes that back.
    tile_of_warps = Tile(16 * WARPS, block_n, 0, 0, 16, block_n, 0)
    sums = tensor_core_sums(16, block_n, vector.lanes(dtype))
    begin_sums = first_sums(WHOLE, tile_of_warps, sums)
    store_rows = epilogue(dtype, tile_of_warps, sums, activation_name, partial=False)

    def conv_image(x, weight, bias, y, low, high, height, width, out_height, out_width,
                   out_channels, top, left, count, across, across_m, across_s, down, down_m,
                   down_s):
        tid = uint32(cuda.threadIdx.x)
        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        smem = dynamic_smem()
        first_n = uint32(uint32(cuda.blockIdx.y) * uint32(block_n))
        copy_weights(smem, weight + uint64(uint32(cuda.blockIdx.y)) * uint64(weight_chunks * 16),
                     tid)
        patch = uint32(smem + uint32(patch_at))
        # What this lane names of 16 rows x 2 chunks of patches, and of as many weights.
        a_first = uint32(patch + (warp * uint32(2 * stride_h * columns) + (lane & uint32(15))
                                  + (lane >> uint32(4)) * uint32(chunk_step)) * uint32(16))
        b_row = uint32((lane & uint32(7)) + ((lane >> uint32(4)) << uint32(3)))
        b_first = uint32(smem + (b_row * uint32(pitch) + ((lane >> uint32(3)) & uint32(1)))
                         * uint32(16))
        upper = cuda.local.array(acc_count, float32)
        lower = cuda.local.array(acc_count, float32)
        wait_for_inputs()
        tile = uint32(cuda.blockIdx.x)
        while tile < count:
            line, tile_w = split(tile, across, across_m, across_s)
            image, tile_h = split(line, down, down_m, down_s)
            row, column = uint32(tile_h * uint32(TILE_H)), uint32(tile_w * uint32(TILE_W))
            copy_image(patch, x, tid, uint32(row * uint32(stride_h) - top),
                       uint32(column * uint32(stride_w) - left), image, height, width)
            begin_sums(upper, tid, first_n, bias)
            begin_sums(lower, tid, first_n, bias)
            multiply(upper, lower, a_first, b_first)
            tile = uint32(tile + uint32(cuda.gridDim.x))
            if tile >= count:
                let_next_begin()
            # Of y as a list of pixels: where the warp's rows begin and end. Below y none does.
            row = uint32(row + warp * uint32(2))
            begin = uint32((image * out_height + row) * out_width)
            first = uint32(begin + column - warp * uint32(16))
            end = uint32(begin + out_width) if row < out_height else uint32(0)
            store_rows(upper, smem, tid, first, first_n, uint32(0), bias, x, uint32(0), y, low,
                       high, end, out_channels, out_channels, uint32(0), uint32(1))
            end = uint32(end + out_width) if uint32(row + uint32(1)) < out_height else uint32(0)
            store_rows(lower, smem, tid, uint32(first + out_width), first_n, uint32(0), bias, x,
                       uint32(0), y, low, high, end, out_channels, out_channels, uint32(0),
                       uint32(1))

    return conv_image


def weight_copy(window: Window) -> Callable:
    """Device function: start copying the weights of block_n channels."""
    count = window.block_n * window.pitch
    rounds = -(-count // THREADS)

    @cuda.jit(device=True, inline="always")
    def copy_weights(smem, weight, tid):
        for i in range(rounds):
            chunk = uint32(tid + uint32(i * THREADS))
            if chunk < uint32(count):
                cp_async_16(uint32(smem + (chunk << uint32(4))),
                            weight + (uint64(chunk) << uint64(4)))
        cp_async_commit()

    return copy_weights


def image_copy(window: Window) -> Callable:
    """Device function: the part of the image that begins at `row` and `column`, which wrap around
    above and left of it, into shared memory; zeros beside the image. All threads have read what
    was there before, and see what is there after, and the weights."""
    rows, columns = window.patch
    count, channels, stride_w = rows * columns, window.channels, window.stride[1]
    rounds = -(-count // THREADS)
    load = vector.load("bits16", 1, fill=0.0)
    held = rounds * 8                               # values of two pixels of 4 channels

    @cuda.jit(device=True, inline="always")
    def copy_image(patch, x, tid, row, column, image, height, width):
        value = cuda.local.array(held, uint32)
        for i in range(held):
            value[i] = uint32(0)
        for i in range(rounds):
            chunk = uint32(tid + uint32(i * THREADS))
            h = uint32(row + chunk // uint32(columns))
            w = uint32(column + chunk % uint32(columns) * uint32(stride_w))
            there = h < height and chunk < uint32(count)
            at = uint32(((image * height + h) * width + w) * uint32(channels))
            for pixel in range(2):
                inside = there and uint32(w + uint32(pixel)) < width
                for c in range(channels):
                    load(value, i * 8 + pixel * 4 + c,
                         x + uint64(uint32(at + uint32(pixel * channels + c))) * uint64(2), inside)
        cuda.syncthreads()
        for i in range(rounds):
            chunk = uint32(tid + uint32(i * THREADS))
            if chunk < uint32(count):
                k = i * 8
                st_shared_v4_b32(uint32(patch + (chunk << uint32(4))),
                                 uint32(value[k] | (value[k + 1] << uint32(16))),
                                 uint32(value[k + 2] | (value[k + 3] << uint32(16))),
                                 uint32(value[k + 4] | (value[k + 5] << uint32(16))),
                                 uint32(value[k + 6] | (value[k + 7] << uint32(16))))
        cp_async_wait_all()
        cuda.syncthreads()

    return copy_image


def multiply_patches(dtype: str, window: Window) -> Callable:
    """Device function: upper, lower += the products of 16 patches of a row of y each, and all
    weights."""
    columns, row_chunks, step_chunks = window.patch[1], window.row_chunks, window.chunk_step
    steps, next_row = window.chunks // 2, window.stride[0] * columns
    ni_count, pitch = window.block_n // 8, window.pitch
    b_count = ni_count * 2
    mma = MMA[dtype]

    @cuda.jit(device=True, inline="always")
    def add_product(acc, o, a, b):
        d = mma((acc[o], acc[o + 1], acc[o + 2], acc[o + 3]), a, b)
        acc[o] = d[0]                           # constant tuple indices only
        acc[o + 1] = d[1]
        acc[o + 2] = d[2]
        acc[o + 3] = d[3]

    @cuda.jit(device=True, inline="always")
    def multiply(upper, lower, a_first, b_first):
        b = cuda.local.array(b_count, uint32)
        for step in range(steps):
            chunk = step * 2
            at = (chunk // row_chunks * columns + chunk % row_chunks * step_chunks) * 16
            u = ldmatrix_x4(uint32(a_first + uint32(at)))
            v = ldmatrix_x4(uint32(a_first + uint32(at + next_row * 16)))
            for nj in range(ni_count // 2):
                w = ldmatrix_x4(uint32(b_first + uint32((nj * 16 * pitch + chunk) * 16)))
                b[nj * 4] = w[0]
                b[nj * 4 + 1] = w[1]
                b[nj * 4 + 2] = w[2]
                b[nj * 4 + 3] = w[3]
            for ni in range(ni_count):
                weights = (b[ni * 2], b[ni * 2 + 1])
                add_product(upper, ni * 4, u, weights)
                add_product(lower, ni * 4, v, weights)

    return multiply
