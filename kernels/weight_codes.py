"""Weights that were quantised to 8 bits, as the whole numbers that they were."""
from __future__ import annotations

import numpy as np

from .step import Array

MOST = 127              # of a weight's code, either way
NEAR = 2.0 ** -21       # what the roundings of a product with a scale leave of a weight
FEW = 16                # weights of an output that are tried before all are


def weight_scales(weight: Array) -> Array:
    """(O, ...) float32 -> (O,): of each output the greatest scale of which all its weights are
    multiples, -127 to 127 times; NaN where there is none.

    The greatest weight of an output is k times the scale for a k up to 127, so all are tried. That
    finds what a file was quantised to, whatever has been done since to whole outputs, as a batch
    norm that was folded into them.
    """
    rows = weight.reshape(len(weight), -1)
    greatest = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0)).astype(float)
    scales = np.where(greatest == 0, 1, np.nan)
    sample = np.where(np.isfinite(greatest)[:, None], rows[:, :FEW], 0).astype(float)
    for k in range(1, MOST + 1):
        tried = greatest / k
        open_yet = np.isnan(scales) & np.isfinite(greatest)
        likely = np.flatnonzero(open_yet & _are_multiples(sample, np.where(open_yet, tried, 1)))
        found = [row for row in likely if _are_multiples(rows[row:row + 1], tried[row:row + 1])]
        scales[found] = tried[found]
    return scales


def _are_multiples(rows: Array, scales: Array) -> Array:
    """Of each row whether all its numbers are multiples of its scale, as far as float32 can tell
    where none is above MOST times the scale."""
    wrong = rows / scales[:, None]
    wrong -= np.rint(wrong)
    return np.abs(wrong).max(axis=1, initial=0) <= NEAR * MOST


def codes(weight: Array, scales: Array) -> Array:
    """The multiples, in weight's shape: int8. In float64, where every scale has an inverse."""
    whole = np.empty(weight.shape, np.int8)
    for of_output, row, scale in zip(whole, weight, scales, strict=True):
        np.rint(row / scale, out=of_output, casting="unsafe")
    return whole
