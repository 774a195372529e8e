"""Which unit multiplies narrow numbers on this CPU, and the system's permission to use it."""
from __future__ import annotations

import os
from ctypes import CDLL, get_errno
from functools import cache

from ..dot_units import (
    AMX_BF16,
    AMX_EMULATED_BF16,
    AMX_EMULATED_INT8,
    AMX_INT8,
    AVX2_INT8,
    AVX512_BF16,
    AVX512_EMULATED_BF16,
    AVXVNNI_INT8,
    DOTPROD_EMULATED_INT8,
    DOTPROD_INT8,
    VNNI_EMULATED_INT8,
    VNNI_INT8,
    Amx,
    AmxInt8,
    Unit,
    missing,
)

# By name, the best first.
BF16: dict[str, Unit] = {unit.name: unit for unit in (
    AMX_BF16, AVX512_BF16, AMX_EMULATED_BF16, AVX512_EMULATED_BF16)}
INT8: dict[str, Unit] = {unit.name: unit for unit in (
    AMX_INT8, VNNI_INT8, AVXVNNI_INT8, AVX2_INT8, DOTPROD_INT8, AMX_EMULATED_INT8,
    VNNI_EMULATED_INT8, DOTPROD_EMULATED_INT8)}
NONE = "none"           # of CNN_INT8: multiply in float32
# Linux, x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


def choose() -> Unit:
    """What multiplies bfloat16: AMX where the CPU has it, else AVX512_BF16; or what the environment
    variable CNN_BF16 asks for: amx, avx512, or for tests amx_emulated and avx512_emulated, which
    any CPU runs, slowly.

    ValueError where the CPU lacks it or the system does not permit it, and for any other value.
    """
    unit = _asked("CNN_BF16", BF16) or _first(BF16)
    if unit is None:
        raise ValueError(f"bfloat16 is multiplied by AMX or AVX512_BF16, and this CPU has neither: "
                         f"AMX needs {', '.join(missing(AMX_BF16))}, AVX512_BF16 "
                         f"{', '.join(missing(AVX512_BF16))}; use dtype='float32'")
    if isinstance(unit, Amx):
        try:
            permit_tiles()
        except ValueError as error:
            raise ValueError(f"{error}; set CNN_BF16=avx512, or use dtype='float32'") from None
    return unit


def choose_int8() -> Unit | None:
    """What multiplies 8 bits: AMX where the CPU and the system let us, else AVX512_VNNI, else
    AVX_VNNI, else AVX2; on 64-bit ARM its DotProd; else None: float32 does it as well, but slower.
    Or what the environment variable CNN_INT8 asks for: amx, vnni, avxvnni, avx2, dotprod, none, or
    for tests amx_emulated, vnni_emulated and dotprod_emulated.

    ValueError where it asks for what the CPU or the system refuses, and for any other value.
    """
    if os.environ.get("CNN_INT8") == NONE:
        return None
    asked = _asked("CNN_INT8", INT8)
    unit = asked or _first(INT8)
    if isinstance(unit, AmxInt8):
        try:
            permit_tiles()
        except ValueError as error:
            if asked:
                raise ValueError(f"{error}; set CNN_INT8=vnni") from None
            return VNNI_INT8
    return unit


def _asked(variable: str, units: dict[str, Unit]) -> Unit | None:
    """The unit that an environment variable names."""
    name = os.environ.get(variable)
    if name is None:
        return None
    if name not in units:
        more = f", {NONE}" if units is INT8 else ""
        raise ValueError(f"{variable} is {name!r}; it must be one of {', '.join(units)}{more}")
    if missing(units[name]):
        raise ValueError(f"{variable} is {name!r} and this CPU lacks "
                         f"{', '.join(missing(units[name]))}; leave it out")
    return units[name]


def _first(units: dict[str, Unit]) -> Unit | None:
    """The best that the CPU has, which no emulated one is."""
    return next((unit for name, unit in units.items()
                 if "emulated" not in name and not missing(unit)), None)


@cache
def permit_tiles() -> None:
    """Ask the system for AMX, for all threads of this process; ValueError where it refuses."""
    system = CDLL(None, use_errno=True)
    if system.syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) != 0:
        reason = os.strerror(get_errno())
        raise ValueError(f"this CPU has AMX and the system does not let this process use it "
                         f"({reason})")
