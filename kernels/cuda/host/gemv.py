"""Matrix-vector product on CUDA: when it serves a linear layer, and its grid."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ops import Unary
from ...step import Array, Step
from .. import gemv, vector
from ..activation import activation_of
from ..compiler import Kernel
from ..launch import CudaOptions, Launch
from .arguments import blocks
from .weights import stored

SAMPLES = (1, 4)        # that kernels are compiled for
WARPS_TO_FILL = 16      # of a multiprocessor: their loads in flight keep memory busy


def kernel_of(dtype: str, x_lanes: int, most_samples: int, owner_threads: int, activation: str
              ) -> Kernel:
    owner = "warp" if owner_threads == 32 else "block"
    return Kernel(f"gemv_{owner}_{vector.short(dtype)}x{x_lanes}_m{most_samples}_{activation}",
                  gemv.make, (dtype, x_lanes, most_samples, owner_threads, activation),
                  gemv.SIGNATURE, gemv.THREADS, arch=vector.arch(dtype),
                  blocks=WARPS_TO_FILL // gemv.WARPS)


def kernels(dtype: str) -> list[Kernel]:
    """Both owners for whole accesses; single elements of x; SiLU for other activations."""
    wide = vector.lanes(dtype)
    return [*(kernel_of(dtype, wide, most, owner, "clip") for most in SAMPLES
              for owner in (32, gemv.THREADS)),
            *(kernel_of(dtype, 1, most, 32, "clip") for most in SAMPLES),
            kernel_of(dtype, wide, 1, 32, "silu")]


def fits(samples: int) -> bool:
    """Whether there are so few samples that the time is that of reading the weights."""
    return 0 < samples <= max(SAMPLES)


def prepare_gemv(dtype: str, samples: int, features: int, activation: Unary | None, weight: Array,
                 bias: Array | None, options: CudaOptions) -> Step:
    """x (samples, features) and y stored as `dtype`; weight (outputs, features)."""
    lanes, outputs = vector.lanes(dtype), len(weight)
    most = next(most for most in SAMPLES if samples <= most)
    # A block to an output reads rows of more than one round of a warp's accesses faster.
    few = (outputs < options.multiprocessors * WARPS_TO_FILL
           and features > 32 * lanes * gemv.UNROLL)
    owner = gemv.THREADS if few else 32
    name, low, high = activation_of(activation)
    kernel = kernel_of(dtype, 1 if features % lanes else lanes, most, owner, name)
    pitch = -(-features // lanes) * lanes

    def pack(w: Array) -> Array:
        rows = np.zeros((outputs, pitch), np.float32)
        rows[:, :features] = w
        return options.upload(stored(rows, dtype))

    packed = options.pack(weight, f"gemv_{dtype}", pack)
    packed_bias = options.upload(np.zeros(outputs, np.float32) if bias is None
                                 else bias.astype(np.float32))
    numbers = (low, high, features, outputs, samples, pitch * vector.STORAGE[dtype].bytes)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [Launch(kernel, blocks(outputs * owner, gemv.THREADS),
                       (arrays[0], packed, packed_bias, y, *numbers))]

    return Step(kernel.name, bind)
