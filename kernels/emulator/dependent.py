"""Dependent launches: memory that the kernel before may still use (PTX ISA, griddepcontrol).

A launch that may begin early has each thread wait before it touches such memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import TooEarly
from .geometry import Selection
from .instruction import Instruction
from .operation import NotCovered, Operation, nothing, opcode
from .ptxtypes import Array
from .space import Space

if TYPE_CHECKING:
    from .machine import Machine


class Late:
    """An array argument that must not be touched before `griddepcontrol.wait`: else TooEarly."""

    def __init__(self, array: Array) -> None:
        self.array = array


class Dependence:
    """Which threads of a wave have waited."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.waited = np.zeros(machine.geometry.threads, bool)

    def reset(self) -> None:
        self.waited[:] = False

    def wait(self, at: Selection) -> None:
        self.waited[self.machine.geometry.select(at)] = True

    def check(self, space: Space, offset: Array, at: Selection) -> None:
        """An access to global memory of which some is late."""
        assert space.late is not None
        early = space.late[offset] & ~self.waited[self.machine.geometry.select(at)]
        if early.any():
            i = int(np.argmax(early))
            first = int(offset[i])
            self.machine.fault(
                TooEarly,
                f"touches {space.name} address {first + space.base:#x}, {space.nearest(first)}, "
                "before griddepcontrol.wait, when the kernel before may not have ended",
                self.machine.geometry.select(at)[i],
                first + space.base,
            )


@opcode("griddepcontrol")
def griddepcontrol(machine: Machine, instruction: Instruction) -> Operation:
    """griddepcontrol.wait, .launch_dependents: the second has no effect on this kernel."""
    if instruction.has("wait"):
        return Operation(machine.dependence.wait)
    if instruction.has("launch_dependents"):
        return Operation(nothing)
    raise NotCovered("is neither griddepcontrol.wait nor .launch_dependents")
