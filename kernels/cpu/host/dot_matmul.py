"""Linear layers of narrow numbers: a 1x1 convolution over rows of samples, as in matmul.py. With
few samples the time goes into reading weights, which are a half or a quarter as long as in float32;
tiles would gain nothing then, and vectors take a row alone."""
from __future__ import annotations

from ...ops import Linear, TensorSpec, count, known
from ...step import Array, Options, Step, weight_and_bias
from ..dot_units import (
    AVX512_BF16,
    AVX512_EMULATED_BF16,
    BLOCK,
    VNNI_EMULATED_INT8,
    VNNI_INT8,
    Amx,
    AmxEmulated,
    AmxInt8,
    AmxInt8Emulated,
    Unit,
)
from ..geometry import ConvGeometry
from . import matmul
from .dot_conv import prepare_tiled
from .numbers import numbers_of, unit_for

FEW = 8                 # samples that fill less than half of a tile's rows
VECTORS: dict[type[Unit], Unit] = {
    Amx: AVX512_BF16, AmxEmulated: AVX512_EMULATED_BF16, AmxInt8: VNNI_INT8,
    AmxInt8Emulated: VNNI_EMULATED_INT8}


def prepare_linear(op: Linear, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options, unit: Unit | None = None) -> Step:
    """y = activation(x @ weight.T + bias + residual) for x (..., in); as `prepare_conv2d` of
    dot_conv.py."""
    weight, bias = weight_and_bias(op.kind, weights)
    unit = unit or unit_for(inputs[0], weight, options)
    if unit is None:
        return matmul.prepare_linear(op, inputs, output, weights, options)
    features = known(inputs[0].shape)[-1]
    samples = count(inputs[0].shape[:-1])
    if samples < FEW:
        unit = VECTORS.get(type(unit), unit)
    unit = unit.for_sums_of(features)
    g = ConvGeometry(samples, 1, features, samples, 1, len(weight), 1, 1, 1, 1, 0, 0, 1, 1,
                     features)
    numbers = numbers_of(unit, op.activation, inputs, output, weight, bias, options)
    kind = "gemv" if samples == 1 else f"{unit.rows}x{BLOCK}"
    return prepare_tiled(f"linear_{unit.dtype}_{unit.name}_{kind}", 1, g, (0, 0), 1, numbers,
                         options, unit, inputs[0].dtype, has_residual=len(inputs) > 3)
