"""Sums, means, greatest values and norms along axes."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from kernels import ops

from ..importer import Importer, Ints, Value

MOST_TERMS = 16     # of a sum that is written out


def sum_along(net: Importer, x: Value, axes: Ints | None, keepdims: int) -> Value:
    """Along one short axis its slices are added, as split attention wants it; else the sum is as
    many times the mean as there are elements."""
    shape, over = net.shape(x), _known_axes(net, x, axes)
    elements = ops.count(tuple(shape[axis] for axis in over))
    if len(over) > 1 or elements > MOST_TERMS:
        mean = _pooled(ops.GlobalAvgPool2d(), net, x, axes, keepdims)
        number = net.add_constant(f"{net.name}:elements", np.array(elements, np.float32))
        return net.emit(ops.Mul(), mean, number)
    (axis,) = over
    terms = [net.emit(ops.Slice(axis, i, i + 1), x, suffix=f":{i}") for i in range(elements)]
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = net.emit(ops.Add(), total, term, suffix=f":sum{i}")
    return total if keepdims else net.without_axes(total, [axis], suffix=":squeeze")


def _pooled(pool: ops.GlobalPool2d, net: Importer, x: Value, axes: Ints | None, keepdims: int
            ) -> Value:
    """What global pooling makes of images whose pixels lie along `axes`; the longest of the other
    axes is their channels, or the last of several."""
    shape, over = net.shape(x), _known_axes(net, x, axes)
    if len(shape) == 4 and over in ([1, 2], [2, 3]):        # over height and width, NHWC or NCHW
        y = net.emit(pool, x) if over == [1, 2] else net.channels_last(pool, x)
        return y if keepdims else net.emit(ops.Reshape((0, -1)), y, suffix=":squeeze")
    kept = [axis for axis in range(len(shape)) if axis not in over]
    known = [axis for axis in kept if shape[axis] is not None]
    channels = [max(known, key=lambda axis: (shape[axis], axis))] if known else []
    images = [axis for axis in kept if axis not in channels]
    order = (*images, *over, *channels)
    pixels = ops.count(tuple(shape[axis] for axis in over))
    moved = net.emit(ops.Transpose(order), x, suffix=":together")
    image = net.emit(ops.Reshape((-1, pixels, 1, ops.count(tuple(shape[i] for i in channels)))),
                     moved, suffix=":image")
    pooled = net.emit(pool, image, suffix=":pool")
    made = [*images, *channels]
    if made != kept:
        apart = (-1 if size is None else size for size in (shape[axis] for axis in made))
        pooled = net.emit(ops.Reshape(tuple(apart)), pooled, suffix=":apart")
        pooled = net.emit(ops.Transpose(tuple(made.index(axis) for axis in kept)), pooled,
                          suffix=":kept")
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


def _reduction(reduce: Callable[[Importer, Value, Ints | None, int], Value]
               ) -> Callable[..., Value]:
    """The operator that reduces so; in newer opsets no axes may mean that nothing is reduced."""
    def operator(net: Importer, x: Value, axes_input: Value | None = None, *,
                 axes: Ints | None = None, keepdims: int = 1,
                 noop_with_empty_axes: int = 0) -> Value:
        wanted = net.given(axes_input, axes, "axes")
        return x if noop_with_empty_axes and not wanted else reduce(net, x, wanted, keepdims)
    return operator


ReduceSum = _reduction(sum_along)
ReduceMean = _reduction(partial(_pooled, ops.GlobalAvgPool2d()))
ReduceMax = _reduction(partial(_pooled, ops.GlobalMaxPool2d()))
ReduceL2 = _reduction(partial(_pooled, ops.GlobalL2Pool2d()))
