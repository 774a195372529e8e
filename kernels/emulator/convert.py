"""cvt (PTX ISA 9.7.9.21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .geometry import Selection
from .instruction import Instruction
from .operation import NotCovered, Operation, elementwise, opcode
from .ptxtypes import U32, bf16_to_f32, dtype_of, f32_to_bf16, is_float, is_type
from .rounding import toward

if TYPE_CHECKING:
    from .machine import Machine

TO_INTEGER: dict[str, Callable[..., Any]] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}
DIRECTED = ("rz", "rm", "rp")
_KNOWN = {"rn", "rna", "ftz", "sat", "relu", "satfinite", *TO_INTEGER, *DIRECTED}


@opcode("cvt")
def cvt(machine: Machine, instruction: Instruction) -> Operation:
    """cvt{.rounding}{.ftz}{.sat}{.relu}.to.from d, a{, b}"""
    *options, to, source = instruction.modifiers
    unknown = set(options) - _KNOWN
    if unknown or not is_type(to) or not is_type(source):
        name = ".".join(instruction.modifiers)
        raise NotCovered(f"is cvt.{name}, which the emulator does not know")
    convert = conversion(to, source, tuple(options))
    registers = machine.registers
    target, *operands = instruction.operands
    destination = registers.destination(target, to)
    if not to.endswith("x2"):
        return Operation(elementwise(convert, destination, registers.value(operands[0], source)))
    high, low = (registers.spread(operand, source) for operand in operands)

    def pair(at: Selection) -> None:
        """d = {a, b}: a goes to the upper half. d may be the register of a or b."""
        selection = slice(None) if at is None else at
        halves = convert(low[selection]), convert(high[selection])
        destination[selection] = np.stack(halves, axis=-1)

    return Operation(pair)


def conversion(to: str, source: str, options: tuple[str, ...]) -> Callable[[Any], Any]:
    """The function of one operand."""
    if is_float(to):
        convert = _to_float(to, source, options)
    elif is_float(source):
        convert = _float_to_integer(source, dtype_of(to), options)
    else:
        convert = _integer_to_integer(dtype_of(to), "sat" in options)
    if source.startswith("bf16"):
        return lambda x: convert(bf16_to_f32(x))
    return convert


def _float_to_integer(
    source: str, dtype: np.dtype[Any], options: tuple[str, ...]
) -> Callable[[Any], Any]:
    """Values out of range saturate, with or without .sat.

    NaN becomes 0, or the top bit alone if the source is f64 or the destination has 64 bits.
    """
    limits = np.iinfo(dtype)
    nan = 0
    if source == "f64" or dtype.itemsize == 8:
        nan = limits.min if dtype.kind == "i" else 1 << (8 * dtype.itemsize - 1)
    rounding = next((TO_INTEGER[o] for o in options if o in TO_INTEGER), np.trunc)

    def convert(x: Any) -> Any:
        whole = rounding(x.astype(np.float64))
        over, under = whole >= float(limits.max), whole <= float(limits.min)
        inside = np.where(over | under | np.isnan(whole), 0.0, whole).astype(dtype)
        result = np.where(over, dtype.type(limits.max), inside)
        result = np.where(under, dtype.type(limits.min), result)
        return np.where(np.isnan(whole), dtype.type(nan), result)

    return convert


def _integer_to_integer(dtype: np.dtype[Any], saturate: bool) -> Callable[[Any], Any]:
    if not saturate:
        return lambda x: x.astype(dtype)

    def convert(x: Any) -> Any:
        have, want = np.iinfo(x.dtype), np.iinfo(dtype)
        return np.clip(x, max(have.min, want.min), min(have.max, want.max)).astype(dtype)

    return convert


def _to_float(to: str, source: str, options: tuple[str, ...]) -> Callable[[Any], Any]:
    direction = next((o for o in options if o in DIRECTED), None)
    to_integer = next((TO_INTEGER[o] for o in options if o in TO_INTEGER), None)
    narrow = _narrowing(to, source, direction, options)

    def convert(x: Any) -> Any:
        if to_integer and is_float(source):
            x = to_integer(x)
        if "sat" in options:
            x = np.clip(np.nan_to_num(x, nan=0.0), 0, 1)
        if "relu" in options:
            x = np.maximum(x, 0)
        return narrow(x)

    return convert


def _narrowing(
    to: str, source: str, direction: str | None, options: tuple[str, ...]
) -> Callable[[Any], Any]:
    """The rounding to the destination type."""
    if "satfinite" in options:
        raise NotCovered("is cvt with .satfinite, which the emulator does not know")
    if to.startswith("bf16"):
        if direction not in (None, "rz"):
            raise NotCovered(f"rounds to bf16 by .{direction}, which the emulator does not know")
        truncate = direction == "rz"
        return lambda x: f32_to_bf16(x.astype(np.float32), truncate)
    if to == "tf32":
        return _to_tf32("rn" if "rn" in options else direction)
    dtype: Any = dtype_of(to).type
    if direction is None:
        return lambda x: x.astype(dtype)
    if is_float(source):
        return lambda x: toward(direction, x, dtype)
    if source in ("s64", "u64") or to != "f32":
        raise NotCovered(f"rounds .{source} to .{to} by .{direction}")
    return lambda x: toward(direction, x.astype(np.float64), dtype)


def _to_tf32(direction: str | None) -> Callable[[Any], Any]:
    """The last 13 bits fall away: by .rna (ties away from zero), .rn (ties to even) or .rz."""
    if direction not in (None, "rn", "rz"):
        raise NotCovered(f"rounds to tf32 by .{direction}, which the emulator does not know")

    def convert(x: Any) -> Any:
        pattern = x.view(U32)
        if direction is None:
            pattern = pattern + U32(0x1000)
        elif direction == "rn":
            pattern = pattern + U32(0xFFF) + ((pattern >> U32(13)) & U32(1))
        return np.where(np.isnan(x), x, (pattern & U32(0xFFFFE000)).view(np.float32))

    return convert
