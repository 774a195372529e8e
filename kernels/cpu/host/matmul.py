"""Linear layers: a matrix product is a 1x1 convolution over an image of one row of samples.

With one sample the micro-kernel of one row streams each weight through once (a GEMV, bound by
memory); with TILE_ROWS samples or more it is the register-blocked GEMM of
../conv.py.
"""
from __future__ import annotations

from ...ops import Linear, TensorSpec, count, known
from ...step import Array, Options, Step, weight_and_bias
from ..geometry import ConvGeometry
from ..sizes import BLOCK, TILE_ROWS
from .conv import prepare_tiled


def prepare_linear(op: Linear, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    """y = activation(x @ weight.T + bias) for x (..., in)."""
    weight, bias = weight_and_bias(op.kind, weights)
    features = known(inputs[0].shape)[-1]
    samples = count(inputs[0].shape[:-1])
    g = ConvGeometry(1, samples, features, 1, samples, len(weight), 1, 1, 1, 1, 0, 0, 1, 1,
                     features)
    kind = "gemv" if samples < TILE_ROWS // 2 else f"{TILE_ROWS}x{BLOCK}"
    return prepare_tiled(f"linear_f32_{kind}", 1, g, (0, 0), 1, op.activation, weight, bias,
                             options)
