"""Operators of the domain com.microsoft that ONNX Runtime's quantiser writes: each dequantises,
computes as the ONNX operator that it is named after, and quantises."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels import ops

from ..importer import TO_NCHW, TO_NHWC, Importer, Value
from . import elementwise, images, norms, products, shapes
from .quantised import NO_TYPE, dequantise, quantise, sums


def QLinearAdd(net: Importer, *inputs: Any) -> Value:
    return _binary(net, ops.Add(), *inputs)


def QLinearMul(net: Importer, *inputs: Any) -> Value:
    return _binary(net, ops.Mul(), *inputs)


def QLinearAveragePool(net: Importer, x: Value, x_scale: Value, x_zero: Value | None,
                       y_scale: Value, y_zero: Value | None = None, *, channels_last: int = 0,
                       **attributes: Any) -> Value:
    return _image(net, images.AveragePool, x, x_scale, x_zero, y_scale, y_zero, channels_last,
                  **attributes)


def QLinearGlobalAveragePool(net: Importer, x: Value, x_scale: Value, x_zero: Value | None,
                             y_scale: Value, y_zero: Value | None = None, *,
                             channels_last: int = 0) -> Value:
    return _image(net, images.GlobalAveragePool, x, x_scale, x_zero, y_scale, y_zero,
                  channels_last)


def QLinearConcat(net: Importer, y_scale: Value, y_zero: Value, *inputs: Value | None, axis: int
                  ) -> Value:
    """Of as many values as there are triples of a value, its scale and its zero point."""
    triples = list(zip(inputs[::3], inputs[1::3], (*inputs[2::3], None), strict=False))
    parts = [dequantise(net, x, scale, zero) for x, scale, zero in triples if x and scale]
    if len(parts) < len(triples):
        raise ValueError("a value and its scale must not be left out")
    return quantise(net, shapes.Concat(net, *parts, axis=axis), y_scale, y_zero)


def QLinearSigmoid(net: Importer, x: Value, x_scale: Value, x_zero: Value | None, y_scale: Value,
                   y_zero: Value | None = None) -> Value:
    dtype = _dtype(net, x)
    y = elementwise.Sigmoid(net, dequantise(net, x, x_scale, x_zero))
    return quantise(net, y, y_scale, y_zero, dtype)


def QLinearLeakyRelu(net: Importer, x: Value, x_scale: Value, x_zero: Value | None,
                     y_scale: Value, y_zero: Value | None = None, *, alpha: float = 0.01) -> Value:
    dtype = _dtype(net, x)
    y = elementwise.LeakyRelu(net, dequantise(net, x, x_scale, x_zero), alpha=alpha)
    return quantise(net, y, y_scale, y_zero, dtype)


def QLinearSoftmax(net: Importer, x: Value, x_scale: Value, x_zero: Value | None, y_scale: Value,
                   y_zero: Value, *, opset: int, axis: int = -1) -> Value:
    """`opset` says which version of Softmax is meant."""
    y = norms.softmax(net, dequantise(net, x, x_scale, x_zero), axis, opset)
    return quantise(net, y, y_scale, y_zero)


def QGemm(net: Importer, a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value,
          b_zero: Value, c: Value | None = None, y_scale: Value | None = None,
          y_zero: Value | None = None, *, alpha: float = 1.0, transA: int = 0, transB: int = 0
          ) -> Value:
    """Without y_scale the result is float."""
    dtype = _dtype(net, a)
    left = dequantise(net, a, a_scale, a_zero)
    right = dequantise(net, b, b_scale, b_zero, axis=0 if transB else 1)
    bias = None if c is None else sums(net, c, a_scale, b_scale, alpha)
    y = products.Gemm(net, left, right, bias, alpha=alpha, transA=transA, transB=transB)
    return y if y_scale is None else quantise(net, y, y_scale, y_zero, dtype)


def _binary(net: Importer, op: ops.Binary, a: Value, a_scale: Value, a_zero: Value | None, b: Value,
            b_scale: Value, b_zero: Value | None, y_scale: Value, y_zero: Value | None = None
            ) -> Value:
    dtype = _dtype(net, a)
    y = net.emit(op, dequantise(net, a, a_scale, a_zero), dequantise(net, b, b_scale, b_zero))
    return quantise(net, y, y_scale, y_zero, dtype)


def _image(net: Importer, pool: Callable[..., Value], x: Value, x_scale: Value,
           x_zero: Value | None, y_scale: Value, y_zero: Value | None, channels_last: int,
           **attributes: Any) -> Value:
    dtype = _dtype(net, x)
    image = dequantise(net, x, x_scale, x_zero)
    if channels_last:
        image = net.emit(ops.Transpose(TO_NCHW), image, suffix=":first")
    y = pool(net, image, **attributes)
    if channels_last:
        y = net.emit(ops.Transpose(TO_NHWC), y, suffix=":last")
    return quantise(net, y, y_scale, y_zero, dtype)


def _dtype(net: Importer, x: Value) -> np.dtype:
    """Of codes, which is also that of the result's where the file leaves out its zero point."""
    if x in net.constants:
        return net.constants[x].dtype
    return np.dtype(net.coded[x].dtype) if x in net.coded else NO_TYPE
