"""What all ops have in common: shapes, and what a pass over them costs."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

Dim = int | None
Shape = tuple[Dim, ...]
Pair = tuple[int, int]
Padding = tuple[int, int, int, int]     # top, left, bottom, right: the order of ONNX `pads`


class Grid(NamedTuple):
    """The 256 numbers (code - zero_point) * scale, for codes from 0 to 255: what FakeQuantize of
    these two gives."""
    scale: float
    zero_point: int


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (a NumPy name) of a value.

    grid  where it is known that its numbers are of one; in uint8 they are stored as its codes
    """
    shape: Shape
    dtype: str = "float32"
    grid: Grid | None = None


@dataclass(frozen=True)
class Op:
    """Base of all ops. One without attributes of its own is a dataclass as its base is.

    arity   the least and the greatest number of inputs it takes
    packed  positions of inputs that are constants of a network, which a backend lays out its way
    """
    arity: ClassVar[Pair] = (1, 1)
    packed: ClassVar[tuple[int, ...]] = ()

    @property
    def kind(self) -> str:
        """The name that people read: the class's own."""
        return type(self).__name__

    def output_shape(self, *shapes: Shape) -> Shape:
        """Shape of the output for inputs of these shapes; ValueError where they do not fit."""
        return shapes[0]

    def macs(self, *shapes: Shape) -> int:
        """Multiply-accumulates; 0 for ops that do none. All dimensions must be known."""
        return 0

    def flops(self, *shapes: Shape) -> int:
        """Floating-point operations: two per multiply-accumulate, else one per output element."""
        return 2 * self.macs(*shapes) or count(self.output_shape(*shapes))

    def bytes(self, *shapes: Shape, itemsize: int = 4) -> int:
        """Bytes read and written when each input and the output are touched once."""
        return itemsize * (sum(map(count, shapes)) + count(self.output_shape(*shapes)))


def count(shape: Shape) -> int:
    """Number of elements of a fully known shape."""
    return math.prod(known(shape))


def known(shape: Shape) -> tuple[int, ...]:
    """The shape, once every dimension is known; ValueError otherwise."""
    sizes = tuple(size for size in shape if size is not None)
    if len(sizes) != len(shape):
        raise ValueError(f"shape {shape} has a dimension that is not known yet")
    return sizes


def normal_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front; ValueError where there is no such axis."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is out of range for rank {rank}")
    return axis % rank
