"""`njit` with a disk cache of our own, and the vector width that kernels are compiled for.

Numba's cache does not notice an edit in a file that a kernel calls into, so the folder's name
carries a hash of all CPU kernel sources: any edit compiles afresh.
"""
from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba

from ..cache import cache_root


def _host_lanes() -> int:
    """float32 lanes of the widest vector registers: 16 (AVX-512), 8 (AVX) or 4."""
    asked = os.environ.get("CNN_SIMD_LANES")
    if asked is not None:
        if asked not in ("4", "8", "16"):
            raise ValueError(f"CNN_SIMD_LANES is {asked!r}; it must be 4, 8 or 16")
        return int(asked)
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


LANES = _host_lanes()


def _source_hash() -> str:
    # Numba compiles anew for sources at another place, so that each installation is cold at first.
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256(f"{LANES} lanes, numba {numba.__version__}, {folder}".encode())
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


CACHE_DIR = cache_root() / f"cpu-{_source_hash()}"


def is_cold() -> bool:
    """Whether no kernel has been compiled for these sources on this machine yet."""
    return not any(CACHE_DIR.rglob("*.nbc"))


def _writable() -> bool:
    """Whether the cache can be used; said once where it can not, for each start then compiles."""
    try:
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        if os.access(CACHE_DIR, os.W_OK | os.X_OK):
            return True
        reason = "no permission"
    except OSError as error:
        reason = error.strerror or str(error)
    warnings.warn(f"the kernel cache {CACHE_DIR} can not be written ({reason}): kernels are "
                  f"compiled anew in each process. Set CNN_CACHE_DIR to a folder that can.",
                  RuntimeWarning, stacklevel=2)
    return False


_CACHE = _writable()


def njit(**options: Any) -> Callable[[Callable], Any]:
    """`numba.njit(**options)`, always nogil, cached under CACHE_DIR."""
    def decorate(function: Callable) -> Any:
        dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
        if not _CACHE:
            return dispatcher
        users = numba.config.CACHE_DIR      # other users of numba keep their own folder
        numba.config.CACHE_DIR = str(CACHE_DIR)
        try:
            dispatcher.enable_caching()
        finally:
            numba.config.CACHE_DIR = users
        return dispatcher
    return decorate
