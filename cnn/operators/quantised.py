"""Operators of files that are quantised to 8 bits.

A value that the file keeps as codes is here the real number that each code stands for, on the grid
of 256 numbers that its scale and zero point make (`Importer.grids`); ops.FakeQuantize puts it
there. So every other operator computes as in the float network, and none in integers.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels import ops

from .. import fold
from ..importer import Grid, Importer, Value
from . import images, products

# Operators that give elements of their first input, of Concat's inputs, or constants that are
# codes, too: what Pad fills with, and Clip's bounds.
MOVES = {"Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather",
         "GlobalMaxPool", "Identity", "MaxPool", "Pad", "ReduceMax", "Reshape", "Resize", "Slice",
         "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
FLOAT = 1               # TensorProto's number of float32
NO_TYPE = np.dtype(np.uint8)


def QuantizeLinear(net: Importer, x: Value, scale: Value, zero_point: Value | None = None, *,
                   axis: int = 1, saturate: int = 1, block_size: int = 0, precision: int = 0,
                   output_dtype: np.dtype | None = None) -> Value:
    if precision not in (0, FLOAT):
        raise net.error(f"QuantizeLinear with precision {precision} is not supported, only "
                        f"{FLOAT}, float32")
    return quantise(net, x, scale, zero_point, np.dtype(output_dtype or NO_TYPE), suffix="")


def DequantizeLinear(net: Importer, x: Value, scale: Value, zero_point: Value | None = None, *,
                     axis: int = 1, block_size: int = 0, output_dtype: np.dtype | None = None
                     ) -> Value:
    real = dequantise(net, x, scale, zero_point)
    net.coded.pop(real, None)
    return real


def QLinearConv(net: Importer, x: Value, x_scale: Value, x_zero: Value, w: Value, w_scale: Value,
                w_zero: Value, y_scale: Value, y_zero: Value, b: Value | None = None,
                **attributes: Any) -> Value:
    image = dequantise(net, x, x_scale, x_zero)
    weight = dequantise(net, w, w_scale, w_zero, axis=0)
    bias = None if b is None else sums(net, b, x_scale, w_scale)
    y = images.Conv(net, image, weight, bias, **attributes)
    return quantise(net, y, y_scale, y_zero)


def QLinearMatMul(net: Importer, a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value,
                  b_zero: Value, y_scale: Value, y_zero: Value) -> Value:
    left = dequantise(net, a, a_scale, a_zero, axis=-2)
    right = dequantise(net, b, b_scale, b_zero, axis=-1)
    return quantise(net, products.MatMul(net, left, right), y_scale, y_zero)


def quantise(net: Importer, y: Value, scale: Value, zero_point: Value | None,
             dtype: np.dtype = NO_TYPE, suffix: str = ":quantised") -> Value:
    """y on this grid, which the node returns as codes; dtype is that of a zero point left out."""
    grid = _grid(net, scale, zero_point, dtype)
    value = net.emit(ops.FakeQuantize(grid.scale, grid.zero_point), y, suffix=suffix)
    net.coded[value] = grid
    return value


def dequantise(net: Importer, x: Value, scale: Value, zero_point: Value | None, axis: int = 1
               ) -> Value:
    """The real numbers that codes stand for: of a constant a new one, of a computed value itself
    unless it lies on another grid than it is said to."""
    if x in net.constants:
        zeros = None if zero_point is None else net.array(zero_point, "zero point")
        real = fold.DequantizeLinear(net.constants[x], net.array(scale, "scale"), zeros, axis=axis)
        return net.add_constant(f"{x}:{scale}:{zero_point}:{net.name}", real)
    found = net.coded.get(x)
    if found is None:
        raise net.error(f"its input {x!r} must be quantised, and is not; a QuantizeLinear must "
                        f"come first")
    wanted = _grid(net, scale, zero_point, np.dtype(found.dtype))
    if wanted.dtype != found.dtype:
        raise net.error(f"its input {x!r} is quantised to {found.dtype}, and its zero point is "
                        f"{wanted.dtype}; both must be one type")
    return x if wanted == found else _same_codes(net, x, found, wanted)


def _same_codes(net: Importer, x: Value, found: Grid, wanted: Grid) -> Value:
    """What the codes of x stand for on another grid; FakeQuantize takes what the product rounds."""
    suffix = f":{x}"
    factor = np.float32(wanted.scale) / np.float32(found.scale)
    shift = np.float32((found.zero_point - wanted.zero_point) * wanted.scale)
    for op, number in ((ops.Mul(), factor), (ops.Add(), shift)):
        constant = net.add_constant(f"{net.name}{suffix}:{op.kind}", np.array(number, np.float32))
        x = net.emit(op, x, constant, suffix=f"{suffix}:{op.kind.lower()}")
    return net.emit(ops.FakeQuantize(wanted.scale, wanted.zero_point), x, suffix=suffix)


def sums(net: Importer, b: Value, x_scale: Value, w_scale: Value, factor: float = 1.0) -> Value:
    """A bias of int32, whose scale is that of the products that are summed up."""
    scale = factor * net.array(x_scale, "scale").astype(np.float64) * net.array(w_scale, "scale")
    scale = scale if scale.size > 1 else scale.reshape(())
    codes = net.array(b, "bias")
    fold.check_size(np.broadcast_shapes(codes.shape, scale.shape))
    return net.add_constant(f"{b}:{net.name}", (codes * scale).astype(np.float32))


def _grid(net: Importer, scale: Value, zero_point: Value | None, dtype: np.dtype) -> Grid:
    """That of a computed value, which must be one that FakeQuantize has."""
    scales = net.weight(scale, "scale")
    zeros = np.zeros((), dtype) if zero_point is None else net.array(zero_point, "zero point")
    if zeros.dtype.name not in ("uint8", "int8") or scales.size != 1 or zeros.size != 1:
        raise net.error(f"a computed value quantised to {zeros.dtype} by a scale of shape "
                        f"{scales.shape} is not supported, only to uint8 or int8 by one scale; "
                        f"only constants may have more")
    number = float(scales.reshape(()))
    if not 0 < number < math.inf:
        raise net.error(f"its scale is {number}; it must be a positive number")
    return Grid(number, int(zeros.reshape(())) - int(np.iinfo(zeros.dtype).min), zeros.dtype.name)


def moved(net: Importer, operator: str, inputs: list[Value | None], mode: object) -> Grid | None:
    """The grid on which what an operator gives lies, None where it takes no codes; ModelError
    where it would compute with codes."""
    if not net.coded:
        return None
    grid = next(iter(net.coded.values()))
    if operator not in MOVES or (operator == "Resize" and mode not in (None, "nearest")):
        raise net.error(f"{operator} takes a value that the file quantised ({grid}); a "
                        f"DequantizeLinear must come first")
    read = inputs if operator == "Concat" else inputs[:1]
    grids = {net.coded.get(value or "") for value in read}
    if grids != {grid}:
        both = " and ".join(sorted("not quantised" if each is None else str(each)
                                   for each in grids))
        raise net.error(f"{operator} of values on different scales ({both}) is not supported; "
                        f"a DequantizeLinear of each must come first")
    return grid
