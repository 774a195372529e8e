"""Batch norm: its four constants become a scale and a shift."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ops import BatchNorm, TensorSpec, count
from ...step import Array, Step
from .. import norm, vector
from ..compiler import Kernel
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import blocks, check_sizes


def kernel_of(dtype: str, lanes: int) -> Kernel:
    return Kernel(f"batch_norm_{vector.short(dtype)}x{lanes}", norm.make, (dtype, lanes),
                  norm.SIGNATURE, norm.THREADS, arch=vector.arch(dtype))


def kernels(dtype: str) -> list[Kernel]:
    """The widest and the narrowest vectors."""
    return [kernel_of(dtype, lanes) for lanes in (vector.lanes(dtype), 1)]


def prepare_batch_norm(op: BatchNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: CudaOptions) -> Step:
    """Inputs x and four constants; y may be x."""
    check_sizes(op.kind, output)
    constants = [weight for weight in weights[1:] if weight is not None]
    if len(constants) != 4:
        raise ValueError("BatchNorm: scale, bias, mean and variance must be constants of the "
                         "network")
    weight, bias, mean, var = (constant.astype(np.float64) for constant in constants)
    exact = weight / np.sqrt(var + op.epsilon)
    scale = options.upload(exact.astype(np.float32))
    shift = options.upload((bias - mean * exact).astype(np.float32))

    channels = len(weight)
    lanes = vector.lanes(output.dtype, channels)
    kernel, vectors = kernel_of(output.dtype, lanes), channels // lanes
    pixels = count(output.shape) // channels
    threads = -(-pixels // norm.PIXELS) * vectors

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [Launch(kernel, blocks(threads, kernel.threads),
                       (arrays[0], scale, shift, y, threads, pixels, channels, *divisor(vectors)))]

    return Step(kernel.name, bind)
