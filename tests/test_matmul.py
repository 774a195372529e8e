"""Linear layers: one sample, few, many; any number of features."""
import numpy as np
import pytest
from checks import assert_exact, assert_within, integers, normal, run, sum_bound
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cpu.sizes import LANES, TILE_ROWS
from kernels.ops import Linear

WEIGHTS = (1, 2)


def arrays(make, shape, outputs, seed=0):
    rng = np.random.default_rng(seed)
    return make(rng, *shape), make(rng, outputs, shape[-1]), make(rng, outputs)


@given(st.integers(1, 3 * TILE_ROWS), st.integers(1, 70), st.integers(1, 5 * LANES),
       st.sampled_from([None, ops.Relu()]), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_any_size_is_exact_on_integers(samples, features, outputs, activation, seed):
    kernel = "linear_f32_gemv" if samples < TILE_ROWS // 2 else f"linear_f32_{TILE_ROWS}x"
    assert_exact(Linear(activation), *arrays(integers, (samples, features), outputs, seed),
                 weights=WEIGHTS, kernel=kernel)


@pytest.mark.parametrize("shape", [(1, 1280), (8, 512), (30, 77), (2, 3, 5, 40), (6,)])
def test_floats_are_within_the_bound(shape):
    inputs = arrays(normal, shape, 100)
    assert_within(sum_bound(Linear(), shape[-1], *inputs), Linear(), *inputs, weights=WEIGHTS)


@pytest.mark.parametrize("activation", [ops.Sigmoid(), ops.Tanh(), ops.Clip(-1.0, 1.0)])
def test_fused_activations(activation):
    inputs = arrays(normal, (3, 20), 33)
    bound = sum_bound(Linear(), 20, *inputs) + 4e-7
    assert_within(bound, Linear(activation), *inputs, weights=WEIGHTS)


@pytest.mark.parametrize("samples", [1, 3, 30])
def test_a_residual_is_added_before_the_activation(samples):
    x, weight, bias = arrays(integers, (2, samples, 20), 37)
    residual = integers(np.random.default_rng(1), 2, samples, 37)
    assert_exact(Linear(ops.Relu()), x, weight, bias, residual, weights=WEIGHTS)


def test_a_residual_must_fit():
    with pytest.raises(ValueError, match="residual has shape"):
        Linear().output_shape((2, 3, 4), (5, 4), (5,), (3, 5))


def test_without_bias():
    x, weight, _ = arrays(integers, (4, 9), 5)
    assert_exact(Linear(), x, weight, weights=(1,))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_travel_as_ieee_says(value):
    x, weight, bias = arrays(integers, (3, 9), 5)
    weight[weight == 0] = 1
    x[1, 4] = value
    assert_exact(Linear(), x, weight, bias, weights=WEIGHTS)


def test_weights_must_be_constants():
    with pytest.raises(ValueError, match="must be constants"):
        run(Linear(), *arrays(integers, (4, 9), 5), weights=(2,))
