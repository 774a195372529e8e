"""Depthwise convolution: which kernel, which grid, and how the weights are packed."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ops import Conv2d, TensorSpec, known
from ...step import Array, Step, weight_and_bias
from .. import depthwise, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import blocks, check_sizes

COMPILED_IN = ((3, 1), (3, 2), (5, 1), (5, 2))      # (kernel, stride) of square windows
PIXELS = (4, 2)     # windows a thread; fewer share less, but make more threads of a small map


def kernel_of(dtype: str, lanes: int, pixels: int, window: tuple[int, int], activation: str
              ) -> Kernel:
    """window: (kernel, stride) of COMPILED_IN, or (0, 0)."""
    size = f"{window[0]}x{window[0]}_s{window[1]}" if window[0] else "any"
    return Kernel(f"depthwise_{size}_{vector.short(dtype)}x{lanes}_p{pixels}_{activation}",
                  depthwise.make, (dtype, lanes, pixels, *window, activation),
                  depthwise.SIGNATURE, depthwise.THREADS, arch=vector.arch(dtype))


def kernels(dtype: str) -> list[Kernel]:
    """Those that networks meet, and the narrowest vectors."""
    wide, windows = vector.lanes(dtype), (*COMPILED_IN, (0, 0))
    return [*(kernel_of(dtype, wide, pixels, window, "clip") for window in windows
              for pixels in PIXELS),
            kernel_of(dtype, wide, PIXELS[0], (5, 1), "silu"),
            *(kernel_of(dtype, 1, PIXELS[0], window, "clip") for window in ((3, 1), (0, 0)))]


def fits(op: Conv2d, inputs: Sequence[TensorSpec]) -> bool:
    """One filter per channel, and one channel per filter."""
    channels, weight = inputs[0].shape[3], inputs[1].shape
    return op.groups == channels == weight[0] and weight[3] == 1


def prepare_depthwise(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: CudaOptions) -> Step:
    """Inputs x, weight (C, KH, KW, 1), [bias], [residual]; weight and bias are constants."""
    check_sizes(op.kind, inputs[0], output)
    weight, bias = weight_and_bias(op.kind, weights)
    batch, height, width, channels = known(inputs[0].shape)
    _, out_height, out_width, _ = known(output.shape)
    dtype = output.dtype
    lanes = vector.lanes(dtype, channels)
    vectors, rows = channels // lanes, batch * out_height

    def threads_for(pixels: int) -> int:
        return vectors * -(-out_width // pixels) * rows

    full = options.multiprocessors * 4 * depthwise.THREADS     # threads that hide some latency
    pixels = next((p for p in PIXELS if threads_for(p) >= full), PIXELS[-1])
    threads = threads_for(pixels)
    kh, kw = weight.shape[1:3]
    square = kh == kw and op.stride[0] == op.stride[1] and op.dilation == (1, 1)
    window = (kh, op.stride[0]) if square and (kh, op.stride[0]) in COMPILED_IN else (0, 0)
    activation, low, high = activation_of(op.activation)
    kernel = kernel_of(dtype, lanes, pixels, window, activation)

    packed = options.pack(weight, "depthwise", lambda w: options.upload(
        np.ascontiguousarray(w.reshape(channels, kh * kw).T, np.float32)))
    packed_bias = options.upload(np.zeros(channels, np.float32) if bias is None
                                 else bias.astype(np.float32))
    numbers = (threads, channels, height, width, out_width, *op.padding[:2], low, high, kh, kw,
               *op.stride, *op.dilation, *divisor(vectors), *divisor(-(-out_width // pixels)),
               *divisor(out_height))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        has_residual = len(arrays) > 3
        residual = arrays[3] if has_residual else arrays[0]
        return [Launch(kernel, blocks(threads, kernel.threads),
                       (arrays[0], packed, packed_bias, residual, int(has_residual), y,
                        *numbers))]

    return Step(kernel.name, bind)
