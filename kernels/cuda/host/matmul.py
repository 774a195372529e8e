"""Linear layers on CUDA: a matrix product is a 1x1 convolution over an image of one row."""
from __future__ import annotations

from ...ops import Linear, TensorSpec, count, known
from ...step import Array, Step
from ..compiler import Kernel
from ..conv_mma import Tile
from ..launch import CudaOptions
from . import conv
from .arguments import check_sizes
from .conv import Conv, prepare_mma


def kernels(dtype: str) -> list[Kernel]:
    """None of its own: conv.py lists them."""
    return []


def prepare_linear(op: Linear, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: CudaOptions, tile: Tile | None = None,
                   splits: int | None = None) -> Step:
    """y = activation(x @ weight.T + bias) for x (..., in); weight and bias are constants.

    tile and splits force the choice that `choose` makes otherwise.
    """
    weight, bias = weights[1], weights[2] if len(weights) > 2 else None
    if weight is None or (bias is None and len(weights) > 2):
        raise ValueError("Linear: weight and bias must be constants of the network")
    if options.dtype not in conv.MMA_DTYPES:
        raise ValueError(f"Linear: there is no tensor-core kernel for dtype {options.dtype!r}; "
                         f"use one of {conv.MMA_DTYPES}")
    check_sizes(op.kind, inputs[0], output)
    features, samples = known(inputs[0].shape)[-1], count(inputs[0].shape[:-1])
    as_conv = Conv(1, 1, samples, features, 1, samples, len(weight), (1, 1), (1, 1), 0, 0, (1, 1),
                   1)
    return prepare_mma(as_conv, op.activation, weight, bias, options, tile, splits)
