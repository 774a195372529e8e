"""Writes networks of paddle.vision and PaddleClas as ONNX files, for exported_networks.py.

    python profiling/export_paddle.py --output paddle PPLCNet_x1_0 resnet18

Needs paddlepaddle, paddle2onnx and paddleclas, in an environment of their own, and nothing of this
project. Weights are random, and the statistics of batch norms those of random images, so that
values keep their size from layer to layer.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import paddle
from paddle.static import InputSpec

VISION = ["resnet18", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0",
          "squeezenet1_1", "densenet121", "googlenet", "inception_v3", "resnext50_32x4d", "alexnet"]
PADDLECLAS = ["PPLCNet_x1_0", "PPLCNetV2_base", "PPHGNet_tiny", "PPHGNetV2_B0", "ESNet_x1_0",
              "GhostNet_x1_0", "MobileNetV4_conv_small", "StarNet_S1", "VAN_B0", "PeleeNet",
              "HarDNet68", "ResNet50_vd", "SE_ResNet50_vd", "DLA34"]


def build(name: str) -> Any:
    """The network in inference mode; it gives logits."""
    paddle.seed(0)
    if name in VISION:
        model = getattr(paddle.vision.models, name)(pretrained=False)
    else:
        from paddleclas.ppcls.arch import backbone
        model = getattr(backbone, name)(pretrained=False)
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):
            layer._momentum = 0.0       # the statistics of the last batch
    model.train()
    with paddle.no_grad():
        model(paddle.randn([2, 3, 224, 224]))
    model.eval()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("networks", nargs="*", help="all of the lists by default")
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    images = InputSpec([None, 3, 224, 224], "float32", "images")
    for name in options.networks or [*VISION, *PADDLECLAS]:
        paddle.onnx.export(build(name), str(options.output / f"paddle_{name}"),
                           input_spec=[images], opset_version=17)


if __name__ == "__main__":
    main()
