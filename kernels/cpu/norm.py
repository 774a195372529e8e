"""Batch norm that no convolution could take in: one multiply-add and a clip per element."""
from __future__ import annotations

from collections.abc import Sequence

from ..norm import scale_and_shift
from ..ops import BatchNorm, TensorSpec
from ..step import Array, Options, Run, Step
from . import scalar
from .epilogue import epilogue
from .jit import njit
from .parallel import parallel_for


@njit()
def scale_shift(x, scale, shift, y, low, high, threads):
    """y[.., c] = clip(x[.., c] * scale[c] + shift[c], low, high) on flat arrays."""
    parallel_for(scale_shift_rows, len(x) // len(scale), threads, (x, scale, shift, y, low, high))


@njit()
def scale_shift_rows(thread, first_row, end_row, x, scale, shift, y, low, high):
    channels = len(scale)
    for row in range(first_row, end_row):
        pixel, out = x[row * channels:][:channels], y[row * channels:][:channels]
        for c in range(channels):
            out[c] = scalar.clip(pixel[c] * scale[c] + shift[c], low, high)


def prepare_batch_norm(op: BatchNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: Options) -> Step:
    scale, shift = scale_and_shift(op, weights)
    low, high, finish, suffix = epilogue(op.activation)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        flat_x, flat_y = arrays[0].reshape(-1), y.reshape(-1)

        def run() -> None:
            scale_shift(flat_x, scale, shift, flat_y, low, high, options.threads)
            finish(flat_y, options.threads)
        return run

    return Step("batch_norm_f32" + suffix, bind)
