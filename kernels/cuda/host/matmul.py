"""Linear layers on CUDA: for few samples a matrix-vector product, else a 1x1 convolution over an
image of one row."""
from __future__ import annotations

from collections.abc import Sequence

from ...ops import Linear, TensorSpec, count, known
from ...step import Array, Step, weight_and_bias
from ..compiler import Kernel
from ..conv_gemm import Tile
from ..launch import CudaOptions
from . import gemv
from .arguments import check_sizes
from .conv import check_dtype, decide, prepare_gemm, stored_as
from .conv_shape import Conv


def kernels(dtype: str) -> list[Kernel]:
    """Those for few samples; conv.py lists the others."""
    return gemv.kernels(stored_as(dtype))


def prepare_linear(op: Linear, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: CudaOptions, tile: Tile | None = None,
                   splits: int | None = None, cluster: bool = False) -> Step:
    """y = activation(x @ weight.T + bias) for x (..., in); weight and bias are constants.

    tile, splits and cluster force the choice that `choose` makes otherwise, for a GEMM. ValueError
    as of `prepare_conv2d`. tf32 is for many samples: the product for few computes in fp32, too.
    """
    check_dtype("Linear", options)
    weight, bias = weight_and_bias(op.kind, weights)
    check_sizes(op.kind, inputs[0], output)
    plain = as_gemm(op, inputs, output)
    samples, features = plain.width, plain.channels
    choice = decide(plain, options, tile, splits, cluster, gemv.fits(samples))
    if choice.tile is None:
        return gemv.prepare_gemv(stored_as(options.dtype), samples, features, op.activation,
                                 weight, bias, options)
    return prepare_gemm(plain, op.activation, weight, bias, options, choice)


def as_gemm(op: Linear, inputs: Sequence[TensorSpec], output: TensorSpec) -> Conv:
    """The layer as a convolution over an image of one row, a pixel a sample."""
    features, samples = known(inputs[0].shape)[-1], count(inputs[0].shape[:-1])
    return Conv(1, 1, samples, features, 1, samples, known(output.shape)[-1], (1, 1), (1, 1), 0, 0,
                (1, 1), 1)
