"""Convolution as an implicit GEMM: the frame that tensor cores and CUDA cores fill in.

    y[pixel, o] = sum over k of patch[pixel, k] * weight[o, k],    k = (kernel row, column, channel)

A block computes a block_m x block_n tile of y, a warp warp_m x warp_n of that. The sum over k is
walked in slices of `row_bytes`, which pass through shared memory. No patch matrix is ever stored:
each thread copies the same 16-byte chunk of a few rows of the patch tile straight from the image,
and all of its rows stand under the same tap at a time. So a copy costs one addition (the row's
first pixel + the tap's offset) and one test of a bit mask (is this tap outside the image for this
row? then zeros are copied). The tap advances by additions.

Weights lie in memory tile by tile, in the order in which blocks copy them: a thread's copies of one
slice are a constant apart, and so are the slices.

Everything is counted in 16-byte chunks: 8 channels of float16 or bfloat16, 4 of float32.

A pointwise convolution or a matrix product is the case of one tap: the loop is the same machine
code and the tap never advances, so there is no second kernel for it.

conv_mma.py, conv_wgmma.py and conv_simt.py say how a slice is copied and multiplied, conv_sums.py
how the sums then lie, and conv_epilogue.py how they become y.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .index import DIVISOR, split
from .ptx import asm_op, cuda, dynamic_smem, float32, let_next_begin, uint32, uint64

MOST_TAPS = (15, 16)        # kernel rows and columns that the bit masks hold
ONE_TAP = 0xFFFEFFFE        # the mask of one row and one column, both inside of the image

# The compiler would rather compute an address anew in every round of the loop than keep a register
# for it. A value that went through `keep` can only be kept.
keep = asm_op("keep", "mov.b32 $0, $1;", uint32, [uint32])


# How a block ends: it has all of the sum over k and makes y; it has a part of it, and stores a
# plane of fp32 [splits, pixels, out_channels], which splitk.py makes y of; or it has a part and
# makes y together with the blocks that have the others (conv_cluster.py).
WHOLE, PLANE, CLUSTER = ENDINGS = ("whole", "plane", "cluster")


class Tile(NamedTuple):
    """Tile sizes in elements; row_bytes is the depth of one slice.

    blocks: whose registers shall fit a multiprocessor. Left to itself ptxas divides them among more
    than shared memory admits, and spills, or among fewer.
    wgmma: a warpgroup multiplies 64 rows by all of block_n (conv_wgmma.py), a warp 16 of them.
    """
    block_m: int
    block_n: int
    row_bytes: int
    stages: int
    warp_m: int
    warp_n: int
    blocks: int
    wgmma: bool = False

    @property
    def threads(self) -> int:
        return self.block_m // self.warp_m * (self.block_n // self.warp_n) * 32

    @property
    def chunks(self) -> int:
        """Of one row of a slice."""
        return self.row_bytes // 16

    @property
    def norm_bytes(self) -> int:
        """Of a slice's scales and shifts, fp32, for elements of 16 bits: conv_norm.py."""
        return self.row_bytes // 2 * 8

    @property
    def rows(self) -> int:
        """Rows that a block copies at a time, one chunk a thread."""
        return self.threads // self.chunks

    @property
    def shared_bytes(self) -> int:
        """Of the slices."""
        return self.stages * (self.block_m + self.block_n) * self.row_bytes

    @property
    def cluster_bytes(self) -> int:
        """Shared memory where all sums of a block pass through it: conv_cluster.py."""
        return max(self.shared_bytes, self.block_m * self.sums_pitch)

    @property
    def sums_pitch(self) -> int:
        """Bytes in shared memory from one row of a block's fp32 sums to the next: 4 floats more
        than need be, so that the rows which a warp writes at a time lie in distinct banks."""
        return (self.block_n + 4) * 4


# x, norm (conv_norm.py), weight [groups][tiles along n][slices], bias (fp32, [groups][rows padded
# to block_n]), residual, has_residual, y, low, high, pixels, elements from a pixel of y (and of the
# residual) to the next, out_channels of a group, padded rows of a group, whole (1: all chunks of y
# are whole and aligned), pointwise (1: each row is the pixel of x that has its number), chunks from
# a pixel of x to the next, height, width, stride (h, w), top, left, dilation (h, w), kernel_h,
# steps of the tap (next column, next row), slices, slices of one split, then divisors: tiles along
# n, out_width, out_height, chunks of a pixel in one group, kernel_w.
# Grid: tiles, splits, groups.
SIGNATURE = (("pointer",) * 5 + ("uint32", "pointer") + ("float32",) * 2 + ("uint32",) * 20
             + DIVISOR * 5)


def frame(tile: Tile, request: Callable, begin_sums: Callable, start: Callable,
          multiply: Callable, finish: Callable) -> Callable:
    """The kernel.

    start       device function (smem, tid, x, base, outside, tap, walk, weight, count): starts
                copying the first slices, and waits for the inputs before it reads x; the tap and
                the weight that `multiply` goes on with. base and outside are those of
                `row_setup`, tap and walk those of `next_tap`, weight is the thread's first chunk
                of the first slice
    multiply    device function (acc, smem, tid, x, base, outside, tap, walk, weight, count, norm):
                acc += the products of `count` slices; norm: where the first one's numbers are
    request, begin_sums, finish     conv_epilogue.py's, what it does in the beginning and at the end
    """
    block_m, block_n, chunks, rows = tile.block_m, tile.block_n, tile.chunks, tile.rows
    a_rounds, b_bytes = block_m // rows, block_n * tile.row_bytes
    norm_bytes = tile.norm_bytes
    acc_count = tile.warp_m * tile.warp_n // 32
    same_pixels, first_pixels = row_setup(a_rounds, rows)

    def conv(x, norm, weight, bias, residual, has_residual, y, low, high, pixels, y_step,
             group_out, padded_out, whole, pointwise, pixel_chunks, height, width, stride_h,
             stride_w, top, left, dilation_h, dilation_w, kernel_h, next_column, next_row, slices,
             split_slices, n_tiles, n_tiles_m, n_tiles_s, out_w, out_w_m, out_w_s, out_h, out_h_m,
             out_h_s, group_chunks, group_chunks_m, group_chunks_s, kernel_w, kernel_w_m,
             kernel_w_s):
        tid = uint32(cuda.threadIdx.x)
        group = uint32(cuda.blockIdx.z)
        # Neighbouring blocks share pixels: the image, not the weights, is what L2 can not hold.
        tile_m, tile_n = split(uint32(cuda.blockIdx.x), n_tiles, n_tiles_m, n_tiles_s)
        first_m = uint32(tile_m * uint32(block_m))
        first_n = uint32(tile_n * uint32(block_n))
        first_slice = uint32(uint32(cuda.blockIdx.y) * split_slices)
        count = min(split_slices, uint32(slices - first_slice))
        smem = dynamic_smem()

        # What this thread copies: chunk `chunk` of rows row, row + rows, ...
        row, chunk = uint32(tid // uint32(chunks)), uint32(tid % uint32(chunks))
        base = cuda.local.array(a_rounds, uint32)
        outside = cuda.local.array(a_rounds, uint32)
        # The bits after those of the last kernel row and column; of a 16th column there is none.
        end_h = uint32(uint32(1) << kernel_h)
        end_w = uint32(uint64(1 << 16) << uint64(kernel_w))
        first, group_chunk = uint32(first_m + row), uint32(group * group_chunks)
        if pointwise:
            same_pixels(base, outside, first, pixels, pixel_chunks, group_chunk)
        else:
            first_pixels(base, outside, first, pixels, pixel_chunks, group_chunk, height, width,
                         stride_h, stride_w, top, left, dilation_h, dilation_w, end_h, end_w,
                         out_w, out_w_m, out_w_s, out_h, out_h_m, out_h_s)
        tap = first_tap(uint32(first_slice * uint32(chunks) + chunk), width, pixel_chunks,
                        dilation_h, dilation_w, kernel_h, group_chunks, group_chunks_m,
                        group_chunks_s, kernel_w, kernel_w_m, kernel_w_s)
        walk = group_chunks, next_column, next_row, end_h, end_w
        weight += (uint64(uint32(uint32(group * n_tiles + tile_n) * slices + first_slice))
                   * uint64(b_bytes) + uint64(uint32(tid * uint32(16))))

        if has_residual:
            request(tid, first_m, first_n, group, residual, pixels, y_step, group_out)
        tap, weight = start(smem, tid, x, base, outside, tap, walk, weight, count)
        acc = cuda.local.array(acc_count, float32)
        begin_sums(acc, tid, first_n, bias + uint64(uint32(group * padded_out)) * uint64(4))
        norm += uint64(first_slice) * uint64(norm_bytes)
        multiply(acc, smem, tid, x, base, outside, tap, walk, weight, count, norm)
        let_next_begin()

        finish(acc, smem, tid, first_m, first_n, group, bias, residual, has_residual, y, low, high,
               pixels, y_step, group_out, padded_out, whole)

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


def next_tap(chunks: int) -> Callable:
    """Device function (tap, walk) -> the tap one slice further: usually in the same pixel, else
    over to the next ones. After the last row its key stays the last one, which is outside of every
    image: zeros."""
    @cuda.jit(device=True, inline="always")
    def advance(tap, walk):
        c, offset, key_h, key_w = tap
        group_chunks, next_column, next_row, end_h, end_w = walk
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

    return advance


def row_setup(a_rounds: int, rows: int) -> tuple[Callable, Callable]:
    """Device functions: where the rows that a thread copies begin, and which taps miss the image;
    of a pointwise convolution, whose rows are the pixels of the image, and of any other.

    base[i]     chunk index of the first tap's pixel; wraps below 0 in the padding
    outside[i]  bit kh: kernel row kh is outside; bit 16 + kw: kernel column kw is. Bits of taps
                that do not exist are set, too, and all bits of rows beyond the last pixel
    """
    @cuda.jit(device=True, inline="always")
    def same_pixels(base, outside, first, pixels, pixel_chunks, group_chunk):
        for i in range(a_rounds):
            pixel = uint32(first + uint32(i * rows))
            base[i] = keep(uint32(pixel * pixel_chunks + group_chunk))
            outside[i] = uint32(ONE_TAP) if pixel < pixels else uint32(0xFFFFFFFF)

    @cuda.jit(device=True, inline="always")
    def clear_inside(outside, at, size, dilation, bit, end):
        while bit != end:
            for i in range(a_rounds):
                if at[i] < size:
                    outside[i] = uint32(outside[i] & ~bit)
                at[i] = uint32(at[i] + dilation)
            bit = uint32(bit << uint32(1))

    @cuda.jit(device=True, inline="always")
    def first_pixels(base, outside, first, pixels, pixel_chunks, group_chunk, height, width,
                     stride_h, stride_w, top, left, dilation_h, dilation_w, end_h, end_w, out_w,
                     out_w_m, out_w_s, out_h, out_h_m, out_h_s):
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
        clear_inside(outside, h, height, dilation_h, uint32(1), end_h)
        clear_inside(outside, w, width, dilation_w, uint32(1 << 16), end_w)

    return same_pixels, first_pixels
