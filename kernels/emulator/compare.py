"""setp, selp, slct, testp (PTX ISA 9.7.6, 9.7.3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .instruction import Instruction, Pair
from .operation import NotCovered, Operation, elementwise, opcode, sequence
from .ptxtypes import bf16_to_f32, is_float

if TYPE_CHECKING:
    from .machine import Machine

Function = Callable[..., Any]

ORDERED: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,  # of unsigned
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
# The unordered comparison holds when the opposite ordered one does not: also for NaN.
UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
COMBINE: dict[str, Function] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _differs(a: Any, b: Any) -> Any:
    """ne of floats: false for NaN, unlike NumPy's."""
    return (a < b) | (a > b)


def _unordered(a: Any, b: Any) -> Any:
    return np.isnan(a) | np.isnan(b)


def _opposite(f: Function) -> Function:
    return lambda a, b: ~f(a, b)


def comparison(name: str, kind: str) -> Function:
    """The function of two operands of the type."""
    if not is_float(kind):
        return ORDERED[name]
    if name in ("nan", "num"):
        f = _unordered if name == "nan" else _opposite(_unordered)
    elif name in UNORDERED:
        f = _opposite(comparison(UNORDERED[name], "f32"))
    else:
        f = _differs if name == "ne" else ORDERED[name]
    if kind == "bf16":
        return lambda a, b: f(bf16_to_f32(a), bf16_to_f32(b))
    return f


@opcode("setp")
def setp(machine: Machine, instruction: Instruction) -> Operation:
    """setp.cmp{.and,.or,.xor}.type p{|q}, a, b{, c}: p = (a cmp b) op c, q = !(a cmp b) op c"""
    name, kind, registers = instruction.modifiers[0], instruction.type, machine.registers
    if kind.endswith("x2"):
        raise NotCovered("compares packed pairs, which the emulator does not know")
    compare = comparison(name, kind)
    target, left, right, *rest = instruction.operands
    pair = (target.first, target.second) if isinstance(target, Pair) else (target,)
    destinations = [registers.destination(p, "pred") for p in pair]
    sources = [registers.value(left, kind), registers.value(right, kind)]
    if not rest and len(destinations) == 1:
        return Operation(elementwise(compare, destinations[0], *sources))
    combine, flip_third = None, False
    if rest:
        combine = next(COMBINE[m] for m in instruction.modifiers if m in COMBINE)
        third, flip_third = registers.predicate(rest[0])
        sources.append(third)

    def result(flip: bool) -> Function:
        def f(a: Any, b: Any, *third: Any) -> Any:
            compared = compare(a, b) ^ flip
            return combine(compared, third[0] ^ flip_third) if combine else compared

        return f

    if len(destinations) == 1:
        return Operation(elementwise(result(False), destinations[0], *sources))
    # q first, set aside: the third operand may be the register p.
    aside = np.zeros_like(destinations[0])
    return Operation(
        sequence(
            elementwise(result(True), aside, *sources),
            elementwise(result(False), destinations[0], *sources),
            elementwise(np.logical_or, destinations[1], aside, aside),
        )
    )


@opcode("selp")
def selp(machine: Machine, instruction: Instruction) -> Operation:
    kind, registers = instruction.type, machine.registers
    target, a, b, condition = instruction.operands
    return Operation(
        elementwise(
            lambda a, b, p: np.where(p, a, b),
            registers.destination(target, kind),
            registers.value(a, kind),
            registers.value(b, kind),
            registers.value(condition, "pred"),
        )
    )


@opcode("slct")
def slct(machine: Machine, instruction: Instruction) -> Operation:
    """slct.type.s32 / .f32: a where c >= 0, else b"""
    kind, registers = instruction.modifiers[-2], machine.registers
    target, a, b, c = instruction.operands
    return Operation(
        elementwise(
            lambda a, b, c: np.where(c >= 0, a, b),
            registers.destination(target, kind),
            registers.value(a, kind),
            registers.value(b, kind),
            registers.value(c, instruction.type),
        )
    )


def _is_subnormal(a: Any) -> Any:
    return (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny)


TESTS: dict[str, Function] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    "subnormal": _is_subnormal,
}


@opcode("testp")
def testp(machine: Machine, instruction: Instruction) -> Operation:
    target, source = instruction.operands
    return Operation(
        elementwise(
            TESTS[instruction.modifiers[0]],
            machine.registers.destination(target, "pred"),
            machine.registers.value(source, instruction.type),
        )
    )
