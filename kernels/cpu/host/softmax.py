"""What softmax.py is called with."""
from __future__ import annotations

from collections.abc import Sequence

from ...ops import Softmax, TensorSpec, count, known, normal_axis
from ...step import Array, Options, Step
from ..launch import Kernel, Launch


def prepare_softmax(op: Softmax, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    shape = known(output.shape)
    axis = normal_axis(op.axis, len(shape))
    length, inner = shape[axis], count(shape[axis + 1:])
    kernel = Kernel("softmax", "log_softmax" if op.log else "softmax")

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [kernel.bind(arrays[0].reshape(-1), y.reshape(-1), length, inner, options.threads)]

    return Step(f"{kernel.name}_f32", bind)
