"""Convolution of stride 1 and 64 channels on Hopper's tensor cores (wgmma, sm_90a alone) that
copies no patches.

conv_wgmma.py copies each pixel from L2 once for every tap that reads it, which is what bounds 3x3
layers of large images and few channels. Here a block keeps all pixels that its outputs see in
shared memory, and multiplies them by the weights of one tap after the other.

An image is cut into vertical strips of some columns of y. Such a strip of all images is one long
row of positions: pixel by pixel, line by line, image by image, with the padding between them, and
outputs have the position of their first tap. Of images of 2 x 4 pixels with a border of 1 that is

    0 0 0 0 0 | 0 x x x x | 0 x x x x || 0 0 0 0 0 | 0 x x x x | ...     pitch 5, an image 3 lines

Tap (r, s) of any output reads the pixel r * pitch + s positions further on. A block computes
block_m consecutive positions; those at the ends of lines and images are no outputs, and are not
stored.

In shared memory a position is a row of 128 bytes. The tensor cores swizzle its 16-byte chunks by
the address, not by the number of the row in the operand (wgmma.py), and so the operand of a tap is
the same memory from another row on: its descriptor is larger by a constant. Weights pass through a
ring of slots, for [64 outputs][64 channels] of one tap each.

Sums begin as the bias. They lie as conv_sums.py says, in runs of 8 neighbouring outputs of a lane.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import vector
from .activation import activation
from .conv_epilogue import first_sums, prefetch_l2
from .conv_gemm import WHOLE, Tile, keep
from .conv_sums import Sums, tensor_core_sums
from .index import DIVISOR, split
from .ptx import (
    cp_async_16,
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    dynamic_smem,
    float32,
    int32,
    let_next_begin,
    uint32,
    uint64,
    wait_for_inputs,
)
from .wgmma import ROW_BYTES, descriptor, fence_proxy_async, products, wait_for_sums, warpgroup

ARCH = "sm_90a"
CHUNKS = ROW_BYTES // 16        # of a row
CHANNELS = ROW_BYTES // 2       # of a pixel
OUTPUTS = 64                    # channels of y that a block computes
TAP_BYTES = OUTPUTS * ROW_BYTES     # of weights
REACH = 128                     # positions that taps may reach beyond a tile: two lines of 63
SIZE = 2                        # bytes of an element of y
RUN = 16 // SIZE                # neighbouring outputs of a lane,
RUN_COLUMNS = 4 * RUN           # and the columns that four lanes have one of: conv_sums.py
RUNS = 2 * OUTPUTS // RUN_COLUMNS   # of a lane, in two rows
OUTSIDE = 1 << 31               # beyond all elements of y


class HaloTile(NamedTuple):
    """What a kernel is compiled for, beside its dtype and the kernel's size.

    block_m   positions of a block
    taps      that are multiplied from one barrier to the next
    stages    the ring holds the weights of so many times as many
    blocks    of a multiprocessor
    """
    block_m: int
    taps: int
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        """A warpgroup for 64 positions."""
        return self.block_m // 64 * 128

    @property
    def rows(self) -> int:
        """Positions whose pixels a block holds."""
        return self.block_m + REACH

    @property
    def round_rows(self) -> int:
        """That a block copies at a time, one chunk a thread."""
        return self.threads // CHUNKS

    @property
    def ahead(self) -> int:
        """Taps whose weights are being copied while others are multiplied."""
        return (self.stages - 1) * self.taps

    @property
    def ring(self) -> int:
        """Bytes before the ring: those of the pixels."""
        return self.rows * ROW_BYTES

    @property
    def shared_bytes(self) -> int:
        return self.ring + self.stages * self.taps * TAP_BYTES


# x, weight [tiles along n][taps][64 outputs in the order of columns][64 channels], bias (fp32,
# padded to 64), residual, has_residual, y, low, high, images, height, width, out_height,
# out_width, out_channels, elements from a pixel of y (and of the residual) to the next, top, left,
# columns of a strip, lines, columns and pixels that a round of copies advances, then divisors:
# tiles along n, pitch, lines of an image.  Grid: tiles, strips.
SIGNATURE = (("pointer",) * 4 + ("uint32", "pointer") + ("float32",) * 2 + ("uint32",) * 13
             + DIVISOR * 3)


def make(dtype: str, tile: HaloTile, kernel: tuple[int, int], activation_name: str) -> Callable:
    block_m, taps = tile.block_m, kernel[0] * kernel[1]
    if block_m not in (64, 128, 256) or tile.taps < 1 or not 0 < tile.ahead <= taps:
        raise ValueError(f"{tile} can not be cut evenly: block_m must be 64, 128 or 256, and taps "
                         f"times all stages but one 1 to {taps}")
    start, multiply = first_copies(tile), multiply_taps(dtype, tile, kernel)
    sums, count = tensor_core_sums(16, OUTPUTS, RUN), RUNS * RUN
    begin_sums = first_sums(WHOLE, Tile(block_m, OUTPUTS, 0, 0, 16, OUTPUTS, 0), sums)
    finish = store_runs(dtype, sums, activation_name)

    def conv_halo(x, weight, bias, residual, has_residual, y, low, high, images, height, width,
                  out_height, out_width, out_channels, y_step, top, left, strip, round_lines,
                  round_columns, round_pixels, n_tiles, n_tiles_m, n_tiles_s, pitch, pitch_m,
                  pitch_s, lines, lines_m, lines_s):
        tid = uint32(cuda.threadIdx.x)
        # Neighbouring blocks share pixels, which L2 can not hold all of.
        tile_m, tile_n = split(uint32(cuda.blockIdx.x), n_tiles, n_tiles_m, n_tiles_s)
        first_m = uint32(tile_m * uint32(block_m))
        first_n = uint32(tile_n * uint32(OUTPUTS))
        begin = uint32(uint32(cuda.blockIdx.y) * strip)
        weight += uint64(tile_n) * uint64(taps * TAP_BYTES)
        row = pitch, pitch_m, pitch_s, lines, lines_m, lines_s
        image = images, height, width, top, uint32(left - begin)
        further = round_lines, round_columns, round_pixels
        copy_to, weight = start(tid, x, weight, first_m, row, image, further)

        # While the copies come: what the sums begin with, and where they go.
        acc = cuda.local.array(count, float32)
        begin_sums(acc, tid, first_n, bias)
        outputs = (images, out_height, out_width, out_channels, y_step, begin,
                   min(strip, uint32(out_width - begin)))
        places = find_places(tid, first_m, first_n, row, outputs)
        if has_residual:
            request(residual, places)
        multiply(acc, tid, copy_to, weight, pitch)
        let_next_begin()
        finish(acc, places, residual, has_residual, y, low, high)

    return conv_halo


@cuda.jit(device=True, inline="always")
def split_position(position, row):
    """(image, line, column)"""
    pitch, pitch_m, pitch_s, lines, lines_m, lines_s = row
    line, column = split(position, pitch, pitch_m, pitch_s)
    image, line = split(line, lines, lines_m, lines_s)
    return image, line, column


def pixel_copies(tile: HaloTile) -> Callable:
    """Device function: start copying a block's pixels, zeros in the padding; of this thread those
    of each `round_rows`-th position, to `target` and on. x: where its chunk is in the first pixel.

    Only the first position is split. How many lines, columns and pixels further the next one is
    the host knows, but for the ends of lines and images.
    """
    rounds, round_bytes = tile.rows // tile.round_rows, tile.threads * 16

    @cuda.jit(device=True, inline="always")
    def copy_pixels(target, x, position, row, image, further):
        images, height, width, top, left = image
        lines, columns, pixels = further
        pitch, image_lines = row[0], row[3]
        n, line, column = split_position(position, row)
        h, w = uint32(line - top), uint32(column - left)    # wrap around above and left of it
        at, count = uint32((n * height + h) * width + w), uint32(images * height * width)
        last_w, last_h = uint32(pitch - left - columns), uint32(image_lines - top)
        for i in range(rounds):
            size = uint32(16) if h < height and w < width and at < count else uint32(0)
            cp_async_16_zfill(uint32(target + uint32(i * round_bytes)),
                              x + uint64(at) * uint64(ROW_BYTES), size)
            over = int32(w) >= int32(last_w)                # in the line after that
            h = uint32(h + lines + uint32(over))
            w = uint32(w + columns - (pitch if over else uint32(0)))
            at = uint32(at + (uint32(pixels + width - pitch) if over else pixels))
            over = int32(h) >= int32(last_h)                # in the image after that
            h = uint32(h - (image_lines if over else uint32(0)))
            at = uint32(at + (uint32((height - image_lines) * width) if over else uint32(0)))

    return copy_pixels


def weight_copy(tile: HaloTile) -> Callable:
    """Device function: start copying a tap's weights, this thread's chunks from `target` on."""
    rounds, round_bytes = OUTPUTS // tile.round_rows, tile.threads * 16

    @cuda.jit(device=True, inline="always")
    def copy_weights(target, weight):
        for i in range(rounds):
            cp_async_16(uint32(target + uint32(i * round_bytes)),
                        weight + uint64(i * round_bytes))

    return copy_weights


def first_copies(tile: HaloTile) -> Callable:
    """Device function: start copying the weights of the first `ahead` taps, and the pixels, which
    wait for the inputs; a group for each stage but the last, of which the first has it all.
    Gives this thread's place in the first row of pixels, and its first chunk of the weights."""
    ring, ahead, groups = tile.ring, tile.ahead, tile.stages - 1
    copy_weights, copy_pixels = weight_copy(tile), pixel_copies(tile)

    @cuda.jit(device=True, inline="always")
    def start(tid, x, weight, first, row, image, further):
        place, chunk = uint32(tid // uint32(CHUNKS)), uint32(tid % uint32(CHUNKS))
        swizzled = uint32(chunk ^ (place & uint32(7)))
        copy_to = keep(uint32(dynamic_smem() + place * uint32(ROW_BYTES)
                              + (swizzled << uint32(4))))
        weight += uint64(uint32(tid << uint32(4)))
        for tap in range(ahead):
            copy_weights(uint32(copy_to + uint32(ring + tap * TAP_BYTES)),
                         weight + uint64(tap * TAP_BYTES))
        wait_for_inputs()
        copy_pixels(copy_to, x + uint64(uint32(chunk << uint32(4))), uint32(first + place), row,
                    image, further)
        for _ in range(groups):
            cp_async_commit()
        return copy_to, weight

    return start


def multiply_taps(dtype: str, tile: HaloTile, kernel: tuple[int, int]) -> Callable:
    """Device function: acc += the products of all taps."""
    taps, kernel_w = kernel[0] * kernel[1], kernel[1]
    ring, ahead, at_once, slots = tile.ring, tile.ahead, tile.taps, tile.stages * tile.taps
    copy_weights, wait_for_oldest = weight_copy(tile), cp_async_wait(tile.stages - 2)
    multiply, wait_for_products = products(dtype, OUTPUTS), wait_for_sums(OUTPUTS)

    @cuda.jit(device=True, inline="always")
    def multiply_all(acc, tid, copy_to, weight, pitch):
        smem = dynamic_smem()
        pixels = descriptor(uint32(smem + warpgroup(tid) * uint32(64 * ROW_BYTES)))
        weights = descriptor(uint32(smem + uint32(ring)))
        for tap in range(taps):
            if tap % at_once == 0:
                wait_for_oldest()
                fence_proxy_async()
                cuda.syncthreads()          # these weights are here, and those before used up
            position = uint32(uint32(tap // kernel_w) * pitch + uint32(tap % kernel_w))
            multiply(acc, pixels + uint64(uint32(position * uint32(CHUNKS))),
                     weights + uint64(tap % slots * TAP_BYTES // 16))
            if tap + ahead < taps:
                copy_weights(uint32(copy_to + uint32(ring + (tap + ahead) % slots * TAP_BYTES)),
                             weight + uint64((tap + ahead) * TAP_BYTES))
            if tap % at_once == at_once - 1 or tap == taps - 1:
                cp_async_commit()
                # Before copies write over what was multiplied, or the sums are read.
                if tap + 1 + ahead < taps or tap == taps - 1:
                    wait_for_products(acc)

    return multiply_all


@cuda.jit(device=True, inline="always")
def place_of(position, channel, row, outputs):
    """Which element of y a channel of a position is, OUTSIDE if the strip has no such output."""
    images, out_height, out_width, out_channels, y_step, begin, columns = outputs
    n, line, w = split_position(position, row)
    pixel = uint32((n * out_height + line) * out_width + begin + w)
    inside = n < images and line < out_height and w < columns and channel < out_channels
    return keep(uint32(pixel * y_step + channel) if inside else uint32(OUTSIDE))


@cuda.jit(device=True, inline="always")
def find_places(tid, first_m, first_n, row, outputs):
    """Of a lane's first runs: (the place of the upper row's, of the lower row's, whether there are
    outputs for the second ones)"""
    warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
    position = uint32(first_m + (warp << uint32(4)) + (lane >> uint32(2)))
    channel = uint32(first_n + (lane & uint32(3)) * uint32(RUN))
    return (place_of(position, channel, row, outputs),
            place_of(uint32(position + uint32(8)), channel, row, outputs),
            uint32(channel + uint32(RUN_COLUMNS)) < outputs[3])


@cuda.jit(device=True, inline="always")
def place_of_run(places, run):
    """(bytes from the beginning of y, is it there?)"""
    upper, lower, more = places
    place = lower if run % 2 else upper
    return (uint64(place) * uint64(SIZE) + uint64(run // 2 * RUN_COLUMNS * SIZE),
            place < uint32(OUTSIDE) and (run < 2 or more))


@cuda.jit(device=True, inline="always")
def request(residual, places):
    """Has the lane's part of the residual brought into L2, so that it comes while others multiply.
    """
    for run in range(RUNS):
        at, there = place_of_run(places, run)
        if there:
            prefetch_l2(residual + at)


def store_runs(dtype: str, sums: Sums, activation_name: str) -> Callable:
    """Device function: y = activation(acc + residual), of a lane's runs; those of both rows take
    turns."""
    load, store = vector.load(dtype, RUN, fill=0.0), vector.store(dtype, RUN)
    activate, take, put, count = activation(activation_name, ARCH), sums.take, sums.put, RUNS * RUN

    @cuda.jit(device=True, inline="always")
    def finish(acc, places, residual, has_residual, y, low, high):
        added = cuda.local.array(count, float32)
        value = cuda.local.array(RUN, float32)
        if has_residual:
            # Loads together: their latency passes once, not once a run.
            for run in range(RUNS):
                at, there = place_of_run(places, run)
                load(added, run * RUN, residual + at, there)
            for run in range(RUNS):
                take(value, acc, run % 2, run // 2)
                for i in range(RUN):
                    value[i] += added[run * RUN + i]
                put(acc, run % 2, run // 2, value)
        for run in range(RUNS):
            take(value, acc, run % 2, run // 2)
            for i in range(RUN):
                value[i] = activate(value[i], low, high)
            at, there = place_of_run(places, run)
            if there:
                store(y + at, value, 0)

    return finish
