"""Puts the functions that a kernel calls behind its own instructions.

Every function has its registers and local variables once: PTX from a compiler does not recurse,
and a thread is in one place of one call chain at a time.
"""

from __future__ import annotations

from dataclasses import replace

from .instruction import (
    Address,
    Function,
    Instruction,
    Kernel,
    Linked,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    Vector,
)


def link(kernel: Kernel, functions: dict[str, Function]) -> None:
    """Functions that the text does not define stay unlinked: calling one is then an error."""
    _append(kernel, kernel.instructions, {}, 0)
    wanted = _called(kernel)
    while wanted:
        name = wanted.pop()
        function = functions.get(name)
        if function is None or name in kernel.linked or _recurses(name, functions):
            continue
        body, rows, entry = function.body, dict(kernel.registers), len(kernel.instructions)
        for width, count in body.registers.items():
            kernel.registers[width] = rows[width] + count
        return_to = Register(64, kernel.registers[64])
        kernel.registers[64] += 1
        kernel.linked[name] = Linked(function, entry, return_to)
        kernel.variables += body.variables
        _append(kernel, body.instructions, rows, entry, return_to)
        wanted |= _called(body)


def _called(kernel: Kernel) -> set[str]:
    return {
        i.operands[1].name
        for i in kernel.instructions
        if i.opcode == "call" and isinstance(i.operands[1], Symbol)
    }


def _recurses(name: str, functions: dict[str, Function]) -> bool:
    """Whether a function can come to call itself."""
    reached, wanted = set(), _called(functions[name].body)
    while wanted:
        callee = wanted.pop()
        if callee in functions and callee not in reached:
            reached.add(callee)
            wanted |= _called(functions[callee].body)
    return name in reached


def _append(
    kernel: Kernel,
    instructions: list[Instruction],
    rows: dict[int, int],
    base: int,
    return_to: Register | None = None,
) -> None:
    """Add a body and its end; rows: what to add to register rows, base: to branch targets."""
    end = Instruction("ret", (), (), "the end of the code", 0)
    moved = []
    for index, i in enumerate([*instructions, end]):
        predicate = _move(i.predicate, rows) if i.predicate else None
        i = replace(
            i,
            operands=tuple(_move(o, rows) for o in i.operands),
            predicate=predicate if isinstance(predicate, Register) else None,
            targets=tuple(base + t for t in i.targets),
        )
        if i.opcode == "call":
            i.targets = (base + index + 1,)  # where to return to
        elif i.opcode == "ret" and return_to is not None:
            i.operands = (return_to,)
        moved.append(i)
    kernel.instructions[base:] = moved


def _move(operand: Operand, rows: dict[int, int]) -> Operand:
    """The operand with its registers in other rows."""
    if isinstance(operand, Register):
        return Register(operand.width, operand.row + rows.get(operand.width, 0))
    if isinstance(operand, Vector):
        return Vector(tuple(_move(o, rows) for o in operand.items))
    if isinstance(operand, Address):
        coordinates = tuple(_move(o, rows) for o in operand.coordinates)
        return Address(_move(operand.base, rows), operand.offset, coordinates)
    if isinstance(operand, Pair):
        return Pair(_move(operand.first, rows), _move(operand.second, rows))
    if isinstance(operand, Negated):
        return Negated(_move(operand.operand, rows))
    return operand
