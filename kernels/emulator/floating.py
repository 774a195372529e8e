"""Floating-point operations on NumPy arrays (PTX ISA 9.7.3 to 9.7.5).

Where this differs from the hardware: .approx functions are exact to rounding; .ftz is ignored
(subnormals are kept); fma of f32 is rounded twice, first to float64 (a tie that only the lost bits
would break can go the other way); fma of f64 is not fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operation import NotCovered
from .ptxtypes import bf16_to_f32, f32_to_bf16


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c: the product of two f32 is exact in float64."""
    if a.dtype.itemsize < 8:
        return (np.multiply(a, b, dtype=np.float64) + c).astype(a.dtype)
    return a * b + c


def reciprocal(a: Any) -> Any:
    return a.dtype.type(1) / a


def reciprocal_root(a: Any) -> Any:
    return a.dtype.type(1) / np.sqrt(a)


def copy_sign(a: Any, b: Any) -> Any:
    """copysign: the magnitude of b with the sign of a."""
    return np.copysign(b, a)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "mad": fused,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.absolute,
    "min": np.fmin,  # a NaN operand gives the other one
    "max": np.fmax,
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
_KEEPING_NAN = {"min": np.minimum, "max": np.maximum}
_IGNORED = {"rn", "approx", "full", "ftz"}


def round_toward(mode: str, exact: Any, dtype: Any) -> Any:
    """Round wider values to the dtype by rz (zero), rm (down) or rp (up)."""
    nearest = exact.astype(dtype)
    limit = {"rz": 0, "rm": -np.inf, "rp": np.inf}[mode]
    if mode == "rz":
        beyond = np.abs(nearest.astype(exact.dtype)) > np.abs(exact)
    elif mode == "rm":
        beyond = nearest > exact
    else:
        beyond = nearest < exact
    return np.where(beyond, np.nextafter(nearest, dtype(limit)), nearest)


def function(opcode: str, modifiers: tuple[str, ...]) -> Callable[..., Any]:
    """The function of an instruction: `ex2`, ("approx", "ftz", "f32")."""
    options, kind = set(modifiers[:-1]) - _IGNORED, modifiers[-1]
    f = FUNCTIONS[opcode]
    if "NaN" in options:
        f = _KEEPING_NAN[opcode]
    for mode in options & {"rz", "rm", "rp"}:
        if kind != "f32":
            raise NotCovered(f"rounds .{kind} by .{mode}, which the emulator does not know")
        f = _directed(f, mode)
    if "sat" in options:
        f = _saturated(f)
    if "relu" in options:
        f = _rectified(f)
    unknown = options - {"NaN", "rz", "rm", "rp", "sat", "relu"}
    if unknown:
        raise NotCovered(f"has the modifier .{min(unknown)}, which the emulator does not know")
    return _in_bf16(f) if kind.startswith("bf16") else f


def _directed(f: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Compute in float64, then round in the direction."""
    return lambda *x: round_toward(mode, f(*[v.astype(np.float64) for v in x]), np.float32)


def _saturated(f: Callable[..., Any]) -> Callable[..., Any]:
    """.sat: [0, 1], and NaN becomes 0."""
    return lambda *x: np.clip(np.nan_to_num(f(*x), nan=0.0), 0, 1)


def _rectified(f: Callable[..., Any]) -> Callable[..., Any]:
    """.relu: negative results become 0; a NaN stays one."""
    return lambda *x: np.maximum(f(*x), 0)


def _in_bf16(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *x: f32_to_bf16(f(*[bf16_to_f32(v) for v in x]))
