"""What elementwise.py is called with."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ... import ops
from ...axes import collapse
from ...ops import Op, TensorSpec, Unary, count
from ...step import Array, Options, Step
from ..launch import Kernel, Launch
from ..sizes import ADD, CLIP, HARD_SWISH, MUL, SIGMOID, SILU, TANH

UNARY, BINARY = Kernel("elementwise", "unary"), Kernel("elementwise", "binary")


def unary_code(op: Op) -> tuple[int, np.float32, np.float32]:
    """(code, low, high) as `unary` takes them; Relu is a clip."""
    if isinstance(op, ops.Relu):
        return CLIP, np.float32(0), np.float32(np.inf)
    if isinstance(op, ops.Clip):
        return CLIP, np.float32(op.low), np.float32(op.high)
    codes: dict[type[Op], int] = {ops.Sigmoid: SIGMOID, ops.Tanh: TANH, ops.Silu: SILU,
                                  ops.HardSwish: HARD_SWISH}
    return codes[type(op)], np.float32(0), np.float32(0)


def in_place(op: Unary) -> Callable[[Array, int], list[Launch]]:
    """(flat array, threads) -> what applies the op to the array itself."""
    return lambda y, threads: [_unary(op, y, y, threads)]


def _unary(op: Op, x: Array, y: Array, threads: int) -> Launch:
    return UNARY.bind(*unary_code(op), x, y, x is y, threads)


def prepare_unary(op: Unary, inputs: list[TensorSpec], output: TensorSpec,
                  weights: list[Array | None], options: Options) -> Step:
    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [_unary(op, arrays[0].reshape(-1), y.reshape(-1), options.threads)]

    return Step(f"{op.kind.lower()}_f32", bind)


def prepare_binary(op: ops.Binary, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    shape = output.shape or (1,)
    merged, steps = collapse(shape, inputs[0].shape, inputs[1].shape)
    sizes, a_steps, b_steps = (np.array(numbers, np.int64) for numbers in (merged, *steps))
    swap = a_steps[-1] == 0 and b_steps[-1] != 0      # both ops commute: let a be the dense one
    if swap:
        a_steps, b_steps = b_steps, a_steps
    code = ADD if isinstance(op, ops.Add) else MUL

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        a, b = (array.reshape(-1) for array in (arrays[::-1] if swap else arrays))
        return [BINARY.bind(code, a, b, y.reshape(-1), sizes, a_steps, b_steps, options.threads)]

    broadcast = "" if count(inputs[0].shape) == count(inputs[1].shape) else "_broadcast"
    return Step(f"{op.kind.lower()}_f32{broadcast}", bind)
