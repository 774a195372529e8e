"""Convolution of an image of few channels: when it serves, its grid, and its weights."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ops import Conv2d, TensorSpec, known
from ...step import Array, Step, weight_and_bias
from .. import conv_image, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..conv_image import MOST_CHANNELS, THREADS, TILE_H, TILE_W, Window
from ..conv_sums import spread
from ..index import divisor
from ..launch import CudaOptions, Launch
from .weights import stored

DTYPES = ("float16", "bfloat16")
BLOCKS = 4                  # of a multiprocessor; they hide one another's waits
MOST_SHARED = 99 * 1024     # bytes that a block may have on every GPU of sm_80 and newer
# ResNet; VGG; SqueezeNet; MobileNet and EfficientNet.
COMPILED_IN = (Window(3, (7, 7), (2, 2), 64), Window(3, (3, 3), (1, 1), 64),
               Window(3, (3, 3), (2, 2), 64), Window(3, (3, 3), (2, 2), 32))


def kernel_of(dtype: str, window: Window, activation: str) -> Kernel:
    (kh, kw), (sh, sw) = window.kernel, window.stride
    name = (f"conv_image_{vector.short(dtype)}x{window.channels}_{kh}x{kw}_s{sh}x{sw}_"
            f"{window.block_n}_{activation}")
    return Kernel(name, conv_image.make, (dtype, window, activation), conv_image.SIGNATURE, THREADS,
                  window.shared_bytes, "sm_80", BLOCKS)


def kernels(dtype: str) -> list[Kernel]:
    return [kernel_of(dtype, window, "clip") for window in COMPILED_IN]


def fits(op: Conv2d, inputs: Sequence[TensorSpec], dtype: str) -> bool:
    """Whether an image has so few channels, and the layer is a plain one without a residual."""
    channels, out_channels = known(inputs[0].shape)[3], known(inputs[1].shape)[0]
    return (dtype in DTYPES and channels <= MOST_CHANNELS and op.groups == 1
            and op.dilation == (1, 1) and op.stride[1] in (1, 2) and len(inputs) <= 3
            and out_channels % vector.lanes(dtype) == 0
            and window_of(op, inputs).shared_bytes <= MOST_SHARED)


def window_of(op: Conv2d, inputs: Sequence[TensorSpec]) -> Window:
    out_channels, kh, kw, channels = known(inputs[1].shape)
    return Window(channels, (kh, kw), op.stride, 32 if out_channels <= 32 else 64)


def prepare_conv_image(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: CudaOptions) -> Step:
    """Inputs x, weight (O, KH, KW, C), [bias]; weight and bias are constants."""
    weight, bias = weight_and_bias(op.kind, weights)
    batch, height, width, _ = known(inputs[0].shape)
    _, out_height, out_width, out_channels = known(output.shape)
    window, dtype = window_of(op, inputs), options.dtype
    activation, low, high = activation_of(op.activation)
    kernel = kernel_of(dtype, window, activation)
    n_tiles = -(-out_channels // window.block_n)

    def packing(w: Array) -> Array:
        return options.upload(stored(spread(pack(w, window, n_tiles), vector.lanes(dtype)), dtype))

    packed = options.pack(weight, f"conv_image_{dtype}_{window}", packing)
    padded = np.zeros(n_tiles * window.block_n, np.float32)
    if bias is not None:
        padded[:out_channels] = bias
    packed_bias = options.upload(padded)
    across, down = -(-out_width // TILE_W), -(-out_height // TILE_H)
    count = batch * across * down
    grid = (min(count, options.multiprocessors * BLOCKS), n_tiles, 1)
    numbers = (low, high, height, width, out_height, out_width, out_channels, *op.padding[:2],
               count, *divisor(across), *divisor(down))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [Launch(kernel, grid, (arrays[0], packed, packed_bias, y, *numbers))]

    return Step(kernel.name, bind)


def pack(weight: Array, window: Window, n_tiles: int) -> Array:
    """float32 [tiles along o * block_n][pitch * 8], of each kernel row pairs of columns of 4
    channels, zeros beyond the weights."""
    (kh, kw), channels = window.kernel, window.channels
    rows = np.zeros((n_tiles * window.block_n, window.pitch * 8), np.float32)
    taps = np.zeros((len(weight), kh, 2 * window.row_chunks, MOST_CHANNELS), np.float32)
    taps[:, :, :kw, :channels] = weight.reshape(-1, kh, kw, channels)
    rows[:len(weight), :window.chunks * 8] = taps.reshape(len(weight), -1)
    return rows
