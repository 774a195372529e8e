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


@njit(inline="always")
def one_block(rows, vectors, arguments):
    """The micro-kernel of the wanted size, which it must know when it is compiled."""
    if rows == TILE_ROWS and vectors == 2:
        conv_tile(TILE_ROWS, 2, arguments)
    elif rows == HALF_ROWS and vectors == 2:
        conv_tile(HALF_ROWS, 2, arguments)
    elif vectors == 2:
        conv_tile(1, 2, arguments)
    elif rows == TILE_ROWS:
        conv_tile(TILE_ROWS, 1, arguments)
    elif rows == HALF_ROWS:
        conv_tile(HALF_ROWS, 1, arguments)
    else:
        conv_tile(1, 1, arguments)
