"""call and ret (PTX ISA 9.7.12.5, 9.7.12.6): functions defined in the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .geometry import Selection
from .instruction import Instruction, Linked, Operand, Symbol, Variable, Vector
from .operation import Kind, NotCovered, Operation, Run, nothing, opcode
from .ptxtypes import Array

if TYPE_CHECKING:
    from .machine import Machine


def _callee(machine: Machine, instruction: Instruction) -> tuple[Linked, Operand, Operand]:
    """The function, and the operands of the call for its results and parameters."""
    results, name, parameters = instruction.operands
    linked = machine.kernel.linked.get(name.name) if isinstance(name, Symbol) else None
    if linked is None:
        raise NotCovered("calls a function that recurses or whose code is not in the PTX text")
    return linked, results, parameters


@opcode("call")
def call(machine: Machine, instruction: Instruction) -> Operation:
    """Hand the parameters over and go to the function."""
    linked, _, parameters = _callee(machine, instruction)
    hand_over = _copies(machine, parameters, linked.function.parameters, to_function=True)
    return_to = machine.registers.row(linked.return_to)
    back = instruction.targets[0]

    def run(at: Selection) -> Array:
        hand_over(at)
        threads = machine.geometry.select(at)
        return_to[threads] = back
        return np.full(threads.size, linked.entry)

    return Operation(run, Kind.JUMP)


@opcode("call-done")
def call_done(machine: Machine, instruction: Instruction) -> Operation:
    """Where the function returns to: take the results over."""
    linked, results, _ = _callee(machine, instruction)
    return Operation(_copies(machine, results, linked.function.results, to_function=False))


@opcode("ret", "exit")
def ret(machine: Machine, instruction: Instruction) -> Operation:
    """The end of a function goes back to its caller; that of a kernel ends the threads."""
    if not instruction.operands:
        return Operation(nothing, Kind.EXIT)
    return_to = machine.registers.row(instruction.operands[0])
    return Operation(lambda at: return_to[machine.geometry.select(at)], Kind.JUMP)


def _copies(
    machine: Machine, operands: Operand, variables: Sequence[Variable], to_function: bool
) -> Run:
    """Copies between the operands of a call and the variables of the function, in local memory."""
    space, symbols = machine.local_space, machine.layout.symbols
    memory = space.bytes.reshape(machine.geometry.threads, -1)
    names = operands.items if isinstance(operands, Vector) else ()
    moves: list[tuple[slice, slice]] = []
    for operand, variable in zip(names, variables, strict=True):
        if not isinstance(operand, Symbol) or operand.name not in symbols:
            raise NotCovered("passes something to a function that is no parameter variable")
        ends = [symbols[name] - space.base for name in (operand.name, variable.name)]
        outside, inside = (slice(start, start + variable.size) for start in ends)
        moves.append((inside, outside) if to_function else (outside, inside))

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        for destination, source in moves:
            memory[threads, destination] = memory[threads, source]

    return run
