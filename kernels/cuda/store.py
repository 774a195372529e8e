"""The disk cache of PTX and cubins, and cubins that were shipped instead of a compiler.

A file is named after its kernel and everything that decides its contents. It is written beside
its place and renamed, so that processes may compile at once, and ends with a checksum, so that a
torn file counts as none.
"""
from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..cache import cache_root
from .assembler import find_tool

TRAILER = b"\n// sha256 "       # a comment to PTX, and beyond the end to a reader of cubins


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
        warnings.warn(f"the kernel cache {folder()} can not be written ({error.strerror}): "
                      f"kernels are compiled anew in each process. Set CNN_CACHE_DIR to a folder "
                      f"that can.", RuntimeWarning, stacklevel=2)


def read(path: Path) -> bytes | None:
    """A file's contents without their checksum; None where it is missing or torn."""
    try:
        contents, found, digest = path.read_bytes().rpartition(TRAILER)
    except OSError:
        return None
    whole = found and digest.decode(errors="replace") == hashlib.sha256(contents).hexdigest()
    return contents if whole else None


def write(path: Path, contents: bytes) -> None:
    """The file appears at once and whole, with its checksum. OSError where it can not be."""
    replace(path, contents + TRAILER + hashlib.sha256(contents).hexdigest().encode())


def replace(path: Path, contents: bytes) -> None:
    """The file is there with these contents or as it was before. OSError where it can not be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
