"""Sums, means, greatest values and norms along axes."""
from __future__ import annotations

import numpy as np

from kernels import ops

from ..importer import Importer, Ints, Value

MOST_TERMS = 16     # of a sum that is written out


def ReduceMean(net: Importer, x: Value, axes_input: Value | None = None, *,
               axes: Ints | None = None, keepdims: int = 1,
               noop_with_empty_axes: int = 0) -> Value:
    return _pooled(net, ops.GlobalAvgPool2d(), x, net.given(axes_input, axes, "axes"), keepdims,
                   noop_with_empty_axes)


def ReduceMax(net: Importer, x: Value, axes_input: Value | None = None, *, axes: Ints | None = None,
              keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    return _pooled(net, ops.GlobalMaxPool2d(), x, net.given(axes_input, axes, "axes"), keepdims,
                   noop_with_empty_axes)


def ReduceL2(net: Importer, x: Value, axes_input: Value | None = None, *, axes: Ints | None = None,
             keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    return _pooled(net, ops.GlobalL2Pool2d(), x, net.given(axes_input, axes, "axes"), keepdims,
                   noop_with_empty_axes)


def ReduceSum(net: Importer, x: Value, axes_input: Value | None = None, *,
              axes: Ints | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    wanted = net.given(axes_input, axes, "axes")
    if noop_with_empty_axes and not wanted:
        return x
    return sum_along(net, x, wanted, keepdims)


def sum_along(net: Importer, x: Value, axes: Ints | None, keepdims: int) -> Value:
    """Along one short axis its slices are added, as split attention wants it; else the sum is as
    many times the mean as there are elements."""
    shape, over = net.shape(x), _known_axes(net, x, axes)
    elements = ops.count(tuple(shape[axis] for axis in over))
    if len(over) > 1 or elements > MOST_TERMS:
        mean = _pooled(net, ops.GlobalAvgPool2d(), x, axes, keepdims)
        number = net.add_constant(f"{net.name}:elements", np.array(elements, np.float32))
        return net.emit(ops.Mul(), mean, number)
    (axis,) = over
    terms = [net.emit(ops.Slice(axis, i, i + 1), x, suffix=f":{i}") for i in range(elements)]
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = net.emit(ops.Add(), total, term, suffix=f":sum{i}")
    return total if keepdims else net.without_axes(total, [axis], suffix=":squeeze")


def _pooled(net: Importer, pool: ops.GlobalPool2d, x: Value, axes: Ints | None, keepdims: int,
            nothing_for_none: int = 0) -> Value:
    """What global pooling makes of images whose pixels lie along `axes`; the last of the other axes
    is their channels, where its size is known."""
    if nothing_for_none and not axes:
        return x
    shape, over = net.shape(x), _known_axes(net, x, axes)
    if len(shape) == 4 and over in ([1, 2], [2, 3]):        # over height and width, NHWC or NCHW
        y = net.emit(pool, x) if over == [1, 2] else net.channels_last(pool, x)
        return y if keepdims else net.emit(ops.Reshape((0, -1)), y, suffix=":squeeze")
    kept = [axis for axis in range(len(shape)) if axis not in over]
    channels = kept[-1:] if kept and shape[kept[-1]] is not None else []
    order = (*kept[:len(kept) - len(channels)], *over, *channels)
    pixels = ops.count(tuple(shape[axis] for axis in over))
    moved = net.emit(ops.Transpose(order), x, suffix=":together")
    image = net.emit(ops.Reshape((-1, pixels, 1, ops.count(tuple(shape[i] for i in channels)))),
                     moved, suffix=":image")
    pooled = net.emit(pool, image, suffix=":pool")
    sizes = [1 if axis in over else shape[axis] for axis in range(len(shape))
             if keepdims or axis not in over]
    return net.emit(ops.Reshape(tuple(-1 if size is None else size for size in sizes)), pooled)


def _known_axes(net: Importer, x: Value, axes: Ints | None) -> list[int]:
    """The axes in order, from the front; at least one, and none of a size that is not known."""
    shape = net.shape(x)
    over = sorted({ops.normal_axis(axis, len(shape)) for axis in axes or ()})
    if not over or None in [shape[axis] for axis in over] or sum(
            size is None for size in shape) > 1:
        raise net.error(f"a reduction over axes {axes} of shape {shape} is not supported: it must "
                        f"name axes whose sizes are in the file, and not the batch")
    return over
