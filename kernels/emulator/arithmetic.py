"""Instructions that compute each thread's result from its own operands (PTX ISA 9.7.1 to 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import floating, integer
from .geometry import Selection
from .instruction import Instruction
from .operation import NotCovered, Operation, elementwise, opcode
from .ptxtypes import UINT, Array, bits, dtype_of, is_float, is_type

if TYPE_CHECKING:
    from .machine import Machine

_UNARY = (
    *("neg", "abs", "not", "cnot", "popc", "clz", "bfind", "brev"),
    *("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh"),
)
_SOURCES = {
    **dict.fromkeys(_UNARY, 1),
    **dict.fromkeys(("mad", "madc", "fma", "sad", "bfe", "prmt", "shf"), 3),
    **dict.fromkeys(("bfi", "lop3"), 4),
}  # how many operands there are; 2 of the others
EXTENDED = ("addc", "subc", "madc")
_PLAIN_INTEGER = {"u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64", "pred"}


@opcode(*integer.FUNCTIONS, *floating.FUNCTIONS, "mul", "mad", "shf", *EXTENDED)
def arithmetic(machine: Machine, instruction: Instruction) -> Operation:
    """The functions are in integer.py and floating.py; the last modifier says which."""
    opcode_name, kind = instruction.opcode, instruction.type
    if not is_type(kind):
        raise NotCovered(f"works on .{kind}, which the emulator does not know")
    if len(instruction.operands) != 1 + _SOURCES.get(opcode_name, 2):
        raise NotCovered(f"has {len(instruction.operands)} operands")
    if instruction.has("cc") or opcode_name in EXTENDED:
        return _extended(machine, instruction)
    if is_float(kind):
        f = floating.function(opcode_name, instruction.modifiers)
        result, sources = kind, [kind] * (len(instruction.operands) - 1)
    else:
        f, result, sources = _integer(instruction)
    registers = machine.registers
    destination = registers.destination(instruction.operands[0], result)
    values = [
        registers.value(operand, source)
        for operand, source in zip(instruction.operands[1:], sources, strict=True)
    ]
    return Operation(elementwise(f, destination, *values))


def _integer(instruction: Instruction) -> tuple[Callable[..., Any], str, list[str]]:
    """The function of an integer instruction, the type of its result, the types of its sources."""
    opcode_name, kind, modifiers = instruction.opcode, instruction.type, instruction.modifiers
    sources = [kind] * (len(instruction.operands) - 1)
    if kind not in _PLAIN_INTEGER:
        raise NotCovered(f"works on .{kind}, which the emulator does not know")
    if opcode_name in ("mul", "mad"):
        return _product(opcode_name, modifiers[0], kind, sources)
    if modifiers[:-1] == ("sat",) and opcode_name in ("add", "sub") and kind == "s32":
        saturating = {"add": integer.add_saturating, "sub": integer.subtract_saturating}
        return saturating[opcode_name], kind, sources
    if opcode_name == "shf":
        left, wrap = modifiers[0] == "l", modifiers[1] == "wrap"
        return integer.funnel_shift(left, wrap), kind, sources
    if modifiers[:-1] == ("shiftamt",) and opcode_name == "bfind":
        return integer.find_shift, "u32", sources
    if modifiers[:-1]:
        raise NotCovered(f"has the modifier .{modifiers[0]}, which the emulator does not know")
    if opcode_name in ("shl", "shr"):
        return integer.FUNCTIONS[opcode_name], kind, [kind, "u32"]
    if opcode_name in ("bfe", "bfi"):
        return integer.FUNCTIONS[opcode_name], kind, [*sources[:-2], "u32", "u32"]
    if opcode_name in ("popc", "clz", "bfind"):
        return integer.FUNCTIONS[opcode_name], "u32", sources
    if opcode_name == "not" and kind == "pred":
        return np.logical_not, kind, sources
    return integer.FUNCTIONS[opcode_name], kind, sources


def _product(
    opcode_name: str, half: str, kind: str, sources: list[str]
) -> tuple[Callable[..., Any], str, list[str]]:
    """mul and mad: .lo, .hi, or .wide, whose result is twice as wide."""
    result = kind
    multiply: Callable[..., Any] = np.multiply
    if half == "wide":
        result = kind[0] + str(2 * bits(kind))
        multiply = integer.multiply_wide(dtype_of(result))
    elif half == "hi":
        multiply = integer.multiply_high
    elif half != "lo":
        raise NotCovered(f"multiplies .{half}, which the emulator does not know")
    if opcode_name == "mul":
        return multiply, result, sources
    return lambda a, b, c: multiply(a, b) + c, result, [*sources[:2], result]


def _extended(machine: Machine, instruction: Instruction) -> Operation:
    """Extended precision: add.cc, addc, sub.cc, subc, mad.lo.cc, madc.hi (PTX ISA 9.7.2)."""
    name, kind, registers = instruction.opcode, instruction.type, machine.registers
    sources = [registers.value(o, kind) for o in instruction.operands[1:]]
    destination = registers.destination(instruction.operands[0], kind)
    carry_in, carry_out = name in EXTENDED, instruction.has("cc")
    subtracts, multiplies = name.startswith("sub"), name.startswith("mad")
    multiply = integer.multiply_high if instruction.has("hi") else np.multiply
    unsigned, carry = UINT[destination.dtype.itemsize], registers.carry

    def run(at: Selection) -> None:
        selection = slice(None) if at is None else at
        values = [s[selection] if isinstance(s, np.ndarray) else s for s in sources]
        if multiplies:
            values = [multiply(values[0], values[1]), values[2]]
        shape = destination[selection].shape
        a, b = (np.broadcast_to(v, shape).astype(unsigned) for v in values)
        c: Any = carry[selection].astype(unsigned) if carry_in else unsigned(0)
        if subtracts:
            total = a - b - c
            overflow: Array = (a < b) | ((a == b) & (c > 0))
        else:
            total = a + b + c
            overflow = (total < a) | ((total == a) & (c > 0) & (b > 0))
        destination[selection] = total.view(destination.dtype)
        if carry_out:
            carry[selection] = overflow

    return Operation(run)


@opcode("dp4a")
def dp4a(machine: Machine, instruction: Instruction) -> Operation:
    """d = c + the dot product of the four bytes of a and b."""
    kinds = [{"u32": "u", "s32": "i"}[m] for m in instruction.modifiers]
    registers = machine.registers
    a, b, c = (registers.spread(o, "u32") for o in instruction.operands[1:])
    destination = registers.destination(instruction.operands[0], "u32")

    def run(at: Selection) -> None:
        selection = slice(None) if at is None else at
        x, y = (
            np.ascontiguousarray(v[selection]).view(f"{kind}1").reshape(-1, 4).astype(np.int64)
            for v, kind in zip((a, b), kinds, strict=True)
        )
        destination[selection] = (c[selection] + (x * y).sum(1)).astype(np.uint32)

    return Operation(run)
