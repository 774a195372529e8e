"""Batch norm that no convolution could take in: one multiply and one add per element."""
from __future__ import annotations

from collections.abc import Sequence

from ..norm import scale_and_shift
from ..ops import BatchNorm, TensorSpec
from ..step import Array, Options, Run, Step
from .jit import njit
from .parallel import parallel_for


@njit()
def scale_shift(x, scale, shift, y, threads):
    """y[.., c] = x[.., c] * scale[c] + shift[c] on flat arrays."""
    parallel_for(scale_shift_rows, len(x) // len(scale), threads, (x, scale, shift, y))


@njit()
def scale_shift_rows(thread, first_row, end_row, x, scale, shift, y):
    channels = len(scale)
    for row in range(first_row, end_row):
        first = row * channels
        for c in range(channels):
            y[first + c] = x[first + c] * scale[c] + shift[c]


def prepare_batch_norm(op: BatchNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: Options) -> Step:
    scale, shift = scale_and_shift(op, weights)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> Run:
        flat_x, flat_y = arrays[0].reshape(-1), y.reshape(-1)
        return lambda: scale_shift(flat_x, scale, shift, flat_y, options.threads)

    return Step("batch_norm_f32", bind)
