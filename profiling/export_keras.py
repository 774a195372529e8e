"""Writes networks of keras.applications as ONNX files, for exported_networks.py.

    python profiling/export_keras.py --output keras MobileNetV2 ResNet50

Needs tensorflow and tf2onnx, in an environment of their own, and nothing of this project. Weights
are random, and the statistics of batch norms those of random images, so that values keep their size
from layer to layer. Keras's own exporter writes the files, or tf2onnx by itself.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow

# EfficientNet's constants of normalisation become inputs of the file, and ConvNeXt's file is one
# that ONNX Runtime refuses, too.
NETWORKS = ["MobileNet", "MobileNetV2", "MobileNetV3Small", "ResNet50", "ResNet50V2", "DenseNet121",
            "InceptionV3", "InceptionResNetV2", "Xception", "NASNetMobile"]
KERAS, TF2ONNX = EXPORTERS = ("keras", "tf2onnx")


def build(name: str) -> Any:
    """The network, which gives logits; of any size of image, it has seen one of 224x224."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, classifier_activation=None)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0        # the statistics of the last batch
    sizes = [size or 224 for size in model.input_shape[1:3]]
    model(np.random.default_rng(0).random((2, *sizes, 3), np.float32), training=True)
    return model


def export(model: Any, path: Path, exporter: str) -> None:
    if exporter == KERAS:
        model.export(path, format="onnx", verbose=False)
        return
    import tf2onnx
    images = tensorflow.TensorSpec((None, *model.input_shape[1:]), tensorflow.float32, "images")
    tf2onnx.convert.from_function(
        tensorflow.function(lambda images: model(images, training=False)),
        input_signature=(images,), opset=17, output_path=str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("networks", nargs="*", help="all of the list by default")
    parser.add_argument("--exporter", choices=EXPORTERS, default=KERAS,
                        help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.networks or NETWORKS:
        export(build(name), options.output / f"{options.exporter}_{name}.onnx", options.exporter)


if __name__ == "__main__":
    main()
