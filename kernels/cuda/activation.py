"""The activations that a kernel's epilogue can apply, and the names by which it is compiled."""
from __future__ import annotations

import math
from collections.abc import Callable

from .. import ops
from .ptx import cuda, float32


def activation(name: str) -> Callable:
    """Device function (x, low, high) -> float32; low and high are the bounds of "clip".

    "clip" serves no activation, ReLU and ReLU6 alike, so that one compiled kernel does.
    """
    return ACTIVATIONS[name]


def activation_of(op: ops.Unary | None) -> tuple[str, float, float]:
    """(name, low, high) as `activation` takes them."""
    if op is None:
        return "clip", -math.inf, math.inf
    if isinstance(op, ops.Relu):
        return "clip", 0.0, math.inf
    if isinstance(op, ops.Clip):
        return "clip", op.low, op.high
    return NAMES[type(op)], -math.inf, math.inf


NAMES: dict[type[ops.Op], str] = {ops.Sigmoid: "sigmoid", ops.Tanh: "tanh", ops.Silu: "silu",
                                  ops.HardSwish: "hard_swish"}


@cuda.jit(device=True, inline="always")
def clip(x, low, high):
    # Written so that a NaN stays one: it is neither below nor above a bound.
    x = low if x < low else x
    return high if x > high else x


@cuda.jit(device=True, inline="always")
def sigmoid(x, low, high):
    return float32(1) / (float32(1) + math.exp(-x))


@cuda.jit(device=True, inline="always")
def tanh(x, low, high):
    return math.tanh(x)


@cuda.jit(device=True, inline="always")
def silu(x, low, high):
    # Below 0, exp(-x) would overflow, and exp(x) underflow, where the product with x does not yet.
    t = math.exp(float32(-0.5) * abs(x))
    return (x if x > float32(0) else x * t * t) / (float32(1) + t * t)


@cuda.jit(device=True, inline="always")
def hard_swish(x, low, high):
    return x * (min(max(x + float32(3), float32(0)), float32(6)) / float32(6))


ACTIVATIONS: dict[str, Callable] = {"clip": clip, "sigmoid": sigmoid, "tanh": tanh, "silu": silu,
                                    "hard_swish": hard_swish}
