"""Makes a PyTorch module of a network's ONNX file: a layer of torch.nn for each of its nodes.

It computes what the file says, in NCHW, of any dtype and on any device that `Module.to` takes it
to; torch.compile and CUDA graphs take it whole. It knows the operators of profiling/networks.py and
of the embedded network.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils import fusion


@dataclass(frozen=True)
class Node:
    """A node of the file. weights: its constant inputs, None at the place of a value.

    in_place: whether nobody else reads its first input, so that it may be overwritten.
    """
    operator: str
    name: str
    attributes: dict[str, Any]
    weights: list[np.ndarray | None]
    in_place: bool

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"node {self.name!r}: {what}; add it to profiling/torch_network.py")


@dataclass(frozen=True)
class Step:
    """A layer's names: of what it reads, of what it makes, and of what nobody reads after it."""
    inputs: tuple[str, ...]
    output: str
    last: tuple[str, ...] = ()


class Add(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


class Concat(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return torch.cat(values, self.axis)


class TorchNetwork(nn.Module):
    """(N, C, H, W) images -> the network's first output, in eval mode, weights in float32.

    fold    whether a batch norm becomes part of the convolution before it, as whoever wants speed
            does with torch.nn.utils.fusion

    ValueError for an operator or an attribute that it lacks.
    """

    def __init__(self, path: str | Path, fold: bool = False) -> None:
        super().__init__()
        graph = onnx.load(path).graph
        constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.input = next(value.name for value in graph.input if value.name not in constants)
        self.output = graph.output[0].name
        # The caller reads these two besides.
        uses = Counter([self.input, self.output,
                        *(name for node in graph.node for name in node.input)])
        layers: list[nn.Module] = []
        steps: list[Step] = []
        for node in graph.node:
            if fixed(node, constants):
                continue
            values = tuple(name for name in node.input if name and name not in constants)
            for layer in layers_of(node, constants, uses[values[0]] == 1):
                if fold and can_fold(layer, layers, steps, values, uses):
                    layers[-1] = fusion.fuse_conv_bn_eval(layers[-1].eval(), layer.eval())
                    steps[-1] = Step(steps[-1].inputs, node.output[0])
                    continue
                if steps and steps[-1].output == node.output[0]:    # of this node's first layer
                    steps[-1] = Step(steps[-1].inputs, f"{node.output[0]}.padded")
                    values = (steps[-1].output,)
                layers.append(layer)
                steps.append(Step(values, node.output[0]))
        self.layers, self.steps = nn.ModuleList(layers), with_last_uses(steps, self.output)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = {self.input: images}
        for step, layer in zip(self.steps, self.layers, strict=True):
            values[step.output] = layer(*[values[name] for name in step.inputs])
            for name in step.last:
                del values[name]        # its memory serves the next layers
        return values[self.output]


def fixed(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> bool:
    """Whether the node's output is a constant, which then is among `constants`."""
    attributes = attributes_of(node)
    if node.op_type == "Constant" and "value" in attributes:
        constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
        return True
    if node.op_type == "Cast" and node.input[0] in constants:
        dtype = helper.tensor_dtype_to_np_dtype(attributes["to"])
        constants[node.output[0]] = constants[node.input[0]].astype(dtype)
        return True
    return False


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def layers_of(proto: onnx.NodeProto, constants: dict[str, np.ndarray], in_place: bool
              ) -> Iterator[nn.Module]:
    """One layer, or a padding and one."""
    node = Node(proto.op_type, proto.name or proto.output[0], attributes_of(proto),
                [constants.get(name) for name in proto.input], in_place)
    if node.operator not in LAYERS:
        raise node.refuse(f"operator {node.operator} is none of {', '.join(LAYERS)}")
    if node.attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise node.refuse(f"auto_pad={node.attributes['auto_pad'].decode()} is not known")
    yield from LAYERS[node.operator](node)


def can_fold(layer: nn.Module, layers: list[nn.Module], steps: list[Step],
             values: tuple[str, ...], uses: Counter[str]) -> bool:
    """Whether the layer is a batch norm of what the last convolution makes for it alone."""
    return (isinstance(layer, nn.BatchNorm2d) and bool(layers)
            and isinstance(layers[-1], nn.Conv2d)
            and steps[-1].output == values[0] and uses[values[0]] == 1)


def with_last_uses(steps: list[Step], output: str) -> list[Step]:
    seen, found = {output}, []
    for step in reversed(steps):
        last = tuple(dict.fromkeys(name for name in step.inputs if name not in seen))
        seen.update(last)
        found.append(Step(step.inputs, step.output, last))
    return found[::-1]


# ---- layers -----------------------------------------------------------------------------------

def parameter(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(array.astype(np.float32)), requires_grad=False)


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
    "Relu": of_values(lambda node: nn.ReLU(node.in_place)),
    "GlobalAveragePool": of_values(lambda node: nn.AdaptiveAvgPool2d(1)),
    "Add": of_values(lambda node: Add()),
    "Concat": of_values(lambda node: Concat(node.attributes["axis"])),
}
