"""What multiplies narrow numbers, two of bfloat16 or four of 8 bits in a word of 32, and adds their
products to wide sums. A Unit is an argument of kernels, and its class tells their micro-kernels
(dot_simd.py), when they are compiled, which instructions to emit:

    Amx             tdpbf16ps: tiles of 16 x 16 sums in float32, 32 products added to each
    Avx512          vdpbf16ps: vectors of 16 sums in float32, two products added to each
    AmxInt8         tdpbusd: tiles of 16 x 16 sums in int32, 64 products of uint8 and int8 to each
    Vnni            vpdpbusd: vectors of 16 sums in int32, four products to each
    AvxVnni         the same of 8 sums, two of which make one of ours
    Avx2            vpmaddwd: vectors of 8 sums in int32, two products of int16 to each
    Dotprod         sdot of 64-bit ARM: vectors of 4 sums in int32, four products of int8 to each
    AmxEmulated,    the same tiles and vectors in plain LLVM, for CPUs without these instructions:
    ...             slow, and there for tests
"""
from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm

from .launch import Constant

COLUMNS = 16                        # sums of a vector, or of a row of a tile
BLOCK = 2 * COLUMNS                 # output channels of a micro-kernel
GROUP = 8                           # rows of sums written in a step: 2 x 2 tiles hide about as many
TILE_ROWS, TILE_WORDS = 16, 16      # 16 rows of at most 16 words are a tile of inputs
SHORT = 256                         # products of 8 bits: a sum of more of them is long
STEP = 2 * TILE_WORDS               # inputs, bfloat16, of a step in products of computed matrices


class Unit(NamedTuple):
    """What multiplies.

    sizes     pixels of its micro-kernels, ascending
    depth     inputs that a step of these multiplies at most
    together  inputs in a word: 2 of bfloat16 or int16, 4 of 8 bits
    """
    sizes: tuple[int, ...]
    depth: int
    together: int

    @property
    def has_tiles(self) -> bool:
        return self.depth > self.together

    @property
    def itemsize(self) -> int:
        """Bytes of an input."""
        return 4 // self.together

    @property
    def dtype(self) -> str:
        """What inputs are, in names of kernels."""
        return "int8" if self.is_int8 else "bf16"

    @property
    def is_int8(self) -> bool:
        """Of codes of 8 bits, and int32 sums."""
        return isinstance(self, Int8)

    @property
    def speed(self) -> float:
        """How many products it does in the time of one of float32's, at least."""
        return SPEEDS.get(type(self), 4)

    @property
    def stored(self) -> str:
        """The dtype of what it multiplies with weights."""
        return "uint8" if self.is_int8 else "bfloat16"

    @property
    def taken_off(self) -> int:
        """What it takes off codes to multiply them."""
        return 128 if isinstance(self, (Dotprod, DotprodEmulated)) else 0

    @property
    def rows(self) -> int:
        """Pixels of its largest micro-kernel."""
        return self.sizes[-1]

    def for_sums_of(self, terms: int) -> Unit:
        """With the micro-kernels that are best for sums of so many products. Vectors write sums
        between their products, which wait for that, and the less the fewer rows there are."""
        if self.has_tiles or not self.is_int8 or terms > SHORT:
            return self
        return self._replace(sizes=tuple(rows for rows in self.sizes if rows <= GROUP))

    @property
    def name(self) -> str:
        """In names of kernels, and for the environment variables CNN_BF16 and CNN_INT8."""
        return NAMES[type(self)]

    @property
    def constant(self) -> Constant:
        """What stands for it where a kernel is bound."""
        return Constant("dot_units", f"{self.name}_{self.dtype}".upper())


class Amx(Unit):
    """The tiles of AMX, of bfloat16."""


class AmxEmulated(Unit):
    """The same tiles in memory."""


class Avx512(Unit):
    """The vectors of AVX512_BF16."""


class Avx512Emulated(Unit):
    """The same in what vectors there are."""


class Int8(Unit):
    """Of 8 bits."""


class AmxInt8(Int8):
    """The tiles of AMX, of 8 bits."""


class AmxInt8Emulated(Int8):
    """The same tiles in memory."""


class Vnni(Int8):
    """The vectors of AVX512_VNNI."""


class AvxVnni(Int8):
    """The vectors of AVX_VNNI, half as wide."""


class Avx2(Int8):
    """The vectors of AVX2, which multiply 16 bits: codes less their zero point, and weights."""

    @property
    def stored(self) -> str:
        return "int16"


class VnniEmulated(Int8):
    """The vectors of AVX512_VNNI in what vectors there are."""


class Dotprod(Int8):
    """The vectors of ARM's DotProd, whose bytes all have a sign."""


class DotprodEmulated(Int8):
    """The same in what vectors there are."""


NAMES = {Amx: "amx", Avx512: "avx512", AmxEmulated: "amx_emulated",
         Avx512Emulated: "avx512_emulated", AmxInt8: "amx", Vnni: "vnni", AvxVnni: "avxvnni",
         Avx2: "avx2", Dotprod: "dotprod", AmxInt8Emulated: "amx_emulated",
         VnniEmulated: "vnni_emulated", DotprodEmulated: "dotprod_emulated"}

SPEEDS: dict[type[Unit], float] = {Avx512: 2, Avx512Emulated: 2, Avx2: 1.5}

# 2 x 2 tiles of sums, two of pixels and two of weights: all eight registers.
AMX_BF16, AMX_EMULATED_BF16 = Amx((16, 32), 32, 2), AmxEmulated((16, 32), 32, 2)
AMX_INT8, AMX_EMULATED_INT8 = AmxInt8((16, 32), 64, 4), AmxInt8Emulated((16, 32), 64, 4)
# 14 x 2 vectors of sums, two of weights and up to two pixels: all 32 registers.
AVX512_BF16, AVX512_EMULATED_BF16 = Avx512((1, 7, 14), 2, 2), Avx512Emulated((1, 7, 14), 2, 2)
VNNI_INT8, VNNI_EMULATED_INT8 = Vnni((1, 7, 8, 14), 4, 4), VnniEmulated((1, 7, 8, 14), 4, 4)
# 2 x 4 half vectors of sums at a time, four of weights and two pixels: 14 of 16 registers.
AVXVNNI_INT8 = AvxVnni((1, 4, 8), 4, 4)
# 6 x 2 half vectors of sums, two of weights, a pixel and products: all 16 registers.
AVX2_INT8 = Avx2((1, 3, 6), 2, 2)
# 6 x 4 quarter vectors of sums, four of weights, up to two pixels: 30 of 32 registers.
DOTPROD_INT8 = Dotprod((1, 3, 6), 4, 4)
DOTPROD_EMULATED_INT8 = DotprodEmulated((1, 3, 6), 4, 4)

# What the compiler must know of the CPU. One with tiles has the vector instruction, too, by which
# single samples are multiplied.
NEEDS: dict[type[Unit], tuple[str, ...]] = {
    Amx: ("amx-tile", "amx-bf16", "avx512bf16"), Avx512: ("avx512bf16",),
    AmxInt8: ("amx-tile", "amx-int8", "avx512vnni"), Vnni: ("avx512vnni",), AvxVnni: ("avxvnni",),
    Avx2: ("avx2",), Dotprod: ("dotprod",)}


def missing(unit: Unit) -> list[str]:
    """The features that it needs and that are not there."""
    return [need for need in NEEDS.get(type(unit), ()) if not has(need)]


def has(feature: str) -> bool:
    """Whether there is a feature of a CPU, as LLVM names it.

    There is what Numba compiles for: this CPU's features, unless NUMBA_CPU_FEATURES says others.
    """
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = _of_this_cpu()
    return f"+{feature}" in features.split(",")


@cache
def _of_this_cpu() -> str:
    """Its features: every layer of a network asks."""
    return llvm.get_host_cpu_features().flatten()
