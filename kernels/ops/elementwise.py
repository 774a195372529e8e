"""Functions of one element, or of two."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import Dim, Grid, Op, Pair, Shape


class Unary(Op):
    """y = f(x), element by element. Also serves as the fused activation of other ops."""


class Relu(Unary):
    """max(x, 0)"""


@dataclass(frozen=True)
class Clip(Unary):
    """min(max(x, low), high); ReLU6 is Clip(0, 6)."""
    low: float = -math.inf
    high: float = math.inf


class Sigmoid(Unary):
    """1 / (1 + exp(-x))"""


class Tanh(Unary):
    """tanh(x)"""


class Silu(Unary):
    """x / (1 + exp(-x)), also called Swish (Elfwing et al. 2018, arXiv:1702.03118)."""


class HardSwish(Unary):
    """x * min(max(x + 3, 0), 6) / 6 (Howard et al. 2019, arXiv:1905.02244)."""


@dataclass(frozen=True)
class HardSigmoid(Unary):
    """min(max(alpha * x + beta, 0), 1); the defaults are PyTorch's, ONNX's are 0.2 and 0.5."""
    alpha: float = 1 / 6
    beta: float = 0.5


@dataclass(frozen=True)
class LeakyRelu(Unary):
    """x where it is above 0, else alpha * x (Maas et al. 2013)."""
    alpha: float = 0.01


@dataclass(frozen=True)
class Elu(Unary):
    """x where it is above 0, else alpha * (exp(x) - 1) (Clevert et al. 2015, arXiv:1511.07289)."""
    alpha: float = 1.0


@dataclass(frozen=True)
class Gelu(Unary):
    """x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    tanh: instead x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) / 2.
    """
    tanh: bool = False


class Erf(Unary):
    """2 / sqrt(pi) * the integral of exp(-t * t) from 0 to x, of which Gelu is made."""


class Sqrt(Unary):
    """Square root of x; NaN below 0."""


@dataclass(frozen=True)
class StarRelu(Unary):
    """scale * max(x, 0) ** 2 + bias (Yu et al. 2022, arXiv:2210.13452)."""
    scale: float = 1.0
    bias: float = 0.0


@dataclass(frozen=True)
class FakeQuantize(Unary):
    """(min(max(round(x / scale) + zero_point, 0), 255) - zero_point) * scale, half to even: the
    number that stands for x among 256 (Jacob et al. 2018, arXiv:1712.05877).

    A network quantised to 8 bits stores it as that whole number from 0 to 255, its code; one that
    stores int8 has its zero_point and codes 128 below ours. relu: of max(x, 0). first: instead of
    what this function, one of FIRST, gives of x; fusing alone makes such.
    """
    scale: float = 1.0
    zero_point: int = 0
    relu: bool = False
    first: Unary | None = None
    FIRST: ClassVar[tuple[type[Unary], ...]] = (Gelu, Silu, HardSwish)

    @property
    def kind(self) -> str:
        return f"{self.first.kind}_FakeQuantize" if self.first else "FakeQuantize"

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero_point)

    @property
    def bounds(self) -> Pair:
        """The least and the greatest code, less zero_point."""
        return 0 if self.relu else -self.zero_point, 255 - self.zero_point


class Binary(Op):
    """y = f(a, b) with NumPy's broadcasting."""
    arity: ClassVar[Pair] = (2, 2)

    def output_shape(self, *shapes: Shape) -> Shape:
        return broadcast_shapes(*shapes)


class Add(Binary):
    """a + b"""


@dataclass(frozen=True)
class AddFakeQuantize(Binary):
    """FakeQuantize of a + b, which are of one shape: how a residual block of 8 bits ends."""
    scale: float = 1.0
    zero_point: int = 0
    relu: bool = False

    @property
    def last(self) -> FakeQuantize:
        return FakeQuantize(self.scale, self.zero_point, self.relu)

    @property
    def grid(self) -> Grid:
        return self.last.grid

    def output_shape(self, *shapes: Shape) -> Shape:
        y = super().output_shape(*shapes)
        if not len(shapes[0]) == len(shapes[1]) == len(y) or any(
                1 in sizes and sizes != (1, 1) for sizes in zip(*shapes, strict=True)):
            raise ValueError(f"AddFakeQuantize takes two values of one shape, not {shapes[0]} and "
                             f"{shapes[1]}")
        return y


class Mul(Binary):
    """a * b"""


class Div(Binary):
    """a / b"""


def broadcast_shapes(a: Shape, b: Shape) -> Shape:
    """NumPy's rule; an unknown dimension against 1 stays unknown, against n > 1 must be n."""
    rank = max(len(a), len(b))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in (a, b)]
    result: list[Dim] = []
    for p, q in zip(*padded, strict=True):
        if p == 1 or p == q:
            result.append(q)
        elif q == 1 or q is None:
            result.append(p)
        elif p is None:
            result.append(q)
        else:
            raise ValueError(f"shapes {a} and {b} do not broadcast")
    return tuple(result)
