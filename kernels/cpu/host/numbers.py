"""What a layer multiplies in narrow numbers: its weights so, and what its sums become."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ... import weight_codes
from ...ops import FakeQuantize, TensorSpec, Unary
from ...step import Array, Options
from ..dot_units import Unit
from ..launch import Constant
from . import unit_choice
from .codes import divisor
from .epilogue import epilogue, in_registers

LONGEST = 1 << 16       # products of codes whose sum is sure to fit 32 bits


class Numbers(NamedTuple):
    """Of a layer.

    weight   float32, in the op's shape; narrow makes of it what the unit multiplies
    dtype    of the image that is multiplied with it
    rows     (O,) each: the bias, and of codes the factors of their sums
    reading  what `narrow` of dot_simd.py takes of the image's grid: inverse, zero_point;
             and each byte of what lies around it
    writing  what its Writer takes: low, high, zero_point, residual_factor, a, b
    activation
             that it applies, if any
    """
    weight: Array
    narrow: Callable[[Array], Array]
    dtype: Any
    rows: tuple[Array, ...]
    reading: tuple[np.float32, int, int]
    writing: tuple[Any, ...]
    activation: Constant | int
    suffix: str


def numbers_of(unit: Unit, activation: Unary | None, inputs: Sequence[TensorSpec], y: TensorSpec,
               weight: Array, bias: Array | None, options: Options) -> Numbers:
    """Of a layer that a unit multiplies, for inputs and an output as these specs say."""
    if bias is None:
        bias = np.zeros(len(weight), np.float32)
    if unit.is_int8:
        return _of_codes(unit, activation, inputs, y, weight, bias, options)
    low, high, _, suffix = epilogue(activation)
    one = np.float32(1)
    function, *numbers = in_registers(activation, y.dtype)
    return Numbers(weight, to_bfloat16, np.uint16, (bias,), (one, 0, 0),
                   (low, high, 0, one, *numbers), function, suffix)


def to_bfloat16(weight: Array) -> Array:
    """Its bits."""
    return weight.astype(ml_dtypes.bfloat16).view(np.uint16)


def weight_scales(weight: Array, options: Options) -> Array:
    """`weight_codes.weight_scales`, found once for all programs."""
    return options.pack(weight, "scales", weight_codes.weight_scales)


def unit_for(x: TensorSpec, weight: Array, options: Options) -> Unit | None:
    """What multiplies a layer with these inputs and weights; None: nothing but float32 does."""
    unit = unit_choice.choose_int8() if are_codes(x, weight, options) else None
    return unit or (unit_choice.choose() if options.dtype == "bfloat16" else None)


def are_codes(x: TensorSpec, weight: Array, options: Options) -> bool:
    """Whether a layer's inputs and weights are of 8 bits."""
    return (x.grid is not None and weight[0].size < LONGEST
            and not np.isnan(weight_scales(weight, options)).any())


def _of_codes(unit: Unit, activation: Unary | None, inputs: Sequence[TensorSpec], y: TensorSpec,
              weight: Array, bias: Array, options: Options) -> Numbers:
    """A sum of products of codes, times both scales, less what zero_point adds to it. That does not
    depend on the image, for around it lie codes of zero_point; what was taken off all codes, when
    the image was made or by the unit, is not in it. All is divided by the scale of an output that
    is stored in codes."""
    grid = inputs[0].grid
    assert grid is not None
    scales = weight_scales(weight, options)
    of_ones = options.pack(weight, "sums of codes", lambda w: weight_codes.codes(w, scales).reshape(
        len(w), -1).sum(axis=1, dtype=np.int64))
    factors = scales * grid.scale
    kind, zero = (np.int16, 0) if unit.stored == "int16" else (np.int8, grid.zero_point)
    wide, residual_factor, zero_point = bias - (zero - unit.taken_off) * of_ones * factors, 1.0, 0
    if len(inputs) > 3 and inputs[3].dtype == "uint8":
        assert inputs[3].grid is not None
        residual_factor = inputs[3].grid.scale
        wide -= inputs[3].grid.zero_point * residual_factor
    low, high, _, suffix = epilogue(activation)
    function, *numbers = in_registers(activation, y.dtype)
    if y.dtype == "uint8":
        assert isinstance(activation, FakeQuantize)
        scale = float(divisor(y, activation)[0])
        factors, wide, residual_factor = factors / scale, wide / scale, residual_factor / scale
        low, high = map(np.float32, activation.bounds)
        # Added to what is rounded, so that halves become the same codes as those of others.
        zero_point, numbers[1] = activation.zero_point, np.float32(0)
    return Numbers(weight, lambda w: weight_codes.codes(w, scales).astype(kind),
                   np.dtype(unit.stored),
                   (wide.astype(np.float32), factors.astype(np.float32)),
                   (np.float32(1 / grid.scale), grid.zero_point, zero),
                   (low, high, zero_point, np.float32(residual_factor), *numbers), function,
                   suffix)
