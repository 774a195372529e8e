"""Makes a PyTorch module of a network's ONNX file: a layer of torch.nn for each of its nodes, or
for the several that the exporter wrote for one (torch_patterns.py).

It computes what the file says, in NCHW, of any dtype and on any device that `Module.to` takes it
to; torch.compile and CUDA graphs take it whole. It knows the operators of profiling/networks.py and
of the embedded network.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils import fusion
from torch_layers import LAYERS, Node
from torch_patterns import attributes_of, join

VIEWS = ("Flatten", "Gather", "Reshape", "Transpose")   # whose output may be their input's memory


@dataclass(frozen=True)
class Step:
    """A layer's names: of what it reads, of what it makes, and of what nobody reads after it."""
    inputs: tuple[str, ...]
    output: str
    last: tuple[str, ...] = ()


class TorchNetwork(nn.Module):
    """(N, C, H, W) images -> the network's first output, in eval mode, weights in float32.

    fold    whether a batch norm becomes part of the convolution before it, as whoever wants speed
            does with torch.nn.utils.fusion, and a layer scale part of the Linear before it

    ValueError for an operator or an attribute that it lacks.
    """

    def __init__(self, path: str | Path, fold: bool = False) -> None:
        super().__init__()
        graph = onnx.load(path).graph
        constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.input = next(value.name for value in graph.input if value.name not in constants)
        self.output = graph.output[0].name
        nodes = join([node for node in graph.node if not fixed(node, constants)], constants,
                     self.output, fold)
        # The caller reads these two besides.
        uses = Counter([self.input, self.output, *(name for node in nodes for name in node.input)])
        views = {node.output[0] for node in nodes if node.op_type in VIEWS}
        layers: list[nn.Module] = []
        steps: list[Step] = []
        for node in nodes:
            values = tuple(name for name in node.input if name and name not in constants)
            in_place = uses[values[0]] == 1 and values[0] not in views
            for layer in layers_of(node, constants, in_place):
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
