"""Convolution of stride 1 on Hopper's tensor cores (wgmma, sm_90a alone) that copies no patches.

conv_wgmma.py copies each pixel from L2 once for every tap that reads it, which is what bounds 3x3
layers of large images. Here a block keeps the pixels that its outputs see in shared memory, 64
channels of each at a time, and multiplies them by the weights of one tap after the other.

An image is cut into vertical strips of some columns of y. Such a strip of all images is one long
row of positions: pixel by pixel, line by line, image by image, with the padding between them, and
outputs have the position of their first tap. Of images of 2 x 4 pixels with a border of 1 that is

    0 0 0 0 0 | 0 x x x x | 0 x x x x || 0 0 0 0 0 | 0 x x x x | ...     pitch 5, an image 3 lines

Tap (r, s) of any output reads the pixel r * pitch + s positions further on. A block computes
block_m consecutive positions; those at the ends of lines and images are no outputs, and are not
stored.

In shared memory a position is a row of 128 bytes. The tensor cores swizzle its 16-byte chunks by
the address, not by the number of the row in the operand (wgmma.py), and so the operand of a tap is
the same memory from another row on: its descriptor is larger by a constant.

Of a sum over several times 64 channels the pixels of the next ones are copied into a second buffer,
a round of copies in each step. Weights pass through a ring of slices, [block_n][64 channels] of one
tap.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import vector
from .activation import activation
from .conv_epilogue import second_half
from .conv_gemm import keep, sums_pitch
from .conv_mma import put_rows
from .index import DIVISOR, split
from .ptx import (
    cp_async_16,
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    dynamic_smem,
    float32,
    ld_shared_v4_f32,
    let_next_begin,
    uint32,
    uint64,
    wait_for_inputs,
)
from .wgmma import ROW_BYTES, descriptor, fence_proxy_async, products, wait, wait_for_sums

ARCH = "sm_90a"
CHUNKS = ROW_BYTES // 16        # of a row
CHANNELS = ROW_BYTES // 2       # that a row holds of a pixel
REACH = 128                     # positions that taps may reach beyond a tile: two lines of 63
LEAST_TAPS = 9                  # steps in which the pixels of the next channels are copied


class HaloTile(NamedTuple):
    """What a kernel is compiled for, beside its dtype.

    buffers   of pixels: 1, for 64 channels, or 2
    stages    slices of weights in the ring
    blocks    of a multiprocessor
    """
    block_m: int
    block_n: int
    buffers: int
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        """A warpgroup for 64 positions."""
        return self.block_m // 64 * 128

    @property
    def rows(self) -> int:
        """Positions that a buffer holds."""
        return self.block_m + REACH

    @property
    def round_rows(self) -> int:
        """That a block copies at a time, one chunk a thread."""
        return self.threads // CHUNKS

    @property
    def in_flight(self) -> int:
        """Products that a warpgroup does not wait for before the next barrier: conv_wgmma.py."""
        return 1 if self.blocks == 1 else 0

    @property
    def ahead(self) -> int:
        """Slices that are being copied while one is multiplied."""
        return self.stages - 1 - self.in_flight

    @property
    def ring(self) -> int:
        """Bytes before the ring: those of the pixels."""
        return self.buffers * self.rows * ROW_BYTES

    @property
    def shared_bytes(self) -> int:
        """Of pixels and weights; then all sums pass through the same memory."""
        return max(self.ring + self.stages * self.block_n * ROW_BYTES,
                   self.block_m * sums_pitch(self.block_n))


# x, weight [tiles along n][64 channels][taps][block_n][64], bias (fp32, padded to block_n),
# residual, has_residual, y, low, high, positions of a strip, height, width, chunks of a pixel,
# out_height, out_width, out_channels, top, left, columns of a strip, taps, kernel_w, rounds of
# copies that the pixels of a tile take, then divisors: tiles along n, pitch, lines of an image.
# Grid: tiles, strips.
SIGNATURE = (("pointer",) * 4 + ("uint32", "pointer") + ("float32",) * 2 + ("uint32",) * 13
             + DIVISOR * 3)


def make(dtype: str, tile: HaloTile, activation_name: str) -> Callable:
    block_m, block_n = tile.block_m, tile.block_n
    rounds, steps = tile.rows // tile.round_rows, LEAST_TAPS + 1 - tile.ahead - tile.in_flight
    if (block_m % 64 or block_n not in (64, 128) or tile.rows % tile.round_rows
            or block_n % tile.round_rows or tile.ahead < 1 or steps < 1
            or (tile.buffers == 2 and rounds > steps)):
        raise ValueError(f"{tile} can not be cut evenly: block_m must be a multiple of 64, block_n "
                         f"64 or 128, {tile.rows} rows of pixels and block_n multiples of a round "
                         f"of copies ({tile.round_rows} rows), and stages 2, or 3 for one block, "
                         f"or more; for two buffers so few that {steps} steps copy {rounds} rounds")
    acc_count, slice_bytes = block_n // 2, block_n * ROW_BYTES
    multiply, finish = multiply_taps(dtype, tile), store_rows(dtype, tile, activation_name)

    def conv_halo(x, weight, bias, residual, has_residual, y, low, high, positions, height, width,
                  pixel_chunks, out_height, out_width, out_channels, top, left, strip, taps,
                  kernel_w, rounds, n_tiles, n_tiles_m, n_tiles_s, pitch, pitch_m, pitch_s,
                  lines, lines_m, lines_s):
        tid = uint32(cuda.threadIdx.x)
        # Neighbouring blocks share pixels, which L2 can not hold all of.
        tile_m, tile_n = split(uint32(cuda.blockIdx.x), n_tiles, n_tiles_m, n_tiles_s)
        first_m = uint32(tile_m * uint32(block_m))
        first_n = uint32(tile_n * uint32(block_n))
        begin = uint32(uint32(cuda.blockIdx.y) * strip)
        smem = dynamic_smem()
        count = uint32(taps * (pixel_chunks // uint32(CHUNKS)))
        weight += uint64(uint32(tile_n * count)) * uint64(slice_bytes)
        row = positions, pitch, pitch_m, pitch_s, lines, lines_m, lines_s
        image = height, width, pixel_chunks, top, uint32(left - begin)
        acc = cuda.local.array(acc_count, float32)
        for i in range(acc_count):
            acc[i] = float32(0)
        multiply(acc, smem, tid, x, weight, first_m, row, image, count, taps, kernel_w, rounds)
        let_next_begin()
        outputs = out_height, out_width, out_channels, begin, min(strip, uint32(out_width - begin))
        finish(acc, smem, tid, first_m, first_n, row, outputs, bias, residual, has_residual, y, low,
               high)

    return conv_halo


@cuda.jit(device=True, inline="always")
def split_position(position, row):
    """(image, line, column, is there such an image?)"""
    positions, pitch, pitch_m, pitch_s, lines, lines_m, lines_s = row
    line, column = split(position, pitch, pitch_m, pitch_s)
    image, line = split(line, lines, lines_m, lines_s)
    return image, line, column, position < positions


@cuda.jit(device=True, inline="always")
def copy_pixel(target, x, position, row, image):
    """Start copying 16 bytes of the pixel at a position, zeros in the padding; x: where they are
    in the first pixel."""
    height, width, pixel_chunks, top, left = image
    n, line, column, there = split_position(position, row)
    h, w = uint32(line - top), uint32(column - left)            # wrap around above and left of it
    at = uint32(((n * height + h) * width + w) * pixel_chunks)
    size = uint32(16) if there and h < height and w < width else uint32(0)
    cp_async_16_zfill(target, x + uint64(at) * uint64(16), size)


def weight_copy(tile: HaloTile) -> Callable:
    """Device function: start copying a slice of weights, this thread's chunks from `target` on."""
    round_bytes = tile.threads * 16
    rounds = tile.block_n // tile.round_rows

    @cuda.jit(device=True, inline="always")
    def copy_weights(target, weight):
        for i in range(rounds):
            cp_async_16(uint32(target + uint32(i * round_bytes)),
                        weight + uint64(i * round_bytes))

    return copy_weights


def first_copies(tile: HaloTile) -> Callable:
    """Device function: start copying the first `ahead` slices of weights, and the pixels of the
    first 64 channels, which wait for the inputs. As many groups, of which the first has it all."""
    ring, ahead, slice_bytes = tile.ring, tile.ahead, tile.block_n * ROW_BYTES
    round_rows, round_bytes = tile.round_rows, tile.threads * 16
    most_rounds = tile.rows // round_rows
    copy_weights = weight_copy(tile)

    @cuda.jit(device=True, inline="always")
    def start(copy_to, x, weight, position, row, image, rounds):
        for i in range(ahead):
            copy_weights(uint32(copy_to + uint32(ring + i * slice_bytes)),
                         weight + uint64(i * slice_bytes))
        wait_for_inputs()
        for i in range(most_rounds):
            if uint32(i) < rounds:
                copy_pixel(uint32(copy_to + uint32(i * round_bytes)), x,
                           uint32(position + uint32(i * round_rows)), row, image)
        for _ in range(ahead):
            cp_async_commit()

    return start


def next_tap(tile: HaloTile) -> Callable:
    """Device function: (tap, its column, where its pixels begin in shared memory, where those of
    its channels do, the first pixel's chunk of these channels), one tap further."""
    buffers, both = tile.buffers, tile.rows * ROW_BYTES     # sum of both buffers' offsets

    @cuda.jit(device=True, inline="always")
    def advance(walk, taps, kernel_w, pitch):
        tap, column, at, buffer, x = walk
        tap, column = uint32(tap + uint32(1)), uint32(column + uint32(1))
        at = uint32(at + uint32(ROW_BYTES))
        if column == kernel_w:
            column, at = uint32(0), uint32(at + (pitch - kernel_w) * uint32(ROW_BYTES))
        if buffers == 2 and tap == taps:
            tap, buffer, x = uint32(0), uint32(uint32(both) - buffer), x + uint64(ROW_BYTES)
            at = buffer
        return tap, column, at, buffer, x

    return advance


def multiply_taps(dtype: str, tile: HaloTile) -> Callable:
    """Device function: acc += the products of `count` slices of weights, taps for each 64 channels.

    rounds: of copies of the pixels of 64 channels. Steps start one each, from the first on that
    finds the other buffer free; the last one is waited for `ahead` steps later.
    """
    ring, ahead, in_flight = tile.ring, tile.ahead, tile.in_flight
    round_rows, round_bytes = tile.round_rows, tile.threads * 16
    slice_bytes = tile.block_n * ROW_BYTES
    end, buffers, both = tile.stages * slice_bytes, tile.buffers, tile.rows * ROW_BYTES
    wait_for_oldest, wait_for_older = cp_async_wait(ahead - 1), wait(in_flight)
    start, copy_weights, advance = first_copies(tile), weight_copy(tile), next_tap(tile)
    multiply, wait_for_all = products(dtype, tile.block_n), wait_for_sums(tile.block_n)

    @cuda.jit(device=True, inline="always")
    def multiply_all(acc, smem, tid, x, weight, first, row, image, count, taps, kernel_w, rounds):
        place, chunk = uint32(tid // uint32(CHUNKS)), uint32(tid % uint32(CHUNKS))
        swizzled = uint32(chunk ^ (place & uint32(7)))
        copy_to = keep(uint32(smem + place * uint32(ROW_BYTES) + (swizzled << uint32(4))))
        position = uint32(first + place)
        x += uint64(uint32(chunk << uint32(4)))
        weight += uint64(uint32(tid << uint32(4)))
        start(copy_to, x, weight, position, row, image, rounds)
        weight += uint64(ahead * slice_bytes)

        pixels = descriptor(uint32(smem + (tid >> uint32(7)) * uint32(64 * ROW_BYTES)))
        weights = descriptor(uint32(smem + uint32(ring)))
        slot, free = uint32(0), uint32(ahead * slice_bytes)     # byte offsets into the ring
        walk = uint32(0), uint32(0), uint32(0), uint32(0), x
        done = uint32(0)
        while done < count:
            tap, _, at, buffer, x = walk
            wait_for_oldest()
            fence_proxy_async()
            cuda.syncthreads()                  # this slice is here, and `free` is used up
            multiply(acc, pixels + uint64(at >> uint32(4)), weights + uint64(slot >> uint32(4)))
            if uint32(done + uint32(ahead)) < count:
                copy_weights(uint32(copy_to + uint32(ring) + free), weight)
                weight += uint64(slice_bytes)
            i = uint32(tap - uint32(in_flight))
            if buffers == 2 and i < rounds and uint32(done - tap + taps) < count:
                other = uint32(copy_to + uint32(both) - buffer)
                copy_pixel(uint32(other + i * uint32(round_bytes)), x + uint64(ROW_BYTES),
                           uint32(position + i * uint32(round_rows)), row, image)
            cp_async_commit()
            wait_for_older()
            slot, free = uint32(slot + uint32(slice_bytes)), uint32(free + uint32(slice_bytes))
            if slot == uint32(end):
                slot = uint32(0)
            if free == uint32(end):
                free = uint32(0)
            walk = advance(walk, taps, kernel_w, row[1])
            done = uint32(done + uint32(1))
        wait_for_all(acc)
        cuda.syncthreads()                      # what follows writes over pixels and weights

    return multiply_all


def store_rows(dtype: str, tile: HaloTile, activation_name: str) -> Callable:
    """Device function: a warp's 16 rows of sums become y, as in conv_epilogue.py, but that a row's
    pixel is where its position says, if that is an output of the strip."""
    size, lanes = vector.STORAGE[dtype].bytes, vector.lanes(dtype)
    across = tile.block_n // lanes                  # lanes along a row
    down = 32 // across
    passes, at_once = 16 // down, 4                 # rows of a lane, and those loaded together
    pitch_of_sums = sums_pitch(tile.block_n)
    half, added_count = second_half(dtype, tile.block_n), at_once * lanes
    put = put_rows(dtype, tile.block_n, pitch_of_sums)
    load_bias, load = vector.load("float32", lanes), vector.load(dtype, lanes, fill=0.0)
    store, activate = vector.store(dtype, lanes), activation(activation_name, ARCH)

    @cuda.jit(device=True, inline="always")
    def place(position, column, row, outputs):
        out_height, out_width, out_channels, begin, columns = outputs
        n, line, w, there = split_position(position, row)
        pixel = uint32((n * out_height + line) * out_width + begin + w)
        inside = there and line < out_height and w < columns and column < out_channels
        return (uint64(pixel) * uint64(out_channels) + uint64(column)) * uint64(size), inside

    @cuda.jit(device=True, inline="always")
    def finish(acc, smem, tid, first_m, first_n, row, outputs, bias, residual, has_residual, y, low,
               high):
        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        mine = uint32(smem + warp * uint32(16 * pitch_of_sums))
        down_lane, across_lane = uint32(lane // uint32(across)), uint32(lane % uint32(across))
        get = uint32(mine + down_lane * uint32(pitch_of_sums) + (across_lane << uint32(4)))
        position = uint32(first_m + warp * uint32(16) + down_lane)
        column = uint32(first_n + across_lane * uint32(lanes))
        put(acc, mine, lane, 0)
        cuda.syncwarp()
        value = cuda.local.array(lanes, float32)
        biases = cuda.local.array(lanes, float32)
        added = cuda.local.array(added_count, float32)
        load_bias(biases, 0, bias + uint64(column) * uint64(4))
        for first in range(0, passes, at_once):
            if has_residual:
                for p in range(at_once):
                    at, inside = place(uint32(position + uint32((first + p) * down)), column, row,
                                       outputs)
                    load(added, p * lanes, residual + at, inside)
            for p in range(at_once):
                for j in range(lanes // 4):
                    v = ld_shared_v4_f32(
                        uint32(get + uint32((first + p) * down * pitch_of_sums + j * half)))
                    value[j * 4] = v[0]             # constant tuple indices only
                    value[j * 4 + 1] = v[1]
                    value[j * 4 + 2] = v[2]
                    value[j * 4 + 3] = v[3]
                for j in range(lanes):
                    value[j] += biases[j]
                if has_residual:
                    for j in range(lanes):
                        value[j] += added[p * lanes + j]
                for j in range(lanes):
                    value[j] = activate(value[j], low, high)
                at, inside = place(uint32(position + uint32((first + p) * down)), column, row,
                                   outputs)
                if inside:
                    store(y + at, value, 0)

    return finish
