"""Builds the benchmark networks as ONNX files: torchvision's architectures, random weights.

Nodes and weights carry torchvision's names, or timm's where torchvision has no such network. Batch
norm stays unfolded, GELU and attention are written out, as torch exports a network in eval mode.
Weights are seeded: the same seed gives the same bytes.

    python profiling/networks.py --list
    python profiling/networks.py resnet50 -o resnet50.onnx
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8      # the one that came with opset 17, so that older runtimes read the file too


class Builder:
    """Grows an ONNX graph layer by layer.

    Every layer takes the name of a value, adds one node, and returns the name of its output,
    which is also the node's.

    size: rows and columns of the images that go into "input"
    """

    def __init__(self, seed: int, size: int = 224) -> None:
        self.size = size
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.channels = {"input": 3}

    def node(self, operator: str, name: str, inputs: list[str], channels: int,
             **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        self.channels[name] = channels
        return name

    def constant(self, name: str, values: Any, dtype: type = np.float32) -> str:
        """What is no weight: a number of a formula, or a shape."""
        array = np.array(values, dtype)
        return self.node("Constant", name, [], 0, value=numpy_helper.from_array(array))

    def weight(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def normal(self, name: str, shape: tuple[int, ...], deviation: float) -> str:
        return self.weight(name, deviation * self.rng.standard_normal(shape, dtype=np.float32))

    def uniform(self, name: str, channels: int, low: float, high: float) -> str:
        return self.weight(name, self.rng.uniform(low, high, channels))

    def conv(self, x: str, name: str, channels: int, kernel: int, stride: int = 1,
             groups: int = 1, padding: int | None = None, bias: bool = False,
             gain: float = 1.0) -> str:
        """Square, padded by default to keep the size at stride 1. Weights are `gain` times those
        of He et al. 2015, fan in."""
        shape = (channels, self.channels[x] // groups, kernel, kernel)
        deviation = gain * math.sqrt(2 / math.prod(shape[1:]))
        inputs = [x, self.normal(f"{name}.weight", shape, deviation)]
        if bias:
            inputs.append(self.normal(f"{name}.bias", (channels,), 0.1))
        return self.node("Conv", name, inputs, channels, kernel_shape=[kernel] * 2,
                         strides=[stride] * 2, dilations=[1, 1], group=groups,
                         pads=[kernel // 2 if padding is None else padding] * 4)

    def batch_norm(self, x: str, name: str, gain: float = 1.0) -> str:
        """Scales by about `gain`; the running statistics are near those of He's weights."""
        channels = self.channels[x]
        parameters = [self.uniform(f"{name}.weight", channels, 0.8 * gain, 1.2 * gain),
                      self.normal(f"{name}.bias", (channels,), 0.1),
                      self.normal(f"{name}.running_mean", (channels,), 0.1),
                      self.uniform(f"{name}.running_var", channels, 0.8, 1.2)]
        return self.node("BatchNormalization", name, [x, *parameters], channels,
                         epsilon=1e-5, momentum=0.9, training_mode=0)

    def layer_norm(self, x: str, name: str) -> str:
        """Over the last axis."""
        channels = self.channels[x]
        parameters = [self.uniform(f"{name}.weight", channels, 0.8, 1.2),
                      self.normal(f"{name}.bias", (channels,), 0.1)]
        return self.node("LayerNormalization", name, [x, *parameters], channels,
                         axis=-1, epsilon=1e-6)

    def relu(self, x: str) -> str:
        return self.node("Relu", f"{x}.relu", [x], self.channels[x])

    def relu6(self, x: str) -> str:
        bounds = [self.constant(f"{x}.min", 0), self.constant(f"{x}.max", 6)]
        return self.node("Clip", f"{x}.relu6", [x, *bounds], self.channels[x])

    def gelu(self, x: str) -> str:
        """x (1 + erf(x / sqrt(2))) / 2"""
        channels = self.channels[x]
        root, one, half = (self.constant(f"{x}.{name}", value) for name, value in (
            ("root", math.sqrt(2)), ("one", 1), ("half", 0.5)))
        y = self.node("Erf", f"{x}.erf", [self.node("Div", f"{x}.div", [x, root], channels)],
                      channels)
        y = self.node("Add", f"{x}.add", [y, one], channels)
        y = self.node("Mul", f"{x}.mul", [half, y], channels)
        return self.node("Mul", f"{x}.gelu", [x, y], channels)

    def add(self, a: str, b: str, name: str) -> str:
        return self.node("Add", name, [a, b], self.channels[a])

    def concat(self, values: list[str], name: str) -> str:
        return self.node("Concat", name, values, sum(self.channels[x] for x in values), axis=1)

    def max_pool(self, x: str, name: str, kernel: int, stride: int, padding: int = 0,
                 ceil_mode: bool = False) -> str:
        return self.node("MaxPool", name, [x], self.channels[x], kernel_shape=[kernel] * 2,
                         strides=[stride] * 2, pads=[padding] * 4, ceil_mode=int(ceil_mode))

    def average_pool(self, x: str, name: str, kernel: int, stride: int) -> str:
        return self.node("AveragePool", name, [x], self.channels[x], kernel_shape=[kernel] * 2,
                         strides=[stride] * 2)

    def global_pool(self, x: str, name: str = "flatten") -> str:
        """(N, C, H, W) -> (N, C)"""
        return self.flatten(self.global_average(x), 1, name)

    def global_average(self, x: str) -> str:
        """(N, C, H, W) -> (N, C, 1, 1)"""
        return self.node("GlobalAveragePool", "avgpool", [x], self.channels[x])

    def flatten(self, x: str, pixels: int, name: str = "flatten") -> str:
        """(N, C, H, W) -> (N, C H W), where H W is `pixels`."""
        return self.node("Flatten", name, [x], self.channels[x] * pixels, axis=1)

    def reshape(self, x: str, name: str, shape: list[int], channels: int) -> str:
        """0 keeps what the axis has."""
        return self.node("Reshape", name, [x, self.constant(f"{name}.shape", shape, np.int64)],
                         channels)

    def transpose(self, x: str, perm: list[int]) -> str:
        return self.node("Transpose", f"{x}.transpose", [x], self.channels[x], perm=perm)

    def pick(self, x: str, name: str, index: int, axis: int) -> str:
        """Without the axis."""
        return self.node("Gather", name, [x, self.constant(f"{name}.index", index, np.int64)],
                         self.channels[x], axis=axis)

    def pointwise(self, x: str, name: str, features: int, gain: float = 1.0) -> str:
        """A Linear of more than two axes, over the last of them. Weights, which are transposed as
        MatMul wants them, are `gain` times those of He et al. 2015."""
        shape = (self.channels[x], features)
        weight = self.normal(f"{name}.weight", shape, gain * math.sqrt(2 / shape[0]))
        y = self.node("MatMul", f"{name}.matmul", [x, weight], features)
        return self.node("Add", name, [y, self.normal(f"{name}.bias", (features,), 0.1)], features)

    def linear(self, x: str, name: str, features: int, output: str = "logits") -> str:
        """Its output is named `output`, its weights are those of He et al. 2015."""
        shape = (features, self.channels[x])
        parameters = [self.normal(f"{name}.weight", shape, math.sqrt(2 / shape[1])),
                      self.normal(f"{name}.bias", shape[:1], 0.1)]
        return self.node("Gemm", output, [x, *parameters], features, transB=1)

    def model(self, name: str) -> onnx.ModelProto:
        """All layers so far, from "input" (N, 3, size, size) to "logits" (N, classes)."""
        image = helper.make_tensor_value_info("input", TensorProto.FLOAT,
                                              ["N", 3, self.size, self.size])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT,
                                               ["N", self.channels["logits"]])
        graph = helper.make_graph(self.nodes, name, [image], [logits], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)],
                                 ir_version=IR_VERSION, producer_name="profiling/networks.py")


def resnet50(net: Builder) -> None:
    """He et al. 2016 in torchvision's version 1.5: a block strides in its 3x3 convolution."""
    resnet(net, bottleneck, [3, 4, 6, 3])


def resnet18(net: Builder) -> None:
    """He et al. 2016, as in torchvision."""
    resnet(net, basic_block, [2, 2, 2, 2])


def resnet(net: Builder, block: Callable[[Builder, str, str, int, int], str],
           depths: list[int]) -> None:
    x = net.relu(net.batch_norm(net.conv("input", "conv1", 64, 7, stride=2), "bn1"))
    x = net.max_pool(x, "maxpool", 3, stride=2, padding=1)
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            stride = 2 if i == 0 and stage > 1 else 1
            x = block(net, x, f"layer{stage}.{i}", 32 << stage, stride)
    net.linear(net.global_pool(x), "fc", 1000)


def bottleneck(net: Builder, x: str, name: str, width: int, stride: int) -> str:
    y = net.relu(net.batch_norm(net.conv(x, f"{name}.conv1", width, 1), f"{name}.bn1"))
    y = net.conv(y, f"{name}.conv2", width, 3, stride=stride)
    y = net.relu(net.batch_norm(y, f"{name}.bn2"))
    return residual(net, x, net.conv(y, f"{name}.conv3", 4 * width, 1), name, "bn3", stride)


def basic_block(net: Builder, x: str, name: str, width: int, stride: int) -> str:
    y = net.conv(x, f"{name}.conv1", width, 3, stride=stride)
    y = net.relu(net.batch_norm(y, f"{name}.bn1"))
    return residual(net, x, net.conv(y, f"{name}.conv2", width, 3), name, "bn2", stride)


def residual(net: Builder, x: str, y: str, name: str, norm: str, stride: int) -> str:
    """A block's end: y is normalised and added to x, which is projected where shapes differ."""
    # A gain well below 1 keeps the sum over a stage's blocks from growing.
    y = net.batch_norm(y, f"{name}.{norm}", gain=0.3)
    if stride > 1 or net.channels[x] != net.channels[y]:
        x = net.conv(x, f"{name}.downsample.0", net.channels[y], 1, stride=stride)
        x = net.batch_norm(x, f"{name}.downsample.1")
    return net.relu(net.add(y, x, f"{name}.add"))


def vgg16(net: Builder) -> None:
    """Simonyan and Zisserman 2015, as in torchvision without batch norm.

    torchvision's adaptive pooling to 7x7 does nothing at 224x224 and is left out, as are its
    Dropouts.
    """
    x, index = "input", 0
    for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        for i in range(depth):
            # Max pooling of positive values more than doubles their power; this takes it back.
            gain = 0.75 if stage and i == 0 else 1.0
            x = net.relu(net.conv(x, f"features.{index}", width, 3, bias=True, gain=gain))
            index += 2
        x = net.max_pool(x, f"features.{index}", 2, stride=2)
        index += 1
    x = net.flatten(x, (net.size // 32) ** 2)
    x = net.relu(net.linear(x, "classifier.0", 4096, "classifier.0"))
    x = net.relu(net.linear(x, "classifier.3", 4096, "classifier.3"))
    net.linear(x, "classifier.6", 1000)


def squeezenet1_1(net: Builder) -> None:
    """Iandola et al. 2016 in version 1.1, as in torchvision without its Dropout."""
    x = net.relu(net.conv("input", "features.0", 64, 3, stride=2, padding=0, bias=True))
    x = net.max_pool(x, "features.2", 3, stride=2, ceil_mode=True)
    squeezes = {3: 16, 4: 16, 6: 32, 7: 32, 9: 48, 10: 48, 11: 64, 12: 64}
    for index in range(3, 13):
        if index in squeezes:
            after_pool = index - 1 not in squeezes
            x = fire(net, x, f"features.{index}", squeezes[index], 0.62 if after_pool else 1.0)
        else:
            x = net.max_pool(x, f"features.{index}", 3, stride=2, ceil_mode=True)
    x = net.relu(net.conv(x, "classifier.1", 1000, 1, bias=True, gain=2.0))
    net.global_pool(x, "logits")


def fire(net: Builder, x: str, name: str, squeeze: int, gain: float) -> str:
    x = net.relu(net.conv(x, f"{name}.squeeze", squeeze, 1, bias=True, gain=gain))
    return net.concat([net.relu(net.conv(x, f"{name}.expand{kernel}x{kernel}", 4 * squeeze,
                                         kernel, bias=True)) for kernel in (1, 3)],
                      f"{name}.concat")


def densenet121(net: Builder) -> None:
    """Huang et al. 2017, as in torchvision: a layer's batch norm comes before its convolution."""
    growth = 32
    x = net.conv("input", "features.conv0", 64, 7, stride=2)
    x = net.relu(net.batch_norm(x, "features.norm0"))
    x = net.max_pool(x, "features.pool0", 3, stride=2, padding=1)
    for block, depth in enumerate([6, 12, 24, 16], start=1):
        if block > 1:
            name = f"features.transition{block - 1}"
            x = net.relu(net.batch_norm(x, f"{name}.norm"))
            x = net.conv(x, f"{name}.conv", net.channels[x] // 2, 1)
            x = net.average_pool(x, f"{name}.pool", 2, stride=2)
        for layer in range(1, depth + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            y = net.relu(net.batch_norm(x, f"{name}.norm1"))
            y = net.conv(y, f"{name}.conv1", 4 * growth, 1)
            y = net.relu(net.batch_norm(y, f"{name}.norm2"))
            x = net.concat([x, net.conv(y, f"{name}.conv2", growth, 3)], f"{name}.concat")
    x = net.relu(net.batch_norm(x, "features.norm5"))
    net.linear(net.global_pool(x), "classifier", 1000)


def mobilenet_v2(net: Builder) -> None:
    """Sandler et al. 2018, as in torchvision."""
    x = net.conv("input", "features.0.0", 32, 3, stride=2)
    x = net.relu6(net.batch_norm(x, "features.0.1"))
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
              (6, 160, 3, 2), (6, 320, 1, 1)]
    index = 1
    for expansion, channels, blocks, stride in stages:
        for block in range(blocks):
            x = inverted_residual(net, x, f"features.{index}", expansion, channels,
                                  stride if block == 0 else 1)
            index += 1
    x = net.conv(x, "features.18.0", 1280, 1)
    x = net.relu6(net.batch_norm(x, "features.18.1"))
    net.linear(net.global_pool(x), "classifier.1", 1000)


def inverted_residual(net: Builder, x: str, name: str, expansion: int, channels: int,
                      stride: int) -> str:
    y, layer, hidden = x, 0, expansion * net.channels[x]
    if expansion > 1:
        y = net.relu6(net.batch_norm(net.conv(y, f"{name}.conv.0.0", hidden, 1),
                                     f"{name}.conv.0.1"))
        layer = 1
    y = net.conv(y, f"{name}.conv.{layer}.0", hidden, 3, stride=stride, groups=hidden)
    y = net.relu6(net.batch_norm(y, f"{name}.conv.{layer}.1"))
    y = net.conv(y, f"{name}.conv.{layer + 1}", channels, 1)
    # No ReLU follows to halve the power that He's weights double: sqrt(0.5) does.
    y = net.batch_norm(y, f"{name}.conv.{layer + 2}", gain=math.sqrt(0.5))
    if stride == 1 and net.channels[x] == channels:
        y = net.add(x, y, f"{name}.add")
    return y


def vit_s_16(net: Builder) -> None:
    """Touvron et al. 2021, the small DeiT, as timm has it: vit_small_patch16_224."""
    width, patches = 384, (net.size // 16) ** 2
    x = net.conv("input", "patch_embed.proj", width, 16, stride=16, padding=0, bias=True)
    x = net.transpose(net.reshape(x, "patch_embed.flatten", [0, width, patches], width), [0, 2, 1])
    x = net.node("Concat", "tokens", [class_tokens(net, width), x], width, axis=1)
    x = net.add(x, net.normal("pos_embed", (1, 1 + patches, width), 0.5), "embedded")
    for i in range(12):
        name = f"blocks.{i}"
        y = attention(net, net.layer_norm(x, f"{name}.norm1"), f"{name}.attn", 1 + patches, heads=6)
        x = net.add(x, y, f"{name}.add1")
        y = net.pointwise(net.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1", 4 * width)
        # What a block adds is small, so that the sum does not grow.
        x = net.add(x, net.pointwise(net.gelu(y), f"{name}.mlp.fc2", width, 0.3), f"{name}.add2")
    net.linear(net.pick(net.layer_norm(x, "norm"), "class", 0, axis=1), "head", 1000)


def class_tokens(net: Builder, width: int) -> str:
    """One for each image."""
    images = net.node("Shape", "images", ["input"], 0, start=0, end=1)
    shape = net.node("Concat", "cls_token.shape",
                     [images, net.constant("cls_token.tail", [1, width], np.int64)], 0, axis=0)
    token = net.normal("cls_token", (1, 1, width), 1.0)
    return net.node("Expand", "cls_token.expand", [token, shape], width)


def attention(net: Builder, x: str, name: str, tokens: int, heads: int) -> str:
    """Of the tokens of an image to each other. He's weights make scores of about +-2, so that a
    token attends to a few others and not to all alike."""
    width = net.channels[x]
    depth = width // heads
    x = net.reshape(net.pointwise(x, f"{name}.qkv", 3 * width), f"{name}.heads",
                    [0, tokens, 3, heads, depth], depth)
    x = net.transpose(x, [2, 0, 3, 1, 4])
    q, k, v = (net.pick(x, f"{name}.{part}", i, axis=0) for i, part in enumerate("qkv"))
    q = net.node("Mul", f"{name}.scaled", [q, net.constant(f"{name}.scale", depth ** -0.5)], depth)
    x = net.node("MatMul", f"{name}.scores", [q, net.transpose(k, [0, 1, 3, 2])], tokens)
    x = net.node("Softmax", f"{name}.softmax", [x], tokens, axis=-1)
    x = net.transpose(net.node("MatMul", f"{name}.values", [x, v], depth), [0, 2, 1, 3])
    x = net.reshape(x, f"{name}.joined", [0, tokens, width], width)
    return net.pointwise(x, f"{name}.proj", width, 0.3)


def convnext_tiny(net: Builder) -> None:
    """Liu et al. 2022, as in torchvision without its stochastic depth."""
    x = net.conv("input", "features.0.0", 96, 4, stride=4, padding=0, bias=True)
    x = channel_norm(net, x, "features.0.1")
    for stage, (channels, depth) in enumerate([(96, 3), (192, 3), (384, 9), (768, 3)]):
        if stage:
            x = channel_norm(net, x, f"features.{2 * stage}.0")
            x = net.conv(x, f"features.{2 * stage}.1", channels, 2, stride=2, padding=0, bias=True)
        for i in range(depth):
            x = convnext_block(net, x, f"features.{2 * stage + 1}.{i}")
    x = channel_norm(net, net.global_average(x), "classifier.0")
    net.linear(net.flatten(x, 1), "classifier.2", 1000)


def channel_norm(net: Builder, x: str, name: str) -> str:
    """torchvision's LayerNorm2d."""
    x = net.layer_norm(net.transpose(x, [0, 2, 3, 1]), name)
    return net.transpose(x, [0, 3, 1, 2])


def convnext_block(net: Builder, x: str, name: str) -> str:
    channels = net.channels[x]
    y = net.conv(x, f"{name}.block.0", channels, 7, groups=channels, bias=True)
    y = net.layer_norm(net.transpose(y, [0, 2, 3, 1]), f"{name}.block.2")
    y = net.gelu(net.pointwise(y, f"{name}.block.3", 4 * channels))
    y = net.transpose(net.pointwise(y, f"{name}.block.5", channels), [0, 3, 1, 2])
    # As large as a trained network's, and small enough that the sum does not grow.
    scale = net.weight(f"{name}.layer_scale", net.rng.uniform(0.2, 0.4, (channels, 1, 1)))
    y = net.node("Mul", f"{name}.scaled", [scale, y], channels)
    return net.add(y, x, f"{name}.add")


NETWORKS: dict[str, Callable[[Builder], None]] = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "vgg16": vgg16,
    "squeezenet1_1": squeezenet1_1,
    "densenet121": densenet121,
    "vit_s_16": vit_s_16,
    "convnext_tiny": convnext_tiny,
}


def build(name: str, seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """The network of that name; ValueError where there is none.

    Input "input" (N, 3, size, size) and output "logits" (N, 1000) are float32, N is free. size: a
    multiple of 32.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NETWORKS)}")
    net = Builder(seed, size)
    NETWORKS[name](net)
    return net.model(name)


def parameters(model: onnx.ModelProto) -> int:
    """Trainable parameters, as torch counts them: running statistics are not among them."""
    statistics = {name for node in model.graph.node if node.op_type == "BatchNormalization"
                  for name in node.input[3:]}
    return sum(math.prod(weight.dims) for weight in model.graph.initializer
               if weight.name not in statistics)


def dot_products(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """(terms, how many per image) of the dot products of each convolution, Gemm and MatMul."""
    # With data propagation, for a class token is expanded to a shape that is computed.
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    for value in [*graph.value_info, *graph.output]:
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    layers = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            outputs = shapes[node.output[0]][1:]
            # Conv weights are (O, C / groups, KH, KW); the elements of either kind of weight
            # divide by the output channels, however Gemm's transB turns them.
            layers.append((math.prod(shapes[node.input[1]]) // outputs[0], math.prod(outputs)))
        elif node.op_type == "MatMul":
            layers.append((shapes[node.input[1]][-2], math.prod(shapes[node.output[0]][1:])))
    return layers


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of all convolutions and matrix products for one image."""
    return sum(terms * outputs for terms, outputs in dot_products(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=NETWORKS, help="the network to build")
    parser.add_argument("-o", "--output", type=Path, help="file to write, default NAME.onnx")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, default 0")
    parser.add_argument("--list", action="store_true", help="list all networks with their sizes")
    args = parser.parse_args()
    if args.list:
        for name in NETWORKS:
            model = build(name)
            print(f"{name:14} {parameters(model):12,} parameters {macs(model) / 1e9:6.2f} GMACs")
    elif args.name:
        path = args.output or Path(f"{args.name}.onnx")
        onnx.save(build(args.name, args.seed), path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    else:
        parser.error("name a network to build, or ask for --list")


if __name__ == "__main__":
    main()
