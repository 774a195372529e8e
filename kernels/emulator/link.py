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

END = Instruction("ret", (), (), "the end of the code", 0)


def link(kernel: Kernel, functions: dict[str, Function]) -> None:
    """Functions that the text does not define stay unlinked: calling one is then an error."""
    kernel.instructions.append(END)
    wanted = _called(kernel)
    while wanted:
        name = wanted.pop()
        function = functions.get(name)
        if function and name not in kernel.linked and not _recurses(name, functions):
            _append(kernel, name, function)
            wanted |= _called(function.body)
    for index, instruction in enumerate(kernel.instructions):
        if instruction.opcode == "call":
            instruction.targets = (index + 1,)  # where to return to


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


def _append(kernel: Kernel, name: str, function: Function) -> None:
    """Add a function, its register rows and branch targets moved behind those that there are."""
    body, rows, entry = function.body, dict(kernel.registers), len(kernel.instructions)
    for width, count in body.registers.items():
        kernel.registers[width] = rows.get(width, 0) + count
    return_to = Register(64, kernel.registers[64])
    kernel.registers[64] += 1
    kernel.linked[name] = Linked(function, entry, return_to)
    kernel.variables += body.variables
    for i in [*body.instructions, END]:
        predicate = _move(i.predicate, rows) if i.predicate else None
        moved = replace(
            i,
            operands=tuple(_move(o, rows) for o in i.operands),
            predicate=predicate if isinstance(predicate, Register) else None,
            targets=tuple(entry + t for t in i.targets),
        )
        if moved.opcode == "ret":
            moved.operands = (return_to,)
        kernel.instructions.append(moved)


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
