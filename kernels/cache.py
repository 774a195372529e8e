"""The folder in which compiled kernels are kept between processes, and its files.

A file is written beside its place and renamed, so that processes may compile at once, and ends
with a checksum, so that a torn file counts as none.
"""
from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

TRAILER = b"\n// sha256 "       # a comment to PTX, and beyond the end to a reader of machine code


def cache_root() -> Path:
    """Folder of all compiled kernels: $CNN_CACHE_DIR, else numba-cnn in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba-cnn"
    return Path(os.environ.get("CNN_CACHE_DIR") or default)


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


def warn_unwritable(folder: Path, reason: object) -> None:
    """Say that what is compiled can not be kept in this folder."""
    warnings.warn(f"the kernel cache {folder} can not be written ({reason}): kernels are compiled "
                  f"anew in each process. Set CNN_CACHE_DIR to a folder that can.",
                  RuntimeWarning, stacklevel=3)
