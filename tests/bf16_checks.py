"""What the tests of bfloat16 on the CPU share: units, rounded inputs, bounds."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from checks import EPS, THREADS, assert_within, run_step, sum_bound

from kernels import reference
from kernels.cpu import backend
from kernels.cpu.dot_units import Unit, missing
from kernels.cpu.host import unit_choice
from kernels.ops import Op, TensorSpec
from kernels.step import Options, Step

BF16_EPS = 2.0 ** -8            # unit roundoff: 8 significant bits


def lacking(unit: Unit) -> str:
    """Why this machine can not run a unit, or ""."""
    if missing(unit):
        return f"this CPU lacks {', '.join(missing(unit))}"
    try:
        if unit.name == "amx":
            unit_choice.permit_tiles()
    except ValueError as error:
        return str(error)
    return ""


def every(units: dict[str, Unit]) -> pytest.MarkDecorator:
    """Those that this CPU has, and emulations of others."""
    def left_out(name: str) -> str:
        real = units.get(name.removesuffix("_emulated"))
        if "emulated" in name and real is not None and not lacking(real):
            return f"this CPU has {real.name} itself"
        return lacking(units[name])

    return pytest.mark.parametrize("unit", [
        pytest.param(unit, id=name, marks=pytest.mark.skipif(
            bool(left_out(name)), reason=left_out(name))) for name, unit in units.items()])


def every_kind(units: dict[str, Unit]) -> pytest.MarkDecorator:
    """A unit with tiles and one with vectors, this CPU's or else emulated: for what is done beside
    the products, which all units of a kind share, and which takes long to compile."""
    best: dict[bool, Unit] = {}
    for unit in units.values():         # the best first
        if not lacking(unit):
            best.setdefault(unit.has_tiles, unit)
    return every({unit.name: unit for unit in best.values()})


every_unit, unit_of_each_kind = every(unit_choice.BF16), every_kind(unit_choice.BF16)


@pytest.fixture(autouse=True, scope="module")
def prepared_in_bfloat16():
    """`checks.run` finds the kernels of bfloat16, which take the unit as a choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "PREPARE", backend.PREPARE | backend.narrow())
        yield


def rounded(array: np.ndarray) -> np.ndarray:
    """The nearest numbers that bfloat16 has, as float32."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def assert_sums_right(op: Op, plain: Op, length: int, *arrays: np.ndarray, slack: float = 0,
                      **options) -> None:
    """Products of bfloat16 are exact in float32, so with inputs that bfloat16 has only the sums of
    `plain`, the op without activation, round; with any inputs each factor is rounded first."""
    x, weight, *others = arrays
    given = [rounded(x), rounded(weight), *others]
    assert_within(sum_bound(plain, length, *given) + slack, op, *given, **options)
    size = reference.run(plain, *(np.abs(array) for array in arrays))
    n = (length + 3) * EPS
    factors = (1 + BF16_EPS) ** 2
    bound = (factors * (1 + n / (1 - n)) - 1) * size
    assert_within(bound + slack, op, *arrays, **options)


def narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)


def prepare_stored(op: Op, arrays, dtype: str, threads: int = 1, **choice) -> Step:
    """The step of a layer whose weights are constants, for arrays of their own dtypes and an
    output of this one."""
    output = TensorSpec(op.output_shape(*(array.shape for array in arrays)), dtype)
    specs = [TensorSpec(array.shape, array.dtype.name) for array in arrays]
    weights = [array if i in op.packed else None for i, array in enumerate(arrays)]
    return backend.PREPARE[type(op)](op, specs, output, weights, Options(threads, "bfloat16"),
                                     **choice)


def run_stored(op: Op, arrays, dtype: str, **choice) -> np.ndarray:
    """Its output: the same with 1 and 2 threads, and nothing beside it was written."""
    shape = op.output_shape(*(array.shape for array in arrays))
    results = [run_step(prepare_stored(op, arrays, dtype, threads, **choice), arrays,
                        TensorSpec(shape, dtype), threads) for threads in THREADS]
    assert all(result.tobytes() == results[0].tobytes() for result in results)
    return results[0]
