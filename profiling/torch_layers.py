"""The layers of torch_network.py: PyTorch's for an ONNX operator."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Node:
    """A node of the file. weights: its constant inputs, None at the place of a value.

    in_place: whether nobody else reads its first input's memory, so that it may be overwritten.
    """
    operator: str
    name: str
    attributes: dict[str, Any]
    weights: list[np.ndarray | None]
    in_place: bool

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"node {self.name!r}: {what}; add it to profiling/torch_layers.py")


class Add(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


class AddConstant(nn.Module):
    def __init__(self, constant: np.ndarray) -> None:
        super().__init__()
        self.constant = parameter(constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.constant


class Scale(nn.Module):
    def __init__(self, factor: np.ndarray) -> None:
        super().__init__()
        self.factor = parameter(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Concat(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return torch.cat(values, self.axis)


class ExpandToBatch(nn.Module):
    """As many of a constant as there are images."""

    def __init__(self, constant: np.ndarray) -> None:
        super().__init__()
        self.constant = parameter(constant)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.constant.expand(len(images), *self.constant.shape[1:])


class Reshape(nn.Module):
    """0 keeps what the axis has."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape([size or x.shape[axis] for axis, size in enumerate(self.shape)])


class Permute(nn.Module):
    def __init__(self, perm: list[int]) -> None:
        super().__init__()
        self.perm = perm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.perm)


class Select(nn.Module):
    def __init__(self, axis: int, index: int) -> None:
        super().__init__()
        self.axis, self.index = axis, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.select(self.axis, self.index)


class Attention(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, scale=self.scale)


# ---- of operators -----------------------------------------------------------------------------

def parameter(array: np.ndarray) -> nn.Parameter:
    # Contiguous, as nn.Linear has it, also where the file has the weight transposed.
    return nn.Parameter(torch.from_numpy(array.astype(np.float32, order="C")), requires_grad=False)


def padding(node: Node, value: float) -> tuple[list[nn.Module], tuple[int, int]]:
    """(layers that pad, what is left for the node's own padding): torch pads both ends of an axis
    alike."""
    top, left, bottom, right = node.attributes.get("pads", [0, 0, 0, 0])
    if (top, left) == (bottom, right):
        return [], (top, left)
    return [nn.ConstantPad2d((left, right, top, bottom), value)], (0, 0)


def conv(node: Node) -> Iterator[nn.Module]:
    _, weight, *rest = node.weights
    if weight is None or weight.ndim != 4:
        raise node.refuse("a Conv without constant weights (O, C, KH, KW) is not known")
    groups = node.attributes.get("group", 1)
    pads, within = padding(node, 0.0)
    yield from pads
    layer = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2:],
                      node.attributes.get("strides", (1, 1)), within,
                      node.attributes.get("dilations", (1, 1)), groups, bias=bool(rest),
                      device="meta")
    layer.weight = parameter(weight)
    if rest:
        layer.bias = parameter(rest[0])
    yield layer


def batch_norm(node: Node) -> Iterator[nn.Module]:
    _, scale, shift, mean, variance = node.weights
    layer = nn.BatchNorm2d(len(scale), node.attributes.get("epsilon", 1e-5), device="meta")
    layer.weight, layer.bias = parameter(scale), parameter(shift)
    layer.running_mean, layer.running_var = parameter(mean).data, parameter(variance).data
    layer.num_batches_tracked = torch.tensor(0)
    yield layer


def linear(node: Node) -> Iterator[nn.Module]:
    _, weight, *rest = node.weights
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if weight is None or any(node.attributes.get(name, one) != one for name, one in plain.items()):
        raise node.refuse("a Gemm with variable weights, alpha, beta or transA is not known")
    weight = weight if node.attributes.get("transB", 0) else weight.T
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(rest), device="meta")
    layer.weight = parameter(weight)
    if rest:
        layer.bias = parameter(rest[0])
    yield layer


def layer_norm(node: Node) -> Iterator[nn.Module]:
    _, scale, *rest = node.weights
    if scale is None or scale.ndim != 1 or node.attributes.get("axis", -1) != -1:
        raise node.refuse("a LayerNormalization of more than the last axis is not known")
    layer = nn.LayerNorm(len(scale), node.attributes.get("epsilon", 1e-5), bias=bool(rest),
                         device="meta")
    layer.weight = parameter(scale)
    if rest:
        layer.bias = parameter(rest[0])
    yield layer


def clip(node: Node) -> Iterator[nn.Module]:
    bounds = [None if bound is None else float(bound) for bound in node.weights[1:]]
    if len(bounds) != 2 or None in bounds:
        raise node.refuse("a Clip without two constant bounds is not known")
    if bounds == [0, 6]:
        yield nn.ReLU6(node.in_place)
    else:
        yield nn.Hardtanh(*bounds, inplace=node.in_place)


def max_pool(node: Node) -> Iterator[nn.Module]:
    kernel = tuple(node.attributes["kernel_shape"])
    pads, within = padding(node, float("-inf"))
    yield from pads
    yield nn.MaxPool2d(kernel, tuple(node.attributes.get("strides", (1, 1))), within,
                       tuple(node.attributes.get("dilations", (1, 1))),
                       ceil_mode=bool(node.attributes.get("ceil_mode", 0)))


def average_pool(node: Node) -> Iterator[nn.Module]:
    pads, within = padding(node, 0.0)
    if pads or set(node.attributes.get("dilations", (1, 1))) != {1}:
        raise node.refuse("an AveragePool with uneven pads or dilations is not known")
    yield nn.AvgPool2d(tuple(node.attributes["kernel_shape"]),
                       tuple(node.attributes.get("strides", (1, 1))), within,
                       bool(node.attributes.get("ceil_mode", 0)),
                       bool(node.attributes.get("count_include_pad", 0)))


def flatten(node: Node) -> Iterator[nn.Module]:
    if node.attributes.get("axis", 1) != 1:
        raise node.refuse(f"Flatten with axis={node.attributes['axis']} is not known")
    yield nn.Flatten()


def reshape(node: Node) -> Iterator[nn.Module]:
    _, shape = node.weights
    if shape is None:
        raise node.refuse("a Reshape to a shape that is computed is not known")
    yield Reshape(shape.tolist())


def transpose(node: Node) -> Iterator[nn.Module]:
    if "perm" not in node.attributes:
        raise node.refuse("a Transpose without perm is not known")
    yield Permute(node.attributes["perm"])


def select(node: Node) -> Iterator[nn.Module]:
    _, index = node.weights
    if index is None or index.ndim:
        raise node.refuse("a Gather of anything but one constant index is not known")
    yield Select(node.attributes.get("axis", 0), int(index))


def gelu(node: Node) -> Iterator[nn.Module]:
    yield nn.GELU(node.attributes.get("approximate", b"none").decode())


def attention(node: Node) -> Iterator[nn.Module]:
    if set(node.attributes) != {"scale"} or len(node.weights) != 3:
        raise node.refuse("an Attention with more than queries, keys, values and a scale is not "
                          "known")
    yield Attention(node.attributes["scale"])


def add(node: Node) -> Iterator[nn.Module]:
    constants = [weight for weight in node.weights if weight is not None]
    yield AddConstant(constants[0]) if constants else Add()


def scale(node: Node) -> Iterator[nn.Module]:
    constants = [weight for weight in node.weights if weight is not None]
    if not constants:
        raise node.refuse("a Mul of two values is not known")
    yield Scale(constants[0])


def expand_to_batch(node: Node) -> Iterator[nn.Module]:
    yield ExpandToBatch(node.weights[1])


def of_values(make: Callable[[Node], nn.Module]) -> Callable[[Node], Iterator[nn.Module]]:
    """Of a layer without weights."""
    def layer(node: Node) -> Iterator[nn.Module]:
        if any(weight is not None for weight in node.weights):
            raise node.refuse(f"{node.operator} with a constant is not known")
        yield make(node)
    return layer


LAYERS: dict[str, Callable[[Node], Iterator[nn.Module]]] = {
    "Conv": conv, "BatchNormalization": batch_norm, "Gemm": linear, "Clip": clip,
    "MaxPool": max_pool, "AveragePool": average_pool, "Flatten": flatten,
    "LayerNormalization": layer_norm, "Gelu": gelu, "Reshape": reshape, "Transpose": transpose,
    "Gather": select, "ExpandToBatch": expand_to_batch, "Add": add, "Mul": scale,
    "Attention": attention,
    "Relu": of_values(lambda node: nn.ReLU(node.in_place)),
    "GlobalAveragePool": of_values(lambda node: nn.AdaptiveAvgPool2d(1)),
    "Concat": of_values(lambda node: Concat(node.attributes["axis"])),
}
