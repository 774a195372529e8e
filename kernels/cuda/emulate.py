"""Runs launches on the CPU: the PTX that every GPU gets, over NumPy arrays."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..emulator import Emulator, Late
from ..step import Array
from . import overlap
from .compiler import ptx
from .launch import Launch


def emulate(launches: Iterable[Launch], race: bool = True, late: Sequence[Array] = ()) -> None:
    """Execute one after the other; race: also look for races in shared memory (slower).

    late: memory that the kernel before each may still use, see overlap.py: touching it before
    waiting is a fault. EmulatorError names the kernel, PTX line, block, thread and address of one.
    """
    def given(argument: Any) -> Any:
        if isinstance(argument, np.ndarray) and any(np.may_share_memory(argument, memory)
                                                    for memory in late):
            return Late(argument)
        return argument
    emulator = Emulator(race=race)
    for launch in launches:
        kernel = launch.kernel
        emulator.launch(overlap.hopper(ptx(kernel)), kernel.name, launch.grid, kernel.threads,
                        [given(argument) for argument in launch.args], kernel.shared_bytes,
                        (1, launch.cluster, 1))
