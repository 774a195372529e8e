"""The end of a convolution's block: y = activation(sums + bias + residual).

Each warp turns 16 rows of its sums around in its own part of shared memory, so that a lane holds
16 bytes of y: residual and y then move in whole sectors (where a lane moved what it has summed
up, 32-byte sectors would move in pieces).

Such a lane has 4 sums or, of 16-bit y, 8, which are 32 bytes of shared memory and are read by two
accesses. Eight lanes' first accesses would meet in the same banks if sums lay in the order of their
columns. So a row begins with what all first accesses read, and what the second ones read follows
after 16 bytes of nothing, by which stores of both halves at a time go to distinct banks, too.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .conv_cluster import cluster_epilogue
from .conv_gemm import CLUSTER, PLANE, Tile, keep, sums_pitch
from .ptx import asm_op, cuda, float32, ld_shared_v4_f32, uint32, uint64

ld_shared_f32 = asm_op("ld_shared_f32", "ld.shared.f32 $0, [$1];", float32, [uint32], memory=True)

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
    def request(tid, first_m, first_n, group, residual, pixels, out_channels, group_out):
        row = uint32(tid // uint32(lines))
        column = uint32(first_n + uint32(tid % uint32(lines)) * uint32(LINE // size))
        if row < uint32(last) and column < group_out:
            for i in range(rounds):
                m = uint32(first_m + row + uint32(i * rows))
                if m < pixels:
                    at = uint64(m) * uint64(out_channels) + uint64(uint32(group * group_out))
                    prefetch_l2(residual + uint64(at + uint64(column)) * uint64(size))

    return request


def ending(how: str, stored_as: str, tile: Tile, width: int, pitch: int, put_rows: Callable,
           activation_name: str) -> Callable:
    """Device function: what `frame` finishes with.

    put_rows    maker (stored_as, width, pitch) of what `epilogue` takes by that name
    """
    if how == CLUSTER:
        return cluster_epilogue(stored_as, tile, width, put_rows(
            "float32", width, sums_pitch(tile.block_n)), activation_name)
    if how == PLANE:
        stored_as = "float32"
    return epilogue(stored_as, tile, width, pitch, put_rows(stored_as, width, pitch),
                    activation_name, how == PLANE)


def second_half(stored_as: str, width: int) -> int:
    """Bytes from a row's beginning to where the second 4 of each 8 sums lie; 0 where there are
    none."""
    return (width // 2 + 4) * 4 if vector.STORAGE[stored_as].bytes == 2 else 0


def epilogue(stored_as: str, tile: Tile, width: int, pitch: int, put_rows: Callable,
             activation_name: str, partial: bool) -> Callable:
    """Device function: a warp's part of y.

    width       columns of sums that pass through shared memory at a time, of all warp_n
    put_rows    device function (acc, first, lane, i): part i of the warp's sums, of 16 rows and
                `width` columns, into shared memory, from `first` on, halves apart; parts of the
                same rows follow one another
    pitch       bytes from one such row to the next
    partial     y is one plane of split sums: no bias, no residual, no activation
    """
    size = vector.STORAGE[stored_as].bytes
    lanes = 16 // size                              # columns a lane holds
    parts = tile.warp_n // width                    # of a row
    steps = tile.warp_m // 16 * parts
    across = width // lanes                         # lanes along a row
    down = 32 // across
    passes, half = 16 // down, second_half(stored_as, width)
    # Rows a lane loads of the residual; after the only part of the sums their registers are free.
    at_once = min(passes, 8 if steps == 1 else 4)
    added_count, bias_count = at_once * lanes, parts * lanes
    load_bias, load_one_bias = vector.load("float32", lanes), vector.load("float32", 1)
    load, load_one = vector.load(stored_as, lanes, fill=0.0), vector.load(stored_as, 1)
    store, store_one = vector.store(stored_as, lanes), vector.store(stored_as, 1)
    warp_m, warp_n, warps_n = tile.warp_m, tile.warp_n, tile.block_n // tile.warp_n
    activate = activation(activation_name, vector.arch(stored_as))

    @cuda.jit(device=True, inline="always")
    def finish(acc, smem, tid, first_m, first_n, group, bias, residual, has_residual, y, low, high,
               pixels, out_channels, group_out, padded_out, whole):
        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        first_m = uint32(first_m + uint32(warp // uint32(warps_n)) * uint32(warp_m))
        first_n = uint32(first_n + uint32(warp % uint32(warps_n)) * uint32(warp_n))
        mine = uint32(smem + warp * uint32(16 * pitch))
        row = uint32(lane // uint32(across))
        column = uint32(lane % uint32(across))
        get = uint32(mine + row * uint32(pitch) + (column << uint32(4)))
        column = uint32(first_n + column * uint32(lanes))
        bias += uint64(uint32(group * padded_out)) * uint64(4)
        # Elements of y before this group's columns; a split has a plane of its own.
        plane = uint64(group) * uint64(group_out)
        if partial:
            plane += uint64(cuda.blockIdx.y) * uint64(pixels) * uint64(out_channels)
        value = cuda.local.array(lanes, float32)
        added = cuda.local.array(added_count, float32)
        biases = cuda.local.array(bias_count, float32)
        if not partial:
            for part in range(parts):
                load_bias(biases, part * lanes,
                          bias + uint64(uint32(column + uint32(part * width))) * uint64(4))
        for step in range(steps):
            top = uint32(first_m + uint32(step // parts * 16))
            left = uint32(step % parts * width)
            here = uint64(plane + uint64(uint32(top + row)) * uint64(out_channels)
                          + uint64(uint32(column + left))) * uint64(size)
            down_bytes = uint64(out_channels) * uint64(down * size)
            # Rows of y from this lane's first one on, if its columns are any of y's.
            inside = uint32(0)
            if uint32(column + left) < group_out and uint32(top + row) < pixels:
                inside = uint32(pixels - uint32(top + row))
            cuda.syncwarp()
            put_rows(acc, mine, lane, step)
            cuda.syncwarp()
            if whole:
                for first in range(0, passes, at_once):
                    if not partial and has_residual:
                        # Loads together: their latency passes once, not once a row.
                        for p in range(at_once):
                            load(added, p * lanes, residual + here + uint64(first + p) * down_bytes,
                                 uint32((first + p) * down) < inside)
                    for p in range(at_once):
                        for j in range(lanes // 4):
                            v = ld_shared_v4_f32(
                                uint32(get + uint32((first + p) * down * pitch + j * half)))
                            value[j * 4] = v[0]         # constant tuple indices only
                            value[j * 4 + 1] = v[1]
                            value[j * 4 + 2] = v[2]
                            value[j * 4 + 3] = v[3]
                        if not partial:
                            for j in range(lanes):
                                value[j] += biases[step % parts * lanes + j]
                            if has_residual:
                                for j in range(lanes):
                                    value[j] += added[p * lanes + j]
                            for j in range(lanes):
                                value[j] = activate(value[j], low, high)
                        if uint32((first + p) * down) < inside:
                            store(y + here + uint64(first + p) * down_bytes, value, 0)
            else:
                # Rows of y are not aligned to 16 bytes: one element at a time. `keep` hides from
                # the compiler how often the loop runs, or it would write it out 16 times.
                e = keep(lane)
                while e < uint32(16 * width):
                    r, c = uint32(e // uint32(width)), uint32(e % uint32(width))
                    at = uint32((c // uint32(lanes) << uint32(4)) + ((c & uint32(3)) << uint32(2)))
                    if c & uint32(lanes - 4):
                        at = uint32(at + uint32(half))
                    value[0] = ld_shared_f32(uint32(mine + r * uint32(pitch) + at))
                    m, c = uint32(top + r), uint32(first_n + left + c)
                    if m < pixels and c < group_out:
                        there = uint64(plane + uint64(m) * uint64(out_channels) + uint64(c))
                        there = uint64(there * uint64(size))
                        if not partial:
                            load_one_bias(biases, 0, bias + uint64(c) * uint64(4))
                            value[0] += biases[0]
                            if has_residual:
                                load_one(added, 0, residual + there)
                                value[0] += added[0]
                            value[0] = activate(value[0], low, high)
                        store_one(y + there, value, 0)
                    e = uint32(e + uint32(32))

    return finish
