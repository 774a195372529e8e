"""The types of PTX (PTX ISA 5.2, 9.7.2) as NumPy dtypes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
UINT: dict[int, type[np.unsignedinteger[Any]]] = {1: U8, 2: U16, 4: U32, 8: U64}

_KINDS = {"s": "i", "u": "u", "b": "u", "f": "f"}
_TYPE = re.compile(r"[usb](8|16|32|64)|f(16|32|64|16x2)|bf16(x2)?|tf32|pred")


def is_type(name: str) -> bool:
    """Whether the emulator can hold values of this PTX type."""
    return bool(_TYPE.fullmatch(name))


def is_float(name: str) -> bool:
    return "f" in name


def bits(name: str) -> int:
    """Width in bits of a PTX type; a packed pair (f16x2) counts as a whole."""
    if name == "pred":
        return 1
    if name.endswith("x2"):
        return 32
    digits = re.search(r"\d+", name)
    if digits is None:
        raise ValueError(f"{name!r} is no PTX type")
    return int(digits.group())


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy dtype of (one element of) a PTX type. bfloat16 is held as its 16 bits."""
    if name == "pred":
        return np.dtype(bool)
    if name.startswith("bf16"):
        return np.dtype(U16)
    if name == "tf32":
        return np.dtype(np.float32)
    size = 2 if name.endswith("x2") else int(name[1:]) // 8
    return np.dtype(f"{_KINDS[name[0]]}{size}")


def bf16_to_f32(x: Any) -> Any:
    return (np.asarray(x).astype(U32) << U32(16)).view(np.float32)


def f32_to_bf16(x: Any, truncate: bool = False) -> Array:
    """Round to nearest even (or toward zero) to 16 bits; every NaN becomes 0x7fff."""
    u = np.ascontiguousarray(x, np.float32).view(U32)
    if not truncate:
        u = u + (U32(0x7FFF) + ((u >> U32(16)) & U32(1)))
    return np.where(np.isnan(x), U32(0x7FFF), u >> U32(16)).astype(U16)
