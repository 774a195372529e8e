"""Batch norm: its four constants become a scale and a shift."""
from __future__ import annotations

from collections.abc import Sequence

from ...axes import pixel_step
from ...norm import scale_and_shift
from ...ops import BatchNorm, TensorSpec, count
from ...step import Array, Step
from .. import norm, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import blocks, check_sizes, part_unit


def kernel_of(dtype: str, lanes: int, activation: str) -> Kernel:
    return Kernel(f"batch_norm_{vector.short(dtype)}x{lanes}_{activation}", norm.make,
                  (dtype, lanes, activation), norm.SIGNATURE, norm.THREADS, arch=vector.arch(dtype))


def kernels(dtype: str) -> list[Kernel]:
    """The widest and the narrowest vectors, with the usual activation."""
    return [kernel_of(dtype, lanes, "clip") for lanes in (vector.lanes(dtype), 1)]


def prepare_batch_norm(op: BatchNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: CudaOptions) -> Step:
    """Inputs x and four constants; y may be x."""
    check_sizes(op.kind, output)
    scale, shift = (options.upload(array) for array in scale_and_shift(op, weights))
    channels = len(scale)
    lanes = vector.lanes(output.dtype, channels)
    activation, *bounds = activation_of(op.activation)
    kernel, vectors = kernel_of(output.dtype, lanes, activation), channels // lanes
    pixels = count(output.shape) // channels
    threads = -(-pixels // norm.PIXELS) * vectors

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [Launch(kernel, blocks(threads, kernel.threads),
                       (arrays[0], scale, shift, y, threads, pixels, pixel_step(arrays[0]),
                        pixel_step(y), *divisor(vectors), *bounds))]

    unit = part_unit(output.dtype)
    return Step(kernel.name, bind, strided=unit, reads_strided=unit)
