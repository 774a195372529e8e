"""Operators that change shape or order, or nothing."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, get_args

import numpy as np

from kernels import ops
from kernels.ops import PadMode

from .. import fold
from ..graph import Glue
from ..importer import BATCHES, Importer, Ints, Value
from .taking import take

MOST_TILES = 256        # along an axis: what a file asks for may be anything
ALL = 2 ** 31 - 1       # what files write, or more, for the end of an axis


def Concat(net: Importer, *inputs: Value, axis: int) -> Value:
    return net.emit(ops.Concat(axis), *inputs)


def Split(net: Importer, x: Value, split_input: Value | None = None, *, axis: int = 0,
          split: Ints | None = None, num_outputs: int | None = None) -> tuple[Value, ...]:
    size = net.shape(x)[ops.normal_axis(axis, len(net.shape(x)))]
    if size is None:
        raise net.error(f"Split along axis {axis} of shape {net.shape(x)}, whose size is not known")
    parts = net.given(split_input, split, "split")
    if parts is None:
        length = -(-size // (num_outputs or net.outputs))
        parts = [min(length, size - first) for first in range(0, size, length)]
    if sum(parts) != size or min(parts) < 1:
        raise ValueError(f"parts of {list(parts)} do not make up the {size} elements of axis "
                         f"{axis} of shape {net.shape(x)}")
    ends = list(accumulate(parts))
    return tuple(net.emit(ops.Slice(axis, end - part, end), x, suffix=f":{i}")
                 for i, (part, end) in enumerate(zip(parts, ends, strict=True)))


def Slice(net: Importer, x: Value, starts_input: Value | None = None,
          ends_input: Value | None = None, axes_input: Value | None = None,
          steps_input: Value | None = None, *, starts: Ints = (), ends: Ints = (),
          axes: Ints | None = None) -> Value:
    """Ends are beyond the last element, or count back from it, as Python's do."""
    starts = net.given(starts_input, starts, "starts") or ()
    ends = net.given(ends_input, ends, "ends") or ()
    axes = net.given(axes_input, axes, "axes")
    axes = range(len(starts)) if axes is None else axes
    steps = net.given(steps_input, None, "steps")
    steps = [1] * len(starts) if steps is None else steps
    shape, parts = net.shape(x), []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = ops.normal_axis(axis, len(shape))
        size = shape[axis]
        if (start, step) == (0, 1) and end >= ALL:
            continue
        if size is None:
            raise net.error(f"Slice {start}:{end}:{step} along axis {axis} of shape {shape} is not "
                            f"supported: its size must be known")
        first, stop, _ = slice(start, end).indices(size)
        if step < 0:
            x = take(net, x, axis, range(size)[start:end:step])
        elif (first, stop, step) != (0, size, 1):
            parts.append(ops.Slice(axis, first, stop, step))
    for i, part in enumerate(parts, 1):
        x = net.emit(part, x, suffix="" if i == len(parts) else f":{part.axis}")
    return x


def Pad(net: Importer, x: Value, pads_input: Value | None = None, value_input: Value | None = None,
        axes_input: Value | None = None, *, mode: PadMode = "constant", pads: Ints | None = None,
        value: float = 0.0) -> Value:
    if mode not in get_args(PadMode):
        raise net.error(f"Pad with mode {mode!r} is not supported, only 'constant', 'edge' and "
                        f"'reflect'")
    if value_input is not None:
        value = float(net.array(value_input, "value").reshape(()))
    if x in net.coded:
        value = net.coded[x].real(value)
    rank = len(net.shape(x))
    given = list(net.given(pads_input, pads, "pads") or ())
    axes = net.given(axes_input, None, "axes")
    axes = range(rank) if axes is None else axes
    if len(given) != 2 * len(axes):
        raise ValueError(f"pads {given} must be two numbers for each of the axes {list(axes)}")
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = given[i], given[len(axes) + i]
    x = _cropped(net, x, before, after)
    sides = [tuple(max(0, side) for side in sides) for sides in (before, after)]
    return net.emit(ops.Pad(sides[0], sides[1], value, mode), x)


def _cropped(net: Importer, x: Value, before: Sequence[int], after: Sequence[int]) -> Value:
    """Without the elements that negative pads take away."""
    for axis, (first, last) in enumerate(zip(before, after, strict=True)):
        if min(first, last) < 0:
            (size,) = ops.known(net.shape(x)[axis:axis + 1])
            part = ops.Slice(axis, max(0, -first), size - max(0, -last))
            x = net.emit(part, x, suffix=f":crop{axis}")
    return x


def Expand(net: Importer, x: Value, shape: Value) -> Value:
    """x * 1 in the broadcast shape; x itself where that is its own. What grows with the batch only
    keeps it."""
    if shape in net.constants:
        wanted = net.constants[shape].tolist()
    else:
        found = net.batches.get(shape)
        if found is None:
            raise net.error(f"its shape must not depend on values, it is {shape!r}")
        wanted = [a if a == b else 1 for a, b in zip(*(each.tolist() for each in found),
                                                     strict=True)]
    ones = fold.ConstantOfShape(np.array(wanted), value=np.ones(1, np.float32))
    if ops.broadcast_shapes(net.shape(x), ones.shape) == net.shape(x):
        return x
    return net.emit(ops.Mul(), x, net.add_constant(f"{net.name}:ones", ones))


def Tile(net: Importer, x: Value, repeats: Value) -> Value:
    """What is repeated for each image of a batch is left as it is, for ops broadcast it."""
    pair = net.batches.get(repeats)
    first, second = pair if pair is not None else [net.array(repeats, "repeats")] * 2
    for axis, (number, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if number != other and net.shape(x)[axis] != 1:
            raise net.error(f"Tile of shape {net.shape(x)} along axis {axis} is not supported: it "
                            f"depends on the batch")
        if number == other and not 1 <= number <= MOST_TILES:
            raise net.error(f"Tile {number} times along axis {axis} is not supported, only 1 to "
                            f"{MOST_TILES} times")
        if number == other > 1:
            x = net.emit(ops.Concat(axis), *[x] * number, suffix=f":{axis}")
    return x


def Flatten(net: Importer, x: Value, *, axis: int = 1) -> Value:
    return net.emit(ops.Flatten(axis), x)


def Reshape(net: Importer, x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    if shape in net.constants:
        return net.emit(ops.Reshape(tuple(net.constants[shape].tolist()), bool(allowzero)), x)
    target = _target(net, x, shape)
    if target is not None and not allowzero:
        return net.emit(ops.Reshape(target), x)
    return net.emit(Glue("Reshape", (("allowzero", allowzero),)), x, shape)


def _target(net: Importer, x: Value, shape: Value) -> tuple[int, ...] | None:
    """What a computed shape says for any batch: a size that the batch decides is what is left; of
    several such sizes all but one are x's own, and copied."""
    found, sizes = net.batches.get(shape), net.shapes(x)
    if found is None or sizes is None:
        return None
    wanted = [each.tolist() for each in found]
    if sizes[0][:1] == sizes[1][:1] == (1,) and [each[:1] for each in wanted] == [
            [batch] for batch in BATCHES]:
        for each in wanted:     # what an op will broadcast: see Expand
            each[0] = 1
    first, second = (ops.known(ops.Reshape(tuple(each)).output_shape(given))
                     for each, given in zip(wanted, sizes, strict=True))
    target = [a if a == b else -1 for a, b in zip(first, second, strict=True)]
    for axis, own in enumerate(list(zip(*sizes, strict=True))[:len(target)]):
        if target.count(-1) > 1 and own == (first[axis], second[axis]):
            target[axis] = 0
    return tuple(target) if target.count(-1) <= 1 else None


def Gather(net: Importer, x: Value, indices: Value, *, axis: int = 0) -> Value:
    """Elements of an axis in any order that few slices make up; where the batch decides, all in
    their order, as PyTorch's exporter writes some views."""
    shape = net.shape(x)
    axis = ops.normal_axis(axis, len(shape))
    size = shape[axis]
    if indices in net.batches and len(shape) == 1:
        target = _in_order(net, x, indices)
        if target is not None:
            return net.emit(ops.Reshape(target), x)
    elif indices in net.constants and size is not None:
        chosen = net.constants[indices]
        if chosen.size and not -size <= chosen.min() <= chosen.max() < size:
            raise ValueError(f"its indices go from {chosen.min()} to {chosen.max()}, and axis "
                             f"{axis} of shape {shape} has {size} elements")
        part = take(net, x, axis, (chosen % size).reshape(-1).tolist())
        if chosen.ndim == 1:
            return part
        rest = [-1 if length is None else length for length in shape[axis + 1:]]
        return net.emit(ops.Reshape((*[0] * axis, *chosen.shape, *rest)), part)
    raise net.error(f"Gather along axis {axis} of shape {shape} is not supported with indices "
                    f"{indices!r}: they must be constants, and the axis of known size")


def _in_order(net: Importer, x: Value, indices: Value) -> tuple[int, ...] | None:
    """The shape of indices that name each element of x once, in order, whatever the batch is."""
    found, sizes = net.batches[indices], net.shapes(x)
    if found is None or sizes is None:
        return None
    for each, size in zip(found, sizes, strict=True):
        if not np.array_equal(each.reshape(-1), np.arange(ops.count(size))):
            return None
    target = tuple(a if a == b else -1 for a, b in zip(*(each.shape for each in found),
                                                       strict=True))
    return target if target.count(-1) <= 1 else None


def DepthToSpace(net: Importer, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    """Channels become blocks of pixels; depth first (DCR) or column first (CRD)."""
    channels, height, width = net.image(x)
    if channels % blocksize ** 2:
        raise ValueError(f"{channels} channels do not divide into blocks of {blocksize} squared")
    depth = channels // blocksize ** 2
    split, order = (((blocksize, blocksize, depth), (0, 3, 4, 1, 5, 2)) if mode == "DCR" else
                    ((depth, blocksize, blocksize), (0, 1, 4, 2, 5, 3)))
    return regroup(net, x, (-1, *split, height, width), order,
                   (-1, depth, height * blocksize, width * blocksize))


def SpaceToDepth(net: Importer, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    channels, height, width = net.image(x)
    if height % blocksize or width % blocksize:
        raise ValueError(f"{height} x {width} pixels do not divide into blocks of {blocksize}")
    rows, columns = height // blocksize, width // blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return regroup(net, x, (-1, channels, rows, blocksize, columns, blocksize), order,
                   (-1, channels * blocksize ** 2, rows, columns))


def regroup(net: Importer, x: Value, split: Sequence[int], order: Sequence[int],
            joined: Sequence[int]) -> Value:
    """Axes split by a reshape, moved, and joined by another."""
    axes = net.emit(ops.Reshape(tuple(split)), x, suffix=":split")
    moved = net.emit(ops.Transpose(tuple(order)), axes, suffix=":moved")
    return net.emit(ops.Reshape(tuple(joined)), moved)


def Squeeze(net: Importer, x: Value, axes_input: Value | None = None, *,
            axes: Ints | None = None) -> Value:
    shape = net.shape(x)
    given = net.given(axes_input, axes, "axes")
    gone = ([i for i, size in enumerate(shape) if size == 1] if given is None
            else [ops.normal_axis(axis, len(shape)) for axis in given])
    if any(shape[i] not in (1, None) for i in gone):
        raise ValueError(f"axes {gone} of shape {shape} are not all 1")
    return net.without_axes(x, gone)


def Unsqueeze(net: Importer, x: Value, axes_input: Value | None = None, *,
              axes: Ints | None = None) -> Value:
    given = net.given(axes_input, axes, "axes")
    rank = len(net.shape(x)) + len(given or ())
    new = [ops.normal_axis(axis, rank) for axis in given or ()]
    old = iter(range(rank))
    return net.with_axes(x, [None if i in new else next(old) for i in range(rank)])


def Transpose(net: Importer, x: Value, *, perm: Ints | None = None) -> Value:
    order = range(len(net.shape(x)))[::-1] if perm is None else perm
    return net.emit(ops.Transpose(tuple(order)), x)


def Identity(net: Importer, x: Value) -> Value:
    return x


def Dropout(net: Importer, x: Value, ratio: Value | None = None,
            training_mode: Value | None = None, **_: Any) -> Value:
    if training_mode is not None and net.array(training_mode, "training_mode").any():
        raise net.error("Dropout in training mode is not supported")
    return x


def Cast(net: Importer, x: Value, *, to: np.dtype, saturate: int = 1) -> Value:
    if to not in (np.float32, np.float16):
        raise net.error(f"Cast of a computed value to {to} is not supported; values are float32")
    return x
