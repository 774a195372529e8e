"""A batch norm as one multiply and one add per element, the same for every backend."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ops import BatchNorm
from .step import Array


def scale_and_shift(op: BatchNorm, weights: Sequence[Array | None]) -> tuple[Array, Array]:
    """(scale, shift), float32, each (C,): the op is x * scale + shift.

    weights: the constants behind the op's inputs, None for x. Worked out in float64 and rounded
    once. ValueError where one of the four parameters is no constant.
    """
    constants = [weight for weight in weights[1:] if weight is not None]
    if len(constants) != 4:
        raise ValueError("BatchNorm: scale, bias, mean and variance must be constants of the "
                         "network")
    weight, bias, mean, var = (constant.astype(np.float64) for constant in constants)
    scale = weight / np.sqrt(var + op.epsilon)
    return scale.astype(np.float32), (bias - mean * scale).astype(np.float32)
