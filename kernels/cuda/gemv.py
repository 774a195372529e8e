"""Matrix-vector product: a linear layer for so few samples that reading the weights is the work.

    y[r, o] = activation(sum over k of x[r, k] * weight[o, k] + bias[o])

Every weight is read once, 16 bytes at a time, UNROLL accesses a thread in flight, and multiplied
with all samples; x stays in the first-level cache. The sum of one output belongs to one warp,
whose lanes exchange their parts in registers, or, where there are too few outputs to occupy the
GPU so, to a block, whose warps then do so in shared memory.

Rows of the weight are filled up to whole accesses; rows of x are not, and x is read as it lies.
Where K is no multiple of an access that means element by element.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation
from .ptx import cuda, float32, uint32, uint64

THREADS = 128
WARPS = THREADS // 32
UNROLL = 4
ALL = 0xFFFFFFFF        # lanes of a warp

# x, weight (rows padded to 16 bytes), bias (fp32), y, low, high, features, outputs, samples,
# bytes of a weight's row
SIGNATURE = ("pointer",) * 4 + ("float32",) * 2 + ("uint32",) * 4


def make(dtype: str, x_lanes: int, most_samples: int, owner_threads: int, activation_name: str
         ) -> Callable:
    """x_lanes: elements of x an access, a divisor of features; most_samples: 1 to 32;
    owner_threads: of one output, 32 or THREADS."""
    size, lanes = vector.STORAGE[dtype].bytes, vector.lanes(dtype)
    count, x_count, parts_count = UNROLL * lanes, most_samples * lanes, WARPS * most_samples
    owner_warps, outputs_of_block = owner_threads // 32, THREADS // owner_threads
    load_weight = vector.load(dtype, lanes, fill=0.0)
    load_x, load_bias = vector.load(dtype, x_lanes, fill=0.0), vector.load("float32", 1)
    store = vector.store(dtype, 1)
    activate = activation(activation_name)

    def gemv(x, weight, bias, y, low, high, features, outputs, samples, row_bytes):
        thread = uint32(cuda.threadIdx.x)
        output = uint32(uint32(cuda.blockIdx.x) * uint32(outputs_of_block)
                        + thread // uint32(owner_threads))
        if output >= outputs:       # a whole warp or none
            return
        lane = uint32(thread & uint32(31))
        weight += uint64(output) * uint64(row_bytes)
        w = cuda.local.array(count, float32)
        values = cuda.local.array(x_count, float32)
        sums = cuda.local.array(most_samples, float32)
        for r in range(most_samples):
            sums[r] = float32(0)
        first = uint32(uint32(thread % uint32(owner_threads)) * uint32(lanes))
        while first < features:
            for u in range(UNROLL):
                k = uint32(first + uint32(u * owner_threads * lanes))
                load_weight(w, u * lanes, weight + uint64(k) * uint64(size), k < features)
            for u in range(UNROLL):
                k = uint32(first + uint32(u * owner_threads * lanes))
                for r in range(most_samples):
                    for j in range(0, lanes, x_lanes):
                        at = uint32(k + uint32(j))
                        load_x(values, r * lanes + j,
                               x + uint64(uint32(r * features + at)) * uint64(size),
                               at < features and uint32(r) < samples)
                for r in range(most_samples):
                    for j in range(lanes):
                        sums[r] += w[u * lanes + j] * values[r * lanes + j]
            first = uint32(first + uint32(UNROLL * owner_threads * lanes))

        total = cuda.local.array(1, float32)
        total[0] = float32(0)
        for r in range(most_samples):
            for step_log in range(5):
                sums[r] += cuda.shfl_xor_sync(ALL, sums[r], 16 >> step_log)
            if lane == uint32(r):       # from here on lane r holds sample r
                total[0] = sums[r]
        if owner_warps > 1:
            parts = cuda.shared.array(parts_count, float32)
            if lane < uint32(most_samples):
                parts[uint32(uint32(thread // uint32(32)) * uint32(most_samples)) + lane] = (
                    total[0])
            cuda.syncthreads()
            if thread >= uint32(most_samples):
                return
            total[0] = float32(0)
            for i in range(WARPS):
                total[0] += parts[uint32(i * most_samples) + lane]
        if lane < samples:
            b = cuda.local.array(1, float32)
            load_bias(b, 0, bias + uint64(output) * uint64(4))
            total[0] = activate(total[0] + b[0], low, high)
            store(y + uint64(uint32(lane * outputs + output)) * uint64(size), total, 0)

    return gemv
