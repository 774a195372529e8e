"""What norm.py is called with."""
from __future__ import annotations

from collections.abc import Sequence

from ...norm import scale_and_shift
from ...ops import BatchNorm, TensorSpec
from ...step import Array, Options, Step
from ..launch import Kernel, Launch
from .epilogue import epilogue

SCALE_SHIFT = Kernel("norm", "scale_shift")


def prepare_batch_norm(op: BatchNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: Options) -> Step:
    scale, shift = scale_and_shift(op, weights)
    low, high, finish, suffix = epilogue(op.activation)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        x, flat = arrays[0].reshape(-1), y.reshape(-1)
        return [SCALE_SHIFT.bind(x, scale, shift, flat, low, high, options.threads),
                *finish(flat, options.threads)]

    return Step("batch_norm_f32" + suffix, bind)
