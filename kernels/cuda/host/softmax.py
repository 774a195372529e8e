"""Softmax: along rows or columns, a warp or a block to a row."""
from __future__ import annotations

from collections.abc import Sequence

from ...ops import Softmax, TensorSpec, count, known, normal_axis
from ...step import Array, Options, Step
from .. import softmax, vector
from ..compiler import Kernel
from ..index import divisor
from ..launch import Launch
from .arguments import blocks, check_sizes

WARP_READS = 4      # of a lane; a longer row is shared by a block


def rows_kernel(dtype: str, lanes: int, row_threads: int, log: bool) -> Kernel:
    owner = "warp" if row_threads == 32 else "block"
    return Kernel(f"{_kind(log)}_{owner}_{vector.short(dtype)}x{lanes}", softmax.rows,
                  (dtype, lanes, row_threads, log), softmax.ROWS_SIGNATURE, softmax.THREADS,
                  arch=vector.arch(dtype))


def columns_kernel(dtype: str, log: bool) -> Kernel:
    return Kernel(f"{_kind(log)}_columns_{vector.short(dtype)}", softmax.columns, (dtype, log),
                  softmax.COLUMNS_SIGNATURE, softmax.THREADS, arch=vector.arch(dtype))


def _kind(log: bool) -> str:
    return "log_softmax" if log else "softmax"


def kernels(dtype: str) -> list[Kernel]:
    """All of the dtype but for the narrower vectors; of the logarithm that of whole rows."""
    wide = vector.lanes(dtype)
    return [*(rows_kernel(dtype, lanes, threads, False) for lanes in (wide, 1)
              for threads in (32, softmax.THREADS)), columns_kernel(dtype, False),
            *(rows_kernel(dtype, wide, threads, True) for threads in (32, softmax.THREADS))]


def prepare_softmax(op: Softmax, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    check_sizes(op.kind, output)
    shape, dtype = known(output.shape), output.dtype
    axis = normal_axis(op.axis, len(shape))
    length, inner = shape[axis], count(shape[axis + 1:])
    owners = count(shape) // length
    if inner == 1:
        lanes = vector.lanes(dtype, length)
        row_threads = 32 if length <= WARP_READS * 32 * lanes else softmax.THREADS
        kernel = rows_kernel(dtype, lanes, row_threads, op.log)
        grid = blocks(owners * row_threads, kernel.threads)
        numbers: tuple[int, ...] = (owners, length)
    else:
        kernel = columns_kernel(dtype, op.log)
        grid = blocks(owners, kernel.threads)
        numbers = (owners, length, *divisor(inner))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [Launch(kernel, grid, (arrays[0], y, *numbers))]

    return Step(kernel.name, bind)
