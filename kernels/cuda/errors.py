"""What can be wrong with a machine, not with an argument: no driver, no compiler, too old a GPU."""
from __future__ import annotations


class CudaError(RuntimeError):
    """The GPU path can not run here; the message says why and what to do."""


class NoRoom(CudaError):
    """A GPU's memory ran out."""


class CompilerMissing(CudaError):
    """A kernel must be compiled and no CUDA compiler is installed."""
