"""The disk cache of PTX and cubins, and cubins that were shipped instead of a compiler.

A file is named after its kernel and everything that decides its contents.
"""
from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..cache import cache_root, read, warn_unwritable, write
from .assembler import find_tool


@cache
def compiler_hash() -> str:
    """Of the versions of all that turns Python into machine code here."""
    found = [f"ptxas {find_tool('ptxas')}"]
    for package in ("numba", "numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvcc", "nvidia-nvjitlink"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} none")
    return hashlib.sha256(", ".join(found).encode()).hexdigest()[:8]


def folder() -> Path:
    """Where this installation keeps what it compiled."""
    return cache_root() / f"cuda-{compiler_hash()}"


def get(name: str) -> bytes | None:
    """The contents of a file of $CNN_CUBINS or of the cache; None where it is missing or torn."""
    shipped = os.environ.get("CNN_CUBINS")
    places = [Path(shipped)] if shipped else []
    found = (read(place / name) for place in [*places, folder()])
    return next((contents for contents in found if contents is not None), None)


def put(name: str, contents: bytes) -> None:
    """Keep a file in the cache; warns where the cache can not be written."""
    try:
        write(folder() / name, contents)
    except OSError as error:
        warn_unwritable(folder(), error.strerror)
