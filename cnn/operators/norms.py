"""Operators that bring values to a common scale: norms and softmax."""
from __future__ import annotations

import numpy as np

from kernels import ops

from ..importer import Importer, Value


def BatchNormalization(net: Importer, x: Value, scale: Value, b: Value, mean: Value, var: Value,
                       *, epsilon: float = 1e-5, momentum: float = 0.9, spatial: int = 1,
                       training_mode: int = 0) -> Value:
    if training_mode or not spatial:
        raise net.error("BatchNormalization in training mode, or not per channel, is not supported")
    for value, what in ((scale, "scale"), (b, "bias"), (mean, "mean"), (var, "variance")):
        net.weight(value, what, rank=1)
    op, rank = ops.BatchNorm(epsilon), len(net.shape(x))
    if rank == 4:
        return net.channels_last(op, x, scale, b, mean, var)
    if rank == 3:       # channels of one axis: an image of one row
        row = net.emit(ops.Reshape((0, 0, 1, -1)), x, suffix=":row")
        return net.emit(ops.Reshape((0, 0, -1)),
                        net.channels_last(op, row, scale, b, mean, var))
    if rank != 2:
        raise net.error(f"BatchNormalization of {rank} axes is not supported, only of 2 to 4")
    return net.emit(op, x, scale, b, mean, var)


def LayerNormalization(net: Importer, x: Value, scale: Value, b: Value | None = None, *,
                       axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Value:
    shape = net.shape(x)
    axis = ops.normal_axis(axis, len(shape))
    sizes = ops.known(shape[axis:])
    weight = net.weight(scale, "scale")
    bias = np.zeros_like(weight) if b is None else net.weight(b, "bias")
    if not weight.shape == bias.shape == sizes:
        raise ValueError(f"its scale and bias have shapes {weight.shape} and {bias.shape}; "
                         f"{sizes} is needed")
    constants = [net.add_constant(f"{scale}:{what}:{net.name}", array.reshape(-1))
                 for what, array in (("scale", weight), ("bias", bias))]
    return net.by_rows(ops.LayerNorm(epsilon), axis, x, *constants)


def InstanceNormalization(net: Importer, x: Value, scale: Value, b: Value, *,
                          epsilon: float = 1e-5) -> Value:
    return _group_norm(net, x, scale, b, ops.known(net.shape(x)[1:2])[0], epsilon)


def GroupNormalization(net: Importer, x: Value, scale: Value, b: Value, *, num_groups: int,
                       epsilon: float = 1e-5, stash_type: int = 1) -> Value:
    return _group_norm(net, x, scale, b, num_groups, epsilon)


def _group_norm(net: Importer, x: Value, scale: Value, b: Value, groups: int, epsilon: float
                ) -> Value:
    """A group of a sample is a row of a layer norm; what scales channels comes after it. Before
    opset 21 GroupNormalization had a scale for each group."""
    sizes = ops.known(net.shape(x)[1:])
    channels, length = sizes[0], ops.count(sizes) // groups
    if channels % groups:
        raise ValueError(f"{channels} channels can not be cut into {groups} groups")
    ones, zeros = (net.add_constant(f"{net.name}:{what}", np.full(length, value, np.float32))
                   for what, value in (("ones", 1), ("zeros", 0)))
    rows = net.emit(ops.Reshape((0, groups, length)), x, suffix=":rows")
    normal = net.emit(ops.LayerNorm(epsilon), rows, ones, zeros)
    y = net.emit(ops.Reshape((0, *sizes)), normal, suffix=":back")
    for op, value, neutral in ((ops.Mul(), scale, 1), (ops.Add(), b, 0)):
        factors = net.weight(value, "scale and bias", rank=1)
        if len(factors) not in (groups, channels):
            raise ValueError(f"its scale and bias have {len(factors)} values, and there are "
                             f"{channels} channels")
        if (factors != neutral).any():
            shaped = np.repeat(factors, channels // len(factors)).reshape(-1, *[1] * len(sizes[1:]))
            y = net.emit(op, y, net.add_constant(f"{value}:{net.name}", shaped),
                         suffix=f":{op.kind.lower()}")
    return y


def LRN(net: Importer, x: Value, *, size: int, alpha: float = 1e-4, beta: float = 0.75,
        bias: float = 1.0) -> Value:
    if len(net.shape(x)) != 4 or size < 1:
        raise net.error(f"LRN over {size} channels of shape {net.shape(x)} is not supported, only "
                        f"over at least 1 of an image's")
    return net.channels_last(ops.LocalResponseNorm(size, alpha, beta, bias), x)


def Softmax(net: Importer, x: Value, *, axis: int | None = None) -> Value:
    return softmax(net, x, axis, net.opset)


def LogSoftmax(net: Importer, x: Value, *, axis: int | None = None) -> Value:
    return softmax(net, x, axis, net.opset, log=True)


def softmax(net: Importer, x: Value, axis: int | None, opset: int, log: bool = False) -> Value:
    if opset >= 13:
        return net.emit(ops.Softmax(-1 if axis is None else axis, log), x)
    return net.by_rows(ops.Softmax(-1, log),
                       ops.normal_axis(1 if axis is None else axis, len(net.shape(x))), x)
