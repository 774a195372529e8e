"""Depthwise convolution: which kernel, which grid, and how the weights are packed."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ops import Conv2d, TensorSpec, known
from ...step import Array, Step, weight_and_bias
from .. import depthwise, depthwise_run, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import blocks, check_sizes

COMPILED_IN = ((3, 1), (3, 2), (5, 1), (5, 2))      # (kernel, stride) of square windows
PIXELS = (4, 2)     # windows a thread; fewer share less, but make more threads of a small map
# Channels and neighbouring pixels of a thread that computes a run of rows, by window: as its
# registers allow in 16 bits; in float32, whose words hold half as much, it has 2 pixels.
RUNS = {(3, 1): (4, 4), (3, 2): (4, 2), (5, 1): (2, 4), (5, 2): (2, 4)}
SLABS = (128, 96, 64, 32)       # bytes of a pixel that a block reads: whole sectors of a line


def kernel_of(dtype: str, lanes: int, pixels: int, window: tuple[int, int], activation: str
              ) -> Kernel:
    """window: (kernel, stride) of COMPILED_IN, or (0, 0)."""
    size = f"{window[0]}x{window[0]}_s{window[1]}" if window[0] else "any"
    return Kernel(f"depthwise_{size}_{vector.short(dtype)}x{lanes}_p{pixels}_{activation}",
                  depthwise.make, (dtype, lanes, pixels, *window, activation),
                  depthwise.SIGNATURE, depthwise.THREADS, arch=vector.arch(dtype))


def run_kernel(dtype: str, window: tuple[int, int], activation: str) -> Kernel:
    """window: of RUNS."""
    (kernel, stride), (lanes, pixels) = window, RUNS[window]
    pixels = 2 if dtype == "float32" else pixels
    return Kernel(f"depthwise_{kernel}x{kernel}_s{stride}_{vector.short(dtype)}x{lanes}_p{pixels}"
                  f"_run_{activation}", depthwise_run.make,
                  (dtype, lanes, pixels, kernel, stride, activation), depthwise_run.SIGNATURE,
                  depthwise.THREADS, arch=vector.arch(dtype), blocks=depthwise_run.BLOCKS)


def kernels(dtype: str) -> list[Kernel]:
    """Those that networks meet, and the narrowest vectors."""
    wide, windows = vector.lanes(dtype), (*COMPILED_IN, (0, 0))
    return [*(kernel_of(dtype, wide, pixels, window, "clip") for window in windows
              for pixels in PIXELS),
            *(run_kernel(dtype, window, "clip") for window in RUNS),
            kernel_of(dtype, wide, PIXELS[0], (5, 1), "silu"),
            *(kernel_of(dtype, 1, PIXELS[0], window, "clip") for window in ((3, 1), (0, 0)))]


def fits(op: Conv2d, inputs: Sequence[TensorSpec]) -> bool:
    """One filter per channel, and one channel per filter."""
    channels, weight = inputs[0].shape[3], inputs[1].shape
    return op.groups == channels == weight[0] and weight[3] == 1


def window_of(op: Conv2d, weight: tuple[int, ...]) -> tuple[int, int]:
    """The (kernel, stride) of COMPILED_IN, or (0, 0)."""
    kernel, stride = weight[1:3], op.stride
    square = kernel[0] == kernel[1] and stride[0] == stride[1] and op.dilation == (1, 1)
    window = kernel[0], stride[0]
    return window if square and window in COMPILED_IN else (0, 0)


def one_row(op: Conv2d, x: TensorSpec, y: TensorSpec, weight: tuple[int, ...],
            options: CudaOptions) -> tuple[Kernel, int, tuple]:
    """(kernel, threads, arguments from the threads on) of threads with pixels of one row."""
    batch, height, width, channels = known(x.shape)
    _, out_height, out_width, _ = known(y.shape)
    lanes = vector.lanes(y.dtype, channels)
    vectors = channels // lanes

    def threads_for(pixels: int) -> int:
        return vectors * -(-out_width // pixels) * batch * out_height

    pixels = next((p for p in PIXELS if threads_for(p) >= full(options)), PIXELS[-1])
    threads = threads_for(pixels)
    activation, low, high = activation_of(op.activation)
    kernel = kernel_of(y.dtype, lanes, pixels, window_of(op, weight), activation)
    return kernel, threads, (
        threads, channels, height, width, out_width, *op.padding[:2], low, high, *weight[1:3],
        *op.stride, *op.dilation, *divisor(vectors), *divisor(-(-out_width // pixels)),
        *divisor(out_height))


def run_of_rows(op: Conv2d, x: TensorSpec, y: TensorSpec, weight: tuple[int, ...],
                options: CudaOptions) -> tuple[Kernel, int, tuple] | None:
    """The same of threads with a run of rows; None where there is no such kernel, or too little
    to do for it."""
    window = window_of(op, weight)
    if window not in RUNS or weight[0] % RUNS[window][0]:
        return None
    activation, low, high = activation_of(op.activation)
    kernel = run_kernel(y.dtype, window, activation)
    _, lanes, pixels, *_ = kernel.config
    batch, height, width, channels = known(x.shape)
    _, out_height, out_width, _ = known(y.shape)
    vectors, groups = channels // lanes, -(-out_width // pixels)
    run = run_length(batch * vectors * groups, out_height,
                     depthwise_run.rows_at_once(*window) - 1, full(options))
    if not run:
        return None
    size = lanes * vector.STORAGE[y.dtype].bytes
    slab = next((n // size for n in SLABS if vectors % (n // size) == 0), vectors)
    runs = -(-out_height // run)
    threads = batch * vectors * groups * runs
    return kernel, threads, (
        threads, channels, height, width, out_height, out_width, *op.padding[:2], low, high, run,
        *divisor(slab), *divisor(groups), *divisor(vectors // slab), *divisor(runs))


def run_length(columns: int, rows: int, more: int, full: int) -> int:
    """Rows of y a thread for the least time, where each of `columns` of threads has `rows` to
    compute; 0 if they should not be parted so. A run costs `more` rows that only begin or end in
    it, a third of its length at most; `full` threads run at once."""
    lengths = {-(-rows // runs) for runs in range(1, rows + 1)}
    time = {length: -(-columns * -(-rows // length) // max(full, 1)) * (length + more)
            for length in sorted(lengths, reverse=True)
            if length >= 3 * more and columns * -(-rows // length) >= full}
    return min(time, key=lambda length: time[length], default=0)


def full(options: CudaOptions) -> int:
    """Threads that hide some latency."""
    return options.multiprocessors * depthwise_run.BLOCKS * depthwise.THREADS


def prepare_depthwise(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: CudaOptions) -> Step:
    """Inputs x, weight (C, KH, KW, 1), [bias], [residual]; weight and bias are constants."""
    check_sizes(op.kind, inputs[0], output)
    weight, bias = weight_and_bias(op.kind, weights)
    channels = weight.shape[0]
    taps = weight.shape[1] * weight.shape[2]
    kernel, threads, numbers = (run_of_rows(op, inputs[0], output, weight.shape, options)
                                or one_row(op, inputs[0], output, weight.shape, options))
    packed = options.pack(weight, "depthwise", lambda w: options.upload(
        np.ascontiguousarray(w.reshape(channels, taps).T, np.float32)))
    packed_bias = options.upload(np.zeros(channels, np.float32) if bias is None
                                 else bias.astype(np.float32))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        has_residual = len(arrays) > 3
        residual = arrays[3] if has_residual else arrays[0]
        return [Launch(kernel, blocks(threads, kernel.threads),
                       (arrays[0], packed, packed_bias, residual, int(has_residual), y,
                        *numbers))]

    return Step(kernel.name, bind)
