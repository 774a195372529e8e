"""Elements of an axis in any order, put together from slices: Resize, Gather and Slice need it."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from kernels import ops

from ..importer import Importer, Value

MOST_SLICES = 64        # that an axis is put together from


def take(net: Importer, x: Value, axis: int, elements: Sequence[int]) -> Value:
    """The elements of an axis of known size that `elements` names, in that order."""
    shape = net.shape(x)
    (size,) = ops.known(shape[axis:axis + 1])
    factor = max(len(elements) // size, 1)
    if axis and factor > 1 and list(elements) == [i // factor for i in range(size * factor)]:
        return _repeated(net, x, axis, factor)
    slices = list(islice(_runs(elements), MOST_SLICES + 1))
    if not 0 < len(slices) <= MOST_SLICES:
        raise ValueError(f"{len(elements)} elements of the {size} along axis {axis} of shape "
                         f"{shape} are not supported in this order: they must be 1 to "
                         f"{MOST_SLICES} slices at even distances")
    if slices == [(0, size - 1, 1)]:
        return x
    parts = [net.emit(ops.Slice(axis, first, last + 1, step), x, suffix=f":{axis}:{i}")
             for i, (first, last, step) in enumerate(slices)]
    return parts[0] if len(parts) == 1 else net.emit(ops.Concat(axis), *parts)


def _repeated(net: Importer, x: Value, axis: int, factor: int) -> Value:
    """Each element of an axis so many times, by a product with ones that is broadcast."""
    before, (size, *after) = net.shape(x)[1:axis], ops.known(net.shape(x)[axis:])
    split = net.emit(ops.Reshape((-1, *ops.known(before), size, 1, *after)), x,
                     suffix=f":split{axis}")
    ones = np.ones((factor, *[1] * len(after)), np.float32)
    each = net.emit(ops.Mul(), split, net.add_constant(f"{net.name}:ones{axis}", ones),
                    suffix=f":{axis}")
    return net.emit(ops.Reshape((-1, *ops.known(before), size * factor, *after)), each)


def _runs(elements: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, last, step) of each run of elements at one distance, which is positive."""
    i = 0
    while i < len(elements):
        end, step = i + 1, 1
        if end < len(elements) and elements[end] > elements[i]:
            step = elements[end] - elements[i]
            while end < len(elements) and elements[end] - elements[end - 1] == step:
                end += 1
        yield elements[i], elements[end - 1], step
        i = end
