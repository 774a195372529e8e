"""What codes.py is called with."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...axes import flat_pixels
from ...ops import AddFakeQuantize, FakeQuantize, Grid, TensorSpec, Unary
from ...step import Array, Options, Step
from ..launch import Kernel, Launch

QUANTIZE, ADD = Kernel("codes", "quantize"), Kernel("codes", "add")


def meaning(spec: TensorSpec) -> tuple[np.float32, np.float32]:
    """(scale, zero point) of what is stored."""
    if spec.dtype != "uint8":
        return np.float32(1), np.float32(0)
    assert spec.grid is not None
    return np.float32(spec.grid.scale), np.float32(spec.grid.zero_point)


def divisor(y: TensorSpec, activation: Unary | None) -> tuple[np.float32, np.float32]:
    """(scale, zero point) of what a layer computes before `epilogue.in_registers`, so that nothing
    is left to be done after."""
    after = isinstance(activation, FakeQuantize) and activation.first is not None
    return (np.float32(1), np.float32(0)) if after else meaning(y)


def writes_codes(activation: Unary | None) -> bool:
    """Whether a kernel that adds a zero point before it rounds can write what this gives: the same
    half is even before and after. What a function gives before is a half by chance alone."""
    return isinstance(activation, FakeQuantize) and (
        activation.zero_point % 2 == 0 or activation.first is not None)


def code_bounds(activation: Unary | None) -> tuple[np.float32, np.float32]:
    """The least and the greatest code of what `writes_codes` says yes to."""
    assert isinstance(activation, FakeQuantize)
    low, high = (np.float32(bound + activation.zero_point) for bound in activation.bounds)
    return low, high


def writing(y: TensorSpec, grid: Grid) -> tuple[np.float32, np.float32]:
    """(scale, zero point) by which a code, less its own zero point, is stored."""
    if y.dtype != "uint8":
        return np.float32(grid.scale), np.float32(0)
    return np.float32(1), np.float32(grid.zero_point)


def name(what: str, inputs: Sequence[TensorSpec], y: TensorSpec) -> str:
    """Of a kernel, with what it reads and writes: "add_u8_f32_to_u8"."""
    short = {"uint8": "u8", "float32": "f32"}
    return f"{what}_{'_'.join(short[spec.dtype] for spec in inputs)}_to_{short[y.dtype]}"


def prepare_quantize(op: FakeQuantize, inputs: list[TensorSpec], output: TensorSpec,
                     options: Options) -> Step:
    """Where codes are read or written."""
    numbers = (*meaning(inputs[0]), np.float32(op.scale), *map(np.float32, op.bounds),
               *writing(output, op.grid))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        flat, y_step = flat_pixels(y)
        rows, width = (1, y.size) if y.flags.c_contiguous else (y.size // y.shape[-1], y.shape[-1])
        return [QUANTIZE.bind(*numbers, rows, width, arrays[0].reshape(-1), flat, y_step,
                              options.threads)]

    return Step(name("quantize", inputs, output), bind, strided=1)


def prepare_add(op: AddFakeQuantize, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: Options) -> Step:
    """Of any of float32 and codes."""
    (a_scale, a_zero), (b_scale, b_zero) = (
        [float(number) for number in meaning(spec)] for spec in inputs)
    shift = -(a_zero * a_scale + b_zero * b_scale)
    numbers = [np.float32(number / op.scale) for number in (a_scale, b_scale, shift)]
    numbers += [*map(np.float32, op.last.bounds), *writing(output, op.last.grid)]

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        flat = [array.reshape(-1) for array in (*arrays, y)]
        return [ADD.bind(*numbers, *flat, options.threads)]

    return Step(name("add_quantize", inputs, output), bind)
