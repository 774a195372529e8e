"""Quantises a float .onnx file to 8 bits with ONNX Runtime's quantiser, to time what comes of it.

    python profiling/quantise.py resnet50.onnx resnet50_int8.onnx

Activations are uint8 and weights int8, by channel, with QuantizeLinear and DequantizeLinear nodes.
The ranges are those of random images: for a network that is to be right, take your own, as
docs/models.md shows.
"""
from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from measured_network import random_batch

IMAGES = 8


def quantise(source: Path, target: Path, images: np.ndarray) -> None:
    """Write `target`, with the ranges of these images, float32 (N, C, H, W)."""
    # What needs it is imported where it is called, so that a worker of another engine holds none.
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):        # type: ignore[misc]
        left: Iterator[np.ndarray] = iter(images[:, None])

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {name: image}

    model = onnx.load(source, load_external_data=False)
    weights = {weight.name for weight in model.graph.initializer}
    name = next(value.name for value in model.graph.input if value.name not in weights)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, target, Reader(), per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    settings = parser.parse_args()
    quantise(settings.source, settings.target, random_batch(onnx.load(settings.source), IMAGES))


if __name__ == "__main__":
    main()
