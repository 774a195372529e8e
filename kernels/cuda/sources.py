"""Which source files decide a kernel's machine code: its own, and those that it imports."""
from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path


@cache
def source_hash(module: str) -> str:
    """Of a kernel's module and the files beside it that it imports, and those that these import.

    An edit in any of them compiles its kernels afresh, and no others.
    """
    file = sys.modules[module].__file__
    assert file is not None
    digest = hashlib.sha256()
    for path in sorted(_closure(Path(file))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _closure(start: Path) -> set[Path]:
    found, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return found


def _imported(path: Path) -> list[Path]:
    """Files beside this one that it imports by `from .name import` or `from . import name`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    beside = [path.parent / f"{name}.py" for name in names]
    return [file for file in beside if file.exists()]
