"""What each op IS: its attributes, the shape it gives, the arithmetic and the bytes it costs.

Images are NHWC, convolution weights OHWI (out, height, width, in / groups), Linear weights
(out, in). A dimension that is not known yet, usually the batch, is None and travels as None.
What each op MEANS is in `reference.py`.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

Dim = int | None
Shape = tuple[Dim, ...]
Pair = tuple[int, int]
Padding = tuple[int, int, int, int]     # top, left, bottom, right: the order of ONNX `pads`


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (a NumPy name) of a value."""
    shape: Shape
    dtype: str = "float32"


@dataclass(frozen=True)
class Op:
    """Base of all ops. One without attributes of its own is a dataclass as its base is.

    arity   the least and the greatest number of inputs it takes
    packed  positions of inputs that are constants of a network, which a backend lays out its way
    """
    arity: ClassVar[Pair] = (1, 1)
    packed: ClassVar[tuple[int, ...]] = ()

    @property
    def kind(self) -> str:
        """The name that people read: the class's own."""
        return type(self).__name__

    def output_shape(self, *shapes: Shape) -> Shape:
        """Shape of the output for inputs of these shapes; ValueError where they do not fit."""
        return shapes[0]

    def macs(self, *shapes: Shape) -> int:
        """Multiply-accumulates; 0 for ops that do none. All dimensions must be known."""
        return 0

    def flops(self, *shapes: Shape) -> int:
        """Floating-point operations: two per multiply-accumulate, else one per output element."""
        return 2 * self.macs(*shapes) or count(self.output_shape(*shapes))

    def bytes(self, *shapes: Shape, itemsize: int = 4) -> int:
        """Bytes read and written when each input and the output are touched once."""
        return itemsize * (sum(map(count, shapes)) + count(self.output_shape(*shapes)))


def count(shape: Shape) -> int:
    """Number of elements of a fully known shape."""
    return math.prod(known(shape))


def known(shape: Shape) -> tuple[int, ...]:
    """The shape, once every dimension is known; ValueError otherwise."""
    sizes = tuple(size for size in shape if size is not None)
    if len(sizes) != len(shape):
        raise ValueError(f"shape {shape} has a dimension that is not known yet")
    return sizes


# ---- elementwise ------------------------------------------------------------------------------

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


class Binary(Op):
    """y = f(a, b) with NumPy's broadcasting."""
    arity: ClassVar[Pair] = (2, 2)

    def output_shape(self, *shapes: Shape) -> Shape:
        return broadcast_shapes(*shapes)


class Add(Binary):
    """a + b"""


class Mul(Binary):
    """a * b"""


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


# ---- convolution and matrix product -----------------------------------------------------------

def window_extent(size: Dim, kernel: int, stride: int, before: int, after: int,
                  dilation: int = 1, ceil_mode: bool = False) -> Dim:
    """Number of windows along one axis, by PyTorch's and ONNX's common rule.

    With ceil_mode a last window may hang over the end, but must start inside the input or the
    padding before it.
    """
    if size is None:
        return None
    reach = dilation * (kernel - 1) + 1
    room = size + before + after - reach
    if room < 0:
        raise ValueError(f"a window of {reach} does not fit {size} elements padded by "
                         f"{before} and {after}")
    extent = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (extent - 1) * stride >= size + before:
        extent -= 1
    return extent


@dataclass(frozen=True)
class Conv2d(Op):
    """y = activation(conv(x, weight) + bias + residual).

    Inputs: x (N, H, W, C), weight (O, KH, KW, C / groups), then bias (O,), then a residual of the
    output's shape; bias and residual may be left out, residual never stands without bias.
    """
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: Unary | None = None
    arity: ClassVar[Pair] = (2, 4)
    packed: ClassVar[tuple[int, ...]] = (1, 2)

    def output_shape(self, *shapes: Shape) -> Shape:
        x, weight = shapes[:2]
        if len(x) != 4 or len(weight) != 4:
            raise ValueError(f"Conv2d takes x (N, H, W, C) and weight (O, KH, KW, C / groups), "
                             f"not {x} and {weight}")
        n, h, w, c = x
        o, kh, kw, per_group = known(weight)
        if c is not None and c != per_group * self.groups:
            raise ValueError(f"Conv2d: x has {c} channels, weight {weight} with groups="
                             f"{self.groups} takes {per_group * self.groups}")
        if o % self.groups:
            raise ValueError(f"Conv2d: {o} output channels do not divide into {self.groups} groups")
        if len(shapes) > 2 and shapes[2] != (o,):
            raise ValueError(f"Conv2d: bias has shape {shapes[2]}, {(o,)} is needed")
        top, left, bottom, right = self.padding
        y = (n, window_extent(h, kh, self.stride[0], top, bottom, self.dilation[0]),
             window_extent(w, kw, self.stride[1], left, right, self.dilation[1]), o)
        if len(shapes) > 3 and (len(shapes[3]) != 4 or any(
                None not in (p, q) and p != q for p, q in zip(y, shapes[3], strict=True))):
            raise ValueError(f"Conv2d: residual has shape {shapes[3]}, the output {y}")
        return y

    def macs(self, *shapes: Shape) -> int:
        return count(self.output_shape(*shapes)) * count(shapes[1][1:])


@dataclass(frozen=True)
class Linear(Op):
    """y = activation(x @ weight.T + bias): x (..., in), weight (out, in), bias (out,) or none."""
    activation: Unary | None = None
    arity: ClassVar[Pair] = (2, 3)
    packed: ClassVar[tuple[int, ...]] = (1, 2)

    def output_shape(self, *shapes: Shape) -> Shape:
        x, weight = shapes[:2]
        if not x or len(weight) != 2:
            raise ValueError(f"Linear takes x (..., in) and weight (out, in), not {x} and {weight}")
        if x[-1] is not None and x[-1] != weight[1]:
            raise ValueError(f"Linear: x has {x[-1]} features, weight {weight} takes {weight[1]}")
        if len(shapes) > 2 and shapes[2] != weight[:1]:
            raise ValueError(f"Linear: bias has shape {shapes[2]}, {weight[:1]} is needed")
        return (*x[:-1], weight[0])

    def macs(self, *shapes: Shape) -> int:
        return count(shapes[0]) * count(shapes[1][:1])


# ---- pooling ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pool2d(Op):
    """Windows over x (N, H, W, C); padding never takes part in a maximum."""
    kernel_size: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes[0]) != 4:
            raise ValueError(f"{self.kind} takes x (N, H, W, C), not shape {shapes[0]}")
        n, h, w, c = shapes[0]
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        top, left, bottom, right = self.padding
        if max(top, bottom) > (kh - 1) * dh or max(left, right) > (kw - 1) * dw:
            raise ValueError(f"{self.kind}: padding {self.padding} makes windows of "
                             f"{self.kernel_size} that see no input")
        return (n, window_extent(h, kh, sh, top, bottom, dh, self.ceil_mode),
                window_extent(w, kw, sw, left, right, dw, self.ceil_mode), c)

    def flops(self, *shapes: Shape) -> int:
        return count(self.output_shape(*shapes)) * math.prod(self.kernel_size)


class MaxPool2d(Pool2d):
    """Greatest value of each window."""


@dataclass(frozen=True)
class AvgPool2d(Pool2d):
    """Mean of each window. With count_include_pad the padding counts as zeros; what ceil_mode
    adds beyond it never counts."""
    count_include_pad: bool = False


class GlobalAvgPool2d(Op):
    """Mean over height and width: (N, H, W, C) -> (N, 1, 1, C)."""

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes[0]) != 4:
            raise ValueError(f"GlobalAvgPool2d takes x (N, H, W, C), not shape {shapes[0]}")
        return (shapes[0][0], 1, 1, shapes[0][3])

    def flops(self, *shapes: Shape) -> int:
        return count(shapes[0])


# ---- the rest ---------------------------------------------------------------------------------

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
class Concat(Op):
    """Inputs one after the other along `axis`."""
    axis: int = -1
    arity: ClassVar[Pair] = (1, 1 << 16)

    def output_shape(self, *shapes: Shape) -> Shape:
        rank = len(shapes[0])
        axis = normal_axis(self.axis, rank)
        result = list(shapes[0])
        for shape in shapes[1:]:
            if len(shape) != rank:
                raise ValueError(f"Concat: inputs of rank {rank} and {len(shape)}")
            for i, (p, q) in enumerate(zip(result, shape, strict=True)):
                if i == axis:
                    result[i] = None if p is None or q is None else p + q
                elif p is None:
                    result[i] = q
                elif q is not None and p != q:
                    raise ValueError(f"Concat along axis {axis}: shapes {shapes} differ elsewhere")
        return tuple(result)


@dataclass(frozen=True)
class Softmax(Op):
    """exp(x - max) / sum(exp(x - max)) along `axis`."""
    axis: int = -1

    def flops(self, *shapes: Shape) -> int:
        return 4 * count(shapes[0])


@dataclass(frozen=True)
class Transpose(Op):
    """Axis i of the output is axis permutation[i] of the input."""
    permutation: tuple[int, ...] = ()

    def output_shape(self, *shapes: Shape) -> Shape:
        if sorted(self.permutation) != list(range(len(shapes[0]))):
            raise ValueError(f"Transpose: {self.permutation} does not permute shape {shapes[0]}")
        return tuple(shapes[0][i] for i in self.permutation)

    def flops(self, *shapes: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Reshape(Op):
    """Same elements in the same order; in `shape` 0 copies the input's dimension (unless
    allow_zero) and one -1 takes what is left, as in ONNX."""
    shape: tuple[int, ...] = (-1,)
    allow_zero: bool = False

    def output_shape(self, *shapes: Shape) -> Shape:
        (x,) = shapes
        if not self.allow_zero and any(s == 0 and i >= len(x) for i, s in enumerate(self.shape)):
            raise ValueError(f"Reshape: {self.shape} copies a dimension that {x} does not have")
        target: list[Dim] = [x[i] if s == 0 and not self.allow_zero else s
                             for i, s in enumerate(self.shape)]
        return _fill_minus_one(x, target, self.shape)

    def flops(self, *shapes: Shape) -> int:
        return 0


def _fill_minus_one(x: Shape, target: list[Dim], asked: tuple[int, ...]) -> Shape:
    if None in x:
        # The unknown batch is one factor on both sides where the target copies it.
        if target.count(-1) == 1 and x.count(None) == 1 == target.count(None):
            rest = math.prod(s for s in target if s not in (-1, None))
            target[target.index(-1)] = math.prod(s for s in x if s is not None) // max(rest, 1)
        return tuple(None if s == -1 else s for s in target)
    elements = count(x)
    rest = math.prod(s for s in target if s is not None and s != -1)
    if target.count(-1) == 1 and rest and elements % rest == 0:
        target[target.index(-1)] = elements // rest
    if -1 in target or count(tuple(target)) != elements:
        raise ValueError(f"Reshape: {x} has {elements} elements and can not become {asked}")
    return tuple(target)


@dataclass(frozen=True)
class Flatten(Op):
    """Two dimensions: the product of those before `axis` and of those from it on."""
    axis: int = 1

    def output_shape(self, *shapes: Shape) -> Shape:
        (x,) = shapes
        axis = self.axis + len(x) if self.axis < 0 else self.axis
        if not 0 <= axis <= len(x):
            raise ValueError(f"Flatten: axis {self.axis} is not one of shape {x}")
        halves = x[:axis], x[axis:]
        return tuple(None if None in half else count(half) for half in halves)

    def flops(self, *shapes: Shape) -> int:
        return 0


def normal_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front; ValueError where there is no such axis."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is out of range for rank {rank}")
    return axis % rank
