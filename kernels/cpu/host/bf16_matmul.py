"""Linear layers with bfloat16 products and float32 sums: a 1x1 convolution over rows of samples,
as in matmul.py. With few samples the time goes into reading weights, which are half as long as in
float32; tiles would gain nothing then, and vectors take a row alone."""
from __future__ import annotations

from ...ops import Linear, TensorSpec, count, known
from ...step import Array, Options, Step, weight_and_bias
from ..bf16_units import AVX512, AVX512_EMULATED, BLOCK, Amx, AmxEmulated, Unit
from ..geometry import ConvGeometry
from . import bf16
from .bf16_conv import prepare_tiled

FEW = 8                 # samples that fill less than half of a tile's rows
VECTORS: dict[type[Unit], Unit] = {Amx: AVX512, AmxEmulated: AVX512_EMULATED}


def prepare_linear(op: Linear, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options, unit: Unit | None = None) -> Step:
    """y = activation(x @ weight.T + bias + residual) for x (..., in); unit None asks for
    `bf16.choose`."""
    weight, bias = weight_and_bias(op.kind, weights)
    unit = unit or bf16.choose()
    features = known(inputs[0].shape)[-1]
    samples = count(inputs[0].shape[:-1])
    if samples < FEW:
        unit = VECTORS.get(type(unit), unit)
    g = ConvGeometry(samples, 1, features, samples, 1, len(weight), 1, 1, 1, 1, 0, 0, 1, 1,
                     features)
    kind = "gemv" if samples == 1 else f"{unit.rows}x{BLOCK}"
    return prepare_tiled(f"linear_bf16_{unit.name}_{kind}", 1, g, (0, 0), 1, op.activation, weight,
                         bias, options, unit, inputs[0].dtype, has_residual=len(inputs) > 3)
