"""Convolution, matrix product and pooling."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import Dim, Op, Padding, Pair, Shape, count, known
from .elementwise import Unary
from .norm import BatchNorm


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


def _check_residual(what: str, shapes: tuple[Shape, ...], y: Shape) -> None:
    """ValueError where there is a residual whose shape is not the output's."""
    for shape in shapes:
        if len(shape) != len(y) or any(
                None not in (p, q) and p != q for p, q in zip(y, shape, strict=True)):
            raise ValueError(f"{what}: residual has shape {shape}, the output {y}")


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
        _check_residual(self.kind, shapes[3:], y)
        return y

    def macs(self, *shapes: Shape) -> int:
        return count(self.output_shape(*shapes)) * count(shapes[1][1:])


@dataclass(frozen=True)
class NormConv2d(Op):
    """A convolution of 1x1 of what a batch norm gives, which is never stored.

    Inputs: x (N, H, W, C), scale, bias, mean, var, each (C,), then weight (O, 1, 1, C) and maybe
    bias (O,).
    """
    norm: BatchNorm
    conv: Conv2d
    arity: ClassVar[Pair] = (6, 7)
    packed: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6)

    def output_shape(self, *shapes: Shape) -> Shape:
        return self.conv.output_shape(self.norm.output_shape(*shapes[:5]), *shapes[5:])

    def macs(self, *shapes: Shape) -> int:
        return self.conv.macs(shapes[0], *shapes[5:])

    def flops(self, *shapes: Shape) -> int:
        return self.norm.flops(*shapes[:5]) + self.conv.flops(shapes[0], *shapes[5:])


@dataclass(frozen=True)
class Linear(Op):
    """y = activation(x @ weight.T + bias + residual).

    Inputs: x (..., in), weight (out, in), then bias (out,), then a residual of the output's shape,
    as of Conv2d.
    """
    activation: Unary | None = None
    arity: ClassVar[Pair] = (2, 4)
    packed: ClassVar[tuple[int, ...]] = (1, 2)

    def output_shape(self, *shapes: Shape) -> Shape:
        x, weight = shapes[:2]
        if not x or len(weight) != 2:
            raise ValueError(f"Linear takes x (..., in) and weight (out, in), not {x} and {weight}")
        if x[-1] is not None and x[-1] != weight[1]:
            raise ValueError(f"Linear: x has {x[-1]} features, weight {weight} takes {weight[1]}")
        if len(shapes) > 2 and shapes[2] != weight[:1]:
            raise ValueError(f"Linear: bias has shape {shapes[2]}, {weight[:1]} is needed")
        y = (*x[:-1], weight[0])
        _check_residual(self.kind, shapes[3:], y)
        return y

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


class GlobalPool2d(Op):
    """One value of each channel: (N, H, W, C) -> (N, 1, 1, C)."""

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes[0]) != 4:
            raise ValueError(f"{self.kind} takes x (N, H, W, C), not shape {shapes[0]}")
        return (shapes[0][0], 1, 1, shapes[0][3])

    def flops(self, *shapes: Shape) -> int:
        return count(shapes[0])


class GlobalAvgPool2d(GlobalPool2d):
    """Mean over height and width."""


class GlobalMaxPool2d(GlobalPool2d):
    """Greatest value over height and width."""


class GlobalL2Pool2d(GlobalPool2d):
    """Square root of the sum of squares over height and width: ONNX's GlobalLpPool of p = 2."""

    def flops(self, *shapes: Shape) -> int:
        return 2 * count(shapes[0])
