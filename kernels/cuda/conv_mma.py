"""Convolution on tensor cores (mma.sync, sm_80 and later): NHWC x OHWI as an implicit GEMM.

    y[pixel, o] = sum over k of patch[pixel, k] * weight[o, k],    k = (kernel row, column, channel)

A block computes a block_m x block_n tile of y, a warp warp_m x warp_n of that. The sum over k is
walked in slices of `row_bytes` through a ring of `stages` buffers in shared memory, filled by
cp.async. No patch matrix is ever stored: each thread copies the same 16-byte chunk of a few rows of
the patch tile straight from the image, and all of its rows stand under the same tap at a time. So
a copy costs one addition (the row's first pixel + the tap's offset) and one test of a bit mask (is
this tap outside the image for this row? then cp.async fills zeros). The tap advances by additions.

Everything is counted in 16-byte chunks: 8 channels of float16 or bfloat16, 4 of float32 (tf32). To
ldmatrix a chunk is a row of an 8x8 matrix of 16-bit values; where the chunk holds 4 floats, each
lane gets just the float that m16n8k8.tf32 wants from it. So one text serves all three dtypes.

A pointwise convolution or a matrix product is the case of one tap: the loop is the same machine
code and the tap never advances, so there is no second kernel for it.

tf32 weights are rounded to nearest on the host; of activations the tensor core ignores the lowest
13 bits (it truncates).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import vector
from .activation import activation
from .index import DIVISOR, split
from .ptx import (
    asm_op,
    cp_async_16,
    cp_async_16_zfill,
    cp_async_commit,
    cp_async_wait,
    cuda,
    dynamic_smem,
    float32,
    ld_shared_v4_f32,
    ldmatrix_x4,
    mma_bf16,
    mma_f16,
    mma_tf32,
    uint32,
    uint64,
)

MMA = {"float16": mma_f16, "bfloat16": mma_bf16, "tf32": mma_tf32}
SHORT = {"float16": "f16", "bfloat16": "bf16", "tf32": "tf32"}
STORED_AS = {"float16": "float16", "bfloat16": "bfloat16", "tf32": "float32"}
MOST_TAPS = (15, 16)        # kernel rows and columns that the bit masks hold

# The compiler would rather compute an address anew in every round of the loop than keep a register
# for it. A value that went through `keep` can only be kept.
keep = asm_op("keep", "mov.b32 $0, $1;", uint32, [uint32])
ld_shared_f32 = asm_op("ld_shared_f32", "ld.shared.f32 $0, [$1];", float32, [uint32], memory=True)
st_shared_v2_f32 = asm_op("st_shared_v2_f32", "st.shared.v2.f32 [$0], {$1, $2};", None,
                          [uint32, float32, float32], memory=True)


class Tile(NamedTuple):
    """Tile sizes in elements; row_bytes is the depth of one slice, 64 or 128 bytes."""
    block_m: int
    block_n: int
    row_bytes: int
    stages: int
    warp_m: int
    warp_n: int

    @property
    def threads(self) -> int:
        return self.block_m // self.warp_m * (self.block_n // self.warp_n) * 32

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.block_m + self.block_n) * self.row_bytes


# x, weight [groups][rows padded to block_n][slices], bias (fp32, padded alike), residual,
# has_residual, y, low, high, pixels, out_channels, out_channels of a group, padded rows of a group,
# whole (1: all chunks of y are whole and aligned), chunks of a pixel, height, width,
# stride (h, w), top, left, dilation (h, w), kernel_h, steps of the tap (next column, next row),
# slices, slices of one split, then divisors: tiles along n, out_width, out_height, chunks of a
# pixel in one group, kernel_w.  Grid: tiles, splits, groups.
SIGNATURE = (("pointer",) * 4 + ("uint32", "pointer") + ("float32",) * 2 + ("uint32",) * 19
             + DIVISOR * 5)


def make(dtype: str, tile: Tile, activation_name: str, partial: bool) -> Callable:
    """partial: one split of the sum over k; y is then float32 [splits, pixels, out_channels], and
    bias, residual and activation are left to the reduction."""
    block_m, block_n, row_bytes, stages, warp_m, warp_n = tile
    threads, chunks = tile.threads, row_bytes // 16
    rows = threads // chunks                        # rows copied per round
    a_rounds, b_rounds = block_m // rows, block_n // rows
    if (chunks not in (4, 8) or rows % 8 or block_m % rows or block_n % rows or warp_m % 16
            or warp_n % 16 or stages < 2 or threads * (warp_n + 8) * 2 > tile.shared_bytes):
        raise ValueError(f"{tile} can not be cut evenly: row_bytes must be 64 or 128, warps "
                         f"multiples of 16x16, and a round of copies ({rows} rows) a multiple of "
                         f"8 and a divisor of block_m and block_n")
    a_bytes = block_m * row_bytes
    stage = a_bytes + block_n * row_bytes
    acc_count = warp_m // 16 * (warp_n // 8) * 4
    warps_n = block_n // warp_n
    # Chunk c of row r is stored at chunk c ^ (r >> shift & mask), so that the eight rows which one
    # phase of ldmatrix reads, and eight neighbouring chunks being written, lie in distinct banks.
    shift, mask = {4: 1, 8: 0}[chunks], chunks - 1
    wait_for_oldest = cp_async_wait(stages - 2)
    first_pixels = row_setup(a_rounds, rows)
    fragment_addresses, multiply = fragments(tile, shift, mask), multiply_slice(dtype, tile)
    finish = epilogue("float32" if partial else STORED_AS[dtype], tile, activation_name, partial)

    @cuda.jit(device=True, inline="always")
    def copy_slice(target, x, base, outside, offset, key, b_source, b_pitch):
        """Start copying one slice of both tiles."""
        for i in range(a_rounds):
            size = uint32(0) if outside[i] & key else uint32(16)
            cp_async_16_zfill(uint32(target + uint32(i * rows * row_bytes)),
                              x + uint64(uint32(base[i] + offset)) * uint64(16), size)
        for i in range(b_rounds):
            cp_async_16(uint32(target + uint32(a_bytes + i * rows * row_bytes)),
                        b_source + uint64(i * rows) * b_pitch)

    @cuda.jit(device=True, inline="always")
    def advance(c, offset, key_h, key_w, group_chunks, next_column, next_row, end_h, end_w):
        """The chunk one slice further: usually the same tap, else over to the next ones. After
        the last row key_h stays at end_h, which is outside of every image: zeros."""
        c = uint32(c + uint32(chunks))
        offset = uint32(offset + uint32(chunks))
        while c >= group_chunks:
            c = uint32(c - group_chunks)
            offset = uint32(offset + next_column)
            key_w = uint32(key_w << uint32(1))
            if key_w == end_w:
                key_w = uint32(1 << 16)
                offset = uint32(offset + next_row)
                key_h = min(uint32(key_h << uint32(1)), end_h)
        return c, offset, key_h, key_w

    def conv(x, weight, bias, residual, has_residual, y, low, high, pixels, out_channels,
             group_out, padded_out, whole, pixel_chunks, height, width, stride_h, stride_w, top,
             left, dilation_h, dilation_w, kernel_h, next_column, next_row, slices, split_slices,
             n_tiles, n_tiles_m, n_tiles_s, out_w, out_w_m, out_w_s, out_h, out_h_m, out_h_s,
             group_chunks, group_chunks_m, group_chunks_s, kernel_w, kernel_w_m, kernel_w_s):
        tid = uint32(cuda.threadIdx.x)
        group = uint32(cuda.blockIdx.z)
        # Neighbouring blocks share pixels: the image, not the weights, is what L2 can not hold.
        tile_m, tile_n = split(uint32(cuda.blockIdx.x), n_tiles, n_tiles_m, n_tiles_s)
        first_m = uint32(tile_m * uint32(block_m))
        first_n = uint32(tile_n * uint32(block_n))
        first_slice = uint32(uint32(cuda.blockIdx.y) * split_slices)
        mine = min(split_slices, uint32(slices - first_slice))
        smem = dynamic_smem()

        # What this thread copies: chunk `chunk` of rows row, row + rows, ...
        row, chunk = uint32(tid // uint32(chunks)), uint32(tid % uint32(chunks))
        swizzled = uint32(chunk ^ ((row >> uint32(shift)) & uint32(mask)))
        copy_to = keep(uint32(smem + row * uint32(row_bytes) + (swizzled << uint32(4))))
        base = cuda.local.array(a_rounds, uint32)
        outside = cuda.local.array(a_rounds, uint32)
        first_pixels(base, outside, uint32(first_m + row), pixels, pixel_chunks,
                     uint32(group * group_chunks), height, width, stride_h, stride_w, top, left,
                     dilation_h, dilation_w, kernel_h, kernel_w, out_w, out_w_m, out_w_s, out_h,
                     out_h_m, out_h_s)
        k = uint32(first_slice * uint32(chunks) + chunk)
        c, offset, key_h, key_w = first_tap(
            k, width, pixel_chunks, dilation_h, dilation_w, kernel_h, group_chunks,
            group_chunks_m, group_chunks_s, kernel_w, kernel_w_m, kernel_w_s)
        end_h = uint32(uint32(1) << kernel_h)
        end_w = uint32(uint32(1 << 16) << kernel_w)
        b_pitch = uint64(uint32(slices * uint32(row_bytes)))
        b_source = (weight + uint64(uint32(group * padded_out + first_n + row)) * b_pitch
                    + uint64(k) * uint64(16))

        for s in range(stages - 1):
            if uint32(s) < mine:
                copy_slice(uint32(copy_to + uint32(s * stage)), x, base, outside, offset,
                           uint32(key_h | key_w), b_source, b_pitch)
                b_source += uint64(row_bytes)
                c, offset, key_h, key_w = advance(c, offset, key_h, key_w, group_chunks,
                                                  next_column, next_row, end_h, end_w)
            cp_async_commit()                   # also when empty: keeps the count of groups

        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        warp_row = uint32(uint32(warp // uint32(warps_n)) * uint32(warp_m))
        warp_col = uint32(uint32(warp % uint32(warps_n)) * uint32(warp_n))
        acc = cuda.local.array(acc_count, float32)
        for i in range(acc_count):
            acc[i] = float32(0)
        a_lane, b_lane = fragment_addresses(smem, lane, warp_row, warp_col)
        slot, free = uint32(0), uint32((stages - 1) * stage)    # byte offsets into the ring
        done = uint32(0)
        while done < mine:
            wait_for_oldest()
            cuda.syncthreads()                  # this slice is here, and the one before is used up
            if uint32(done + uint32(stages - 1)) < mine:
                copy_slice(uint32(copy_to + free), x, base, outside, offset,
                           uint32(key_h | key_w), b_source, b_pitch)
                b_source += uint64(row_bytes)
                c, offset, key_h, key_w = advance(c, offset, key_h, key_w, group_chunks,
                                                  next_column, next_row, end_h, end_w)
            cp_async_commit()
            multiply(acc, uint32(a_lane + slot), uint32(b_lane + slot))
            free = slot
            slot = uint32(slot + uint32(stage))
            if slot == uint32(stages * stage):
                slot = uint32(0)
            done = uint32(done + uint32(1))

        cuda.syncthreads()                      # the epilogue writes over the ring
        finish(acc, smem, warp, lane, uint32(first_m + warp_row), uint32(first_n + warp_col),
               group, bias, residual, has_residual, y, low, high, pixels, out_channels,
               group_out, padded_out, whole)

    return conv


@cuda.jit(device=True, inline="always")
def first_tap(k, width, pixel_chunks, dilation_h, dilation_w, kernel_h, group_chunks,
              group_chunks_m, group_chunks_s, kernel_w, kernel_w_m, kernel_w_s):
    """Where chunk k of the sum lies: (its channel chunk, its distance from the row's first pixel
    in chunks, the bits of its kernel row and column as `row_setup` numbers them)."""
    tap, c = split(k, group_chunks, group_chunks_m, group_chunks_s)
    tap_h, tap_w = split(tap, kernel_w, kernel_w_m, kernel_w_s)
    offset = uint32((tap_h * dilation_h * width + tap_w * dilation_w) * pixel_chunks + c)
    return (c, offset, uint32(uint32(1) << min(tap_h, kernel_h)),
            uint32(uint32(1 << 16) << tap_w))


def row_setup(a_rounds: int, rows: int) -> Callable:
    """Device function: where the rows that a thread copies begin, and which taps miss the image.

    base[i]     chunk index of the first tap's pixel; wraps below 0 in the padding
    outside[i]  bit kh: kernel row kh is outside; bit 16 + kw: kernel column kw is. Bits of taps
                that do not exist are set, too, and all bits of rows beyond the last pixel
    """
    @cuda.jit(device=True, inline="always")
    def first_pixels(base, outside, first, pixels, pixel_chunks, group_chunk, height, width,
                     stride_h, stride_w, top, left, dilation_h, dilation_w, kernel_h, kernel_w,
                     out_w, out_w_m, out_w_s, out_h, out_h_m, out_h_s):
        h = cuda.local.array(a_rounds, uint32)
        w = cuda.local.array(a_rounds, uint32)
        for i in range(a_rounds):
            pixel = uint32(first + uint32(i * rows))
            line, column = split(pixel, out_w, out_w_m, out_w_s)
            image, line = split(line, out_h, out_h_m, out_h_s)
            # A row beyond the last pixel starts so far down that no tap of it is inside.
            h[i] = uint32(line * stride_h - top) if pixel < pixels else uint32(1 << 31)
            w[i] = uint32(column * stride_w - left)
            base[i] = keep(uint32(((image * height + h[i]) * width + w[i]) * pixel_chunks
                                  + group_chunk))
            outside[i] = uint32(0xFFFFFFFF)
        bit = uint32(1)
        for _ in range(kernel_h):
            for i in range(a_rounds):
                if h[i] < height:
                    outside[i] = uint32(outside[i] & ~bit)
                h[i] = uint32(h[i] + dilation_h)
            bit = uint32(bit << uint32(1))
        bit = uint32(1 << 16)
        for _ in range(kernel_w):
            for i in range(a_rounds):
                if w[i] < width:
                    outside[i] = uint32(outside[i] & ~bit)
                w[i] = uint32(w[i] + dilation_w)
            bit = uint32(bit << uint32(1))

    return first_pixels


def fragments(tile: Tile, shift: int, mask: int) -> Callable:
    """Device function: shared addresses of the first chunks that this lane names to ldmatrix.

    One ldmatrix.x4 reads 16 rows x 2 chunks of A, or 2 n8 tiles x 2 chunks of B.
    """
    row_bytes, a_bytes = tile.row_bytes, tile.block_m * tile.row_bytes

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


def multiply_slice(dtype: str, tile: Tile) -> Callable:
    """Device function: acc += one slice, whose first fragments stand at a_first and b_first."""
    row_bytes = tile.row_bytes
    mi_count, ni_count = tile.warp_m // 16, tile.warp_n // 8
    a_count, b_count = mi_count * 4, ni_count * 2
    steps = row_bytes // 32                     # an mma is two chunks deep
    mma = MMA[dtype]

    @cuda.jit(device=True, inline="always")
    def multiply(acc, a_first, b_first):
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


def epilogue(stored_as: str, tile: Tile, activation_name: str, partial: bool) -> Callable:
    """Device function: y = activation(acc + bias + residual).

    An mma leaves a lane two neighbouring columns of a row. Each warp turns its 16 rows around in
    its own part of shared memory, so that a lane holds 16 bytes of y: residual and y then move in
    whole sectors (4-byte accesses would move every 32-byte sector in two halves). Rows are
    8 floats longer than they need be, which puts the stores of a half-warp into distinct banks.
    """
    size = vector.STORAGE[stored_as].bytes
    lanes = 16 // size                              # columns a lane holds
    mi_count, ni_count = tile.warp_m // 16, tile.warp_n // 8
    across = tile.warp_n // lanes                   # lanes along a row
    down = 32 // across
    passes = 16 // down
    added_count = passes * lanes
    pitch = (tile.warp_n + 8) * 4
    warp_n = tile.warp_n
    load_bias, load_one_bias = vector.load("float32", lanes), vector.load("float32", 1)
    load, load_one = vector.load(stored_as, lanes, fill=0.0), vector.load(stored_as, 1)
    store, store_one = vector.store(stored_as, lanes), vector.store(stored_as, 1)
    activate = activation(activation_name)

    @cuda.jit(device=True, inline="always")
    def finish(acc, smem, warp, lane, first_m, first_n, group, bias, residual, has_residual, y,
               low, high, pixels, out_channels, group_out, padded_out, whole):
        mine = uint32(smem + warp * uint32(16 * pitch))
        put = uint32(mine + (lane >> uint32(2)) * uint32(pitch)
                     + ((lane & uint32(3)) << uint32(3)))
        row = uint32(lane // uint32(across))
        column = uint32(uint32(lane % uint32(across)) * uint32(lanes))
        get = uint32(mine + row * uint32(pitch) + (column << uint32(2)))
        column = uint32(first_n + column)
        bias += uint64(uint32(group * padded_out)) * uint64(4)
        # Elements of y before this group's columns; a split has a plane of its own.
        plane = uint64(group) * uint64(group_out)
        if partial:
            plane += uint64(cuda.blockIdx.y) * uint64(pixels) * uint64(out_channels)
        value = cuda.local.array(lanes, float32)
        added = cuda.local.array(added_count, float32)
        biases = cuda.local.array(lanes, float32)
        if not partial:
            load_bias(biases, 0, bias + uint64(column) * uint64(4))
        for mi in range(mi_count):
            top = uint32(first_m + uint32(mi * 16))
            here = uint64(plane + uint64(uint32(top + row)) * uint64(out_channels)
                          + uint64(column)) * uint64(size)
            down_bytes = uint64(out_channels) * uint64(down * size)
            if not partial and has_residual and whole:
                # All loads of these rows at once: their latency passes once, not once a row.
                for p in range(passes):
                    load(added, p * lanes, residual + here + uint64(p) * down_bytes,
                         uint32(top + row + uint32(p * down)) < pixels and column < group_out)
            cuda.syncwarp()
            for ni in range(ni_count):
                o = (mi * ni_count + ni) * 4
                st_shared_v2_f32(uint32(put + uint32(ni * 32)), acc[o], acc[o + 1])
                st_shared_v2_f32(uint32(put + uint32(ni * 32 + 8 * pitch)), acc[o + 2],
                                 acc[o + 3])
            cuda.syncwarp()
            if whole:
                for p in range(passes):
                    for j in range(lanes // 4):
                        v = ld_shared_v4_f32(uint32(get + uint32(p * down * pitch + j * 16)))
                        value[j * 4] = v[0]
                        value[j * 4 + 1] = v[1]
                        value[j * 4 + 2] = v[2]
                        value[j * 4 + 3] = v[3]
                    if not partial:
                        for j in range(lanes):
                            value[j] += biases[j]
                        if has_residual:
                            for j in range(lanes):
                                value[j] += added[p * lanes + j]
                        for j in range(lanes):
                            value[j] = activate(value[j], low, high)
                    if uint32(top + row + uint32(p * down)) < pixels and column < group_out:
                        store(y + here + uint64(p) * down_bytes, value, 0)
            else:
                # Rows of y are not aligned to 16 bytes: one element at a time. `keep` hides from
                # the compiler how often the loop runs, or it would write it out 16 times.
                e = keep(lane)
                while e < uint32(16 * warp_n):
                    r, c = uint32(e // uint32(warp_n)), uint32(e % uint32(warp_n))
                    value[0] = ld_shared_f32(uint32(mine + r * uint32(pitch) + (c << uint32(2))))
                    m, c = uint32(top + r), uint32(first_n + c)
                    if m < pixels and c < group_out:
                        at = uint64(plane + uint64(m) * uint64(out_channels) + uint64(c))
                        at = uint64(at * uint64(size))
                        if not partial:
                            load_one_bias(biases, 0, bias + uint64(c) * uint64(4))
                            value[0] += biases[0]
                            if has_residual:
                                load_one(added, 0, residual + at)
                                value[0] += added[0]
                            value[0] = activate(value[0], low, high)
                        store_one(y + at, value, 0)
                    e = uint32(e + uint32(32))

    return finish
