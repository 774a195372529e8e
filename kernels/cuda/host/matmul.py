"""Matrix products on CUDA. A Linear layer is for few samples a matrix-vector product, else a 1x1
convolution over an image of one row; where both matrices are computed it is ../matmul.py's kernel.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from ...matrices import Operands, from_starts, nowhere, operands
from ...ops import Linear, MatMul, TensorSpec, count, known
from ...step import Array, Step, weight_and_bias
from .. import matmul, vector
from ..compiler import Kernel
from ..conv_gemm import Tile
from ..index import divisor
from ..launch import CudaOptions, Launch
from . import gemv
from .arguments import check_sizes, four_axes
from .conv import check_dtype, decide, prepare_gemm, stored_as
from .conv_shape import Conv


def kernels(dtype: str) -> list[Kernel]:
    """Those for few samples and of computed matrices; conv.py lists the others."""
    stored = stored_as(dtype)
    return [*gemv.kernels(stored), *(product_kernel(stored, stored, stored, lanes)
                                     for lanes in (4, 1))]


def prepare_linear(op: Linear, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: CudaOptions, tile: Tile | None = None,
                   splits: int | None = None, cluster: bool = False) -> Step:
    """y = activation(x @ weight.T + bias + residual) for x (..., in); weight and bias are
    constants, and the product for few samples takes no residual.

    tile, splits and cluster force the choice that `choose` makes otherwise, for a GEMM. ValueError
    as of `prepare_conv2d`. tf32 is for many samples: the product for few computes in fp32, too.
    """
    check_dtype("Linear", options)
    weight, bias = weight_and_bias(op.kind, weights)
    check_sizes(op.kind, inputs[0], output)
    plain = as_gemm(op, inputs, output)
    samples, features = plain.width, plain.channels
    few = gemv.fits(samples) and len(inputs) < 4
    choice = decide(plain, options, tile, splits, cluster, few)
    if choice.tile is None:
        return gemv.prepare_gemv(stored_as(options.dtype), samples, features, op.activation,
                                 weight, bias, options)
    return prepare_gemm(plain, op.activation, weight, bias, options, choice, inputs)


def as_gemm(op: Linear, inputs: Sequence[TensorSpec], output: TensorSpec) -> Conv:
    """The layer as a convolution over an image of one row, a pixel a sample."""
    features, samples = known(inputs[0].shape)[-1], count(inputs[0].shape[:-1])
    return Conv(1, 1, samples, features, 1, samples, known(output.shape)[-1], (1, 1), (1, 1), 0, 0,
                (1, 1), 1)


# ---- of computed matrices ---------------------------------------------------------------------

def product_kernel(a: str, b: str, y: str, lanes: int) -> Kernel:
    """Of matrices stored as these dtypes."""
    return Kernel(f"matmul_{vector.short(a, b, y)}_{matmul.BLOCK}x{matmul.BLOCK}x{lanes}",
                  matmul.make, (a, b, y, lanes), matmul.SIGNATURE, matmul.THREADS,
                  matmul.SHARED_BYTES, vector.arch(a, b, y))


def prepare_matmul(op: MatMul, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: CudaOptions) -> Step:
    """y = scale * a @ b, in fp32 whatever the compute type is."""
    check_sizes(op.kind, *inputs, output)
    found, dtype = operands(op, inputs, output), output.dtype
    kernel = product_kernel(dtype, dtype, dtype, product_lanes(found))
    multiply = product(kernel, op.kind, found, op.scale)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [multiply(y, *from_starts(arrays, found.starts))]

    return Step(kernel.name, bind)


def product_lanes(found: Operands) -> int:
    """Elements that the output is stored by."""
    y = found.lies[-1]
    steps = (found.shapes[-1][1], y.row, *y.leading)
    return 4 if all(step % 4 == 0 for step in steps) else 1


def product(kernel: Kernel, what: str, found: Operands, scale: float) -> Callable[..., Launch]:
    """What makes the launch that multiplies, of y, a, b and maybe a bias; the lies of `found` are
    those of a, b, [bias,] y. ValueError for too many leading axes."""
    (rows, depth), (_, columns) = found.shapes[:2]
    a, b, *bias, y = found.lies
    lies = a, b, *(bias or [nowhere(found.sizes)]), y
    tiles = -(-columns // matmul.BLOCK)
    numbers = (rows, depth, columns, *divisor(tiles),
               *four_axes(what, found.sizes, *(lie.leading for lie in lies)),
               *(step for lie in lies for step in (lie.row, lie.column)))
    grid = (count(found.sizes), -(-rows // matmul.BLOCK) * tiles, 1)

    def launch(y: Array, a: Array, b: Array, bias: Array | None = None) -> Launch:
        added = (a, 0) if bias is None else (bias, 1)       # which is not read then
        return Launch(kernel, grid, (a, b, *added, y, scale, *numbers))

    return launch
