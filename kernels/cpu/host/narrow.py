"""What passes from one op to another in fewer bytes: in bfloat16, where that is multiplied, and in
codes of 8 bits, where a file was quantised to them. What reads them need not narrow them itself.
In bfloat16 that rounds residuals, and what depthwise convolutions, batch norms and pools read; what
multiplies would round its inputs anyway."""
from __future__ import annotations

from collections.abc import Sequence

from ...ops import (
    AddFakeQuantize,
    Attention,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv2d,
    FakeQuantize,
    GlobalPool2d,
    LayerNorm,
    Linear,
    MatMul,
    MaxPool2d,
    Op,
    TensorSpec,
    known,
)
from ...step import Array, Narrow, Options
from ..dot_units import Unit
from . import depthwise, dot_conv, unit_choice
from .codes import writes_codes
from .numbers import are_codes


def bfloat16(op: Op, inputs: Sequence[TensorSpec]) -> Narrow:
    """Of an op with these inputs, where bfloat16 is asked for."""
    if isinstance(op, (Conv2d, Linear)):
        # Of the numbers of a grid bfloat16 has not all.
        return Narrow((0, 3), not isinstance(op.activation, FakeQuantize))
    if isinstance(op, (Attention, MatMul)):
        return Narrow((0, 1, 2), writes=True)
    if isinstance(op, BatchNorm):
        return Narrow((0,), not isinstance(op.activation, FakeQuantize))
    if isinstance(op, (AvgPool2d, GlobalPool2d)):
        return Narrow((0,), writes=True)
    if isinstance(op, LayerNorm):
        return Narrow(writes=op.activation is None)
    return Narrow(moves=isinstance(op, (Concat, MaxPool2d)))


def codes(op: Op, inputs: Sequence[TensorSpec], weights: Sequence[Array | None],
          options: Options) -> Narrow:
    """Of an op with these inputs, constant where weights has them. What is written is what
    FakeQuantize gives."""
    unit = unit_choice.choose_int8()
    if unit is None:
        return Narrow()
    if isinstance(op, Conv2d) and _is_depthwise(op, inputs):
        return Narrow(*depthwise.takes_codes(op, inputs[0]))
    if isinstance(op, (Conv2d, Linear)):
        weight = weights[1]
        if weight is None or not are_codes(inputs[0], weight, options):
            return Narrow()
        if isinstance(op, Conv2d) and _is_winograd(op, inputs, weight, unit):
            return Narrow((0, 3), writes_codes(op.activation))
        return Narrow((0, 3), isinstance(op.activation, FakeQuantize))
    if isinstance(op, BatchNorm):
        return Narrow((0,), writes_codes(op.activation))
    if isinstance(op, LayerNorm):       # whose kernel knows no bounds and no functions
        last = op.activation
        return Narrow(writes=last is not None and last == FakeQuantize(*last.grid))
    if isinstance(op, (FakeQuantize, AddFakeQuantize)):
        return Narrow((0, 1), writes=True)
    return Narrow(moves=isinstance(op, (Concat, MaxPool2d)))


def _is_depthwise(op: Conv2d, inputs: Sequence[TensorSpec]) -> bool:
    return len(inputs) < 4 and depthwise.fits(op, known(inputs[1].shape),
                                              known(inputs[0].shape)[-1])


def _is_winograd(op: Conv2d, inputs: Sequence[TensorSpec], weight: Array, unit: Unit) -> bool:
    """Whether float32 multiplies codes faster, see `dot_conv.winograd_tile`."""
    _, height, width, _ = known(op.output_shape(known(inputs[0].shape), weight.shape))
    return dot_conv.winograd_tile(op, weight, (height, width), unit) > 0
