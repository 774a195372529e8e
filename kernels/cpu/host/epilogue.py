"""How a fused activation runs: as a clip inside the kernel where it is one, else in registers
before the clip, or, in float32 convolutions, as one elementwise sweep over the output while that is
still in cache."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...ops import Clip, FakeQuantize, Relu, Unary
from ...step import Array
from ..launch import Constant, Launch

Finish = Callable[[Array, int], list[Launch]]
# What scalar.py also has for results that are rounded to bfloat16.
NARROW = ("silu", "gelu", "gelu_tanh")


class Epilogue(NamedTuple):
    """low, high: bounds of the clip; finish: (flat output, threads) -> the sweep in place that
    follows; suffix: of the kernel's name."""
    low: np.float32
    high: np.float32
    finish: Finish
    suffix: str


def epilogue(activation: Unary | None) -> Epilogue:
    low, high = -np.inf, np.inf
    finish: Finish = nothing
    if isinstance(activation, Relu):
        low = 0.0
    elif isinstance(activation, Clip):
        low, high = activation.low, activation.high
    elif activation is not None:
        from .elementwise import in_place
        finish = in_place(activation)
    suffix = "" if activation is None else f"_{activation.kind.lower()}"
    return Epilogue(np.float32(low), np.float32(high), finish, suffix)


class InRegisters(NamedTuple):
    """function: of scalar.py, 0 where there is none; a, b: its two numbers."""
    function: Constant | int
    a: np.float32
    b: np.float32


NOTHING = InRegisters(0, np.float32(0), np.float32(0))


def in_registers(activation: Unary | None, dtype: str) -> InRegisters:
    """What a kernel applies to numbers before it clips them and stores them in this dtype. What it
    stores as codes it has divided by their scale before, where FakeQuantize is all that follows."""
    if activation is None or is_clip(activation):
        return NOTHING
    from .elementwise import function_name, unary_kernel
    if dtype == "uint8":
        assert isinstance(activation, FakeQuantize)
        if activation.first is None:
            return NOTHING
        return InRegisters(Constant("scalar", f"code_of_{function_name(activation.first)}"),
                           np.float32(1 / activation.scale), np.float32(activation.zero_point))
    kernel, a, b = unary_kernel(activation)
    narrow = dtype == "bfloat16" and kernel.name in NARROW
    return InRegisters(Constant("scalar", f"narrow_{kernel.name}" if narrow else kernel.name), a, b)


def is_clip(activation: Unary | None) -> bool:
    """Whether a clip is all of it."""
    return epilogue(activation).finish is nothing


def nothing(y: Array, threads: int) -> list[Launch]:
    """A clip leaves nothing to be done."""
    return []
