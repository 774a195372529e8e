"""How a fused activation runs: as a clip inside the micro-kernel where it is one, else as one
elementwise sweep over the output while it is still in cache."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ops import Clip, Relu, Unary
from ..step import Array

Finish = Callable[[Array, int], None]      # (flat output, threads), in place


def epilogue(activation: Unary | None) -> tuple[np.float32, np.float32, Finish | None]:
    """(low, high, finish): bounds of the clip, and the sweep to run after it, if any."""
    low, high, finish = -np.inf, np.inf, None
    if isinstance(activation, Relu):
        low = 0.0
    elif isinstance(activation, Clip):
        low, high = activation.low, activation.high
    elif activation is not None:
        from .elementwise import in_place
        finish = in_place(activation)
    return np.float32(low), np.float32(high), finish
