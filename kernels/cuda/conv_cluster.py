"""The end of a sum over k that a cluster of blocks has split among itself (sm_90 and later).

The blocks of one tile of y, each with the sums of its part of k, can read one another's shared
memory. Each puts its sums there; then each adds up some rows of all of them, in the order of the
parts, so that a result does not depend on the schedule, and makes y of these. Nothing passes
through global memory, and no launch has to follow (splitk.py).

(PTX ISA, barrier.cluster, mapa; CUDA C++ Programming Guide, "Distributed Shared Memory".)
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .conv_gemm import Tile
from .conv_sums import Sums
from .ptx import Regs, asm_op, cuda, float32, st_shared_v4_f32, uint32, uint64

LANES = 4           # sums of an access
MOST_OF_A_CLUSTER = 8   # blocks that every GPU with clusters admits
AT_ONCE = 4         # of their sums are always asked for, all before one is used: a read takes some
                    # 200 cycles

cluster_rank = asm_op("cluster_rank", "mov.u32 $0, %cluster_ctarank;", uint32, pure=True)
cluster_size = asm_op("cluster_size", "mov.u32 $0, %cluster_nctarank;", uint32, pure=True)
# What the threads of all blocks wrote before they arrived is there for those that have waited.
cluster_arrive = asm_op("cluster_arrive", "barrier.cluster.arrive.release;", memory=True)
# The same with no such promise, of threads that have only read since.
cluster_arrive_relaxed = asm_op("cluster_arrive_relaxed", "barrier.cluster.arrive.relaxed;",
                                memory=True)
cluster_wait = asm_op("cluster_wait", "barrier.cluster.wait.acquire;", memory=True)
# (address of this block, rank) -> the same place in the shared memory of the block of that rank
map_to_rank = asm_op("map_to_rank", "mapa.shared::cluster.u32 $0, $1, $2;", uint32,
                     [uint32, uint32], pure=True)
ld_cluster_v4_f32 = asm_op("ld_cluster_v4_f32",
                           "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];",
                           Regs(float32, LANES), [uint32], memory=True)


@cuda.jit(device=True, inline="always")
def read_sums(read, address, first, count):
    """read[first] and on: what stands at this place in AT_ONCE of the blocks, from that one on."""
    for s in range(first, first + AT_ONCE):
        v = ld_cluster_v4_f32(map_to_rank(address, min(uint32(s), uint32(count - uint32(1)))))
        read[s * LANES] = v[0]                  # constant tuple indices only
        read[s * LANES + 1] = v[1]
        read[s * LANES + 2] = v[2]
        read[s * LANES + 3] = v[3]


@cuda.jit(device=True, inline="always")
def sum_of_blocks(total, read, address):
    """total = what stands at this place in the shared memory of all blocks of the cluster."""
    count = cluster_size()
    read_sums(read, address, 0, count)
    if count > uint32(AT_ONCE):
        read_sums(read, address, AT_ONCE, count)
    for k in range(LANES):
        total[k] = float32(0)
    for s in range(MOST_OF_A_CLUSTER):
        if uint32(s) < count:
            for k in range(LANES):
                total[k] += read[s * LANES + k]


def put_sums(tile: Tile, sums: Sums) -> Callable:
    """Device function: a warp's sums, into the block's rows of them at `smem`."""
    warp_m, warp_n, warps_n = tile.warp_m, tile.warp_n, tile.block_n // tile.warp_n
    run, rows, columns, row_of, column_of, take, _ = sums
    pitch, runs = tile.sums_pitch, warp_n // columns

    @cuda.jit(device=True, inline="always")
    def put(acc, smem, tid):
        warp, lane = uint32(tid >> uint32(5)), uint32(tid & uint32(31))
        first_row = uint32(uint32(warp // uint32(warps_n)) * uint32(warp_m))
        first_column = uint32(uint32(warp % uint32(warps_n)) * uint32(warp_n) + column_of(lane))
        value = cuda.local.array(run, float32)
        for i in range(rows):
            to = uint32(smem + (first_row + row_of(lane, i)) * uint32(pitch)
                        + (first_column << uint32(2)))
            for g in range(runs):
                take(value, acc, i, g)
                for k in range(0, run, 4):
                    st_shared_v4_f32(uint32(to + uint32((g * columns + k) * 4)), value[k],
                                     value[k + 1], value[k + 2], value[k + 3])

    return put


def cluster_epilogue(stored_as: str, tile: Tile, sums: Sums, activation_name: str) -> Callable:
    """Device function: the block's rows of y, as conv_epilogue.py's `epilogue` makes a warp's."""
    size, pitch = vector.STORAGE[stored_as].bytes, tile.sums_pitch
    put = put_sums(tile, sums)
    across = tile.block_n // LANES                  # threads along a row
    down, block_m = tile.threads // across, tile.block_m
    read_count = MOST_OF_A_CLUSTER * LANES
    load_bias = vector.load("float32", LANES)
    load, load_one = vector.load(stored_as, LANES, fill=0.0), vector.load(stored_as, 1)
    store, store_one = vector.store(stored_as, LANES), vector.store(stored_as, 1)
    activate = activation(activation_name, "sm_90")

    @cuda.jit(device=True, inline="always")
    def finish(acc, smem, tid, first_m, first_n, group, bias, residual, has_residual, y, low, high,
               pixels, y_step, group_out, padded_out, whole):
        cuda.syncthreads()          # the sums go where slices were
        put(acc, smem, tid)
        cluster_arrive()
        column = uint32(tid % uint32(across))
        row = uint32(cluster_rank() * uint32(down) + tid // uint32(across))
        further = uint32(cluster_size() * uint32(down))
        rows = min(uint32(block_m), uint32(pixels - first_m))
        channel = uint32(first_n + column * uint32(LANES))
        total = cuda.local.array(LANES, float32)
        added = cuda.local.array(LANES, float32)
        biases = cuda.local.array(LANES, float32)
        read = cuda.local.array(read_count, float32)
        load_bias(biases, 0, bias + uint64(uint32(group * padded_out + channel)) * uint64(4))
        cluster_wait()
        while row < rows:
            there = (uint64(uint32(first_m + row)) * uint64(y_step)
                     + uint64(uint32(group * group_out + channel))) * uint64(size)
            inside = whole != uint32(0) and channel < group_out
            # Asked for before the sums, it comes while they do.
            load(added, 0, residual + there, inside and has_residual != uint32(0))
            sum_of_blocks(total, read, uint32(smem + row * uint32(pitch) + (column << uint32(4))))
            for k in range(LANES):
                total[k] += biases[k]
            if whole:
                for k in range(LANES):
                    total[k] = activate(total[k] + added[k], low, high)
                if inside:
                    store(y + there, total, 0)
            else:
                # Rows of y are not aligned: one element at a time.
                for k in range(LANES):
                    if uint32(channel + uint32(k)) < group_out:
                        if has_residual:
                            load_one(added, k, residual + there + uint64(k * size))
                        total[k] = activate(total[k] + added[k], low, high)
                        store_one(y + there + uint64(k * size), total, k)
            row = uint32(row + further)
        cluster_arrive_relaxed()    # nobody leaves whose sums another one still reads
        cluster_wait()

    return finish
