"""The activations that a kernel's epilogue can apply, and the names by which it is compiled."""
from __future__ import annotations

import math
from collections.abc import Callable

from .. import ops
from .ptx import asm_op, cuda, float32


def activation(name: str, arch: str = "sm_75") -> Callable:
    """Device function (x, low, high) -> float32, for GPUs of `arch` on.

    low and high are the two numbers of the activation, which every epilogue passes on: the bounds
    of "clip", alpha and beta of "hard_sigmoid", scale and bias of "star_relu", scale and zero point
    of "fake_quantize" and of all that end so, and alpha alone where there is one. "clip" serves no
    activation, ReLU and ReLU6 alike, so that one compiled kernel does.
    """
    return clip_sm_80 if name == "clip" and arch >= "sm_80" else ACTIVATIONS[name]


def activation_of(op: ops.Unary | None) -> tuple[str, float, float]:
    """(name, low, high) as `activation` takes them."""
    match op:
        case None:
            return "clip", -math.inf, math.inf
        case ops.Relu():
            return "clip", 0.0, math.inf
        case ops.Clip(low, high):
            return "clip", low, high
        case ops.HardSigmoid(alpha, beta):
            return "hard_sigmoid", alpha, beta
        case ops.LeakyRelu(alpha):
            return "leaky_relu", alpha, 0.0
        case ops.StarRelu(scale, bias):
            return "star_relu", scale, bias
        case ops.FakeQuantize(scale, zero_point, relu, first):
            before = f"{activation_of(first)[0]}_" if first else "relu_" if relu else ""
            return f"{before}fake_quantize", scale, float(zero_point)
        case ops.Elu(alpha):
            return "elu", alpha, 0.0
        case ops.Gelu(tanh):
            return "gelu_tanh" if tanh else "gelu", 0.0, 0.0
    return NAMES[type(op)], 0.0, 0.0


NAMES: dict[type[ops.Op], str] = {ops.Sigmoid: "sigmoid", ops.Tanh: "tanh", ops.Silu: "silu",
                                  ops.HardSwish: "hard_swish", ops.Erf: "erf",
                                  ops.Sqrt: "sqrt"}


@cuda.jit(device=True, inline="always")
def clip(x, low, high):
    # Written so that a NaN stays one: it is neither below nor above a bound.
    x = low if x < low else x
    return high if x > high else x


# The same in two instructions instead of four.
clip_sm_80 = asm_op("clip_sm_80", "{ .reg .f32 t; max.NaN.f32 t, $1, $2; min.NaN.f32 $0, t, $3; }",
                    float32, [float32, float32, float32], pure=True)


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


@cuda.jit(device=True, inline="always")
def hard_sigmoid(x, low, high):
    return clip(low * x + high, float32(0), float32(1))


@cuda.jit(device=True, inline="always")
def leaky_relu(x, low, high):
    return x if x > float32(0) else low * x


@cuda.jit(device=True, inline="always")
def elu(x, low, high):
    return x if x > float32(0) else low * math.expm1(x)


@cuda.jit(device=True, inline="always")
def gelu(x, low, high):
    """x times how much of a normal distribution lies below x."""
    tail = normal_tail(abs(x))
    return x * (tail if x < float32(0) else float32(1) - tail)


# e ** (a * a / 2) * normal_tail(a) as a polynomial in t = 1 / (1 + BEND * a), by Lawson's algorithm
# for a from 0 to TAIL_END: relative error 2 ** -24. With libdevice's erfc, GELU takes two thirds
# more instructions, and far below 0 the rounding of erfc's argument costs it digits.
BEND = 0.35
N1, N2, N3 = 0.139621302, 0.139863521, 0.119821295
N4, N5, N6 = 0.10555248, -0.0232122932, 0.159319609
N7, N8, N9 = -0.255838931, 0.144030884, -0.029157877
TAIL_END = 14.5         # e ** (-a * a / 2) is 0 from there on

inverse = asm_op("inverse", "rcp.approx.ftz.f32 $0, $1;", float32, [float32], pure=True)
multiply_add = asm_op("multiply_add", "fma.rn.f32 $0, $1, $2, $3;", float32,
                      [float32, float32, float32], pure=True)


@cuda.jit(device=True, inline="always")
def normal_tail(a):
    """How much of a normal distribution lies above a, which is at least 0, in all its digits."""
    a = min(a, float32(TAIL_END))
    t = inverse(float32(1) + float32(BEND) * a)
    p = float32(N8) + float32(N9) * t
    p = float32(N7) + p * t
    p = float32(N6) + p * t
    p = float32(N5) + p * t
    p = float32(N4) + p * t
    p = float32(N3) + p * t
    p = float32(N2) + p * t
    p = float32(N1) + p * t
    # What the square lacks would move the power far from 0.
    square = a * a
    rest = multiply_add(a, a, -square)
    power = math.exp(float32(-0.5) * square)
    return p * t * (power - float32(0.5) * rest * power)


TWICE_ROOT = 2 * math.sqrt(2 / math.pi)


@cuda.jit(device=True, inline="always")
def gelu_tanh(x, low, high):
    # (1 + tanh(z / 2)) / 2 is 1 / (1 + exp(-z)), which keeps its digits, too.
    z = x * (float32(TWICE_ROOT) + float32(TWICE_ROOT * 0.044715) * x * x)
    return x / (float32(1) + math.exp(-z))


@cuda.jit(device=True, inline="always")
def erf(x, low, high):
    return math.erf(x)


@cuda.jit(device=True, inline="always")
def sqrt(x, low, high):
    return math.sqrt(x)


@cuda.jit(device=True, inline="always")
def star_relu(x, scale, bias):
    above = float32(0) if x < float32(0) else x
    return scale * (above * above) + bias


ROUND = 1.5 * 2 ** 23       # adding and subtracting it rounds a small number to a whole one


@cuda.jit(device=True, inline="always")
def fake_quantize(x, scale, zero_point):
    return nearest_code(x / scale, -zero_point, float32(255) - zero_point) * scale


@cuda.jit(device=True, inline="always")
def relu_fake_quantize(x, scale, zero_point):
    return nearest_code(x / scale, float32(0), float32(255) - zero_point) * scale


@cuda.jit(device=True, inline="always")
def gelu_fake_quantize(x, scale, zero_point):
    return fake_quantize(gelu(x, scale, zero_point), scale, zero_point)


@cuda.jit(device=True, inline="always")
def gelu_tanh_fake_quantize(x, scale, zero_point):
    return fake_quantize(gelu_tanh(x, scale, zero_point), scale, zero_point)


@cuda.jit(device=True, inline="always")
def silu_fake_quantize(x, scale, zero_point):
    return fake_quantize(silu(x, scale, zero_point), scale, zero_point)


@cuda.jit(device=True, inline="always")
def hard_swish_fake_quantize(x, scale, zero_point):
    return fake_quantize(hard_swish(x, scale, zero_point), scale, zero_point)


@cuda.jit(device=True, inline="always")
def nearest_code(n, low, high):
    return (clip(n, low, high) + float32(ROUND)) - float32(ROUND)


ACTIVATIONS: dict[str, Callable] = {
    "clip": clip, "sigmoid": sigmoid, "tanh": tanh, "silu": silu, "hard_swish": hard_swish,
    "hard_sigmoid": hard_sigmoid, "leaky_relu": leaky_relu, "elu": elu, "gelu": gelu,
    "gelu_tanh": gelu_tanh, "erf": erf, "sqrt": sqrt, "star_relu": star_relu,
    "fake_quantize": fake_quantize, "relu_fake_quantize": relu_fake_quantize,
    "gelu_fake_quantize": gelu_fake_quantize, "silu_fake_quantize": silu_fake_quantize,
    "gelu_tanh_fake_quantize": gelu_tanh_fake_quantize,
    "hard_swish_fake_quantize": hard_swish_fake_quantize}
