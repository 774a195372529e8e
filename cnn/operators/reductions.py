"""Sums and means along axes."""
from __future__ import annotations

from kernels import ops

from ..importer import Importer, Ints, Value

MOST_TERMS = 16     # of a sum that is written out


def ReduceMean(net: Importer, x: Value, axes_input: Value | None = None, *,
               axes: Ints | None = None, keepdims: int = 1,
               noop_with_empty_axes: int = 0) -> Value:
    """Over height and width, which TensorFlow's networks may have before the channels."""
    wanted = net.given(axes_input, axes, "axes")
    shape = net.shape(x)
    over = None if wanted is None or len(shape) != 4 else sorted(axis % 4 for axis in wanted)
    if over not in ([1, 2], [2, 3]):
        raise net.error(f"ReduceMean over axes {wanted} of shape {shape} is not supported, only "
                        f"over height and width of an image")
    op = ops.GlobalAvgPool2d()
    y = net.emit(op, x) if over == [1, 2] else net.channels_last(op, x)
    return y if keepdims else net.emit(ops.Reshape((0, -1)), y, suffix=":squeeze")


def ReduceSum(net: Importer, x: Value, axes_input: Value | None = None, *,
              axes: Ints | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    """Along one short axis: its slices are added, as split attention wants it."""
    wanted = net.given(axes_input, axes, "axes")
    shape = net.shape(x)
    axis = None if wanted is None or len(wanted) != 1 else ops.normal_axis(wanted[0], len(shape))
    size = None if axis is None else shape[axis]
    if axis is None or size is None or not 1 <= size <= MOST_TERMS:
        raise net.error(f"ReduceSum over axes {wanted} of shape {shape} is not supported, only "
                        f"over one axis of at most {MOST_TERMS} elements")
    terms = [net.emit(ops.Slice(axis, i, i + 1), x, suffix=f":{i}") for i in range(size)]
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = net.emit(ops.Add(), total, term, suffix=f":sum{i}")
    return total if keepdims else net.without_axes(total, [axis], suffix=":squeeze")
