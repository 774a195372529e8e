"""mov, cvta, isspacep (PTX ISA 9.7.9.3, 9.7.9.18, 9.7.9.20)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .instruction import Instruction, Operand, Register, Sink, Special, Vector
from .memory import LOCAL_WINDOW, RANK_SHIFT, SHARED_WINDOW, window_of
from .operation import NotCovered, Operation, elementwise, opcode, sequence
from .ptxtypes import U64, UINT, bits

if TYPE_CHECKING:
    from .machine import Machine


@opcode("mov")
def mov(machine: Machine, instruction: Instruction) -> Operation:
    target, source = instruction.operands
    kind, registers = instruction.type, machine.registers
    if isinstance(target, Vector):
        return _unpack(machine, target, source, kind)
    if isinstance(source, Vector):
        return _pack(machine, target, source, kind)
    destination, value = registers.destination(target, kind), registers.value(source, kind)
    if kind == "pred":
        return Operation(elementwise(np.logical_or, destination, value, value))
    return Operation(elementwise(np.positive, destination, value))


def _part(whole: Operand, parts: Vector, kind: str) -> int:
    """Bits of each part of a register."""
    if not isinstance(whole, Register) or whole.width != bits(kind):
        raise NotCovered(f"takes {whole} as .{kind}")
    return bits(kind) // len(parts.items)


def _pack(machine: Machine, target: Operand, source: Vector, kind: str) -> Operation:
    """mov.b64 d, {low, high}"""
    size = _part(target, source, kind)
    row = machine.registers.row(target).view(UINT[size // 8]).reshape(-1, len(source.items))
    moves = [
        elementwise(np.positive, row[:, i], machine.registers.value(item, f"u{size}"))
        for i, item in enumerate(source.items)
    ]
    return Operation(sequence(*moves))


def _unpack(machine: Machine, target: Vector, source: Operand, kind: str) -> Operation:
    """mov.b64 {low, high}, d"""
    size = _part(source, target, kind)
    row = machine.registers.row(source).view(UINT[size // 8]).reshape(-1, len(target.items))
    moves = [
        elementwise(np.positive, machine.registers.destination(item, f"u{size}"), row[:, i])
        for i, item in enumerate(target.items)
        if not isinstance(item, Sink)
    ]
    return Operation(sequence(*moves))


@opcode("cvta")
def cvta(machine: Machine, instruction: Instruction) -> Operation:
    """A state space's addresses and generic ones differ by where its window starts."""
    spaces = ("global", "shared", "local", "const", "param")
    space = next(
        (m.split("::")[0] for m in instruction.modifiers if m.split("::")[0] in spaces), ""
    )
    if not space:
        raise NotCovered("is a cvta of an unknown state space")
    window = window_of(space)
    registers = machine.registers
    destination = registers.destination(instruction.operands[0], "u64")
    source = registers.value(instruction.operands[1], "u64")
    shift = np.subtract if instruction.has("to") else np.add
    return Operation(elementwise(shift, destination, source, window))


@opcode("isspacep")
def isspacep(machine: Machine, instruction: Instruction) -> Operation:
    """Whether a generic address is in the window of a state space."""
    space, registers = instruction.modifiers[0], machine.registers
    target, address = instruction.operands
    low, high = {
        "global": (0, SHARED_WINDOW),
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, 1 << 63),
    }[space.split("::")[0]]

    def inside(a: Any, rank: Any) -> Any:
        in_window = (a >= low) & (a < high)
        if space not in ("shared", "shared::cta"):
            return in_window
        block = a >> U64(RANK_SHIFT) & U64(0xFF)  # 0, or one more than the rank
        return in_window & ((block == 0) | (block == rank + U64(1)))

    destination = registers.destination(target, "pred")
    rank = registers.value(Special("%cluster_ctarank"), "u64")
    return Operation(elementwise(inside, destination, registers.value(address, "u64"), rank))
