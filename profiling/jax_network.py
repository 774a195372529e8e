"""Makes a JAX function of a network's ONNX file: an operation of jax.lax for each of its layers.

torch_network.py reads the file and folds batch norms; this translates its layers. Images lie NHWC,
as XLA's convolutions on a GPU have them, so that Flatten turns its input to NCHW first. Networks
that move axes themselves, as vision transformers do, have no counterpart yet.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from torch import nn
from torch_layers import Add, Concat
from torch_network import TorchNetwork

Apply = Callable[..., Any]      # (weights, *inputs) -> output
Layer = tuple[Sequence[Any], Apply]
LAYOUT = ("NHWC", "OHWI", "NHWC")


def jax_network(path: str | Path, dtype: str) -> tuple[list[Sequence[Any]], Apply]:
    """(weights, function (weights, (N, H, W, C) images) -> the network's first output), all of
    `dtype`; the function is to be given to jax.jit.

    Batch norms are folded. ValueError for an operator that torch_network.py or this lacks.
    """
    network = TorchNetwork(path, fold=True)
    layers = [layer_of(layer, jnp.dtype(dtype)) for layer in network.layers]

    def function(weights: list[Sequence[Any]], images: Any) -> Any:
        values = {network.input: images}
        for step, own, (_, apply) in zip(network.steps, weights, layers, strict=True):
            values[step.output] = apply(own, *[values[name] for name in step.inputs])
        return values[network.output]
    return [weights for weights, _ in layers], function


def layer_of(layer: nn.Module, dtype: Any) -> Layer:
    for kind, make in LAYERS.items():
        if isinstance(layer, kind):
            weights, apply = make(layer)
            return [jnp.asarray(weight, dtype) for weight in weights], apply
    raise ValueError(f"{type(layer).__name__} has no counterpart in profiling/jax_network.py; add "
                     f"it there")


# ---- layers: (weights in float32 or float64, what applies them) -------------------------------

def conv(layer: nn.Conv2d) -> Layer:
    pads = [(size, size) for size in layer.padding]

    def apply(weights: Sequence[Any], x: Any) -> Any:
        return weights[1] + lax.conv_general_dilated(
            x, weights[0], layer.stride, pads, rhs_dilation=layer.dilation,
            dimension_numbers=LAYOUT, feature_group_count=layer.groups)
    return [layer.weight.numpy().transpose(0, 2, 3, 1), bias_of(layer)], apply


def bias_of(layer: nn.Conv2d | nn.Linear) -> np.ndarray:
    return np.zeros(len(layer.weight)) if layer.bias is None else layer.bias.numpy()


def batch_norm(layer: nn.BatchNorm2d) -> Layer:
    scale, shift, mean, variance = (each.double().numpy() for each in (
        layer.weight, layer.bias, layer.running_mean, layer.running_var))
    scale = scale / np.sqrt(variance + layer.eps)
    return [scale, shift - mean * scale], lambda weights, x: x * weights[0] + weights[1]


def linear(layer: nn.Linear) -> Layer:
    return ([layer.weight.numpy().T, bias_of(layer)],
            lambda weights, x: x @ weights[0] + weights[1])


def without_weights(make: Callable[[Any], Apply]) -> Callable[[Any], Layer]:
    def layer_of(layer: nn.Module) -> Layer:
        function = make(layer)
        return (), lambda weights, *inputs: function(*inputs)
    return layer_of


def pad(layer: nn.ConstantPad2d) -> Apply:
    left, right, top, bottom = layer.padding
    pads = [(0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)]
    return lambda x: lax.pad(x, jnp.asarray(layer.value, x.dtype), pads)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def end_pad(size: int, window: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Behind an axis: more than `padding` where a last window is not whole and counts."""
    over = (size + 2 * padding - window) % stride
    # No window begins behind the axis.
    more = ceil_mode and over and size + 2 * padding - window - over + stride < size + padding
    return padding + stride - over if more else padding


def max_pool(layer: nn.MaxPool2d) -> Apply:
    window, stride, padding, dilation = map(pair, (layer.kernel_size, layer.stride, layer.padding,
                                                   layer.dilation))
    reach = [(size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)]

    def function(x: Any) -> Any:
        pads = [(p, end_pad(size, r, s, p, layer.ceil_mode)) for size, r, s, p
                in zip(x.shape[1:3], reach, stride, padding, strict=True)]
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *stride, 1),
                                 [(0, 0), *pads, (0, 0)], window_dilation=(1, *dilation, 1))
    return function


def average_pool(layer: nn.AvgPool2d) -> Apply:
    """ValueError where rounding up adds windows, whose sizes PyTorch counts by rules of its own."""
    if layer.ceil_mode:
        raise ValueError("an average pooling that rounds sizes up has no counterpart in "
                         "profiling/jax_network.py; add it there")
    window, stride = (1, *pair(layer.kernel_size), 1), (1, *pair(layer.stride), 1)
    pads = [(0, 0), *((size, size) for size in pair(layer.padding)), (0, 0)]

    def sums(x: Any) -> Any:
        return lax.reduce_window(x, 0., lax.add, window, stride, pads)
    if layer.count_include_pad:
        return lambda x: sums(x) / math.prod(window)
    return lambda x: sums(x) / sums(jnp.ones_like(x))


def flatten(layer: nn.Flatten) -> Apply:
    return lambda x: (x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).reshape(len(x), -1)


LAYERS: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Conv2d: conv, nn.BatchNorm2d: batch_norm, nn.Linear: linear,
    **{kind: without_weights(make) for kind, make in {
        nn.ConstantPad2d: pad, nn.MaxPool2d: max_pool, nn.AvgPool2d: average_pool,
        nn.Flatten: flatten, nn.ReLU: lambda layer: jax.nn.relu, Add: lambda layer: jnp.add,
        nn.Hardtanh: lambda layer: lambda x: jnp.clip(x, layer.min_val, layer.max_val),
        nn.AdaptiveAvgPool2d: lambda layer: lambda x: x.mean((1, 2), keepdims=True),
        Concat: lambda layer: lambda *values: jnp.concatenate(values, (0, 3, 1, 2)[layer.axis]),
    }.items()},
}
