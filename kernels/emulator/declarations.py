"""Declarations of variables and parameters, and the literals in them (PTX ISA 4.5, 5.4)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .errors import ParseError
from .instruction import Variable
from .ptxtypes import U8, U32, U64, UINT, bits


def variable(declaration: str) -> Variable:
    """`.shared .align 4 .b8 name[4096]`, perhaps with ` = {1, 2}`"""
    head, _, initial = declaration.partition("=")
    space = re.search(r"\.(global|const|shared|local|param)\b", head)
    types = re.findall(r"\.([usb](?:8|16|32|64)|f(?:16|32|64))\b", head)
    extent = r"\[\s*(?:0x[\da-fA-F]+|[1-9]\d*|0)?\s*\]"
    name = re.search(rf"([\w$]+)((?:\s*{extent})*)\s*$", head.strip())
    if space is None or not types or name is None:
        raise ParseError(f"The declaration {' '.join(declaration.split())!r} cannot be read.")
    element = bits(types[-1]) // 8
    size = element
    for count in re.findall(r"\[\s*(\w*)\s*\]", name[2]):
        size *= int(count, 0) if count else 0
    align = re.search(r"\.align\s+(\d+)", head)
    return Variable(
        space[1],
        name[1],
        max(element, int(align[1]) if align else 1),
        size,
        types[-1],
        _initial_bytes(initial, types[-1], element) if initial.strip() else None,
    )


def parameters(text: str | None) -> list[Variable]:
    """The declarations between the parentheses of an entry or function."""
    return [variable(p) for p in (text or "").split(",") if p.strip()]


def _initial_bytes(text: str, type_name: str, element: int) -> Any:
    try:
        values = [number(v) for v in re.findall(r"-?[\w.]+", text)]
    except ValueError:
        raise ParseError(
            f"The initial value {' '.join(text.split())[:80]!r} is not made of numbers."
        ) from None
    if type_name[0] == "f":
        return np.array(values, f"f{element}").view(U8)
    return np.array([v % (1 << 8 * element) for v in values], UINT[element]).view(U8)


def number(text: str) -> Any:
    """PTX ISA 4.5: 0x, 0b, octal and decimal integers, 0f and 0d floating-point bit patterns."""
    if text[:2] in ("0f", "0F"):
        return np.array([int(text[2:], 16)], U32).view(np.float32)[0]
    if text[:2] in ("0d", "0D"):
        return np.array([int(text[2:], 16)], U64).view(np.float64)[0]
    text = text.rstrip("U")
    if "." in text:
        return np.float64(text)
    return int(text, 8) if re.fullmatch(r"-?0\d+", text) else int(text, 0)
