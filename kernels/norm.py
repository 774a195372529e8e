"""A batch norm as one multiply and one add per element, the same for every backend."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ops import BatchNorm
from .step import Array


def scale_and_shift(op: BatchNorm, weights: Sequence[Array | None]) -> tuple[Array, Array]:
    """(scale, shift), float32, each (C,): the op is x * scale + shift.

    weights: the constants behind the op's inputs, None for x. Rounded once. ValueError where one of
    the four parameters is no constant.
    """
    constants = [weight for weight in weights[1:] if weight is not None]
    if len(constants) != 4:
        raise ValueError("BatchNorm: scale, bias, mean and variance must be constants of the "
                         "network")
    scale, shift = in_float64(op, constants)
    return scale.astype(np.float32), shift.astype(np.float32)


def in_float64(op: BatchNorm, parameters: Sequence[Array]) -> tuple[Array, Array]:
    """(scale, shift) of scale, bias, mean and variance, not rounded."""
    weight, bias, mean, var = (parameter.astype(np.float64) for parameter in parameters)
    scale = weight / np.sqrt(var + op.epsilon)
    return scale, bias - mean * scale
