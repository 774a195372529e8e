"""bra, brx.idx, trap, and what has no effect (PTX ISA 9.7.12, 9.7.19)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .geometry import Selection
from .instruction import Instruction
from .operation import Kind, Operation, nothing, opcode
from .ptxtypes import Array

if TYPE_CHECKING:
    from .machine import Machine


@opcode("bra")
def bra(machine: Machine, instruction: Instruction) -> Operation:
    return Operation(nothing, Kind.BRANCH)


@opcode("brx")
def brx(machine: Machine, instruction: Instruction) -> Operation:
    """brx.idx index, table"""
    index = machine.registers.spread(instruction.operands[0], "u32")
    targets = np.array(instruction.targets)

    def run(at: Selection) -> Array:
        threads = machine.geometry.select(at)
        chosen = index[threads]
        if (chosen >= targets.size).any():
            i = int(np.argmax(chosen >= targets.size))
            what = f"branches to entry {chosen[i]} of a table of {targets.size}"
            machine.fault(EmulatorError, what, int(threads[i]))
        result: Array = targets[chosen]
        return result

    return Operation(run, Kind.JUMP)


@opcode("trap", "brkpt")
def trap(machine: Machine, instruction: Instruction) -> Operation:
    def run(at: Selection) -> None:
        thread = int(machine.geometry.select(at)[0])
        machine.fault(EmulatorError, "executes a trap", thread)

    return Operation(run)


@opcode("setmaxnreg", "nanosleep", "pmevent")
def no_effect(machine: Machine, instruction: Instruction) -> Operation:
    """Register limits and delays change nothing here."""
    return Operation(nothing)
