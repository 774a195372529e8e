"""Quantises a float .onnx file to 8 bits as `cnn quantize` does, but without photos, to time what
comes of it.

    python profiling/quantise.py resnet50.onnx resnet50_int8.onnx
    python profiling/quantise.py resnet50.onnx resnet50_int8.onnx --everything

Activations are uint8 and weights int8, by channel, with QuantizeLinear and DequantizeLinear nodes.
The ranges are those of random images: for a network that is to be right, take your own, as
docs/models.md shows.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from common import ROOT
from measured_network import random_batch

IMAGES = 8


def quantise(source: Path, target: Path, images: np.ndarray, everything: bool = False) -> None:
    """Write `target`, with the ranges of these images, float32 (N, C, H, W); everything: see
    `quantize_static` of cnn/quantize.py."""
    sys.path.insert(0, str(ROOT))       # this checkout, installed or not
    from cnn.quantize import quantize_static
    onnx.save(quantize_static(source, onnx.load(source), images[:, None], everything), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--everything", action="store_true",
                        help="quantise what lies between products, too")
    settings = parser.parse_args()
    quantise(settings.source, settings.target, random_batch(onnx.load(settings.source), IMAGES),
             settings.everything)


if __name__ == "__main__":
    main()
