"""Where an array lies, by what it says of itself: no GPU library is imported to ask."""
from __future__ import annotations

from typing import Any

DLPACK_CUDA = 2         # DLDeviceType.kDLCUDA


def on_gpu(array: Any) -> bool:
    """Whether it lies on a GPU, by `__cuda_array_interface__` or by DLPack."""
    library = type(array).__module__
    if library in ("cupy", "numpy"):    # known, and to ask them takes time: an interface is built
        return library == "cupy"
    if hasattr(array, "__cuda_array_interface__"):
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and device()[0] == DLPACK_CUDA
