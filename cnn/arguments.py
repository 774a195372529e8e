"""Checking the arguments of layers: each function reads one by its name and gives its plain form,
or raises ModelError, a sentence with the layer, the argument and the value received."""
from __future__ import annotations

from typing import Any

import numpy as np

from kernels.ops import Padding, Pair, Shape

from .errors import ModelError

LARGEST = (1 << 31) - 1     # kernels count in 32 bits


def refused(layer: object, argument: str, why: str) -> ModelError:
    """The error for an argument that does not fit."""
    return ModelError(f"{type(layer).__name__}: {argument}={getattr(layer, argument)!r} {why}")


def is_whole(value: Any, least: int) -> bool:
    """Whether it is an int, Python's or NumPy's, from `least` to LARGEST."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(least <= value <= LARGEST)


def whole(layer: object, argument: str, least: int = 1) -> int:
    value = getattr(layer, argument)
    if not is_whole(value, least):
        raise refused(layer, argument, f"must be a whole number from {least} to {LARGEST}")
    return int(value)


def flag(layer: object, argument: str) -> bool:
    value = getattr(layer, argument)
    if not isinstance(value, bool):
        raise refused(layer, argument, "must be True or False")
    return value


def number(layer: object, argument: str, most: float, least: float = 0) -> float:
    """A float from `least` to `most`."""
    value = getattr(layer, argument)
    real = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not real or not least <= value <= most:
        raise refused(layer, argument, f"must be a number from {least} to {most}")
    return float(value)


def pair(layer: object, argument: str) -> Pair:
    """(height, width), also from one number for both."""
    height, width = _sizes(layer, argument, 1, (2,), "one number or (height, width)")
    return height, width


def padding(layer: object) -> Padding:
    """(top, left, bottom, right), also from one number or (height, width)."""
    sizes = _sizes(layer, "padding", 0, (2, 4),
                   "one number, (height, width) or (top, left, bottom, right)")
    top, left, bottom, right = sizes if len(sizes) == 4 else sizes * 2
    return top, left, bottom, right


def sides(layer: Any) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), also from one number."""
    value = layer.padding
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 4
    if len(sizes) != 4 or not all(is_whole(size, 0) for size in sizes):
        raise refused(layer, "padding", f"must be one number or (left, right, top, bottom), of "
                                        f"whole numbers from 0 to {LARGEST}")
    left, right, top, bottom = (int(size) for size in sizes)
    return left, right, top, bottom


def _sizes(layer: object, argument: str, least: int, lengths: tuple[int, ...],
           what: str) -> tuple[int, ...]:
    value = getattr(layer, argument)
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sizes) not in lengths or not all(is_whole(size, least) for size in sizes):
        raise refused(layer, argument,
                      f"must be {what}, of whole numbers from {least} to {LARGEST}")
    return tuple(int(size) for size in sizes)


def shape(value: Any, what: str) -> Shape:
    """A shape, None in it being any size."""
    if not isinstance(value, (list, tuple)) or not value or not all(
            size is None or is_whole(size, 1) for size in value):
        raise ModelError(f"{what}={value!r} must be a shape such as (None, 32, 32, 3), of whole "
                         f"numbers from 1 to {LARGEST} and None for any size")
    return tuple(None if size is None else int(size) for size in value)
