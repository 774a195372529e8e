"""Which unit multiplies bfloat16 on this CPU, and the system's permission to use it."""
from __future__ import annotations

import os
from ctypes import CDLL, get_errno
from functools import cache

import ml_dtypes
import numpy as np

from ...step import Array
from ..bf16_units import (
    AMX,
    AMX_EMULATED,
    AVX512,
    AVX512_EMULATED,
    NEEDS,
    Amx,
    Unit,
    missing,
)

UNITS = {unit.name: unit for unit in (AMX, AVX512, AMX_EMULATED, AVX512_EMULATED)}
# Linux, x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


def choose() -> Unit:
    """AMX where the CPU has it, else AVX512_BF16; or what the environment variable CNN_BF16 asks
    for: amx, avx512, or for tests amx_emulated and avx512_emulated, which any CPU runs, slowly.

    ValueError where the CPU lacks it or the system does not permit it, and for any other value.
    """
    asked = os.environ.get("CNN_BF16")
    if asked is not None and asked not in UNITS:
        raise ValueError(f"CNN_BF16 is {asked!r}; it must be one of {', '.join(UNITS)}")
    if asked is None:
        asked = next((name for name in NEEDS if not missing(name)), None)
    if asked is None:
        raise ValueError(f"this CPU does not multiply bfloat16: for AMX it lacks "
                         f"{', '.join(missing('amx'))}, for AVX512_BF16 "
                         f"{', '.join(missing('avx512'))}; use dtype='float32'")
    if missing(asked):
        raise ValueError(f"CNN_BF16 is {asked!r} and this CPU lacks {', '.join(missing(asked))}; "
                         f"use dtype='float32'")
    if isinstance(UNITS[asked], Amx):
        permit_tiles()
    return UNITS[asked]


@cache
def permit_tiles() -> None:
    """Ask the system for AMX, for all threads of this process; ValueError where it refuses."""
    system = CDLL(None, use_errno=True)
    if system.syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) != 0:
        reason = os.strerror(get_errno())
        raise ValueError(f"this CPU has AMX and the system does not let this process use it "
                         f"({reason}); set CNN_BF16=avx512, or use dtype='float32'")


def to_bits(array: Array) -> Array:
    """float32 rounded to bfloat16, as uint16."""
    return array.astype(ml_dtypes.bfloat16).view(np.uint16)
