"""What norm.py is called with."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...axes import flat_pixels
from ...norm import scale_and_shift
from ...ops import BatchNorm, LayerNorm, LocalResponseNorm, TensorSpec, known
from ...step import Array, Options, Step
from ..launch import Kernel, Launch, flat_bits
from .codes import code_bounds, divisor, meaning
from .epilogue import epilogue, in_registers, nothing

SCALE_SHIFT, NORMALISE = Kernel("norm", "scale_shift"), Kernel("norm", "normalise")
LAYER_NORM = Kernel("norm", "layer_norm")
LOCAL_RESPONSE_NORM = Kernel("norm", "local_response_norm")


def prepare_batch_norm(op: BatchNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: Options) -> Step:
    """Codes are numbers as any others, times a scale."""
    scale, shift = scale_and_shift(op, weights)
    low, high, _, suffix = epilogue(op.activation)
    activation, a, b = in_registers(op.activation, output.dtype)
    if inputs[0].dtype == "uint8":
        x_scale, x_zero = meaning(inputs[0])
        shift, scale = shift - x_zero * (scale * x_scale), scale * x_scale
    if output.dtype == "uint8":
        y_scale, y_zero = divisor(output, op.activation)
        scale, shift = scale / y_scale, shift / y_scale + y_zero
        low, high = code_bounds(op.activation)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        (x, x_step), flat = flat_pixels(arrays[0]), flat_bits(y)
        return [SCALE_SHIFT.bind(flat_bits(x), x_step, scale, shift, flat, activation, low, high, a,
                                 b, options.threads)]

    return Step("batch_norm_f32" + suffix, bind, reads_strided=1)


def prepare_layer_norm(op: LayerNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: Options) -> Step:
    """Codes are numbers divided by their scale, by which scale and bias are divided."""
    y_scale, y_zero = meaning(output)
    *_, finish, suffix = epilogue(op.activation)
    if output.dtype == "uint8":
        finish = nothing

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        x, scale, bias = arrays
        if output.dtype == "uint8":
            scale, bias = scale / y_scale, bias / y_scale + y_zero
        launch = LAYER_NORM.bind(x.reshape(-1), scale, bias, np.float32(op.epsilon), flat_bits(y),
                                 options.threads)
        return [launch, *finish(y.reshape(-1), options.threads)]

    return Step("layer_norm_f32" + suffix, bind)


def prepare_local_response_norm(op: LocalResponseNorm, inputs: list[TensorSpec],
                                output: TensorSpec, weights: list[Array | None],
                                options: Options) -> Step:
    channels, before = known(inputs[0].shape)[-1], (op.size - 1) // 2
    factor, beta, bias = map(np.float32, (op.alpha / op.size, op.beta, op.bias))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [LOCAL_RESPONSE_NORM.bind(arrays[0].reshape(-1), channels, before,
                                         op.size - 1 - before, factor, beta, bias, y.reshape(-1),
                                         options.threads)]

    return Step("local_response_norm_f32", bind)


def normalise(pixels: Array, mean: Sequence[float], std: Sequence[float], y: Array,
              threads: int) -> Launch:
    """y = (pixels - mean) / std: of uint8 (N, height, width, channels) float32 of the same shape;
    a mean and a deviation for each channel. ValueError where there are not so many."""
    if not pixels.shape[3] == len(mean) == len(std):
        raise ValueError(f"pixels of shape {pixels.shape} have {pixels.shape[3]} channels, and "
                         f"there are {len(mean)} means and {len(std)} deviations")
    rows, width = pixels.shape[0] * pixels.shape[1], pixels.shape[2]
    of_row = (np.tile(np.array(values, np.float32), width) for values in (mean, std))
    return NORMALISE.bind(np.ascontiguousarray(pixels).reshape(rows, -1), *of_row,
                          y.reshape(rows, -1), threads)
