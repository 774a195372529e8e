"""Layers that are functions of each element, or of all classes."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels import ops
from kernels.ops import Shape

from .arguments import LARGEST, flag, number, refused, whole
from .layer import Emitted, Layer


@dataclass(eq=False)
class ReLU(Layer):
    """max(x, 0). inplace changes no result here."""
    inplace: bool = False
    op: ClassVar[ops.Unary] = ops.Relu()

    def __post_init__(self) -> None:
        flag(self, "inplace")

    def emit(self, shape: Shape) -> Emitted:
        return [(self.op, {})]


class ReLU6(ReLU):
    """min(max(x, 0), 6). inplace changes no result here."""
    op = ops.Clip(0.0, 6.0)


class SiLU(ReLU):
    """x / (1 + exp(-x)). inplace changes no result here."""
    op = ops.Silu()


class Hardswish(ReLU):
    """x * min(max(x + 3, 0), 6) / 6. inplace changes no result here."""
    op = ops.HardSwish()


class Hardsigmoid(ReLU):
    """min(max(x / 6 + 1 / 2, 0), 1). inplace changes no result here."""
    op = ops.HardSigmoid()


@dataclass(eq=False)
class LeakyReLU(Layer):
    """x where it is above 0, else negative_slope * x. inplace changes no result here."""
    negative_slope: float = 0.01
    inplace: bool = False

    def __post_init__(self) -> None:
        self.negative_slope = number(self, "negative_slope", LARGEST, -LARGEST)
        flag(self, "inplace")

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.LeakyRelu(self.negative_slope), {})]


@dataclass(eq=False)
class ELU(Layer):
    """x where it is above 0, else alpha * (exp(x) - 1). inplace changes no result here."""
    alpha: float = 1.0
    inplace: bool = False

    def __post_init__(self) -> None:
        self.alpha = number(self, "alpha", LARGEST, -LARGEST)
        flag(self, "inplace")

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.Elu(self.alpha), {})]


@dataclass(eq=False)
class GELU(Layer):
    """x * (1 + erf(x / sqrt(2))) / 2; with approximate="tanh" what comes close to it, x * (1 +
    tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) / 2."""
    approximate: str = "none"

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise refused(self, "approximate", "can be 'none' or 'tanh'")

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.Gelu(self.approximate == "tanh"), {})]


@dataclass(eq=False)
class Tanh(Layer):
    """tanh(x)"""

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.Tanh(), {})]


@dataclass(eq=False)
class Sigmoid(Layer):
    """1 / (1 + exp(-x))"""

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.Sigmoid(), {})]


@dataclass(eq=False)
class Softmax(Layer):
    """exp(x) / sum(exp(x)) over the classes or, of an image, the channels: always the last axis.

    dim counts NHWC axes: -1, or 1 after Flatten, or 3 for an image (torch's dim=1 there).
    """
    dim: int = -1
    op: ClassVar[ops.Softmax] = ops.Softmax(-1)

    def __post_init__(self) -> None:
        self.dim = whole(self, "dim", least=-4)

    def emit(self, shape: Shape) -> Emitted:
        if ops.normal_axis(self.dim, len(shape)) != len(shape) - 1:
            raise ValueError(f"{type(self).__name__}(dim={self.dim}) of a value of shape {shape} "
                             f"is not supported; channels and classes are the last axis here, "
                             f"dim=-1")
        return [(self.op, {})]


class LogSoftmax(Softmax):
    """x - log(sum(exp(x))), of the same axis as Softmax, and with the same dim."""
    op = ops.Softmax(-1, log=True)
