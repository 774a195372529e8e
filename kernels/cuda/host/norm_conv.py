"""A batch norm and a convolution of 1x1 as one kernel: when it serves, and the norm's numbers."""
from __future__ import annotations

from ...norm import scale_and_shift
from ...ops import BatchNorm, Conv2d, NormConv2d, Relu, TensorSpec
from ...step import Array, Step, weight_and_bias
from .. import vector
from ..compiler import Kernel
from ..conv_gemm import ENDINGS, Tile
from ..conv_norm import DTYPES
from ..launch import Choice, CudaOptions
from .arguments import check_sizes
from .conv import as_gemm, check_dtype, conv_kernel, prepare_gemm
from .conv_choice import MMA_TILES, candidates
from .conv_shape import Norm

# Of 64x128, four of whose blocks share a multiprocessor, a thread has no register left.
TILES = tuple(tile for tile in MMA_TILES if (tile.block_m, tile.block_n) != (64, 128))


def kernels(dtype: str) -> list[Kernel]:
    return [conv_kernel(dtype, tile, "clip", end, "norm_relu") for tile in TILES
            for end in ENDINGS]


def serves(norm: BatchNorm, conv: Conv2d, weight_shape: tuple[int, ...], dtype: str) -> bool:
    """Whether the two can be one: zeros around an image would have to stay zeros."""
    _, kh, kw, channels = weight_shape
    return (dtype in DTYPES and isinstance(norm.activation, (Relu, type(None)))
            and (kh, kw) == (1, 1) and conv.groups == 1 and not any(conv.padding)
            and channels % vector.lanes(dtype) == 0)


def prepare_norm_conv(op: NormConv2d, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: CudaOptions, tile: Tile | None = None,
                      splits: int = 1, cluster: bool = False) -> Step:
    """Inputs as NormConv2d says, constants but for x; tile, splits and cluster force a choice.

    ValueError where `serves` is False, and as of `prepare_conv2d`.
    """
    check_dtype(op.kind, options)
    check_sizes(op.kind, inputs[0], output)
    of_conv = [inputs[0], *inputs[5:]]
    weight, bias = weight_and_bias(op.kind, [None, *weights[5:]])
    if not serves(op.norm, op.conv, weight.shape, options.dtype):
        raise ValueError(f"NormConv2d: {op} with a weight of shape {weight.shape} in "
                         f"{options.dtype} is no single kernel; use BatchNorm and Conv2d")
    plain = as_gemm(op.conv, of_conv, output)
    if tile is not None:
        choice = Choice(tile, splits, cluster)
    else:
        found = candidates(plain.pixels, plain.group_out, plain.depth, 1, options.dtype, options)
        choice = next(choice for _, choice in found if choice.tile in TILES)
    before = "norm_relu" if op.norm.activation else "norm"
    norm = Norm(before, *scale_and_shift(op.norm, weights[:5]))
    return prepare_gemm(plain, op.conv.activation, weight, bias, options, choice, of_conv, norm)
