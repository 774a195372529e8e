"""What multiplies bfloat16. A Unit is an argument of kernels, and its class tells their
micro-kernels (bf16_simd.py), when they are compiled, which instructions to emit:

    Amx             tdpbf16ps: tiles of 16 x 16 sums, 32 products added to each
    Avx512          vdpbf16ps: vectors of 16 sums, two products added to each
    AmxEmulated,    the same tiles and vectors in plain LLVM, for CPUs without these instructions:
    Avx512Emulated  slow, and there for tests
"""
from __future__ import annotations

import os
from typing import NamedTuple

import llvmlite.binding as llvm

from .launch import Constant

COLUMNS = 16                        # sums of a vector, or of a row of a tile
BLOCK = 2 * COLUMNS                 # output channels of a micro-kernel
GROUP = 8                           # rows of sums written in a step: 2 x 2 tiles hide about as many
TILE_ROWS, TILE_PAIRS = 16, 16      # 16 rows of at most 16 pairs are a tile of inputs


class Unit(NamedTuple):
    """What multiplies.

    sizes   pixels of its micro-kernels, ascending
    depth   inputs that a step of these multiplies at most
    """
    sizes: tuple[int, ...]
    depth: int

    @property
    def has_tiles(self) -> bool:
        return isinstance(self, Amx | AmxEmulated)

    @property
    def rows(self) -> int:
        """Pixels of its largest micro-kernel."""
        return self.sizes[-1]

    @property
    def name(self) -> str:
        """In names of kernels, and for the environment variable CNN_BF16."""
        return NAMES[type(self)]

    @property
    def constant(self) -> Constant:
        """What stands for it where a kernel is bound."""
        return Constant("bf16_units", self.name.upper())


class Amx(Unit):
    """The tiles of AMX."""


class AmxEmulated(Unit):
    """The tiles of AMX in memory."""


class Avx512(Unit):
    """The vectors of AVX512_BF16."""


class Avx512Emulated(Unit):
    """The vectors of AVX512_BF16 in what vectors there are."""


NAMES = {Amx: "amx", Avx512: "avx512", AmxEmulated: "amx_emulated",
         Avx512Emulated: "avx512_emulated"}

# 2 x 2 tiles of sums, two of pixels and two of weights: all eight registers.
AMX, AMX_EMULATED = Amx((16, 32), 32), AmxEmulated((16, 32), 32)
# 14 x 2 vectors of sums, two of weights and a pixel: 31 of 32 registers.
AVX512, AVX512_EMULATED = Avx512((1, 7, 14), 2), Avx512Emulated((1, 7, 14), 2)

# What the compiler must know of the CPU. One with tiles has the vector instruction, too, by which
# single samples are multiplied.
NEEDS = {"amx": ("amx-tile", "amx-bf16", "avx512bf16"), "avx512": ("avx512bf16",)}


def missing(name: str) -> list[str]:
    """The features that the unit of this name needs and that are not there.

    There is what Numba compiles for: this CPU's features, unless NUMBA_CPU_FEATURES says others.
    """
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    return [need for need in NEEDS.get(name, ()) if f"+{need}" not in features.split(",")]
