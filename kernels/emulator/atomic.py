"""atom and red (PTX ISA 9.7.13.9, 9.7.13.10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .geometry import Selection
from .instruction import Instruction, Sink
from .operation import NotCovered, Operation, opcode
from .ptxtypes import Array, bits, dtype_of
from .space import Space

if TYPE_CHECKING:
    from .machine import Machine


def _increment(old: Any, limit: Any) -> Any:
    return old.dtype.type(0) if old >= limit else old + old.dtype.type(1)


def _decrement(old: Any, limit: Any) -> Any:
    return limit if old == 0 or old > limit else old - old.dtype.type(1)


def _exchange(old: Any, new: Any) -> Any:
    return new


COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": _exchange,
    "inc": _increment,
    "dec": _decrement,
}


@opcode("atom", "red")
def atom(machine: Machine, instruction: Instruction) -> Operation:
    """One thread after the other, in the order of threads (with a seed: in random order)."""
    reduces, kind = instruction.opcode == "red", instruction.type
    name = next((m for m in instruction.modifiers if m in COMBINE or m == "cas"), "")
    if instruction.has("async") or not name or kind.startswith("bf16") or kind.endswith("x2"):
        raise NotCovered("is an atomic operation that the emulator does not know")
    operands = (Sink(), *instruction.operands) if reduces else instruction.operands
    target, place, *values = operands
    size, dtype = bits(kind) // 8, dtype_of(kind)
    destination = machine.registers.destination(target, kind).view(dtype)
    sources = [machine.registers.spread(v, kind) for v in values]
    combine: Any = COMBINE.get(name)
    at_once = reduces and isinstance(combine, np.ufunc)
    memory, shared, random = machine.memory, machine.shared, machine.random

    def one(old: Any, thread: int) -> Any:
        """What one thread leaves in memory."""
        if combine is not None:
            return combine(old, sources[0][thread])
        return sources[1][thread] if old == sources[0][thread] else old  # cas

    def access(space: Space, address: Array, at: Selection) -> None:
        threads = machine.geometry.select(at)
        offset = memory.locate(space, address, size, at, store=True)
        if space in memory.shared_spaces:
            shared.update(offset, size, threads >> 5)
        elif space.written is not None:
            memory.check_written(space, offset, size, at)
        words, index = space.words[size].view(dtype), offset // size
        if at_once:
            combine.at(words, index, sources[0][threads])
            return
        order = range(threads.size) if random is None else random.permutation(threads.size)
        for i in order:
            old = words[index[i]]
            destination[threads[i]] = old
            words[index[i]] = one(old, threads[i])

    return Operation(memory.accessor(instruction, place, access))
