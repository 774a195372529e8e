"""Emulator: PTX text and arrays in, results in the arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# The instruction families enter themselves in the table of opcodes.
from . import (  # noqa: F401
    arithmetic,
    asynccopy,
    atomic,
    barrier,
    call,
    compare,
    control,
    convert,
    distributed,
    loadstore,
    mbarrier,
    move,
    tensorcore,
    tma,
    warp,
    wgmma,
)
from .errors import ParseError
from .geometry import Geometry, three
from .machine import Machine
from .parse import parse

THREADS_PER_WAVE = 2048  # more would make NumPy calls longer than the caches are large


@dataclass(frozen=True)
class Stats:
    """steps: instructions executed, each for all threads that were at it. waves: of blocks."""

    steps: int
    warp_instructions: int
    waves: int


class Emulator:
    """Runs PTX kernels on the CPU and refuses what the PTX ISA does not allow.

    race: find accesses to shared memory that no barrier orders. Without it the emulator hides
    missing barriers, because warps at the same instruction run in lock-step.
    seed: None runs all warps that are at the same instruction at once. A number runs warps in a
    random order and lets asynchronous copies land at random times; much slower.
    max_steps: a launch that takes more is taken for an endless loop.
    """

    def __init__(
        self, race: bool = True, seed: int | None = None, max_steps: int = 50_000_000
    ) -> None:
        self.race, self.seed, self.max_steps = race, seed, max_steps

    def launch(
        self,
        ptx_text: str,
        entry: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        cluster: int | Sequence[int] = 1,
    ) -> Stats:
        """Run one kernel; an error leaves the arrays as they were.

        args: C-contiguous NumPy arrays for pointers, numbers for scalars, TensorMap for tensor
        maps, Empty(array) for an array that counts as never written, Late(array) for one that the
        kernel before may still use. If the kernel has more
        parameters than there are arguments, arrays are passed as Numba passes them. Arrays that
        share memory do so in the emulator too; a read-only array must not be stored to.
        shared_bytes: size of the dynamic shared memory.
        cluster: blocks of a cluster, as grid and block are given.
        Raises a subclass of EmulatorError.
        """
        if shared_bytes < 0:
            raise ParseError(f"shared_bytes cannot be negative: {shared_bytes}.")
        module = parse(ptx_text)
        if entry not in module.kernels:
            names = ", ".join(module.kernels) or "none"
            raise ParseError(f"The PTX text has no kernel {entry!r}; its kernels are: {names}.")
        kernel = module.kernels[entry]
        shapes = three("grid", grid), three("block", block), three("cluster", cluster)
        geometry = Geometry(*shapes, THREADS_PER_WAVE)
        if geometry.block_threads > kernel.most_threads:
            raise ParseError(
                f"Kernel {entry!r} is compiled for at most {kernel.most_threads} threads in a "
                f"block, not for {geometry.block_threads}.",
                kernel=entry,
            )
        if kernel.cluster not in (None, geometry.cluster):
            raise ParseError(
                f"Kernel {entry!r} is compiled for clusters of {kernel.cluster} blocks, not of "
                f"{geometry.cluster}.",
                kernel=entry,
            )
        with np.errstate(all="ignore"):
            machine = Machine(
                kernel,
                module.variables,
                geometry,
                args,
                shared_bytes,
                race=self.race,
                seed=self.seed,
                max_steps=self.max_steps,
            )
            waves = machine.run()
        scheduler = machine.scheduler
        return Stats(scheduler.steps, scheduler.warp_instructions, waves)
