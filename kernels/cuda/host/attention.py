"""Attention on CUDA: on tensor cores where half precision is asked for, else as two products with a
softmax between them, on fp32 scores in a workspace."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...axes import dense_steps
from ...matrices import Lie, Operands, from_starts, nowhere, operands
from ...memory import ALIGNMENT
from ...ops import Attention, Softmax, TensorSpec, count
from ...step import Array, Step
from .. import attention, vector
from ..compiler import Kernel, number_of
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import check_sizes, four_axes
from .conv import stored_as
from .matmul import product, product_kernel, product_lanes
from .softmax import prepare_softmax

DTYPES = ("float16", "bfloat16")
USUAL = (32, 64)                # columns of a head


def fused_kernel(dtype: str, depth: int, width: int, lanes: int, biased: bool) -> Kernel:
    """depth, width: of q and k, and of v."""
    sizes = attention.padded(depth), attention.padded(width)
    name = f"attention_{vector.short(dtype)}x{lanes}_{sizes[0]}x{sizes[1]}{'_bias' * biased}"
    return Kernel(name, attention.make, (dtype, *sizes, lanes, biased), attention.SIGNATURE,
                  attention.THREADS, attention.shared_bytes(*sizes), "sm_80",
                  resident_blocks(max(sizes)))


def resident_blocks(columns: int) -> int:
    """Whose registers fit a multiprocessor without a spill."""
    return 4 if columns <= 32 else 3 if columns <= 64 else 2


def kernels(dtype: str) -> list[Kernel]:
    """Those of the usual heads; of other compute types the products on fp32 scores."""
    if dtype in DTYPES:
        return [fused_kernel(dtype, size, size, 8, biased) for size in USUAL
                for biased in (False, True)]
    stored = stored_as(dtype)
    return [product_kernel(*dtypes, lanes) for dtypes in ((stored, stored, "float32"),
                                                          ("float32", stored, stored))
            for lanes in (4, 1)]


def prepare_attention(op: Attention, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: CudaOptions) -> Step:
    """Inputs q, k, v, [bias]."""
    check_sizes(op.kind, *inputs, output)
    found = operands(op, inputs, output)
    if options.dtype in DTYPES and number_of(options.arch) >= 80:
        lanes = copy_lanes(found)
        if lanes:
            return _prepare_fused(op, found, output.dtype, lanes)
    return _prepare_apart(op, found, output, options)


def copy_lanes(found: Operands) -> int:
    """By how many elements all rows can be copied; 0 where they can not, or where registers do not
    hold a row's sums."""
    (_, depth), (_, width) = found.shapes[0], found.shapes[2]
    steps = [step for lie in found.lies[:3] for step in (lie.row, *lie.leading)]
    if max(depth, width) > attention.MOST or any(lie.column != 1 for lie in found.lies[:3]):
        return 0
    return next((lanes for lanes in attention.COPY
                 if not any(number % lanes for number in (depth, width, *steps, *found.starts))),
                0)


def _prepare_fused(op: Attention, found: Operands, dtype: str, lanes: int) -> Step:
    (queries, depth), (keys, width) = found.shapes[0], found.shapes[2]
    biased = len(found.lies) == 5
    kernel = fused_kernel(dtype, depth, width, lanes, biased)
    tiles = -(-queries // attention.QUERIES)
    q, k, v, *rest, y = found.lies
    bias = rest[0] if biased else nowhere(found.sizes)
    lies = q, k, v, y, bias
    numbers = (op.scale * attention.LOG2_E, queries, keys, depth, width, *divisor(tiles),
               *four_axes(op.kind, found.sizes, *(lie.leading for lie in lies)),
               *(lie.row for lie in lies), bias.column)
    grid = (tiles * count(found.sizes), 1, 1)

    def bind(arrays: Sequence[Array], out: Array, workspace: Array) -> list[Launch]:
        q, k, v, *rest = from_starts(arrays, found.starts)
        given = q, k, v, rest[0] if biased else v       # which is not read then
        return [Launch(kernel, grid, (*given, out, *numbers))]

    return Step(kernel.name, bind)


def _prepare_apart(op: Attention, found: Operands, output: TensorSpec, options: CudaOptions
                   ) -> Step:
    (queries, _), (keys, _) = found.shapes[0], found.shapes[2]
    q, k, v, *bias, y = found.lies
    matrices = count(found.sizes)
    scores = TensorSpec((matrices, queries, keys))
    check_sizes(op.kind, scores)
    *leading, row, column = dense_steps((*found.sizes, queries, keys))
    dense = Lie(tuple(leading), row, column)
    first = Operands(found.sizes, (found.shapes[0], found.shapes[1][::-1], (queries, keys)),
                     (q, k.turned(), *bias, dense), found.starts[:2])
    second = Operands(found.sizes, ((queries, keys), found.shapes[2], found.shapes[3]),
                      (dense, v, y), (0, found.starts[2]))
    stored = output.dtype
    kernels = (product_kernel(stored, stored, "float32", product_lanes(first)),
               product_kernel("float32", stored, stored, product_lanes(second)))
    scores_of = product(kernels[0], op.kind, first, op.scale)
    values_of = product(kernels[1], op.kind, second, 1.0)
    softmax = prepare_softmax(Softmax(), [scores], scores, [None], options)
    size = -(-4 * count(scores.shape) // ALIGNMENT) * ALIGNMENT

    def bind(arrays: Sequence[Array], out: Array, workspace: Array) -> list[Launch]:
        there, shares = (workspace[at:at + 4 * count(scores.shape)].view(np.float32)
                         for at in (0, size))
        queries, keys, values, *rest = from_starts(arrays, found.starts)
        return [scores_of(there, queries, keys, *rest),
                *softmax.bind([there], shares, workspace), values_of(out, shares, values)]

    return Step(f"{kernels[0].name} + {softmax.kernel} + {kernels[1].name}", bind, 2 * size)
