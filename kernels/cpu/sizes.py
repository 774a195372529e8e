"""Sizes on which kernels and the host's choices agree; those of tiles fill the registers."""
from __future__ import annotations

import os
import platform
from typing import NamedTuple

import llvmlite.binding as llvm


def _asked(variable: str, *choices: int) -> int | None:
    """What an environment variable says of this CPU, for tests of kernels of others."""
    asked = os.environ.get(variable)
    if asked is None:
        return None
    if asked not in map(str, choices):
        *most, last = choices
        raise ValueError(f"{variable} is {asked!r}; it must be "
                         f"{', '.join(map(str, most))} or {last}")
    return int(asked)


def _host_lanes() -> int:
    """float32 lanes of the widest vector registers: 16 (AVX-512), 8 (AVX) or 4."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


LANES = _asked("CNN_SIMD_LANES", 4, 8, 16) or _host_lanes()
ARM = platform.machine() in ("aarch64", "arm64")
# 64-bit ARM and AVX-512 have 32 registers of vectors, others 16.
REGISTERS = _asked("CNN_SIMD_REGISTERS", 16, 32) or (32 if LANES == 16 or ARM else 16)

# ---- convolution and matrix product -----------------------------------------------------------

# Accumulators + one vector of weights per column + one broadcast pixel fill the register file:
# 14 * 2 + 2 + 1 of 32 registers with AVX-512, 6 * 2 + 2 + 1 of 16 with AVX or SSE. ARM loads its
# pixels before it multiplies them, several at a time: 12 * 2 + 2 + 6 of 32.
TILE_ROWS = 14 if LANES == 16 else 12 if REGISTERS == 32 else 6
HALF_ROWS = TILE_ROWS // 2
# A map of 14 x 14 is 16 tiles of Winograd's F(4), one of 7 x 7 is 16 of F(2): whole micro-kernels.
GRID_ROWS = 8 if REGISTERS == 32 else 4
# Beside one vector of outputs, those of a narrow group, there is room for more pixels: 28 + 1 + 1
# of 32 registers, or 14 + 1 + 1 of 16.
NARROW_ROWS = 28 if REGISTERS == 32 else 14
NARROW_HALF_ROWS = NARROW_ROWS // 2
BLOCK_VECTORS = 2
BLOCK = BLOCK_VECTORS * LANES

# ---- depthwise convolution --------------------------------------------------------------------

DEPTHWISE_PIXELS = 7    # divides the map sizes 112 .. 7; 7 sums hide the latency of an FMA


class Window(NamedTuple):
    """Of a tile of DEPTHWISE_PIXELS neighbours: taps of one line, stride, and how many of the
    columns under all of them are outside the image on each side."""
    taps: int
    stride: int
    left: int = 0
    right: int = 0


# Padding 1 or 2, or of TensorFlow, more on the right: most networks. And those of ConvNeXt. A
# kernel is compiled for one family, for each window takes time to compile.
WINDOWS = (
    (Window(3, 1), Window(3, 1, 1), Window(3, 1, 0, 1), Window(3, 1, 1, 1),
     Window(3, 2), Window(3, 2, 1), Window(3, 2, 0, 1), Window(3, 2, 1, 1),
     Window(5, 1), Window(5, 1, 2), Window(5, 1, 0, 2), Window(5, 1, 2, 2),
     Window(5, 2), Window(5, 2, 2), Window(5, 2, 0, 1), Window(5, 2, 2, 1),
     Window(5, 2, 1), Window(5, 2, 0, 2), Window(5, 2, 1, 2)),
    (Window(7, 1), Window(7, 1, 3), Window(7, 1, 0, 3), Window(7, 1, 3, 3)))
COMMON, WIDE = range(len(WINDOWS))

DEPTHWISE_GROUP = 16 * LANES    # channels down whose rows a thread goes: their weights stay in L1
DEPTHWISE_BAND = 7              # of so many rows, before it goes on with others

# ---- what padding consists of -----------------------------------------------------------------

CONSTANT, EDGE, REFLECT = range(3)

# ---- what pooling makes of a window -----------------------------------------------------------

MEAN, GREATEST, L2_NORM = range(3)
