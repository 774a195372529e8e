"""Linear layers in bfloat16: one sample, few, many; any number of features."""
import numpy as np
import pytest
from bf16_checks import assert_sums_right, every_unit, prepared_in_bfloat16  # noqa: F401
from checks import assert_exact, integers, normal, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cpu.dot_units import BLOCK, COLUMNS
from kernels.cpu.host import dot_matmul
from kernels.ops import Linear

WEIGHTS = (1, 2)


def arrays(make, shape, outputs, seed=0):
    rng = np.random.default_rng(seed)
    return make(rng, *shape), make(rng, outputs, shape[-1]), make(rng, outputs)


def kernel(unit, samples):
    """The name's beginning: few samples are multiplied by vectors, one alone by a single row."""
    if samples < dot_matmul.FEW:
        name = unit.name.replace("amx", "avx512")
        return f"linear_bf16_{name}_{'gemv' if samples == 1 else '14x32'}"
    return f"linear_bf16_{unit.name}_{unit.rows}x32"


@every_unit
@given(samples=st.integers(1, 70), features=st.integers(1, 70),
       outputs=st.sampled_from([1, COLUMNS - 1, COLUMNS, BLOCK, 2 * BLOCK + 5]),
       activation=st.sampled_from([None, ops.Relu()]), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_any_size_is_exact_on_integers(unit, samples, features, outputs, activation, seed):
    assert_exact(Linear(activation), *arrays(integers, (samples, features), outputs, seed),
                 weights=WEIGHTS, unit=unit, kernel=kernel(unit, samples))


@every_unit
@pytest.mark.parametrize("shape", [(1, 1280), (8, 512), (30, 77), (2, 3, 5, 40), (6,)])
def test_floats_are_within_the_bounds(unit, shape):
    assert_sums_right(Linear(), Linear(), shape[-1], *arrays(normal, shape, 100), weights=WEIGHTS,
                      unit=unit)


@every_unit
@pytest.mark.parametrize("activation", [ops.Sigmoid(), ops.Tanh(), ops.Clip(-1.0, 1.0)])
def test_fused_activations(unit, activation):
    assert_sums_right(Linear(activation), Linear(), 20, *arrays(normal, (3, 20), 33), slack=4e-7,
                      weights=WEIGHTS, unit=unit)


@every_unit
@pytest.mark.parametrize("samples", [1, 3, 30])
def test_a_residual_is_added_before_the_activation(unit, samples):
    x, weight, bias = arrays(integers, (2, samples, 20), 37)
    residual = integers(np.random.default_rng(1), 2, samples, 37)
    assert_exact(Linear(ops.Relu()), x, weight, bias, residual, weights=WEIGHTS, unit=unit)


@every_unit
def test_without_bias(unit):
    x, weight, _ = arrays(integers, (4, 9), 5)
    assert_exact(Linear(), x, weight, weights=(1,), unit=unit)


@every_unit
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("samples", [1, 3, 20])
def test_nan_and_infinity_travel_as_ieee_says(unit, value, samples):
    x, weight, bias = arrays(integers, (samples, 9), 5)
    weight[weight == 0] = 1
    x[-1, 4] = value
    assert_exact(Linear(), x, weight, bias, weights=WEIGHTS, unit=unit)


def test_weights_must_be_constants():
    with pytest.raises(ValueError, match="must be constants"):
        run(Linear(), *arrays(integers, (4, 9), 5), weights=(2,))
