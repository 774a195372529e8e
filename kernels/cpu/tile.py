"""The sizes of the micro-kernel `conv_tile`, and the call of the one that is wanted."""
from __future__ import annotations

from .jit import LANES, njit
from .microkernels import conv_tile

# Accumulators + one vector of weights per column + one broadcast pixel fill the register file:
# 14 * 2 + 2 + 1 of 32 registers with AVX-512, 6 * 2 + 2 + 1 of 16 with AVX or SSE.
TILE_ROWS = 14 if LANES == 16 else 6
HALF_ROWS = TILE_ROWS // 2
BLOCK_VECTORS = 2
BLOCK = BLOCK_VECTORS * LANES


def _tile(rows, vectors):
    """A function of its own for each micro-kernel: side by side in one, LLVM would keep what all of
    them need at hand, and spill."""
    @njit()
    def tile(arguments):
        conv_tile(rows, vectors, arguments)
    return tile


tile_2, half_2, one_2 = _tile(TILE_ROWS, 2), _tile(HALF_ROWS, 2), _tile(1, 2)
tile_1, half_1, one_1 = _tile(TILE_ROWS, 1), _tile(HALF_ROWS, 1), _tile(1, 1)


@njit()
def some_blocks(rows, vectors, arguments):
    """The micro-kernel of the wanted size."""
    if rows == TILE_ROWS and vectors == 2:
        tile_2(arguments)
    elif rows == HALF_ROWS and vectors == 2:
        half_2(arguments)
    elif vectors == 2:
        one_2(arguments)
    elif rows == TILE_ROWS:
        tile_1(arguments)
    elif rows == HALF_ROWS:
        half_1(arguments)
    else:
        one_1(arguments)
