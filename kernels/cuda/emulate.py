"""Runs launches on the CPU: the PTX that every GPU gets, over NumPy arrays."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..axes import flat_pixels
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
        if not isinstance(argument, np.ndarray):
            return argument
        memory, _ = flat_pixels(argument)
        return Late(memory) if any(np.may_share_memory(memory, other) for other in late) else memory
    emulator = Emulator(race=race)
    for launch in launches:
        kernel = launch.kernel
        emulator.launch(overlap.hopper(ptx(kernel)), kernel.name, launch.grid, kernel.threads,
                        [given(argument) for argument in launch.args], kernel.shared_bytes,
                        (1, launch.cluster, 1))
