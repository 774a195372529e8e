"""How a fused activation runs: as a clip inside the kernel where it is one, else as one elementwise
sweep over the output while it is still in cache."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...ops import Clip, Relu, Unary
from ...step import Array
from ..launch import Launch

Finish = Callable[[Array, int], list[Launch]]


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


def is_clip(activation: Unary | None) -> bool:
    """Whether the kernel computes all of it, and no sweep follows."""
    return epilogue(activation).finish is nothing


def nothing(y: Array, threads: int) -> list[Launch]:
    """A clip leaves nothing to be done."""
    return []
