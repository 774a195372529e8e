"""Local response norm: which kernel, which grid."""
from __future__ import annotations

from ...ops import LocalResponseNorm, TensorSpec, count, known
from ...step import Array, Options, Step
from .. import local_response_norm, vector
from ..compiler import Kernel
from ..index import divisor
from ..launch import Launch
from .arguments import blocks, check_sizes


def kernel_of(dtype: str, lanes: int, window: int) -> Kernel:
    return Kernel(f"local_response_norm_{window}_{vector.short(dtype)}x{lanes}",
                  local_response_norm.make, (dtype, lanes, window), local_response_norm.SIGNATURE,
                  local_response_norm.THREADS, arch=vector.arch(dtype))


def kernels(dtype: str) -> list[Kernel]:
    """The window of AlexNet and GoogLeNet."""
    return [kernel_of(dtype, vector.lanes(dtype), 5)]


def prepare_local_response_norm(op: LocalResponseNorm, inputs: list[TensorSpec],
                                output: TensorSpec, weights: list[Array | None], options: Options
                                ) -> Step:
    check_sizes(op.kind, output)
    channels = known(output.shape)[-1]
    lanes = vector.lanes(output.dtype, channels)
    kernel, threads = kernel_of(output.dtype, lanes, op.size), count(output.shape) // lanes
    numbers = (threads, channels, *divisor(channels // lanes), op.alpha / op.size, op.beta, op.bias)
    return Step(kernel.name, lambda arrays, y, workspace: [
        Launch(kernel, blocks(threads, kernel.threads), (arrays[0], y, *numbers))])
