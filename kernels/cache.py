"""The folder in which compiled kernels are kept between processes."""
from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Folder of all compiled kernels: $CNN_CACHE_DIR, else numba-cnn in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba-cnn"
    return Path(os.environ.get("CNN_CACHE_DIR") or default)
