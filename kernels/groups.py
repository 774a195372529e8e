"""Narrow groups of a convolution as fewer, wider ones, on any device.

A vector, or a tile, of outputs takes as many products whether one narrow group fills a part of it
or several fill it together; and one wide group reads its inputs in longer runs.
"""
from __future__ import annotations

import numpy as np

from .step import Array


def merged(out_channels: int, groups: int, width: int) -> int:
    """How many groups go together, so that they have `width` outputs at most."""
    most = max(1, width // (out_channels // groups))
    return next(count for count in range(most, 0, -1) if groups % count == 0)


def merge(weight: Array, groups: int, together: int) -> Array:
    """(O, KH, KW, C / groups) -> (O, KH, KW, C / groups * together), with zeros for what belongs to
    another of the groups that go together. So an infinite input makes NaN of the outputs of all."""
    per_group, kh, kw, depth = len(weight) // groups, *weight.shape[1:]
    narrow = weight.reshape(-1, together, per_group, kh, kw, depth)
    wide = np.zeros((*narrow.shape[:5], together, depth), weight.dtype)
    for i in range(together):
        wide[:, i, :, :, :, i] = narrow[:, i]
    return wide.reshape(len(weight), kh, kw, -1)
