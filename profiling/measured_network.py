"""A network that is measured: its file, images for it, and the logits that it must give.

Images are random, their pixels 64ths that every dtype holds exactly. Every logit is compared with
the float64 network of the same images. With unit roundoffs u of what is stored and s of sums, a
layer's images, weights and outputs are each rounded once, and its sums of K terms by about sqrt(K)
s. Errors of layers are independent (Higham and Mary 2019), so a logit may be wrong by 8 deviations
of sqrt(sum over layers of (3 u^2 + K s^2)) times the logits' root mean square. A file of 8 bits
rounds where it quantises, be it in the midst of a GELU: each such place is a layer.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import networks
import numpy as np
import onnx
from common import ROOT

ZOO = ROOT / "cnn" / "zoo"
IMAGES = 3                  # different ones in a batch: no power of 2, to find tiles mixed up
PIXEL = 64                  # pixels are whole 64ths, up to 4: 8 bits and a sign
DEVIATIONS = 8
PRODUCTS, EVERYTHING = "products", "everything"
FLOAT32 = 2.0 ** -24        # unit roundoff, also of sums

# (file, images (N, H, W, C)) -> float64 logits (N, classes)
Reference = Callable[[Path, np.ndarray], np.ndarray]


class Network:
    """A network's file, with images and their float64 logits.

    name       a zoo name, one of networks.py, whose file is made in `folder`, or an .onnx file
    quantised  PRODUCTS or EVERYTHING: its file is quantised to 8 bits first, what products read
               or all of it, which is the network then
    images     (IMAGES, H, W, C) float32
    """

    def __init__(self, name: str, folder: Path, reference: Reference,
                 quantised: str | None = None) -> None:
        self.path = find_network(name, folder)
        model = onnx.load(self.path)
        noise = random_batch(model, IMAGES).clip(-4, 4)
        self.images = np.round(PIXEL * noise).transpose(0, 2, 3, 1) / PIXEL
        if quantised:
            import quantise
            float_path, self.path = self.path, folder / f"{self.path.stem}_{quantised}.onnx"
            quantise.quantise(float_path, self.path, self.images.transpose(0, 3, 1, 2),
                              quantised == EVERYTHING)
        self.logits = reference(self.path, self.images)
        products = networks.dot_products(model)
        self.terms = [terms for terms, _ in products]
        self.macs = sum(terms * outputs for terms, outputs in products)     # of one image
        if quantised:
            places = [node.op_type for node in onnx.load(self.path).graph.node].count(
                "QuantizeLinear")
            self.terms += [0] * (places - len(self.terms))

    def batch(self, size: int, dtype: type = np.float32) -> np.ndarray:
        """(size, H, W, C), the images again and again."""
        return np.ascontiguousarray(self.images[np.arange(size) % IMAGES], dtype)

    def allowed(self, unit: float = FLOAT32, sum_unit: float = FLOAT32) -> float:
        """How far a logit may be from the float64 one, see the top of this page."""
        return logit_error(self.terms, self.logits, unit, sum_unit)

    def check(self, found: np.ndarray, size: int, unit: float = FLOAT32,
              sum_unit: float = FLOAT32) -> float:
        """The largest error of the logits of batch(size); ValueError where it is too large."""
        expected = self.logits[np.arange(size) % IMAGES]
        if found.shape != expected.shape:
            raise ValueError(f"wrong: logits of shape {found.shape}, not {expected.shape}")
        error, allowed = float(np.abs(found - expected).max()), self.allowed(unit, sum_unit)
        if not error <= allowed:
            raise ValueError(f"wrong: a logit is {error:.3g} away from the float64 network's, "
                             f"where rounding explains {allowed:.3g}")
        return error


def logit_error(terms: Sequence[int], logits: np.ndarray, unit: float = FLOAT32,
                sum_unit: float = FLOAT32) -> float:
    """How far a logit may be off. terms: of the sums of each layer, see the top of this page."""
    variance = sum(3 * unit ** 2 + count * sum_unit ** 2 for count in terms)
    return DEVIATIONS * math.sqrt(variance * np.mean(np.square(logits, dtype=np.float64)))


def find_network(name: str, folder: Path) -> Path:
    """The file of a network: a path, a zoo name, or one that is built into `folder`."""
    if name.endswith(".onnx"):
        return Path(name)
    if name in networks.NETWORKS:
        path = folder / f"{name}.onnx"
        onnx.save(networks.build(name), path)
        return path
    zoo = {path.stem: path for path in ZOO.glob("*.onnx")}
    if name not in zoo:
        raise ValueError(f"there is no network {name!r}; there are "
                         f"{', '.join([*networks.NETWORKS, *sorted(zoo)])}, or give an .onnx file")
    return zoo[name]


def random_batch(model: onnx.ModelProto, size: int) -> np.ndarray:
    """Seeded normal noise for the network's input, NCHW float32."""
    weights = {weight.name for weight in model.graph.initializer}
    image = next(value for value in model.graph.input if value.name not in weights)
    shape = [dim.dim_value for dim in image.type.tensor_type.shape.dim]
    if len(shape) != 4 or not all(shape[1:]):
        raise ValueError(f"input {image.name!r} must be (N, C, H, W) with only N free; its "
                         f"dimensions are {shape}, where 0 is a free one")
    if shape[0] not in (0, size):
        raise ValueError(f"input {image.name!r} has the fixed batch {shape[0]}, not {size}")
    return np.random.default_rng(0).standard_normal((size, *shape[1:]), dtype=np.float32)
