"""What attention.py is called with."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...matrices import from_starts, nowhere, operands
from ...ops import Attention, TensorSpec, count
from ...step import Array, Options, Step
from ..launch import Kernel, Launch
from ..sizes import BLOCK, LANES, TILE_ROWS
from .conv import cover
from .matmul import cut_bands, steps_of

ATTENTION = Kernel("attention", "attention")


def prepare_attention(op: Attention, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: Options) -> Step:
    """Inputs q, k, v, [bias]."""
    sizes, shapes, lies, starts = operands(op, inputs, output)
    (rows, depth), (keys, width) = shapes[0], shapes[2]
    if len(inputs) == 3:
        lies = (*lies[:3], nowhere(sizes), lies[3])
    tiles = np.array(cover(rows), np.int64)
    bands = cut_bands(sizes, len(tiles), options.threads)
    steps = steps_of(*lies)
    keys_padded, width_padded = (-(-size // LANES) * LANES for size in (keys, width))
    zeros = np.zeros(max(keys_padded, width_padded), np.float32)
    floats = options.threads * (depth * keys_padded + keys * width_padded
                                + TILE_ROWS * (depth + keys))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        q, k, v, *rest = from_starts(arrays, starts)
        bias = rest[0] if rest else np.empty(0, np.float32)
        return [ATTENTION.bind(
            q, k, v, bias, y.reshape(-1), count(sizes), np.array(sizes, np.int64), steps, depth,
            keys, width, tiles, bands, zeros, np.float32(op.scale),
            workspace[:4 * floats].view(np.float32), options.threads)]

    return Step(f"attention_f32_{TILE_ROWS}x{BLOCK}", bind, 4 * floats)
