"""What all layers of layers.py and activations.py are."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kernels.ops import Op, Pair, Shape

Array = np.ndarray
Size = int | Sequence[int]
Emitted = list[tuple[Op, dict[str, Array]]]


class Layer:
    """One layer; the fields of a subclass are its arguments.

    Weights that nobody loaded are drawn when they are first needed, by torch's default rule, from
    np.random.default_rng(seed); `Sequential` gives each of its layers its own seed.

    ignored  names in torch's state_dict that are accepted and not kept
    """
    ignored: ClassVar[tuple[str, ...]] = ()
    seed: Pair = (0, 0)
    _weights: dict[str, Array] | None = None

    def emit(self, shape: Shape) -> Emitted:
        """The ops that compute this layer one after the other for an input of this shape, each
        with its weights by name. ValueError for a shape that the layer does not take."""
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights, in torch's layouts and order."""
        return {}

    @property
    def weights(self) -> dict[str, Array]:
        """Name -> float32 array, of `shapes`. Arrays are replaced, never written into."""
        if self._weights is None:
            self._weights = self.draw(np.random.default_rng(self.seed))
        return self._weights

    @weights.setter
    def weights(self, weights: dict[str, Array] | None) -> None:
        self._weights = weights

    def draw(self, rng: np.random.Generator) -> dict[str, Array]:
        """Fresh weights, uniform in +-1 / sqrt(inputs per output): what torch's
        kaiming_uniform_(a=sqrt(5)) and its rule for biases amount to."""
        shapes = self.shapes()
        reach = 1 / math.sqrt(math.prod(shapes["weight"][1:])) if shapes else 0.0
        return {name: (rng.random(shape, np.float32) * 2 - 1) * np.float32(reach)
                for name, shape in shapes.items()}
