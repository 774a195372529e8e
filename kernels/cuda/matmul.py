"""Products of matrices that are both computed, however they lie, with fp32 sums.

A block computes 64x64 elements of one product, a thread 4x4 of them. Slices of 16 columns of a and
16 rows of b pass through shared memory as fp32, so that one text serves all dtypes; the next slice
is on its way in registers meanwhile. Attention in half precision has a kernel of its own,
attention.py; these are the other products of networks, few and small.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .conv_simt import st_shared_f32
from .index import AXES, DIVISOR, split, split_axes
from .ptx import cuda, dynamic_smem, float32, ld_shared_v4_f32, uint32, uint64

THREADS = 256
BLOCK, DEPTH = 64, 16           # rows and columns of a block, and what of the sum is one slice
ROUNDS = BLOCK * DEPTH // THREADS
PITCH = BLOCK + 4               # floats from one k to the next: 16-byte vectors, in distinct banks
SHARED_BYTES = 2 * DEPTH * PITCH * 4
STEPS = ("uint32",) * 6         # of one operand

# a, b, bias, has_bias, y, scale, rows, depth, columns, tiles along the columns, the leading axes,
# then steps in elements of a, b, bias and y, along these and then of each from row to row and from
# column to column; columns of y are neighbours. Grid: matrices, tiles.
SIGNATURE = (("pointer",) * 3 + ("uint32", "pointer", "float32") + ("uint32",) * 3 + DIVISOR + AXES
             + STEPS * 4)


def make(a_dtype: str, b_dtype: str, y_dtype: str, lanes: int) -> Callable:
    """y = scale * a @ b + bias, the bias as b's dtype; lanes: that y is stored by."""
    a_size, b_size, y_size = (vector.STORAGE[dtype].bytes for dtype in (a_dtype, b_dtype, y_dtype))
    (load_a, store_a), (load_b, store_b) = slice_copy(a_dtype), slice_copy(b_dtype)
    load_bias, store = vector.load(b_dtype, 1), vector.store(y_dtype, lanes)

    def matmul(a, b, bias, has_bias, y, scale, rows, depth, columns, tiles, tiles_m, tiles_s,
               n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s, a0, a1, a2, a3, b0, b1, b2, b3,
               c0, c1, c2, c3, y0, y1, y2, y3, a_row, a_column, b_row, b_column, c_row, c_column,
               y_row, y_column):
        tid = uint32(cuda.threadIdx.x)
        i0, i1, i2, i3 = split_axes(uint32(cuda.blockIdx.x), n1, n1_m, n1_s, n2, n2_m, n2_s, n3,
                                    n3_m, n3_s)
        tile_m, tile_n = split(uint32(cuda.blockIdx.y), tiles, tiles_m, tiles_s)
        first_m, first_n = uint32(tile_m * uint32(BLOCK)), uint32(tile_n * uint32(BLOCK))
        a += uint64(uint32(i0 * a0 + i1 * a1 + i2 * a2 + i3 * a3)) * uint64(a_size)
        b += uint64(uint32(i0 * b0 + i1 * b1 + i2 * b2 + i3 * b3)) * uint64(b_size)
        smem = dynamic_smem()
        b_smem = uint32(smem + uint32(DEPTH * PITCH * 4))

        acc = cuda.local.array(16, float32)
        for i in range(16):
            acc[i] = float32(0)
        a_next = cuda.local.array(ROUNDS, float32)
        b_next = cuda.local.array(ROUNDS, float32)
        load_a(a_next, tid, a, first_m, rows, a_row, uint32(0), depth, a_column)
        load_b(b_next, tid, b, first_n, columns, b_column, uint32(0), depth, b_row)
        done = uint32(0)
        while done < depth:
            cuda.syncthreads()
            store_a(smem, a_next, tid, a_column)
            store_b(b_smem, b_next, tid, b_row)
            cuda.syncthreads()
            done = uint32(done + uint32(DEPTH))
            load_a(a_next, tid, a, first_m, rows, a_row, done, depth, a_column)
            load_b(b_next, tid, b, first_n, columns, b_column, done, depth, b_row)
            multiply(acc, uint32(smem + (tid >> uint32(4)) * uint32(16)),
                     uint32(b_smem + (tid & uint32(15)) * uint32(16)))

        value = cuda.local.array(4, float32)
        column = uint32(first_n + (tid & uint32(15)) * uint32(4))
        bias += uint64(uint32(i0 * c0 + i1 * c1 + i2 * c2 + i3 * c3)) * uint64(b_size)
        y += uint64(uint32(i0 * y0 + i1 * y1 + i2 * y2 + i3 * y3)) * uint64(y_size)
        for i in range(4):
            row = uint32(first_m + (tid >> uint32(4)) * uint32(4) + uint32(i))
            if row < rows:
                for j in range(4):
                    value[j] = scale * acc[i * 4 + j]
                for j in range(0, 4, lanes):
                    at = uint32(column + uint32(j))
                    if at < columns:
                        if has_bias:
                            add_bias(value, j, bias, uint32(row * c_row), at, c_column)
                        store(y + uint64(uint32(row * y_row + at)) * uint64(y_size), value, j)

    @cuda.jit(device=True, inline="always")
    def add_bias(value, first, bias, line, column, step):
        other = cuda.local.array(1, float32)
        for k in range(lanes):
            load_bias(other, 0, bias + uint64(uint32(line + (column + uint32(k)) * step))
                      * uint64(b_size))
            value[first + k] += other[0]

    return matmul


def slice_copy(dtype: str) -> tuple[Callable, Callable]:
    """Device functions: load this thread's elements of a slice [BLOCK, DEPTH], of lines `step`
    elements apart whose own elements are `k_step` apart, zeros where there is none; and store them
    in shared memory [DEPTH, PITCH]. Neighbouring threads load neighbours in memory."""
    size = vector.STORAGE[dtype].bytes
    load = vector.load(dtype, 1, fill=0.0)

    @cuda.jit(device=True, inline="always")
    def load_slice(values, tid, base, first, lines, step, k_first, depth, k_step):
        for i in range(ROUNDS):
            line, k = place(uint32(tid + uint32(i * THREADS)), k_step)
            line, k = uint32(line + first), uint32(k + k_first)
            inside = (line < lines) & (k < depth)
            load(values, i, base + uint64(uint32(line * step + k * k_step)) * uint64(size), inside)

    @cuda.jit(device=True, inline="always")
    def store_slice(smem, values, tid, k_step):
        for i in range(ROUNDS):
            line, k = place(uint32(tid + uint32(i * THREADS)), k_step)
            st_shared_f32(uint32(smem + (k * uint32(PITCH) + line) * uint32(4)), values[i])

    return load_slice, store_slice


@cuda.jit(device=True, inline="always")
def place(i, k_step):
    """(line, k) of element i of a slice: along k first where that is how they lie."""
    if k_step == uint32(1):
        line, k = uint32(i >> uint32(4)), uint32(i & uint32(15))
    else:
        line, k = uint32(i & uint32(63)), uint32(i >> uint32(6))
    return line, k


@cuda.jit(device=True, inline="always")
def multiply(acc, a_first, b_first):
    """acc += one slice, from this thread's first row and column on."""
    for k in range(DEPTH):
        a = ld_shared_v4_f32(uint32(a_first + uint32(k * PITCH * 4)))
        b = ld_shared_v4_f32(uint32(b_first + uint32(k * PITCH * 4)))
        acc[0] += a[0] * b[0]           # constant tuple indices only
        acc[1] += a[0] * b[1]
        acc[2] += a[0] * b[2]
        acc[3] += a[0] * b[3]
        acc[4] += a[1] * b[0]
        acc[5] += a[1] * b[1]
        acc[6] += a[1] * b[2]
        acc[7] += a[1] * b[3]
        acc[8] += a[2] * b[0]
        acc[9] += a[2] * b[1]
        acc[10] += a[2] * b[2]
        acc[11] += a[2] * b[3]
        acc[12] += a[3] * b[0]
        acc[13] += a[3] * b[1]
        acc[14] += a[3] * b[2]
        acc[15] += a[3] * b[3]
