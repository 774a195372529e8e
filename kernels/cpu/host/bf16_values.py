"""What passes in bfloat16 from one op to another: half the bytes, and what reads it need not round
it. No bit changes thereby, but for residuals: convolutions and Linear layers round their inputs."""
from __future__ import annotations

from collections.abc import Sequence

from ...ops import BatchNorm, Concat, Conv2d, Linear, MaxPool2d, Op, Shape, known
from ...step import Narrow
from . import depthwise
from .epilogue import is_clip


def narrow(op: Op, shapes: Sequence[Shape]) -> Narrow:
    """Of an op with inputs of these shapes, where bfloat16 is asked for."""
    if isinstance(op, (Conv2d, Linear)):
        wide = isinstance(op, Conv2d) and len(shapes) < 4 and depthwise.fits(
            op, known(shapes[1]), known(shapes[0])[-1])
        # A sweep that follows, for what is no clip, works on float32.
        return Narrow(() if wide else (0, 3), is_clip(op.activation))
    if isinstance(op, BatchNorm):
        return Narrow(writes=is_clip(op.activation))
    return Narrow(moves=isinstance(op, (Concat, MaxPool2d)))
