"""Operators on images: convolution and pooling."""
from __future__ import annotations

import numpy as np

from kernels import ops
from kernels.ops import Padding

from ..importer import Importer, Ints, Value


def Conv(net: Importer, x: Value, w: Value, b: Value | None = None, *,
         auto_pad: str = "NOTSET", dilations: Ints | None = None, group: int = 1,
         kernel_shape: Ints | None = None, pads: Ints | None = None,
         strides: Ints | None = None) -> Value:
    weight = net.weight(w, "weight")
    if kernel_shape is not None and tuple(kernel_shape) != weight.shape[2:]:
        raise net.error(f"kernel_shape {tuple(kernel_shape)} is not that of its weight "
                        f"{weight.shape}")
    if weight.ndim == 3:        # along one axis: an image of one row
        flat = net.add_constant(f"{w}:row", weight[:, :, None])
        row = net.emit(ops.Reshape((0, 0, 1, -1)), x, suffix=":row")
        y = Conv(net, row, flat, b, auto_pad=auto_pad, group=group, pads=_of_row(pads, 0, 2),
                 dilations=_of_row(dilations, 1), strides=_of_row(strides, 1))
        return net.emit(ops.Reshape((0, 0, -1)), y)
    weight = net.weight(w, "weight", rank=4)
    stride, dilation = _pair(strides), _pair(dilations)
    padding = _padding(net, x, auto_pad, pads, weight.shape[2:], stride, dilation)
    inputs = [net.add_constant(f"{w}:ohwi", np.ascontiguousarray(weight.transpose(0, 2, 3, 1)))]
    if b is not None:
        net.weight(b, "bias", rank=1)
        inputs.append(b)
    return net.channels_last(ops.Conv2d(stride, padding, dilation, group), x, *inputs)


def _of_row(values: Ints | None, fill: int, halves: int = 1) -> Ints | None:
    """Attributes of one axis as those of a row's two: `fill` comes before each of its halves."""
    if values is None or len(values) != halves:
        return values
    return [number for value in values for number in (fill, value)]


def MaxPool(net: Importer, x: Value, *, auto_pad: str = "NOTSET", ceil_mode: int = 0,
            dilations: Ints | None = None, kernel_shape: Ints, pads: Ints | None = None,
            storage_order: int = 0, strides: Ints | None = None) -> Value:
    kernel, stride, dilation = _pair(kernel_shape), _pair(strides), _pair(dilations)
    padding = _padding(net, x, auto_pad, pads, kernel, stride, dilation)
    return net.channels_last(
        ops.MaxPool2d(kernel, stride, padding, dilation, bool(ceil_mode)), x)


def AveragePool(net: Importer, x: Value, *, auto_pad: str = "NOTSET", ceil_mode: int = 0,
                count_include_pad: int = 0, dilations: Ints | None = None, kernel_shape: Ints,
                pads: Ints | None = None, strides: Ints | None = None) -> Value:
    if len(kernel_shape) == 1:
        row = net.emit(ops.Reshape((0, 0, 1, -1)), x, suffix=":row")
        y = AveragePool(net, row, auto_pad=auto_pad, ceil_mode=ceil_mode,
                        count_include_pad=count_include_pad, pads=_of_row(pads, 0, 2),
                        kernel_shape=_of_row(kernel_shape, 1) or (),
                        dilations=_of_row(dilations, 1), strides=_of_row(strides, 1))
        return net.emit(ops.Reshape((0, 0, -1)), y)
    kernel, stride = _pair(kernel_shape), _pair(strides)
    if _pair(dilations) != (1, 1):
        raise net.error(f"AveragePool with dilations {tuple(dilations or ())} is not supported")
    padding = _padding(net, x, auto_pad, pads, kernel, stride, (1, 1))
    return net.channels_last(ops.AvgPool2d(kernel, stride, padding, (1, 1), bool(ceil_mode),
                                           bool(count_include_pad)), x)


def GlobalAveragePool(net: Importer, x: Value) -> Value:
    return net.channels_last(ops.GlobalAvgPool2d(), x)


def GlobalMaxPool(net: Importer, x: Value) -> Value:
    return net.channels_last(ops.GlobalMaxPool2d(), x)


def GlobalLpPool(net: Importer, x: Value, *, p: int = 2) -> Value:
    if p != 2:
        raise net.error(f"GlobalLpPool with p={p} is not supported, only 2")
    return net.channels_last(ops.GlobalL2Pool2d(), x)


def _pair(values: Ints | None) -> tuple[int, int]:
    pair = (1, 1) if values is None else tuple(values)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{pair} must be two numbers of at least 1: only 2-D images are supported")
    return pair


def _padding(net: Importer, x: Value, auto_pad: str, pads: Ints | None, kernel: Ints, stride: Ints,
             dilation: Ints) -> Padding:
    """ONNX `pads`, or what auto_pad makes of the input's size."""
    if auto_pad == "NOTSET":
        given = (0, 0, 0, 0) if pads is None else tuple(pads)
        if len(given) != 4 or min(given) < 0:
            raise ValueError(f"pads {given} must be four numbers of at least 0")
        return given
    if auto_pad == "VALID":
        return (0, 0, 0, 0)
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad {auto_pad!r} is unknown")
    begin, end = [], []
    for size, k, s, d in zip(net.shape(x)[2:], kernel, stride, dilation, strict=True):
        if size is None:
            raise ValueError(f"auto_pad {auto_pad!r} needs the image's size, which is open in "
                             f"shape {net.shape(x)}")
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        begin.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
        end.append(total - begin[-1])
    return (begin[0], begin[1], end[0], end[1])
