"""ld and st (PTX ISA 9.7.9.8, 9.7.9.11)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .geometry import Selection
from .instruction import Address, Instruction, Operand, Symbol, Vector
from .operation import NotCovered, Operation, elementwise, nothing, opcode, sequence
from .ptxtypes import UINT, Array, bits, dtype_of
from .space import Space
from .tensormap import TensorMap

if TYPE_CHECKING:
    from .machine import Machine


def _items(instruction: Instruction, operand: Operand) -> tuple[Operand, ...]:
    """The registers of a load or store: one, or a vector as long as .v2, .v4 or .v8 says."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != instruction.vector_length():
        raise NotCovered(f"moves {len(items)} registers, which its modifiers do not say")
    return items


@opcode("ld", "ldu")
def ld(machine: Machine, instruction: Instruction) -> Operation:
    """ld{.space}{.v2,.v4,.v8}.type; cache hints have no effect."""
    kind, length = instruction.type, instruction.vector_length()
    element, dtype = bits(kind) // 8, dtype_of(kind)
    registers, memory = machine.registers, machine.memory
    destinations = [
        registers.destination(o, kind) for o in _items(instruction, instruction.operands[0])
    ]
    source = instruction.operands[1]
    name = _parameter(instruction, source)
    if name in machine.layout.parameters and isinstance(source, Address):
        return _load_parameter(machine, name, source.offset, kind, destinations)

    def load(space: Space, address: Array, at: Selection) -> None:
        offset = memory.read(space, address, element * length, at)
        value = space.rows(element, length)[offset // (element * length)].view(dtype)
        selection = slice(None) if at is None else at
        for i, destination in enumerate(destinations):
            destination[selection] = value[:, i] if length > 1 else value

    return Operation(memory.accessor(instruction, source, load))


def _parameter(instruction: Instruction, place: Operand) -> str:
    """The name of the parameter that is loaded or stored, if it is one."""
    if any(m.startswith("param") for m in instruction.modifiers) and isinstance(place, Address):
        return place.base.name if isinstance(place.base, Symbol) else ""
    return ""


def _load_parameter(
    machine: Machine, name: str, offset: int, kind: str, destinations: list[Array]
) -> Operation:
    """A kernel parameter is the same for all threads: no memory is needed."""
    raw = machine.layout.parameters[name]
    if isinstance(raw, TensorMap):
        raise NotCovered("looks inside a tensor map, which is opaque")
    dtype = dtype_of(kind)
    values = np.frombuffer(raw, dtype, len(destinations), offset)
    copies = [
        elementwise(lambda v: v, destination, value)
        for destination, value in zip(destinations, values, strict=True)
    ]
    return Operation(sequence(*copies))


@opcode("st")
def st(machine: Machine, instruction: Instruction) -> Operation:
    """st{.space}{.v2,.v4,.v8}.type"""
    kind, length = instruction.type, instruction.vector_length()
    element = bits(kind) // 8
    memory = machine.memory
    if instruction.has("async", "bulk"):
        raise NotCovered("stores asynchronously, which the emulator does not know")
    if _parameter(instruction, instruction.operands[0]) in machine.layout.parameters:
        raise NotCovered("stores to a parameter of the kernel")
    raw = f"u{8 * element}"
    sources = [
        machine.registers.value(o, raw) for o in _items(instruction, instruction.operands[1])
    ]

    def store(space: Space, address: Array, at: Selection) -> None:
        offset = memory.write(space, address, element * length, at)
        values = [s[at] if at is not None and isinstance(s, np.ndarray) else s for s in sources]
        if length == 1:
            space.words[element][offset // element] = values[0]
            return
        rows = np.empty((offset.size, length), UINT[element])
        for i, value in enumerate(values):
            rows[:, i] = value
        space.rows(element, length)[offset // (element * length)] = rows

    return Operation(memory.accessor(instruction, instruction.operands[0], store))


@opcode("prefetch", "prefetchu", "discard", "applypriority", "createpolicy")
def cache_hint(machine: Machine, instruction: Instruction) -> Operation:
    """There are no caches; a policy is any number."""
    return Operation(nothing)
