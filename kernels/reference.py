"""What each op MEANS: plain NumPy in float64, the truth that every backend is tested against.

Written to be obviously right, not fast. Images are NHWC, convolution weights OHWI.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from . import ops
from .ops import Conv2d, Op, Pool2d

Array = np.ndarray


def run(op: Op, *inputs: Array) -> Array:
    """The op's output for these inputs, float64."""
    arrays = [np.asarray(array, np.float64) for array in inputs]
    with np.errstate(all="ignore"):         # NaN and infinity are values like others here
        return MEANINGS[type(op)](op, *arrays)


def conv2d(op: Conv2d, x: Array, weight: Array, bias: Array | None = None,
           residual: Array | None = None) -> Array:
    """Sum of one product per tap: each is a shifted, strided view of the padded image."""
    y = np.zeros(ops.known(op.output_shape(x.shape, weight.shape)))
    out_per_group, in_per_group = len(weight) // op.groups, weight.shape[3]
    for view, i, j in _taps(x, op, weight.shape[1:3], y.shape, fill=0.0):
        for group in range(op.groups):
            outputs = slice(group * out_per_group, (group + 1) * out_per_group)
            inputs = slice(group * in_per_group, (group + 1) * in_per_group)
            y[..., outputs] += view[..., inputs] @ weight[outputs, i, j].T
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y if op.activation is None else run(op.activation, y)


def linear(op: ops.Linear, x: Array, weight: Array, bias: Array | float = 0.0,
           residual: Array | float = 0.0) -> Array:
    y = x @ weight.T + bias + residual
    return y if op.activation is None else run(op.activation, y)


def matmul(op: ops.MatMul, a: Array, b: Array) -> Array:
    a, b = _as_meant(op, a, b)
    return _as_written(op, op.scale * (a @ b))


def attention(op: ops.Attention, q: Array, k: Array, v: Array, bias: Array | float = 0.0) -> Array:
    q, k, v = _as_meant(op, q, k, v)
    weights = softmax(ops.Softmax(), op.scale * (q @ k.swapaxes(-1, -2)) + bias)
    return _as_written(op, weights @ v)


def _as_meant(op: ops.Matrices, *arrays: Array) -> list[Array]:
    arrays = tuple(array if window is None else _through(window, array) for array, window in zip(
        arrays, op.windows or [None] * len(arrays), strict=True))
    rank = max(array.ndim for array in arrays)
    return [array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(op.order(i, rank))
            for i, array in enumerate(arrays)]


def _through(window: ops.Window, x: Array) -> Array:
    part = np.take(x, range(window.start, window.stop), window.axis)
    return part.squeeze(window.axis) if window.gone else part


def _as_written(op: ops.Matrices, y: Array) -> Array:
    return y.transpose(np.argsort(op.order(-1, y.ndim)))


def max_pool2d(op: ops.MaxPool2d, x: Array) -> Array:
    """Padding counts as minus infinity; NaN wins over everything."""
    y = np.full(ops.known(op.output_shape(x.shape)), -np.inf)
    for view, _, _ in _taps(x, op, op.kernel_size, y.shape, fill=-np.inf):
        y = np.maximum(y, view)
    return y


def avg_pool2d(op: ops.AvgPool2d, x: Array) -> Array:
    """Sum over the window / number of its elements that count."""
    shape = ops.known(op.output_shape(x.shape))
    total, elements = np.zeros(shape), np.zeros(shape)
    counted = np.ones_like(x)
    for (view, _, _), (ones, _, _) in zip(
            _taps(x, op, op.kernel_size, shape, fill=0.0),
            _taps(counted, op, op.kernel_size, shape, fill=float(op.count_include_pad),
                  beyond=0.0), strict=True):
        total += view
        elements += ones
    return total / elements


def _taps(x: Array, op: Conv2d | Pool2d, kernel: tuple[int, ...], y_shape: tuple[int, ...],
          fill: float, beyond: float | None = None):
    """(view of x under tap (i, j) of every window, i, j). Padding holds `fill`; what windows of
    ceil_mode reach beyond the padding holds `beyond`, or `fill` too."""
    top, left, bottom, right = op.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    over = tuple(max(0, (y_shape[k + 1] - 1) * op.stride[k] + (kernel[k] - 1) * op.dilation[k]
                     + 1 - padded.shape[k + 1]) for k in (0, 1))
    padded = np.pad(padded, ((0, 0), (0, over[0]), (0, over[1]), (0, 0)),
                    constant_values=fill if beyond is None else beyond)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            first, column = i * op.dilation[0], j * op.dilation[1]
            yield padded[:, first:first + (y_shape[1] - 1) * op.stride[0] + 1:op.stride[0],
                         column:column + (y_shape[2] - 1) * op.stride[1] + 1:op.stride[1]], i, j


def global_avg_pool2d(op: ops.GlobalAvgPool2d, x: Array) -> Array:
    return x.mean(axis=(1, 2), keepdims=True)


def global_l2_pool2d(op: ops.GlobalL2Pool2d, x: Array) -> Array:
    return np.sqrt((x ** 2).sum(axis=(1, 2), keepdims=True))


def global_max_pool2d(op: ops.GlobalMaxPool2d, x: Array) -> Array:
    return x.max(axis=(1, 2), keepdims=True)


def relu(op: ops.Relu, x: Array) -> Array:
    return np.maximum(x, 0)


def clip(op: ops.Clip, x: Array) -> Array:
    return np.minimum(np.maximum(x, op.low), op.high)


def sigmoid(op: ops.Sigmoid, x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def tanh(op: ops.Tanh, x: Array) -> Array:
    return np.tanh(x)


def silu(op: ops.Silu, x: Array) -> Array:
    return x / (1 + np.exp(-x))


def hard_swish(op: ops.HardSwish, x: Array) -> Array:
    return x * np.minimum(np.maximum(x + 3, 0), 6) / 6


def hard_sigmoid(op: ops.HardSigmoid, x: Array) -> Array:
    return np.minimum(np.maximum(op.alpha * x + op.beta, 0), 1)


def leaky_relu(op: ops.LeakyRelu, x: Array) -> Array:
    return np.where(x > 0, x, op.alpha * x)


def elu(op: ops.Elu, x: Array) -> Array:
    return np.where(x > 0, x, op.alpha * np.expm1(x))


def gelu(op: ops.Gelu, x: Array) -> Array:
    if op.tanh:     # 1 + tanh(s / 2) = 2 / (1 + exp(-s)), which does not cancel
        return x / (1 + np.exp(-np.sqrt(8 / np.pi) * (x + 0.044715 * x ** 3)))
    return x * _erfc(-x / np.sqrt(2)) / 2       # 1 + erf(z) = erfc(-z), which does not cancel


def erf(op: ops.Erf, x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[float])(x)


def sqrt(op: ops.Sqrt, x: Array) -> Array:
    return np.sqrt(x)


def star_relu(op: ops.StarRelu, x: Array) -> Array:
    return op.scale * np.maximum(x, 0) ** 2 + op.bias


def fake_quantize(op: ops.FakeQuantize, x: Array) -> Array:
    x = x if op.first is None else run(op.first, x)
    return np.clip(np.rint(x / op.scale), *op.bounds) * op.scale


def _erfc(x: Array) -> Array:
    return np.vectorize(math.erfc, otypes=[float])(x)


def add(op: ops.Add, a: Array, b: Array) -> Array:
    return a + b


def add_fake_quantize(op: ops.AddFakeQuantize, a: Array, b: Array) -> Array:
    return fake_quantize(op.last, a + b)


def mul(op: ops.Mul, a: Array, b: Array) -> Array:
    return a * b


def div(op: ops.Div, a: Array, b: Array) -> Array:
    return a / b


def batch_norm(op: ops.BatchNorm, x: Array, scale: Array, bias: Array, mean: Array,
               var: Array) -> Array:
    y = (x - mean) / np.sqrt(var + op.epsilon) * scale + bias
    return y if op.activation is None else run(op.activation, y)


def norm_conv2d(op: ops.NormConv2d, x: Array, *parameters: Array) -> Array:
    return conv2d(op.conv, batch_norm(op.norm, x, *parameters[:4]), *parameters[4:])


def layer_norm(op: ops.LayerNorm, x: Array, scale: Array, bias: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred ** 2).mean(axis=-1, keepdims=True)
    y = centred / np.sqrt(variance + op.epsilon) * scale + bias
    return y if op.activation is None else run(op.activation, y)


def local_response_norm(op: ops.LocalResponseNorm, x: Array) -> Array:
    before = (op.size - 1) // 2
    total = np.zeros_like(x)
    for c in range(x.shape[-1]):
        window = x[..., max(0, c - before):c - before + op.size]
        total[..., c] = (window ** 2).sum(axis=-1)
    return x / (op.bias + op.alpha / op.size * total) ** op.beta


def concat(op: ops.Concat, *arrays: Array) -> Array:
    return np.concatenate(arrays, axis=op.axis)


def softmax(op: ops.Softmax, x: Array) -> Array:
    x = x - x.max(axis=op.axis, keepdims=True)
    total = np.exp(x).sum(axis=op.axis, keepdims=True)
    return x - np.log(total) if op.log else np.exp(x) / total


def slice_(op: ops.Slice, x: Array) -> Array:
    index = [slice(None)] * x.ndim
    index[op.axis] = slice(op.start, op.stop, op.step)
    return x[tuple(index)]


def pad(op: ops.Pad, x: Array) -> Array:
    widths = [*zip(op.before, op.after, strict=True)]
    if op.mode == "constant":
        return np.pad(x, widths, constant_values=op.value)
    return np.pad(x, widths, op.mode)       # NumPy's modes have the same names


def transpose(op: ops.Transpose, x: Array) -> Array:
    return x.transpose(op.permutation)


def reshape(op: ops.Reshape | ops.Flatten, x: Array) -> Array:
    return x.reshape(ops.known(op.output_shape(x.shape)))


MEANINGS: dict[type[Op], Callable[..., Array]] = {
    ops.Conv2d: conv2d, ops.Linear: linear, ops.MatMul: matmul,
    ops.Attention: attention, ops.MaxPool2d: max_pool2d,
    ops.AvgPool2d: avg_pool2d, ops.GlobalAvgPool2d: global_avg_pool2d,
    ops.GlobalMaxPool2d: global_max_pool2d, ops.GlobalL2Pool2d: global_l2_pool2d,
    ops.Relu: relu, ops.Clip: clip, ops.Sigmoid: sigmoid, ops.Tanh: tanh, ops.Silu: silu,
    ops.HardSwish: hard_swish, ops.HardSigmoid: hard_sigmoid, ops.LeakyRelu: leaky_relu,
    ops.Elu: elu, ops.Gelu: gelu, ops.Erf: erf, ops.Sqrt: sqrt, ops.StarRelu: star_relu,
    ops.FakeQuantize: fake_quantize,
    ops.AddFakeQuantize: add_fake_quantize,
    ops.Add: add, ops.Mul: mul, ops.Div: div, ops.BatchNorm: batch_norm,
    ops.NormConv2d: norm_conv2d,
    ops.LayerNorm: layer_norm, ops.LocalResponseNorm: local_response_norm, ops.Concat: concat,
    ops.Slice: slice_, ops.Pad: pad, ops.Softmax: softmax, ops.Transpose: transpose,
    ops.Reshape: reshape, ops.Flatten: reshape,
}
