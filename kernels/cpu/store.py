"""Where the machine code of kernels is kept between processes, and what makes it stale.

Numba's cache does not notice an edit in a file that a kernel calls into, so the folder's name
carries a hash of all CPU kernel sources: any edit compiles afresh. So does another CPU, another
Numba, or another place of the sources.
"""
from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..cache import cache_root, read, warn_unwritable, write

UNRELATED = ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER")    # to machine code


@cache
def folder() -> Path:
    """Of what was compiled of these sources for this CPU."""
    import llvmlite
    import llvmlite.binding as llvm

    from .sizes import LANES, REGISTERS
    sources = Path(__file__).resolve().parent
    settings = sorted(f"{name}={value}" for name, value in os.environ.items()
                      if name.startswith("NUMBA_") and name not in UNRELATED)
    text = (f"{REGISTERS} registers of {LANES} lanes, llvmlite {llvmlite.__version__}, {sources}, "
            f"{settings}, {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}")
    digest = hashlib.sha256(text.encode() + _numba_version())
    for path in sorted(sources.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return cache_root() / f"cpu-{digest.hexdigest()[:16]}"


def _numba_version() -> bytes:
    """Numba is not imported to ask: that takes longer than all of a start without it."""
    found = find_spec("numba")
    folders = found.submodule_search_locations if found else None
    return b"".join((Path(place) / "_version.py").read_bytes() for place in folders or ())


def is_cold() -> bool:
    """Whether no kernel has been compiled for these sources on this machine yet."""
    return not any(folder().glob("*.o"))


def get(name: str) -> bytes | None:
    """A file's contents; None where it is missing or torn."""
    return read(folder() / name)


def put(name: str, contents: bytes) -> None:
    """Keep a file; said once where that can not be."""
    if writable():
        try:
            write(folder() / name, contents)
        except OSError as error:
            warn_unwritable(folder(), error.strerror or error)


@cache
def writable() -> bool:
    """Whether files can be kept; said once where they can not, for each start then compiles."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        if os.access(folder(), os.W_OK | os.X_OK):
            return True
        reason = "no permission"
    except OSError as error:
        reason = error.strerror or str(error)
    warn_unwritable(folder(), reason)
    return False
