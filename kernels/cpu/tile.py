"""The call of the micro-kernel `conv_tile` that is wanted."""
from __future__ import annotations

from .jit import njit
from .microkernels import BLOCK as BLOCK
from .microkernels import BLOCK_VECTORS as BLOCK_VECTORS
from .microkernels import HALF_ROWS as HALF_ROWS
from .microkernels import TILE_ROWS as TILE_ROWS
from .microkernels import conv_tile


@njit(inline="always")
def some_blocks(rows, vectors, arguments):
    """The micro-kernel of the wanted size, one of CONV_TILES."""
    number = 0 if rows == TILE_ROWS else 1 if rows == HALF_ROWS else 2
    conv_tile(number if vectors == BLOCK_VECTORS else number + 3, arguments)
