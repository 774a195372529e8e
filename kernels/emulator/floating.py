"""Floating-point operations on NumPy arrays (PTX ISA 9.7.3 to 9.7.5).

Where this differs from the hardware: .approx functions are exact to rounding, and .ftz is ignored
(subnormals are kept).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operation import NotCovered
from .ptxtypes import bf16_to_f32, f32_to_bf16
from .rounding import fused, odd_float32, odd_fused, odd_sum, toward

Function = Callable[..., Any]


def maximum(a: Any, b: Any) -> Any:
    """Of a number and NaN the number. Of -0 and +0 it is +0, their sum; NumPy leaves that open."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def minimum(a: Any, b: Any) -> Any:
    return -maximum(-a, -b)


def maximum_or_nan(a: Any, b: Any) -> Any:
    return np.where((a == 0) & (b == 0), a + b, np.maximum(a, b))


def minimum_or_nan(a: Any, b: Any) -> Any:
    return -maximum_or_nan(-a, -b)


def reciprocal(a: Any) -> Any:
    return a.dtype.type(1) / a


def reciprocal_root(a: Any) -> Any:
    return a.dtype.type(1) / np.sqrt(a)


def copy_sign(a: Any, b: Any) -> Any:
    """copysign: the magnitude of b with the sign of a."""
    return np.copysign(b, a)


FUNCTIONS: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "mad": fused,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.absolute,
    "min": minimum,
    "max": maximum,
    "rcp": reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": reciprocal_root,
    "sin": np.sin,
    "cos": np.cos,
    "lg2": np.log2,
    "ex2": np.exp2,
    "tanh": np.tanh,
    "copysign": copy_sign,
}
_KEEPING_NAN: dict[str, Function] = {"min": minimum_or_nan, "max": maximum_or_nan}
# In float64, of float32 operands: exact, or as good for any rounding that follows.
_IN_FLOAT64: dict[str, Function] = {
    "add": odd_sum,
    "sub": lambda a, b: odd_sum(a, -b),
    "mul": np.multiply,
    "fma": odd_fused,
    "mad": odd_fused,
    "div": np.divide,
    "rcp": reciprocal,
    "sqrt": np.sqrt,
}
_IGNORED = {"rn", "approx", "full", "ftz"}
_DIRECTIONS = {"rz", "rm", "rp"}


def function(opcode: str, modifiers: tuple[str, ...]) -> Function:
    """The function of an instruction: `ex2`, ("approx", "ftz", "f32")."""
    options, kind = set(modifiers[:-1]) - _IGNORED, modifiers[-1]
    unknown = options - {"NaN", "sat", "relu", *_DIRECTIONS}
    if unknown:
        raise NotCovered(f"has the modifier .{min(unknown)}, which the emulator does not know")
    f = FUNCTIONS[opcode]
    if "NaN" in options:
        f = _KEEPING_NAN[opcode]
    if kind.startswith("bf16") and f is fused:
        f = _fused_to_bf16  # the other functions of 8-bit numbers survive two roundings
    for mode in options & _DIRECTIONS:
        if kind != "f32" or opcode not in _IN_FLOAT64:
            raise NotCovered(f"rounds .{kind} by .{mode}, which the emulator does not know")
        f = _directed(_IN_FLOAT64[opcode], mode)
    if "sat" in options:
        f = _saturated(f)
    if "relu" in options:
        f = _rectified(f)
    return _in_bf16(f) if kind.startswith("bf16") else f


def _fused_to_bf16(a: Any, b: Any, c: Any) -> Any:
    """float32 rounded to odd, for the rounding to bf16."""
    return odd_float32(odd_fused(a, b, c))


def _directed(f: Function, mode: str) -> Function:
    return lambda *x: toward(mode, f(*[v.astype(np.float64) for v in x]), np.float32)


def _saturated(f: Function) -> Function:
    """.sat: [0, 1], and NaN becomes 0."""
    return lambda *x: np.clip(np.nan_to_num(f(*x), nan=0.0), 0, 1)


def _rectified(f: Function) -> Function:
    """.relu: negative results become 0; a NaN stays one."""
    return lambda *x: np.maximum(f(*x), 0)


def _in_bf16(f: Function) -> Function:
    return lambda *x: f32_to_bf16(f(*[bf16_to_f32(v) for v in x]))
