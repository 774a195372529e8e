"""Executes compiled PTX on the CPU, so that CUDA kernels are tested where there is no GPU.

    from kernels.emulator import Emulator

    Emulator().launch(ptx_text, "axpy", grid=8, block=128, args=[1000, 1.5, x, y])

It answers whether a kernel is right, its synchronisation included; it says nothing about speed.

Where things are: emulator.py launches; parse.py, body.py, declarations.py and link.py turn text
into instruction.py's kernels; machine.py holds the state of a launch (geometry.py, layout.py,
arguments.py, registers.py, memory.py, shared.py, distributed.py, race.py) and decodes each
instruction once, by the table of operation.py; scheduler.py runs it. The other modules are the
instructions, by family.
"""

from .dependent import Late
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
    TooEarly,
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
    "Late",
    "Misaligned",
    "OutOfBounds",
    "ParseError",
    "Race",
    "Stats",
    "TensorMap",
    "TooEarly",
    "UninitialisedRead",
    "UnknownInstruction",
]
