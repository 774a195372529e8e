"""Ops that only move data."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import Dim, Op, Pair, Shape, count, normal_axis


@dataclass(frozen=True)
class Concat(Op):
    """Inputs one after the other along `axis`."""
    axis: int = -1
    arity: ClassVar[Pair] = (1, 1 << 16)

    def output_shape(self, *shapes: Shape) -> Shape:
        rank = len(shapes[0])
        axis = normal_axis(self.axis, rank)
        result = list(shapes[0])
        for shape in shapes[1:]:
            if len(shape) != rank:
                raise ValueError(f"Concat: inputs of rank {rank} and {len(shape)}")
            for i, (p, q) in enumerate(zip(result, shape, strict=True)):
                if i == axis:
                    result[i] = None if p is None or q is None else p + q
                elif p is None:
                    result[i] = q
                elif q is not None and p != q:
                    raise ValueError(f"Concat along axis {axis}: shapes {shapes} differ elsewhere")
        return tuple(result)


@dataclass(frozen=True)
class Slice(Op):
    """Elements start, start + step, ... of `axis`, those before `stop`; none is negative."""
    axis: int
    start: int
    stop: int
    step: int = 1

    def output_shape(self, *shapes: Shape) -> Shape:
        (x,) = shapes
        axis = normal_axis(self.axis, len(x))
        size = x[axis]
        if size is None:
            raise ValueError(f"Slice along axis {axis} of {x}, whose size is not known")
        if not 0 <= self.start < self.stop <= size or self.step < 1:
            raise ValueError(f"Slice: {self.start}:{self.stop}:{self.step} are not elements of "
                             f"axis {axis} of {x}")
        return (*x[:axis], -(-(self.stop - self.start) // self.step), *x[axis + 1:])

    def flops(self, *shapes: Shape) -> int:
        return 0

    def bytes(self, *shapes: Shape, itemsize: int = 4) -> int:
        return 2 * itemsize * count(self.output_shape(*shapes))


PadMode = Literal["constant", "edge", "reflect"]


@dataclass(frozen=True)
class Pad(Op):
    """Elements around x: before[i] and after[i] of them along axis i, none negative.

    mode  "constant": they are `value`; "edge": the last element again and again; "reflect": what
          comes before the last, mirrored at it
    """
    before: tuple[int, ...]
    after: tuple[int, ...]
    value: float = 0.0
    mode: PadMode = "constant"

    def output_shape(self, *shapes: Shape) -> Shape:
        (x,) = shapes
        if not len(self.before) == len(self.after) == len(x) or min(
                (*self.before, *self.after), default=0) < 0:
            raise ValueError(f"Pad: {self.before} and {self.after} are not a number of at least 0 "
                             f"for each axis of {x}")
        if self.mode == "reflect" and any(size is not None and max(sides) >= size for size, *sides
                                          in zip(x, self.before, self.after, strict=True)):
            raise ValueError(f"Pad: {self.before} and {self.after} reflect more elements than "
                             f"{x} has beside its edges")
        return tuple(size if before == after == 0 else None if size is None
                     else before + size + after
                     for size, before, after in zip(x, self.before, self.after, strict=True))

    def flops(self, *shapes: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Transpose(Op):
    """Axis i of the output is axis permutation[i] of the input."""
    permutation: tuple[int, ...] = ()

    def output_shape(self, *shapes: Shape) -> Shape:
        if sorted(self.permutation) != list(range(len(shapes[0]))):
            raise ValueError(f"Transpose: {self.permutation} does not permute shape {shapes[0]}")
        return tuple(shapes[0][i] for i in self.permutation)

    def flops(self, *shapes: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Reshape(Op):
    """Same elements in the same order; in `shape` 0 copies the input's dimension (unless
    allow_zero) and one -1 takes what is left, as in ONNX."""
    shape: tuple[int, ...] = (-1,)
    allow_zero: bool = False

    def output_shape(self, *shapes: Shape) -> Shape:
        (x,) = shapes
        if not self.allow_zero and any(s == 0 and i >= len(x) for i, s in enumerate(self.shape)):
            raise ValueError(f"Reshape: {self.shape} copies a dimension that {x} does not have")
        target: list[Dim] = [x[i] if s == 0 and not self.allow_zero else s
                             for i, s in enumerate(self.shape)]
        return _fill_minus_one(x, target, self.shape)

    def flops(self, *shapes: Shape) -> int:
        return 0


def _fill_minus_one(x: Shape, target: list[Dim], asked: tuple[int, ...]) -> Shape:
    if None in x:
        # The unknown batch is one factor on both sides where the target copies it.
        if target.count(-1) == 1 and x.count(None) == 1 == target.count(None):
            rest = math.prod(s for s in target if s not in (-1, None))
            target[target.index(-1)] = math.prod(s for s in x if s is not None) // max(rest, 1)
        return tuple(None if s == -1 else s for s in target)
    elements = count(x)
    rest = math.prod(s for s in target if s is not None and s != -1)
    if target.count(-1) == 1 and rest and elements % rest == 0:
        target[target.index(-1)] = elements // rest
    if -1 in target or count(tuple(target)) != elements:
        raise ValueError(f"Reshape: {x} has {elements} elements and can not become {asked}")
    return tuple(target)


@dataclass(frozen=True)
class Flatten(Op):
    """Two dimensions: the product of those before `axis` and of those from it on."""
    axis: int = 1

    def output_shape(self, *shapes: Shape) -> Shape:
        (x,) = shapes
        axis = self.axis + len(x) if self.axis < 0 else self.axis
        if not 0 <= axis <= len(x):
            raise ValueError(f"Flatten: axis {self.axis} is not one of shape {x}")
        halves = x[:axis], x[axis:]
        return tuple(None if None in half else count(half) for half in halves)

    def flops(self, *shapes: Shape) -> int:
        return 0
