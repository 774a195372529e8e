"""Local response norm: each element divided by a power of the squares of channels around it.

Bound by memory. A thread computes one vector of channels and also reads those vectors beside it
that its windows reach, which its neighbours bring into the cache. Exact grids.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from . import vector
from .index import DIVISOR, split, thread_index
from .ptx import cuda, float32, uint32, uint64

THREADS = 256

# x, y, count of threads, channels, then the divisor by which a thread finds its place: vectors;
# then alpha / size, beta, bias
SIGNATURE = ("pointer",) * 2 + ("uint32",) * 2 + DIVISOR + ("float32",) * 3


def make(dtype: str, lanes: int, window: int) -> Callable:
    """y[.., c] = x[.., c] / (bias + alpha * total) ** beta, total being the sum of x * x over
    `window` channels around c."""
    size = vector.STORAGE[dtype].bytes
    load, store = vector.load(dtype, lanes, fill=0.0), vector.store(dtype, lanes)
    before = (window - 1) // 2
    behind, ahead = -(-before // lanes), -(-(window - 1 - before) // lanes)     # vectors
    reach = behind + 1 + ahead
    own, held = behind * lanes, reach * lanes

    def local_response_norm(x, y, count, channels, vectors, vectors_m, vectors_s, alpha, beta,
                            bias):
        thread = thread_index(THREADS)
        if thread >= count:
            return
        _, channel = split(thread, vectors, vectors_m, vectors_s)
        channel = uint32(channel * uint32(lanes))
        place = uint64(thread) * uint64(lanes * size)

        value, result = cuda.local.array(held, float32), cuda.local.array(lanes, float32)
        for i in range(reach):
            # What lies before the first channel wraps to beyond the last.
            load(value, i * lanes, x + place + uint64((i - behind) * lanes * size),
                 uint32(channel + uint32((i - behind) * lanes)) < channels)
        for k in range(lanes):
            total = float32(0)
            for j in range(window):
                near = value[own - before + k + j]
                total += near * near
            result[k] = value[own + k] * math.exp(-beta * math.log(bias + alpha * total))
        store(y + place, result, 0)

    return local_response_norm
