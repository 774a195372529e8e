"""Elementwise ops: one expression each, swept over flat arrays by all threads."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import ops
from ..axes import collapse
from ..ops import Op, TensorSpec, Unary, count
from ..step import Array, Options, Run, Step
from . import scalar
from .jit import njit
from .parallel import parallel_for
from .simd import at, copy_floats

SWEEP = 512         # elements, 2 KB: a part that stays in L1, and a size that memcpy is fast for
CLIP, SIGMOID, TANH, SILU, HARD_SWISH = range(5)
ADD, MUL = range(2)


# ---- one input --------------------------------------------------------------------------------

@njit()
def unary(code, low, high, x, y, threads):
    """y = f(x); x may be y."""
    in_place = x.ctypes.data == y.ctypes.data
    parallel_for(unary_range, -(-len(y) // SWEEP), threads, (code, low, high, x, y, in_place))


@njit()
def unary_range(thread, first, end, code, low, high, x, y, in_place):
    """Copy and work on the copy in L1: of two arrays that may be one, LLVM makes scalar code."""
    for sweep in range(first, end):
        start = sweep * SWEEP
        part = y[start:start + SWEEP]
        if not in_place:
            copy_floats(at(y, start), at(x, start), len(part))
        apply(code, low, high, part)


@njit()
def apply(code, low, high, y):
    if code == CLIP:
        for i in range(len(y)):
            y[i] = scalar.clip(y[i], low, high)
    elif code == SIGMOID:
        for i in range(len(y)):
            y[i] = scalar.sigmoid(y[i])
    elif code == TANH:
        for i in range(len(y)):
            y[i] = scalar.tanh(y[i])
    elif code == SILU:
        for i in range(len(y)):
            y[i] = scalar.silu(y[i])
    else:
        for i in range(len(y)):
            y[i] = scalar.hard_swish(y[i])


def unary_code(op: Op) -> tuple[int, np.float32, np.float32]:
    """(code, low, high) as `unary` takes them; Relu is a clip."""
    if isinstance(op, ops.Relu):
        return CLIP, np.float32(0), np.float32(np.inf)
    if isinstance(op, ops.Clip):
        return CLIP, np.float32(op.low), np.float32(op.high)
    codes: dict[type[Op], int] = {ops.Sigmoid: SIGMOID, ops.Tanh: TANH, ops.Silu: SILU,
                                  ops.HardSwish: HARD_SWISH}
    return codes[type(op)], np.float32(0), np.float32(0)


def in_place(op: Unary) -> Callable[[Array, int], None]:
    """A function (flat array, threads) that applies the op to the array itself."""
    code, low, high = unary_code(op)
    return lambda y, threads: unary(code, low, high, y, y, threads)


def prepare_unary(op: Unary, inputs: list[TensorSpec], output: TensorSpec,
                  weights: list[Array | None], options: Options) -> Step:
    code, low, high = unary_code(op)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        flat_x, flat_y = arrays[0].reshape(-1), y.reshape(-1)
        return lambda: unary(code, low, high, flat_x, flat_y, options.threads)

    return Step(f"{op.kind.lower()}_f32", bind)


# ---- two inputs -------------------------------------------------------------------------------

@njit()
def binary(code, a, b, y, sizes, a_steps, b_steps, threads):
    """y = a op b over the collapsed axes `sizes`; steps count elements, 0 along a broadcast.

    The last axis is the inner loop; there a steps by 1 and b by 1 or 0.
    """
    parallel_for(binary_range, len(y), threads, (code, a, b, y, sizes, a_steps, b_steps))


@njit()
def binary_range(thread, i, end, code, a, b, y, sizes, a_steps, b_steps):
    inner, last = sizes[-1], len(sizes) - 1
    while i < end:
        row, column = i // inner, i % inner
        run = min(inner - column, end - i)
        a_first, b_first = column * a_steps[last], column * b_steps[last]
        for axis in range(last - 1, -1, -1):
            a_first += row % sizes[axis] * a_steps[axis]
            b_first += row % sizes[axis] * b_steps[axis]
            row //= sizes[axis]
        # Of slices, unlike sums of indices, LLVM sees that nothing wraps: it makes vector code.
        out, left, right = y[i:i + run], a[a_first:a_first + run], b[b_first:b_first + run]
        if b_steps[last] == 0 and code == ADD:
            for k in range(run):
                out[k] = left[k] + right[0]
        elif b_steps[last] == 0:
            for k in range(run):
                out[k] = left[k] * right[0]
        elif code == ADD:
            for k in range(run):
                out[k] = left[k] + right[k]
        else:
            for k in range(run):
                out[k] = left[k] * right[k]
        i += run


def prepare_binary(op: ops.Binary, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    shape = output.shape or (1,)
    merged, steps = collapse(shape, inputs[0].shape, inputs[1].shape)
    sizes, a_steps, b_steps = (np.array(numbers, np.int64) for numbers in (merged, *steps))
    swap = a_steps[-1] == 0 and b_steps[-1] != 0      # both ops commute: let a be the dense one
    if swap:
        a_steps, b_steps = b_steps, a_steps
    code = ADD if isinstance(op, ops.Add) else MUL

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        a, b = (array.reshape(-1) for array in (arrays[::-1] if swap else arrays))
        flat = y.reshape(-1)
        return lambda: binary(code, a, b, flat, sizes, a_steps, b_steps, options.threads)

    broadcast = "" if count(inputs[0].shape) == count(inputs[1].shape) else "_broadcast"
    return Step(f"{op.kind.lower()}_f32{broadcast}", bind)
