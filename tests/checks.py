"""What all kernel tests share: guard zones, poisoned outputs, integer inputs, computed bounds."""
from __future__ import annotations

import numpy as np

from kernels import ops, reference
from kernels.cpu import backend
from kernels.cpu.threads import available_threads, team
from kernels.ops import Op, TensorSpec
from kernels.step import Options, Step

EPS = float(np.finfo(np.float32).eps) / 2       # unit roundoff of float32
TINY = float(np.finfo(np.float32).tiny)
GUARD = 64                                      # floats before and after an output
POISON = np.float32(np.nan).view(np.uint32) | 0xBAD     # a NaN that no arithmetic makes
THREADS = sorted({1, min(2, available_threads())})


def integers(rng: np.random.Generator, *shape: int, low: int = -4, high: int = 5) -> np.ndarray:
    """Whole numbers as float32: sums of their products are exact up to 2 ** 24."""
    return rng.integers(low, high, shape).astype(np.float32)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def aligned(size: int, fill: int = 0xFF) -> np.ndarray:
    """`size` bytes at a 64-byte boundary."""
    block = np.full(size + 64, fill, np.uint8)
    start = -block.ctypes.data % 64
    return block[start:start + size]


def prepare(op: Op, arrays, weights=(), threads: int = 1, **choice) -> Step:
    """The step for arrays of these shapes; `weights` are the positions of constant inputs, `choice`
    is forced on the family's `prepare`."""
    constants = [array if i in weights else None for i, array in enumerate(arrays)]
    output = TensorSpec(op.output_shape(*(array.shape for array in arrays)))
    specs = [TensorSpec(array.shape) for array in arrays]
    return backend.PREPARE[type(op)](op, specs, output, constants, Options(threads), **choice)


def run_step(step: Step, arrays, output: TensorSpec, threads: int) -> np.ndarray:
    """What a step gives, between guard zones."""
    shape = ops.known(output.shape)
    size = int(np.prod(shape)) * np.dtype(output.dtype).itemsize
    block = aligned(size + 2 * GUARD)
    y = block[GUARD:GUARD + size].view(output.dtype).reshape(shape)
    with team(threads):
        for launch in step.bind(arrays, y, aligned(step.workspace)):
            launch()
    assert (block[:GUARD] == 0xFF).all(), "written before the output"
    assert (block[GUARD + size:] == 0xFF).all(), "written after the output"
    return y.copy()


def run(op: Op, *arrays: np.ndarray, weights=(), kernel: str | None = None, gap: int = 0, **choice
        ) -> np.ndarray:
    """The op's output, checked on the way: it is what 1 and 2 threads both give, every element
    was written, nothing beside it was, inputs are as before, and `kernel` is what ran.

    gap: floats between a pixel of the output and the next one, for a step that is `strided`.
    """
    results = []
    before = [array.copy() for array in arrays]
    for threads in THREADS:
        step = prepare(op, arrays, weights, threads, **choice)
        if kernel is not None:
            assert step.kernel.startswith(kernel), step.kernel
        assert step.strided or not gap, f"{step.kernel} is not strided"
        *places, channels = ops.known(op.output_shape(*(array.shape for array in arrays)))
        size = int(np.prod(places, dtype=int)) * (channels + gap)
        block = aligned(4 * (size + 2 * GUARD)).view(np.uint32)
        block[:] = POISON
        wide = block[GUARD:GUARD + size].view(np.float32).reshape(*places, channels + gap)
        first, end = gap // 2, gap // 2 + channels
        y = wide[..., first:end]
        with team(threads):
            for launch in step.bind(arrays, y, aligned(step.workspace)):
                launch()
        assert (block[:GUARD] == POISON).all(), "written before the output"
        assert (block[GUARD + size:] == POISON).all(), "written after the output"
        bits = wide.view(np.uint32)
        assert (bits[..., :first] == POISON).all(), "written before a pixel's channels"
        assert (bits[..., end:] == POISON).all(), "written after a pixel's channels"
        assert not (bits[..., first:end] == POISON).any(), "not every element was written"
        results.append(y.copy())
    assert all(np.array_equal(result.view(np.uint32), results[0].view(np.uint32))
               for result in results), "the thread count changes bits"
    assert all(np.array_equal(a.view(np.uint32), b.view(np.uint32))
               for a, b in zip(before, arrays, strict=True)), "an input was changed"
    return results[0]


def assert_exact(op: Op, *arrays: np.ndarray, **options) -> None:
    """Integer inputs: the very numbers of the reference."""
    expected = reference.run(op, *arrays)
    assert np.abs(expected[np.isfinite(expected)]).max(initial=0) < 1 << 24
    np.testing.assert_array_equal(run(op, *arrays, **options), expected)


def assert_within(bound: np.ndarray, op: Op, *arrays: np.ndarray, **options) -> None:
    """Random floats: each element within its bound of the reference."""
    expected, found = reference.run(op, *arrays), run(op, *arrays, **options)
    excess = np.abs(found - expected) / (bound + TINY)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 1, (
        f"at {worst}: {found[worst]} instead of {expected[worst]}, {excess[worst]:.2f} x the bound")


def sum_bound(op: Op, length: int, *arrays: np.ndarray) -> np.ndarray:
    """Bound of a sum of `length` products: gamma(n) * sum |a||b| (Higham, "Accuracy and Stability
    of Numerical Algorithms", 3.1); n counts the roundings on the way of one product."""
    n = (length + 3) * EPS
    return n / (1 - n) * reference.run(op, *(np.abs(array) for array in arrays))
