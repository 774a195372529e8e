"""The last launch of a split-K convolution or matrix product."""
from __future__ import annotations

from ...axes import pixel_step
from ...ops import Unary
from ...step import Array
from .. import splitk, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..conv_mma import STORED_AS
from ..index import divisor
from ..launch import Launch
from .arguments import blocks


def kernel_of(dtype: str, lanes: int, activation: str) -> Kernel:
    return Kernel(f"splitk_{vector.short(dtype)}x{lanes}_{activation}", splitk.make,
                  (dtype, lanes, activation), splitk.SIGNATURE, splitk.THREADS,
                  arch=vector.arch(dtype))


def kernels(dtype: str) -> list[Kernel]:
    """16 bytes of the sums at a time, and single elements."""
    return [kernel_of(STORED_AS.get(dtype, dtype), lanes, "clip") for lanes in (4, 1)]


def reduction(dtype: str, activation: Unary | None, sums: Array, splits: int, pixels: int,
              channels: int, bias: Array, residual: Array | None, y: Array) -> Launch:
    """y = activation(sum of sums [splits, pixels, channels] + bias [channels] + residual)."""
    name, low, high = activation_of(activation)
    # The sums are most of the traffic. 8 channels of a 16-bit y would need two accesses of them,
    # and give a small late layer half as many threads.
    lanes = vector.lanes("float32", channels)
    threads = pixels * channels // lanes
    added = (sums, 0) if residual is None else (residual, 1)
    return Launch(kernel_of(dtype, lanes, name), blocks(threads, splitk.THREADS),
                  (sums, bias, *added, y, low, high, threads, splits, 4 * pixels * channels,
                   pixel_step(y), *divisor(channels // lanes)))
