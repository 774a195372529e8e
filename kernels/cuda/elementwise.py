"""Elementwise ops, in place if asked: activations; a + b, a * b, a / b with broadcasting.

Bound by memory. The grids are exact: `flat` gives each thread FLIGHT vectors, whose loads are all
in flight before the first is used, and a thread of `broadcast` computes one vector.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .activation import activation, fake_quantize, relu_fake_quantize
from .index import AXES, split_axes, thread_index
from .ptx import cuda, float32, uint32, uint64

THREADS = 256
FLIGHT = 2      # vectors a thread: with 2048 threads resident, 64 KB in flight per multiprocessor

# a, b (unused by activations), y, count of elements, low, high
FLAT_SIGNATURE = ("pointer",) * 3 + ("uint32",) + ("float32",) * 2


def flat(dtype: str, function: str) -> Callable:
    """y = function(a, b) over arrays of one shape; function: of BINARY, or an activation."""
    size, lanes = vector.STORAGE[dtype].bytes, vector.lanes(dtype)
    total, binary = FLIGHT * lanes, function in BINARY
    load = vector.load(dtype, lanes, fill=0.0, shared_with_stores=True)
    load_one = vector.load(dtype, 1, fill=0.0, shared_with_stores=True)
    store, store_one = vector.store(dtype, lanes), vector.store(dtype, 1)
    compute = BINARY[function] if binary else unary(function)

    def elementwise(a, b, y, count, low, high):
        block = uint32(uint32(cuda.blockIdx.x) * uint32(THREADS * FLIGHT))
        thread = uint32(block + uint32(cuda.threadIdx.x))
        whole = uint32(count // uint32(lanes))
        left = cuda.local.array(total, float32)
        right = cuda.local.array(total, float32)
        for i in range(FLIGHT):
            number = uint32(thread + uint32(i * THREADS))
            offset = uint64(number) * uint64(lanes * size)
            load(left, i * lanes, a + offset, number < whole)
            if binary:
                load(right, i * lanes, b + offset, number < whole)
        for k in range(total):
            left[k] = compute(left[k], right[k] if binary else left[k], low, high)
        for i in range(FLIGHT):
            number = uint32(thread + uint32(i * THREADS))
            if number < whole:
                store(y + uint64(number) * uint64(lanes * size), left, i * lanes)

        # The elements after the last whole vector, one by each of the first threads.
        last = uint32(whole * uint32(lanes) + thread)
        if last < count:
            offset = uint64(last) * uint64(size)
            load_one(left, 0, a + offset, True)
            if binary:
                load_one(right, 0, b + offset, True)
            left[0] = compute(left[0], right[0] if binary else left[0], low, high)
            store_one(y + offset, left, 0)

    return elementwise


# a, b, y, count of vectors, the axes, steps of a (in elements), steps of b
BROADCAST_SIGNATURE = ("pointer",) * 3 + ("uint32",) + AXES + ("uint32",) * 8


def broadcast(dtype: str, lanes: int, function: str, repeat: bool) -> Callable:
    """y = function(a, b) over four axes, each a step of 0 where it is broadcast.

    Along the last axis a steps by 1; so does b, or it repeats one element. y may be a.
    """
    size = vector.STORAGE[dtype].bytes
    load, store = vector.load(dtype, lanes, shared_with_stores=True), vector.store(dtype, lanes)
    load_b = vector.load(dtype, 1 if repeat else lanes)
    compute = BINARY[function]

    def elementwise(a, b, y, count, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s,
                    a0, a1, a2, a3, b0, b1, b2, b3):
        thread = thread_index(THREADS)
        if thread >= count:
            return
        i0, i1, i2, i3 = split_axes(thread, n1, n1_m, n1_s, n2, n2_m, n2_s, n3, n3_m, n3_s)
        i3 = uint32(i3 * uint32(lanes))
        left = cuda.local.array(lanes, float32)
        right = cuda.local.array(lanes, float32)
        load(left, 0, a + uint64(uint32(i0 * a0 + i1 * a1 + i2 * a2 + i3 * a3)) * uint64(size))
        load_b(right, 0, b + uint64(uint32(i0 * b0 + i1 * b1 + i2 * b2 + i3 * b3)) * uint64(size))
        for k in range(lanes):
            left[k] = compute(left[k], right[0 if repeat else k], float32(0), float32(0))
        store(y + uint64(thread) * uint64(lanes * size), left, 0)

    return elementwise


def unary(name: str) -> Callable:
    """The activation as a function of two operands, of which it sees the first."""
    activate = activation(name)

    @cuda.jit(device=True, inline="always")
    def compute(a, b, low, high):
        return activate(a, low, high)
    return compute


@cuda.jit(device=True, inline="always")
def add(a, b, low, high):
    return float32(a + b)


@cuda.jit(device=True, inline="always")
def add_fake_quantize(a, b, scale, zero_point):
    return fake_quantize(float32(a + b), scale, zero_point)


@cuda.jit(device=True, inline="always")
def add_relu_fake_quantize(a, b, scale, zero_point):
    return relu_fake_quantize(float32(a + b), scale, zero_point)


@cuda.jit(device=True, inline="always")
def mul(a, b, low, high):
    return float32(a * b)


@cuda.jit(device=True, inline="always")
def div(a, b, low, high):
    return float32(a / b)


@cuda.jit(device=True, inline="always")
def divide(a, b, low, high):
    """b / a, for operands that have changed places."""
    return float32(b / a)


BINARY: dict[str, Callable] = {
    "add": add, "mul": mul, "div": div, "divide": divide, "add_fake_quantize": add_fake_quantize,
    "add_relu_fake_quantize": add_relu_fake_quantize}
