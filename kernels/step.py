"""The contract between a backend and the executor: one op, prepared for fixed shapes."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Step:
    """An op with its kernel chosen and its weights packed.

    kernel     name of the kernel, as `Model.summary` shows it
    bind       (inputs, output, workspace) -> the launches that compute output from inputs, as
               cpu/launch.py or cuda/launch.py has them. Inputs stand in the op's order and include
               constant ones; every array is of its spec's shape, and C-contiguous but for what
               follows; workspace is uint8, 64-byte aligned, and holds anything
    workspace  bytes of scratch memory that a run needs
    strided    where it is not 0, bind also takes an output whose pixels, the rows of the last axis,
               are further apart than its channels: some channels of a Concat's output, where that
               finds them. How many there are of those from pixel to pixel, and before the first
               one, must be multiples of this number. Of a Concat's inputs, those that lie in its
               output already are None
    reads_strided
               the same of the first input
    """
    kernel: str
    bind: Callable[[Sequence[Any], Array, Array], Any]
    workspace: int = 0
    strided: int = 0
    reads_strided: int = 0


class Narrow(NamedTuple):
    """What an op can do with values in a narrow dtype, where others are wider.

    reads   positions of inputs that its kernel takes so
    writes  its output can be stored so
    moves   it only moves numbers: its inputs and its output are all stored alike
    """
    reads: tuple[int, ...] = ()
    writes: bool = False
    moves: bool = False


@dataclass
class Options:
    """What all steps of one program share.

    dtype   what convolutions, Linear layers and products of matrices multiply in: "float32" or
            "bfloat16"
    packed  weights as kernels read them, by weight and packing
    """
    threads: int = 1
    dtype: str = "float32"
    packed: dict[tuple[int, str], tuple[Array, Array]] = field(default_factory=dict)

    def pack(self, weight: Array, packing: str, make: Callable[[Array], Array]) -> Array:
        """`make(weight)`, computed once per weight and packing, however many programs ask."""
        key = id(weight), packing
        if key not in self.packed:
            # Holding on to the weight as well keeps its id from being given to another.
            self.packed[key] = weight, make(weight)
        return self.packed[key][1]


def weight_and_bias(kind: str, weights: Sequence[Array | None]) -> tuple[Array, Array | None]:
    """Inputs 1 and 2 of a convolution or Linear layer, of which there may be no second.

    weights: the constants behind the op's inputs. ValueError where one of the two is no constant.
    """
    weight, bias = weights[1], weights[2] if len(weights) > 2 else None
    if weight is None or (bias is None and len(weights) > 2):
        raise ValueError(f"{kind}: weight and bias must be constants of the network")
    return weight, bias
