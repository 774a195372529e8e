"""Arrays whose content counts as never written."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from .dependent import Late
from .errors import ParseError
from .ptxtypes import Array


class Empty:
    """An array argument whose bytes count as never written: reading one is UninitialisedRead.

    A byte counts as written once a launch has stored to it through any `Empty` of the same memory;
    that is remembered as long as the memory lives, so that several launches can share a workspace,
    each given its own views of it.
    """

    def __init__(self, array: Array) -> None:
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise ParseError("Empty takes a C-contiguous NumPy array.")
        self.array = array
        root = owner_of(array)
        start = array.ctypes.data - root.ctypes.data
        self.written = _record(root)[start : start + array.nbytes]


def owner_of(array: Array) -> Array:
    """The array that owns the memory of a view. `as_strided` puts an object of NumPy's own between
    the two."""
    base: Any = array
    while (base := getattr(base, "base", None)) is not None:
        array = base if isinstance(base, np.ndarray) else array
    return array


_RECORDS: dict[int, Array] = {}  # id of the owner -> one bool per byte; dropped with the owner


def _record(root: Array) -> Array:
    if id(root) not in _RECORDS:
        low, high = np.lib.array_utils.byte_bounds(root)
        _RECORDS[id(root)] = np.zeros(high - low, bool)
        weakref.finalize(root, _RECORDS.pop, id(root), None)
    return _RECORDS[id(root)]


def unwrap(argument: Any) -> Any:
    return argument.array if isinstance(argument, Empty | Late) else argument
