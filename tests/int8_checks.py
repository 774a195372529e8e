"""What the tests of 8 bits on the CPU share: units, and layers whose numbers are codes."""
from __future__ import annotations

import numpy as np
from bf16_checks import every, every_kind
from checks import THREADS, run_step

from kernels import ops, reference
from kernels.cpu.host import unit_choice
from kernels.ops import Grid, Op, TensorSpec
from kernels.step import Options, Step

every_int8_unit, int8_unit_of_each_kind = every(unit_choice.INT8), every_kind(unit_choice.INT8)
# Powers of two: sums, factors and biases are exact, and ties are met.
IN, WEIGHT, OUT = Grid(0.5, 3), 0.25, Grid(8.0, 101)


def values(rng: np.random.Generator, grid: Grid, *shape: int) -> np.ndarray:
    """Numbers of a grid."""
    return ((rng.integers(0, 256, shape) - grid.zero_point) * grid.scale).astype(np.float32)


def weights(rng: np.random.Generator, *shape: int, scale=WEIGHT) -> np.ndarray:
    """One of each output is -127 or 127 times the scale, by which it is found."""
    whole = rng.integers(-127, 128, shape).reshape(shape[0], -1)
    whole[:, 0] = rng.choice([-127, 127], shape[0])
    return (whole.reshape(shape) * scale).astype(np.float32)


def codes(array: np.ndarray, grid: Grid) -> np.ndarray:
    """Of numbers of a grid: as they are stored."""
    return (np.rint(array / grid.scale) + grid.zero_point).astype(np.uint8)


def stored(array: np.ndarray, grid: Grid) -> np.ndarray:
    """The numbers that codes stand for."""
    return ((array.astype(float) - grid.zero_point) * grid.scale).astype(np.float32)


def specs(op: Op, arrays, grids, output: TensorSpec | None = None):
    """(of the inputs, of the output), which is float32 unless it is said."""
    inputs = [TensorSpec(array.shape, array.dtype.name, grid)
              for array, grid in zip(arrays, grids, strict=True)]
    shape = op.output_shape(*(array.shape for array in arrays))
    return inputs, TensorSpec(shape) if output is None else output


def run_prepared(prepare, op: Op, arrays, grids, grid: Grid | None = None, **choice
                 ) -> tuple[np.ndarray, Step]:
    """(output, step) of `prepare`; grid: of an output that is stored in codes. The output is the
    same with 1 and 2 threads, all of it was written, and nothing beside it."""
    inputs, output = specs(op, arrays, grids)
    if grid is not None:
        output = TensorSpec(output.shape, "uint8", grid)
    constants = [array if i in op.packed else None for i, array in enumerate(arrays)]
    results = []
    for threads in THREADS:
        step = prepare(op, inputs, output, constants, Options(threads), **choice)
        results.append(run_step(step, arrays, output, threads))
    assert all(result.tobytes() == results[0].tobytes() for result in results)
    return results[0], step


def expected_codes(op: Op, arrays, grid: Grid) -> np.ndarray:
    """Of numbers, by the reference; its last step is FakeQuantize of the grid."""
    return codes(reference.run(op, *arrays), grid)


def quantise(grid: Grid) -> ops.FakeQuantize:
    return ops.FakeQuantize(*grid)
