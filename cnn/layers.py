"""Building a network by hand, with torch.nn's names for layers and arguments.

Values are NHWC, (N, features) after Flatten. Weights are kept under torch's names and in torch's
layouts; `emit` is where they become those of `kernels.ops`. Networks here infer and do not train:
Dropout passes values through, BatchNorm2d uses its running statistics.

Every layer raises ModelError for an argument that does not fit, naming layer, argument and value.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kernels import ops
from kernels.ops import Padding, Pair, Shape

from . import arguments
from .activations import (
    ELU,
    GELU,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
)
from .arguments import LARGEST, flag, is_whole, number, pair, refused, whole
from .layer import Array, Emitted, Layer, Size
from .sequential import Sequential

__all__ = ["ELU", "GELU", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "BatchNorm2d",
           "ChannelShuffle", "Conv2d", "Dropout", "Flatten", "Hardsigmoid", "Hardswish",
           "Identity", "Layer", "LayerNorm", "LeakyReLU", "Linear", "LocalResponseNorm",
           "LogSoftmax", "MaxPool2d", "ReLU", "ReLU6", "Sequential", "SiLU", "Sigmoid", "Softmax",
           "Tanh", "ZeroPad2d"]


# ---- convolution and matrix product -----------------------------------------------------------

@dataclass(eq=False)
class Conv2d(Layer):
    """Weights: weight (out_channels, in_channels / groups, KH, KW), bias (out_channels,).

    kernel_size, stride, dilation are one number or (height, width). padding is one number,
    (height, width), (top, left, bottom, right), "valid" (none) or "same" (stride 1 only; the
    output is as large as the input, an odd element of padding goes to the bottom and right).
    """
    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = 1
    padding: Size | str = 0
    dilation: Size = 1
    groups: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        self.groups, self.bias = whole(self, "groups"), flag(self, "bias")
        for argument in ("in_channels", "out_channels"):
            setattr(self, argument, whole(self, argument))
            if getattr(self, argument) % self.groups:
                raise refused(self, argument, f"must divide into groups={self.groups}")
        for argument in ("kernel_size", "stride", "dilation"):
            setattr(self, argument, pair(self, argument))
        if not isinstance(self.padding, str):
            self.padding = arguments.padding(self)
        elif self.padding not in ("same", "valid"):
            raise refused(self, "padding", "can be a number, 'same' or 'valid'")
        elif self.padding == "same" and self.stride != (1, 1):
            raise refused(self, "padding", f"needs stride 1, not {self.stride}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        kernel = pair(self, "kernel_size")
        return _with_bias(self.bias, (self.out_channels, self.in_channels // self.groups, *kernel))

    def emit(self, shape: Shape) -> Emitted:
        op = ops.Conv2d(pair(self, "stride"), self._sides(), pair(self, "dilation"), self.groups)
        ohwi = np.ascontiguousarray(self.weights["weight"].transpose(0, 2, 3, 1))
        return [(op, {**self.weights, "weight": ohwi})]

    def _sides(self) -> Padding:
        if self.padding == "valid":
            return (0, 0, 0, 0)
        if self.padding != "same":
            return arguments.padding(self)
        height, width = (d * (k - 1) for d, k in zip(pair(self, "dilation"),
                                                     pair(self, "kernel_size"), strict=True))
        return (height // 2, width // 2, height - height // 2, width - width // 2)


@dataclass(eq=False)
class Linear(Layer):
    """(N, in_features) -> (N, out_features). Weights: weight (out, in), bias (out,)."""
    in_features: int
    out_features: int
    bias: bool = True

    def __post_init__(self) -> None:
        self.in_features = whole(self, "in_features")
        self.out_features = whole(self, "out_features")
        self.bias = flag(self, "bias")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _with_bias(self.bias, (self.out_features, self.in_features))

    def emit(self, shape: Shape) -> Emitted:
        if len(shape) == 4:     # torch would multiply along the width, NHWC along the channels
            raise ValueError(f"Linear takes (N, {self.in_features}), not an image of shape "
                             f"{shape}; put Flatten() before it")
        return [(ops.Linear(), self.weights)]


def _with_bias(bias: bool, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"weight": weight, "bias": weight[:1]} if bias else {"weight": weight}


# ---- norms ------------------------------------------------------------------------------------

class Norm(Layer):
    """What norms with weights have in common."""

    def draw(self, rng: np.random.Generator) -> dict[str, Array]:
        """Ones and zeros: the layer changes no scale yet, as in torch."""
        return {name: np.full(shape, name in ("weight", "running_var"), np.float32)
                for name, shape in self.shapes().items()}


@dataclass(eq=False)
class BatchNorm2d(Norm):
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias, of images.

    Weights, each (num_features,): weight, bias, running_mean, running_var.
    """
    num_features: int
    eps: float = 1e-5
    ignored: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)

    def __post_init__(self) -> None:
        self.num_features, self.eps = whole(self, "num_features"), number(self, "eps", 1.0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        names = ("weight", "bias", "running_mean", "running_var")
        return dict.fromkeys(names, (self.num_features,))

    def emit(self, shape: Shape) -> Emitted:
        if len(shape) != 4:
            raise ValueError(f"BatchNorm2d takes (N, H, W, {self.num_features}), not {shape}")
        return [(ops.BatchNorm(self.eps), self.weights)]


@dataclass(eq=False)
class LayerNorm(Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias, of mean and variance of the channels of each
    pixel, or of the features: always the last axis. normalized_shape is their number.

    Weights, each (normalized_shape,): weight, bias.
    """
    normalized_shape: int | Sequence[int]
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = self.normalized_shape
        if isinstance(sizes, (list, tuple)) and len(sizes) == 1:
            self.normalized_shape = sizes[0]
        if not is_whole(self.normalized_shape, 1):
            raise refused(self, "normalized_shape", f"must be one whole number from 1 to {LARGEST}"
                                                    f", that of the channels")
        self.eps = number(self, "eps", 1.0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("weight", "bias"), (whole(self, "normalized_shape"),))

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.LayerNorm(self.eps), self.weights)]


@dataclass(eq=False)
class LocalResponseNorm(Layer):
    """x / (k + alpha / size * sum of x * x) ** beta, the sum over `size` channels, of which that of
    x is the middle one. size must be odd: of an even one torch's middle is not ONNX's."""
    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def __post_init__(self) -> None:
        self.size = whole(self, "size")
        if self.size % 2 == 0:
            raise refused(self, "size", "is not supported, only odd sizes, which have a middle")
        for argument in ("alpha", "beta", "k"):
            setattr(self, argument, number(self, argument, LARGEST))

    def emit(self, shape: Shape) -> Emitted:
        if len(shape) != 4:
            raise ValueError(f"LocalResponseNorm takes (N, H, W, C), not {shape}")
        return [(ops.LocalResponseNorm(self.size, self.alpha, self.beta, self.k), {})]


# ---- pooling ----------------------------------------------------------------------------------

class Pool(Layer):
    """What both kinds of pooling have in common."""
    kernel_size: Size
    stride: Size | None
    padding: Size
    dilation: Size = 1
    ceil_mode: bool

    def __post_init__(self) -> None:
        kernel = self.kernel_size = pair(self, "kernel_size")
        self.stride = kernel if self.stride is None else pair(self, "stride")
        self.padding, self.ceil_mode = arguments.padding(self), flag(self, "ceil_mode")
        dilation = self.dilation = pair(self, "dilation")
        window = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        if any(2 * side > size for side, size in zip(self.padding, window * 2, strict=True)):
            raise refused(self, "padding", f"must be at most half of the window {window}")

    def window(self) -> tuple[Pair, Pair, Padding, Pair, bool]:
        """The arguments of kernels.ops.Pool2d."""
        return (pair(self, "kernel_size"), pair(self, "stride"), arguments.padding(self),
                pair(self, "dilation"), self.ceil_mode)


@dataclass(eq=False)
class MaxPool2d(Pool):
    """Greatest value of each window, padding taking no part; arguments as in AvgPool2d."""
    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    dilation: Size = 1
    ceil_mode: bool = False

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.MaxPool2d(*self.window()), {})]


@dataclass(eq=False)
class AvgPool2d(Pool):
    """Mean of each window; padding counts as zeros unless count_include_pad is False.

    kernel_size and stride (None: kernel_size) are one number or (height, width); padding is one
    number, (height, width) or (top, left, bottom, right), at most half a window. With ceil_mode a
    last window may hang over the end.
    """
    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count_include_pad = flag(self, "count_include_pad")

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.AvgPool2d(*self.window(), self.count_include_pad), {})]


@dataclass(eq=False)
class AdaptiveAvgPool2d(Layer):
    """Mean over the whole image, (N, H, W, C) -> (N, 1, 1, C): output_size can only be 1."""
    output_size: Size
    op: ClassVar[ops.GlobalPool2d] = ops.GlobalAvgPool2d()

    def __post_init__(self) -> None:
        self.output_size = pair(self, "output_size")
        if self.output_size != (1, 1):
            raise refused(self, "output_size", "is not supported, only 1; use AvgPool2d or "
                                               "MaxPool2d")

    def emit(self, shape: Shape) -> Emitted:
        return [(self.op, {})]


class AdaptiveMaxPool2d(AdaptiveAvgPool2d):
    """Greatest value of the whole image, (N, H, W, C) -> (N, 1, 1, C): output_size can only be
    1."""
    op = ops.GlobalMaxPool2d()


# ---- layers that only move values, or pass them through ---------------------------------------

@dataclass(eq=False)
class Flatten(Layer):
    """(N, H, W, C) -> (N, C * H * W), in torch's order: all of channel 0 first. A Linear after
    it so takes torch's weights as they are. start_dim can only be 1."""
    start_dim: int = 1

    def __post_init__(self) -> None:
        if not arguments.is_whole(self.start_dim, 1) or self.start_dim != 1:
            raise refused(self, "start_dim", "is not supported, only 1: the batch stays")

    def emit(self, shape: Shape) -> Emitted:
        channels_first: Emitted = [(ops.Transpose((0, 3, 1, 2)), {})]
        return (channels_first if len(shape) == 4 else []) + [(ops.Flatten(1), {})]


@dataclass(eq=False)
class Identity(Layer):
    """x"""

    def emit(self, shape: Shape) -> Emitted:
        return []


@dataclass(eq=False)
class Dropout(Layer):
    """x: values are dropped in training only. inplace changes no result here."""
    p: float = 0.5
    inplace: bool = False

    def __post_init__(self) -> None:
        self.p = number(self, "p", 1.0)
        flag(self, "inplace")

    def emit(self, shape: Shape) -> Emitted:
        return []


@dataclass(eq=False)
class ZeroPad2d(Layer):
    """Zeros around an image. padding is one number or, in torch's order, (left, right, top,
    bottom)."""
    padding: Size

    def __post_init__(self) -> None:
        self.padding = arguments.sides(self)

    def emit(self, shape: Shape) -> Emitted:
        left, right, top, bottom = arguments.sides(self)
        return [(ops.Pad((0, top, left, 0), (0, bottom, right, 0)), {})]


@dataclass(eq=False)
class ChannelShuffle(Layer):
    """Channels as rows of `groups` columns, read by columns: those of each group come to lie
    `groups` apart (Zhang et al. 2017, arXiv:1707.01083)."""
    groups: int

    def __post_init__(self) -> None:
        self.groups = whole(self, "groups")

    def emit(self, shape: Shape) -> Emitted:
        channels = shape[-1]
        if len(shape) != 4 or channels is None or channels % self.groups:
            raise ValueError(f"ChannelShuffle takes (N, H, W, C) with C a multiple of groups="
                             f"{self.groups}, not {shape}")
        return [(ops.Reshape((0, 0, 0, self.groups, channels // self.groups)), {}),
                (ops.Transpose((0, 1, 2, 4, 3)), {}), (ops.Reshape((0, 0, 0, channels)), {})]
