"""Runs launches on the CPU: the PTX that every GPU gets, over NumPy arrays."""
from __future__ import annotations

from collections.abc import Iterable

from ..emulator import Emulator
from .compiler import ptx
from .launch import Launch


def emulate(launches: Iterable[Launch], race: bool = True) -> None:
    """Execute one after the other; race: also look for races in shared memory (slower).

    EmulatorError names the kernel, PTX line, block, thread and address of a fault.
    """
    emulator = Emulator(race=race)
    for launch in launches:
        kernel = launch.kernel
        emulator.launch(ptx(kernel), kernel.name, launch.grid, kernel.threads, launch.args,
                        kernel.shared_bytes)
