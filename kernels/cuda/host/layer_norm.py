"""Layer norm: how many threads share a row, and how much of it each holds."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ops import LayerNorm, TensorSpec, count
from ...step import Array, Step
from .. import layer_norm, vector
from ..compiler import Kernel
from ..launch import CudaOptions, Launch
from .arguments import blocks, check_sizes
from .elementwise import prepare_unary

MOST_HELD = 32      # elements a thread, each in a register; longer rows are read again
LEAST_THREADS = 8   # of a row: with fewer, a warp's loads lie far apart


def held_kernel(dtype: str, lanes: int, row_threads: int, vectors: int) -> Kernel:
    return Kernel(f"layer_norm_{vector.short(dtype)}x{lanes}_{row_threads}x{vectors}",
                  layer_norm.held, (dtype, lanes, row_threads, vectors), layer_norm.SIGNATURE,
                  layer_norm.THREADS, arch=vector.arch(dtype))


def long_kernel(dtype: str, lanes: int) -> Kernel:
    return Kernel(f"layer_norm_{vector.short(dtype)}x{lanes}_long", layer_norm.long,
                  (dtype, lanes), layer_norm.SIGNATURE, layer_norm.THREADS,
                  arch=vector.arch(dtype))


def choose(dtype: str, length: int) -> tuple[Kernel, int]:
    """(kernel, threads of a row): as few of a warp as hold the row, or a block."""
    lanes = vector.lanes(dtype, length)
    pieces = length // lanes
    row_threads = min(32, max(LEAST_THREADS, 1 << (pieces - 1).bit_length()))
    vectors = -(-pieces // row_threads)
    if vectors * lanes > MOST_HELD:
        return long_kernel(dtype, lanes), layer_norm.THREADS
    return held_kernel(dtype, lanes, row_threads, vectors), row_threads


def kernels(dtype: str) -> list[Kernel]:
    """Those of the usual numbers of channels, and of long rows."""
    return [choose(dtype, length)[0] for length in (96, 192, 384, 768, 1024, 2048)]


def prepare_layer_norm(op: LayerNorm, inputs: list[TensorSpec], output: TensorSpec,
                       weights: list[Array | None], options: CudaOptions) -> Step:
    """Inputs x and two constants, scale and bias; y may be x."""
    check_sizes(op.kind, output)
    _, scale, bias = weights
    if scale is None or bias is None:
        raise ValueError(f"{op.kind}: scale and bias must be constants of the network")
    length = len(scale)
    kernel, row_threads = choose(output.dtype, length)
    rows = count(output.shape) // length
    packed, packed_bias = (options.upload(array.astype(np.float32)) for array in (scale, bias))

    last = None if op.activation is None else prepare_unary(op.activation, [output], output, [],
                                                            options)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        norm = Launch(kernel, blocks(rows * row_threads, kernel.threads),
                      (arrays[0], packed, packed_bias, y, rows, length, op.epsilon))
        return [norm, *([] if last is None else last.bind([y], y, workspace))]

    return Step(kernel.name if last is None else f"{kernel.name}_{last.kernel}", bind)
