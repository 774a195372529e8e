"""What passes in bfloat16 from one op to another: half the bytes, and no rounding for each that
reads it. Sums are rounded when they are written, as they would be when they are read."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...ops import Conv2d, Linear, Op, Shape, known
from . import depthwise
from .epilogue import is_clip


class Narrow(NamedTuple):
    """Of a prepared op: positions of the inputs that it reads in bfloat16, if they are stored so,
    and whether it can write that."""
    reads: tuple[int, ...] = ()
    writes: bool = False


def narrow(op: Op, shapes: Sequence[Shape]) -> Narrow:
    """Of an op with inputs of these shapes, where bfloat16 is asked for. A sweep that follows a
    convolution works on float32."""
    if isinstance(op, Linear):
        return Narrow((0,), is_clip(op.activation))
    if isinstance(op, Conv2d):
        if depthwise.fits(op, known(shapes[1]), known(shapes[0])[-1]) and len(shapes) < 4:
            return Narrow()
        return Narrow((0, 3), is_clip(op.activation))
    return Narrow()
