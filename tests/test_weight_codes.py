"""Codes of weights are found again, and only where there are some."""
import numpy as np
import pytest
from checks import normal
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels import weight_codes
from kernels.weight_codes import MOST, NEAR

SHAPES = [(1, 1), (3, 5), (4, 16), (5, 17), (2, 100), (4, 3, 3, 5), (7, 1, 1, 32)]
# Down to the least that float32 has.
any_scale = st.one_of(st.floats(-14, 14), st.floats(-149, 120)).map(
    lambda exponent: float(np.float32(2.0 ** exponent)))


def assert_found(weight, whole, scales):
    """The codes that are found are these, divided by what they have in common."""
    found = weight_codes.weight_scales(weight)
    assert found.shape == (len(weight),)
    assert found.dtype == float
    codes = weight_codes.codes(weight, found)
    assert codes.dtype == np.int8
    assert codes.shape == weight.shape
    for of_output, expected, one, scale, row in zip(codes, whole, found, scales, weight,
                                                    strict=True):
        common = int(np.gcd.reduce(expected, axis=None))
        np.testing.assert_array_equal(of_output.astype(int) * common, expected)
        if common:
            np.testing.assert_allclose(one, common * float(scale), rtol=NEAR)
        assert np.abs(of_output * one - row).max() <= NEAR * MOST * one


def drawn(seed, shape, narrowest=1):
    """Codes of which those of an output do not reach above a number of its own."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(-MOST, MOST + 1, shape)
    most = rng.integers(narrowest, MOST + 1, (len(whole), *[1] * (len(shape) - 1)))
    return np.clip(whole, -most, most)


def times(whole, scales):
    """The weights of a file, as float32."""
    return (whole.astype(np.float32) * scales.reshape(-1, *[1] * (whole.ndim - 1)))


@given(st.integers(0, 9999), st.sampled_from(SHAPES), st.lists(any_scale, min_size=7, max_size=7))
@settings(max_examples=200, deadline=None)
def test_any_codes_times_any_scale_are_found_again(seed, shape, scales):
    whole, scales = drawn(seed, shape), np.float32(scales[:shape[0]])
    assert_found(times(whole, scales), whole, scales)


@given(st.lists(st.integers(-MOST, MOST), min_size=1, max_size=40), any_scale)
@settings(max_examples=200, deadline=None)
def test_any_codes_of_one_output_are_found_again(whole, scale):
    whole, scales = np.array([whole]), np.float32([scale])
    assert_found(times(whole, scales), whole, scales)


@given(st.integers(0, 9999), st.sampled_from(SHAPES),
       st.lists(st.floats(2.0 ** -20, 2.0 ** 20, width=32), min_size=7, max_size=7),
       st.lists(st.floats(2.0 ** -60, 2.0 ** 60, width=32), min_size=7, max_size=7))
@settings(max_examples=200, deadline=None)
def test_a_factor_of_an_output_is_taken_for_a_part_of_its_scale(seed, shape, scales, factors):
    """As of a batch norm that is folded into it, which rounds once more."""
    whole, scales = drawn(seed, shape), np.float32(scales[:shape[0]])
    factors = np.float32(factors[:shape[0]]) * np.where(np.arange(shape[0]) % 2, -1, 1)
    folded = times(times(whole, scales).astype(float), factors.astype(float)).astype(np.float32)
    sign = np.sign(factors).reshape(-1, *[1] * (len(shape) - 1)).astype(int)
    assert_found(folded, whole * sign, scales.astype(float) * np.abs(factors))


def test_outputs_of_zeros_have_any_scale():
    weight = np.zeros((3, 40), np.float32)
    weight[1] = np.arange(40)
    scales = weight_codes.weight_scales(weight)
    np.testing.assert_array_equal(scales, 1)
    np.testing.assert_array_equal(weight_codes.codes(weight, scales), weight)
    weight[2, 0] = -0.0
    np.testing.assert_array_equal(weight_codes.weight_scales(weight), 1)


def test_one_weight_of_an_output_is_its_scale():
    weight = np.float32([[3.7], [-1e-30]])
    scales = weight_codes.weight_scales(weight)
    np.testing.assert_array_equal(scales, np.abs(weight[:, 0]))
    assert weight_codes.codes(weight, scales).ravel().tolist() == [1, -1]


@pytest.mark.parametrize("shape", [(40, 12), (20, 17), (8, 3, 3, 16)])
def test_numbers_that_were_never_quantised_have_none(shape):
    assert np.isnan(weight_codes.weight_scales(normal(np.random.default_rng(0), *shape))).all()


def test_each_output_is_for_itself():
    rng = np.random.default_rng(0)
    weight = normal(rng, 4, 50)
    weight[2] = rng.integers(-MOST, MOST + 1, 50) * np.float32(0.1)
    assert np.isnan(weight_codes.weight_scales(weight)).tolist() == [True, True, False, True]


@pytest.mark.parametrize("place", [0, 15, 16, 49])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_with_nan_or_infinity_has_none(value, place):
    weight = np.tile(np.arange(50, dtype=np.float32), (3, 1))
    weight[1, place] = value
    assert np.isnan(weight_codes.weight_scales(weight)).tolist() == [False, True, False]


@pytest.mark.parametrize("place", [3, 40])
def test_one_weight_beside_the_grid_is_enough(place):
    """A hundredth of a step is, and what rounding leaves is not."""
    whole = np.random.default_rng(0).integers(-MOST, MOST + 1, (2, 50))
    whole[:, 7] = MOST
    weight = times(whole, np.float32([0.3, 0.3]))
    weight[1, place] += np.float32(0.003)
    assert np.isnan(weight_codes.weight_scales(weight)).tolist() == [False, True]


@given(st.lists(st.integers(-128, MOST), min_size=1, max_size=40), any_scale)
@settings(max_examples=200, deadline=None)
def test_128_below_zero_has_no_code_unless_it_is_a_multiple(whole, scale):
    """A file whose codes go down to -128 is right where a coarser scale has them all, and else
    stays float32."""
    whole, scales = np.array([[*whole, -128]]), np.float32([scale])
    assume(np.isfinite(128 * scales).all())
    weight, common = times(whole, scales), int(np.gcd.reduce(whole, axis=None))
    if common == 1:
        assert np.isnan(weight_codes.weight_scales(weight)).all()
    else:
        assert_found(weight, whole, scales)


def test_codes_of_a_large_layer_are_its_own():
    """More weights than are tried first, and outputs of all signs."""
    rng = np.random.default_rng(0)
    whole, scales = rng.integers(-MOST, MOST + 1, (300, 3, 3, 64)), rng.random(300, np.float32) + 1
    assert_found(times(whole, scales), whole, scales)
