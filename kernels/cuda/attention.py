"""Attention on tensor cores: scores never leave the registers (Dao et al. 2022, arXiv:2205.14135).

A block takes 64 queries of one matrix, a warp 16 of them, and goes over tiles of 64 keys and
values, of which the next is copied meanwhile. A warp multiplies its queries by a tile's keys; the
fragments of these sums, rounded to half precision, are those of the left matrix of the product with
the values. Of each row the greatest score so far and the sum of exponentials relative to it are
kept; where a tile has a greater one, what was summed up is scaled down to it.

Rows in shared memory are 16 bytes longer than need be, so that the eight rows which one phase of
ldmatrix reads lie in distinct banks. Sums are fp32.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .conv_mma import MMA
from .index import AXES, DIVISOR, split, split_axes
from .ptx import (
    Regs,
    asm_op,
    cp_async_16_zfill,
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
from .softmax import ALL, LOWEST

WARPS, THREADS = 4, 128
QUERIES, KEYS = 16 * WARPS, 64      # of a block; of a tile
SCORES, SHARES = KEYS // 2, KEYS // 4     # registers of a lane
MOST = 128                          # columns of a matrix: more sums than these no thread can hold
NOTHING = float("-inf")
LOG2_E = 1.4426950408889634
STEPS = ("uint32",) * 5             # of one operand

# q, k, v, bias, y, scale * log2(e), queries, keys, depth, width, tiles of queries, the leading
# axes, then steps in elements of q, k, v, y and bias, along these and then of each from row to row,
# and of bias from column to column. Grid: tiles of all matrices.
SIGNATURE = (("pointer",) * 5 + ("float32",) + ("uint32",) * 4 + DIVISOR + AXES + STEPS * 5
             + ("uint32",))

exp2 = asm_op("exp2", "ex2.approx.ftz.f32 $0, $1;", float32, [float32], pure=True)
# As ldmatrix_x4, each matrix turned: a lane receives elements (2 * (lane % 4) + {0, 1}, lane // 4).
ldmatrix_x4_trans = asm_op(
    "ldmatrix_x4_trans", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
    Regs(uint32, 4), [uint32], memory=True)
cp_async_8_zfill = asm_op("cp_async_8_zfill", "cp.async.ca.shared.global [$0], [$1], 8, $2;", None,
                          [uint32, uint64, uint32], memory=True)
COPY = {8: cp_async_16_zfill, 4: cp_async_8_zfill}      # by how many elements
wait_for_all_but_one = cp_async_wait(1)


def padded(columns: int) -> int:
    """Columns in shared memory: as many as products of 16 take."""
    return -(-columns // 16) * 16


def shared_bytes(depth: int, width: int) -> int:
    """Of the queries and two tiles of keys and of values."""
    return (QUERIES + 2 * KEYS) * _pitch(depth) + 2 * KEYS * _pitch(width)


def _pitch(columns: int) -> int:
    return padded(columns) * 2 + 16


def make(dtype: str, depth: int, width: int, lanes: int, biased: bool) -> Callable:
    """depth, width: the columns of q and k and of v, as `padded` gives them; lanes: elements that
    are copied together, of COPY."""
    k_pitch, v_pitch, columns = _pitch(depth), _pitch(width), width // 8
    query_count, sums = depth // 4, columns * 4
    k_first = QUERIES * k_pitch
    v_first = k_first + 2 * KEYS * k_pitch
    copy_queries, copy_keys, copy_values = (row_copy(rows, columns, lanes) for rows, columns in (
        (QUERIES, depth), (KEYS, depth), (KEYS, width)))
    read_queries, multiply_keys = query_fragments(depth), score_product(dtype, depth)
    soften, multiply_values = online_softmax(dtype, columns, biased), value_product(dtype, width)
    finish = store_rows(dtype, columns)

    def attention(q, k, v, bias, y, scale, queries, keys, q_columns, v_columns, tiles, tiles_m,
                  tiles_s, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s, q0, q1, q2, q3,
                  k0, k1, k2, k3, v0, v1, v2, v3, y0, y1, y2, y3, b0, b1, b2, b3, q_row, k_row,
                  v_row, y_row, b_row, b_column):
        tid = uint32(cuda.threadIdx.x)
        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        matrix, tile = split(uint32(cuda.blockIdx.x), tiles, tiles_m, tiles_s)
        i0, i1, i2, i3 = split_axes(matrix, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s)
        q += uint64(uint32(i0 * q0 + i1 * q1 + i2 * q2 + i3 * q3)) * uint64(2)
        k += uint64(uint32(i0 * k0 + i1 * k1 + i2 * k2 + i3 * k3)) * uint64(2)
        v += uint64(uint32(i0 * v0 + i1 * v1 + i2 * v2 + i3 * v3)) * uint64(2)
        y += uint64(uint32(i0 * y0 + i1 * y1 + i2 * y2 + i3 * y3)) * uint64(2)
        bias += uint64(uint32(i0 * b0 + i1 * b1 + i2 * b2 + i3 * b3)) * uint64(2)
        first = uint32(tile * uint32(QUERIES))
        row = uint32(first + warp * uint32(16) + (lane >> uint32(2)))   # and the one 8 further
        smem = dynamic_smem()
        k_smem, v_smem = uint32(smem + uint32(k_first)), uint32(smem + uint32(v_first))

        wait_for_inputs()
        copy_queries(smem, tid, q, first, queries, q_row, q_columns)
        copy_keys(k_smem, tid, k, uint32(0), keys, k_row, q_columns)
        copy_values(v_smem, tid, v, uint32(0), keys, v_row, v_columns)
        cp_async_commit()
        query = cuda.local.array(query_count, uint32)
        score = cuda.local.array(SCORES, float32)
        share = cuda.local.array(SHARES, uint32)
        acc = cuda.local.array(sums, float32)
        for i in range(sums):
            acc[i] = float32(0)
        state = cuda.local.array(4, float32)        # greatest scores and sums of both rows
        state[0] = state[1] = float32(LOWEST)
        state[2] = state[3] = float32(0)

        key, slot = uint32(0), uint32(0)
        while key < keys:
            following, other = uint32(key + uint32(KEYS)), uint32(uint32(1) - slot)
            if following < keys:
                copy_keys(uint32(k_smem + other * uint32(KEYS * k_pitch)), tid, k, following, keys,
                          k_row, q_columns)
                copy_values(uint32(v_smem + other * uint32(KEYS * v_pitch)), tid, v, following,
                            keys, v_row, v_columns)
            cp_async_commit()
            wait_for_all_but_one()
            cuda.syncthreads()                  # this tile is here
            if key == uint32(0):
                read_queries(query, uint32(smem + warp * uint32(16 * k_pitch)), lane)
            multiply_keys(score, query, uint32(k_smem + slot * uint32(KEYS * k_pitch)), lane)
            soften(share, score, acc, state, scale, row, queries, key, keys, lane, bias, b_row,
                   b_column)
            multiply_values(acc, share, uint32(v_smem + slot * uint32(KEYS * v_pitch)), lane)
            cuda.syncthreads()                  # and is used up
            key, slot = following, other
        let_next_begin()
        finish(y, acc, state, row, queries, y_row, v_columns, lane)

    return attention


def row_copy(rows: int, columns: int, lanes: int) -> Callable:
    """Device function: start copying rows to `target`, zeros where there is no row or column."""
    chunks, pitch, copy = columns // lanes, _pitch(columns), COPY[lanes]
    rounds = -(-rows * chunks // THREADS)

    @cuda.jit(device=True, inline="always")
    def copy_rows(target, tid, source, first, count, step, valid):
        for i in range(rounds):
            number = uint32(tid + uint32(i * THREADS))
            row, chunk = uint32(number // uint32(chunks)), uint32(number % uint32(chunks))
            column = uint32(chunk * uint32(lanes))
            if row < uint32(rows):
                inside = (uint32(first + row) < count) & (column < valid)
                at = uint32((first + row) * step + column)
                copy(uint32(target + row * uint32(pitch) + column * uint32(2)),
                     source + uint64(at) * uint64(2), uint32(2 * lanes) if inside else uint32(0))

    return copy_rows


def query_fragments(depth: int) -> Callable:
    """Device function: the 16 queries of a warp as left fragments, 4 registers each 16 columns."""
    pitch = _pitch(depth)

    @cuda.jit(device=True, inline="always")
    def read_queries(query, smem, lane):
        at = uint32(smem + (lane & uint32(15)) * uint32(pitch) + (lane >> uint32(4)) * uint32(16))
        for step in range(depth // 16):
            fragment = ldmatrix_x4(uint32(at + uint32(step * 32)))
            query[step * 4] = fragment[0]       # constant tuple indices only
            query[step * 4 + 1] = fragment[1]
            query[step * 4 + 2] = fragment[2]
            query[step * 4 + 3] = fragment[3]

    return read_queries


def two_products(dtype: str) -> Callable:
    """Device function: sums of two neighbouring tiles of 8 columns, from acc[first] on, += the
    products of a left fragment and two right ones."""
    mma = MMA[dtype]

    @cuda.jit(device=True, inline="always")
    def multiply_pair(acc, first, left, right):
        d = mma((acc[first], acc[first + 1], acc[first + 2], acc[first + 3]), left,
                (right[0], right[1]))
        acc[first] = d[0]                       # constant tuple indices only
        acc[first + 1] = d[1]
        acc[first + 2] = d[2]
        acc[first + 3] = d[3]
        d = mma((acc[first + 4], acc[first + 5], acc[first + 6], acc[first + 7]), left,
                (right[2], right[3]))
        acc[first + 4] = d[0]
        acc[first + 5] = d[1]
        acc[first + 6] = d[2]
        acc[first + 7] = d[3]

    return multiply_pair


def score_product(dtype: str, depth: int) -> Callable:
    """Device function: score = 16 queries @ 64 keys.T, 8 keys to 4 sums of a lane."""
    multiply_pair, pitch = two_products(dtype), _pitch(depth)

    @cuda.jit(device=True, inline="always")
    def multiply_keys(score, query, smem, lane):
        at = uint32(smem + ((lane & uint32(7)) + ((lane >> uint32(4)) << uint32(3))) * uint32(pitch)
                    + ((lane >> uint32(3)) & uint32(1)) * uint32(16))
        for i in range(SCORES):
            score[i] = float32(0)
        for step in range(depth // 16):
            left = (query[step * 4], query[step * 4 + 1], query[step * 4 + 2], query[step * 4 + 3])
            for pair in range(KEYS // 16):
                right = ldmatrix_x4(uint32(at + uint32(pair * 16 * pitch + step * 32)))
                multiply_pair(score, pair * 8, left, right)

    return multiply_keys


def online_softmax(dtype: str, columns: int, biased: bool) -> Callable:
    """Device function: the scores of a tile become shares relative to the greatest score so far, in
    half precision; acc and the sums, what they were relative to before. Keys beyond the last count
    for nothing."""
    pack = asm_op(f"pack_{dtype}", vector.STORAGE[dtype].narrow.format("$1", "$2", w="$0"), uint32,
                  [float32, float32], pure=True)
    load_bias = vector.load(dtype, 1, fill=0.0)

    @cuda.jit(device=True, inline="always")
    def soften(share, score, acc, state, scale, row, queries, key, keys, lane, bias, b_row,
               b_column):
        first = uint32(key + (lane & uint32(3)) * uint32(2))
        added = cuda.local.array(1, float32)
        for i in range(SCORES):
            column = uint32(first + uint32(i // 4 * 8 + i % 2))
            value = score[i] * scale
            if biased:
                line = uint32(row + uint32(i % 4 // 2 * 8))
                load_bias(added, 0, bias + uint64(uint32(line * b_row + column * b_column))
                          * uint64(2), (line < queries) & (column < keys))
                value += added[0] * float32(LOG2_E)
            score[i] = value if column < keys else float32(NOTHING)
        for half in range(2):
            top = state[half]
            for i in range(KEYS // 8):
                top = max(top, max(score[i * 4 + half * 2], score[i * 4 + half * 2 + 1]))
            top = max(top, cuda.shfl_xor_sync(ALL, top, 1))
            top = max(top, cuda.shfl_xor_sync(ALL, top, 2))
            shrink = exp2(float32(state[half] - top))
            total = state[2 + half] * shrink
            for i in range(KEYS // 8):
                for j in range(2):
                    at = i * 4 + half * 2 + j
                    score[at] = exp2(float32(score[at] - top))
                    total += score[at]
            for i in range(columns):
                acc[i * 4 + half * 2] *= shrink
                acc[i * 4 + half * 2 + 1] *= shrink
            state[half] = top
            state[2 + half] = total
        for i in range(SHARES):
            share[i] = pack(float32(score[i * 2]), float32(score[i * 2 + 1]))

    return soften


def value_product(dtype: str, width: int) -> Callable:
    """Device function: acc += the shares of 16 queries @ 64 values, 8 columns to 4 sums of a lane.
    Sums of two neighbouring tiles of 8 keys lie as the left fragment of 16 keys does."""
    multiply_pair, pitch = two_products(dtype), _pitch(width)

    @cuda.jit(device=True, inline="always")
    def multiply_values(acc, share, smem, lane):
        at = uint32(smem + (lane & uint32(15)) * uint32(pitch) + (lane >> uint32(4)) * uint32(16))
        for step in range(KEYS // 16):
            left = (share[step * 4], share[step * 4 + 1], share[step * 4 + 2], share[step * 4 + 3])
            for pair in range(width // 16):
                right = ldmatrix_x4_trans(uint32(at + uint32(step * 16 * pitch + pair * 32)))
                multiply_pair(acc, pair * 8, left, right)

    return multiply_values


def store_rows(dtype: str, columns: int) -> Callable:
    """Device function: divide by the sums, which four lanes have in parts, and write."""
    store = vector.store(dtype, 2)

    @cuda.jit(device=True, inline="always")
    def finish(y, acc, state, row, queries, y_row, valid, lane):
        value = cuda.local.array(2, float32)
        for half in range(2):
            total = state[2 + half]
            total += cuda.shfl_xor_sync(ALL, total, 1)
            total += cuda.shfl_xor_sync(ALL, total, 2)
            inverse = float32(1) / total
            line = uint32(row + uint32(half * 8))
            for i in range(columns):
                column = uint32((lane & uint32(3)) * uint32(2) + uint32(i * 8))
                if (line < queries) & (column < valid):
                    value[0] = acc[i * 4 + half * 2] * inverse
                    value[1] = acc[i * 4 + half * 2 + 1] * inverse
                    store(y + uint64(uint32(line * y_row + column)) * uint64(2), value, 0)

    return finish
