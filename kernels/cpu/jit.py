"""`kernel` for what the host launches, and `njit` for what kernels call.

References are not counted, for kernels own no memory. Nor may they raise: nobody would hear of it.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from . import store
from .target import Dispatcher


def kernel(function: Callable) -> Any:
    """A function of arrays, numbers and tuples of whole numbers that returns nothing. Its machine
    code is kept by launch.py, by which the host calls it."""
    return _compiled(function)


def njit(keep: bool = True, **options: Any) -> Callable[[Callable], Any]:
    """`numba.njit(**options)`. keep: in Numba's own cache under store.folder(), which never finds
    again what closes over another function."""
    def decorate(function: Callable) -> Any:
        dispatcher = _compiled(function, **options)
        if keep and store.writable():
            users = numba.config.CACHE_DIR      # other users of numba keep their own folder
            numba.config.CACHE_DIR = str(store.folder())
            try:
                dispatcher.enable_caching()
            finally:
                numba.config.CACHE_DIR = users
        return dispatcher
    return decorate


def _compiled(function: Callable, **options: Any) -> Any:
    return Dispatcher(function, targetoptions={
        "nopython": True, "nogil": True, "error_model": "numpy", "_nrt": False, **options})
