"""What pool.py is called with."""
from __future__ import annotations

from collections.abc import Sequence

from ... import ops
from ...ops import TensorSpec, known
from ...step import Array, Options, Step
from ..launch import Kernel, Launch, flat_bits

POOL2D = Kernel("pool", "pool2d")
GLOBAL: dict[type[ops.Op], str] = {
    ops.GlobalAvgPool2d: "global_avg_pool2d", ops.GlobalMaxPool2d: "global_max_pool2d",
    ops.GlobalL2Pool2d: "global_l2_pool2d"}


def prepare_pool2d(op: ops.MaxPool2d | ops.AvgPool2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    is_max = isinstance(op, ops.MaxPool2d)
    include_pad = isinstance(op, ops.AvgPool2d) and op.count_include_pad

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [POOL2D.bind(is_max, include_pad, flat_bits(arrays[0]), known(inputs[0].shape),
                            flat_bits(y), known(output.shape), op.kernel_size, op.stride,
                            op.padding, op.dilation, options.threads)]

    name = "max" if is_max else "avg"
    return Step(f"{name}_pool2d_{op.kernel_size[0]}x{op.kernel_size[1]}_f32", bind)


def prepare_global_pool2d(op: ops.GlobalPool2d, inputs: list[TensorSpec], output: TensorSpec,
                          weights: list[Array | None], options: Options) -> Step:
    name = GLOBAL[type(op)]
    kernel = Kernel("pool", name)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [kernel.bind(flat_bits(arrays[0]), known(inputs[0].shape), flat_bits(y),
                            options.threads)]

    return Step(f"{name}_f32", bind)
