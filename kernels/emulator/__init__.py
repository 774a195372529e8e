"""Executes compiled PTX on the CPU, so that CUDA kernels are tested where there is no GPU.

    from kernels.emulator import Emulator

    Emulator().launch(ptx_text, "axpy", grid=8, block=128, args=[1000, 1.5, x, y])

It answers whether a kernel is right, its synchronisation included; it says nothing about speed.
"""

from .empty import Empty
from .emulator import Emulator, Stats
from .errors import (
    AsyncNotWaited,
    Deadlock,
    Divergence,
    EmulatorError,
    Misaligned,
    OutOfBounds,
    ParseError,
    Race,
    UninitialisedRead,
    UnknownInstruction,
)
from .tensormap import TensorMap

__all__ = [
    "AsyncNotWaited",
    "Deadlock",
    "Divergence",
    "Empty",
    "Emulator",
    "EmulatorError",
    "Misaligned",
    "OutOfBounds",
    "ParseError",
    "Race",
    "Stats",
    "TensorMap",
    "UninitialisedRead",
    "UnknownInstruction",
]
