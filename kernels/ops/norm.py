"""Ops that bring values to a common scale: norms and softmax."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Op, Pair, Shape, count
from .elementwise import FakeQuantize, Unary


@dataclass(frozen=True)
class BatchNorm(Op):
    """activation((x - mean) / sqrt(var + epsilon) * scale + bias) over the last axis.

    Inputs: x (..., C), scale, bias, mean, var, each (C,).
    """
    epsilon: float = 1e-5
    activation: Unary | None = None
    arity: ClassVar[Pair] = (5, 5)
    packed: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    def output_shape(self, *shapes: Shape) -> Shape:
        x, *parameters = shapes
        if x[-1] is not None and any(shape != (x[-1],) for shape in parameters):
            raise ValueError(f"BatchNorm over {x[-1]} channels: its parameters have shapes "
                             f"{parameters}")
        return x

    def flops(self, *shapes: Shape) -> int:
        return 2 * count(shapes[0])


@dataclass(frozen=True)
class LayerNorm(Op):
    """(x - mean) / sqrt(var + epsilon) * scale + bias, of mean and variance along the last axis
    (Ba et al. 2016, arXiv:1607.06450), and FakeQuantize of that.

    Inputs: x (..., C), scale (C,), bias (C,); the variance is that of all C values, over C.
    """
    epsilon: float = 1e-5
    activation: FakeQuantize | None = None
    arity: ClassVar[Pair] = (3, 3)
    packed: ClassVar[tuple[int, ...]] = (1, 2)

    def output_shape(self, *shapes: Shape) -> Shape:
        x, *parameters = shapes
        if not x or (x[-1] is not None and any(shape != (x[-1],) for shape in parameters)):
            raise ValueError(f"LayerNorm along the last axis of {x}: its scale and bias have "
                             f"shapes {parameters}")
        return x

    def flops(self, *shapes: Shape) -> int:
        return 7 * count(shapes[0])


@dataclass(frozen=True)
class LocalResponseNorm(Op):
    """x / (bias + alpha / size * sum of x * x over `size` channels around) ** beta.

    Channels are the last axis. Of an even size one channel more is after than before; what lies
    beyond the channels is 0 (Krizhevsky et al. 2012; ONNX's LRN).
    """
    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    bias: float = 1.0

    def flops(self, *shapes: Shape) -> int:
        return (2 * self.size + 3) * count(shapes[0])


@dataclass(frozen=True)
class Softmax(Op):
    """exp(x - max) / sum(exp(x - max)) along `axis`; log: of that the natural logarithm, which is
    x - max - log(sum(exp(x - max)))."""
    axis: int = -1
    log: bool = False

    def flops(self, *shapes: Shape) -> int:
        return 4 * count(shapes[0])
