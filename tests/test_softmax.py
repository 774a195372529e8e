"""Softmax along every axis."""
import numpy as np
import pytest
from checks import EPS, assert_within, normal, run

from kernels import reference
from kernels.ops import Softmax


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_any_axis_is_within_the_bound(axis):
    x = normal(np.random.default_rng(0), 2, 5, 7, 33) * 10
    op = Softmax(axis)
    # exp turns the rounding of x - max, relative to its size, into a relative error.
    spread = np.abs(x - x.max(axis=axis, keepdims=True))
    bound = (spread + x.shape[axis] + 8) * EPS * reference.run(op, x)
    assert_within(bound, op, x, kernel="softmax_f32")


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_the_logarithm_of_any_axis_is_within_the_bound(axis):
    x = normal(np.random.default_rng(0), 2, 5, 7, 33) * 10
    op = Softmax(axis, log=True)
    greatest = x.max(axis=axis, keepdims=True)
    # The relative error of the sum is that of softmax, and so the error of its logarithm; which,
    # as x - max and the result, is rounded, too.
    spread = np.abs(x - greatest)
    share = np.exp(reference.run(op, x))
    total = ((spread + 8) * share).sum(axis=axis, keepdims=True) + x.shape[axis]
    logarithm = np.log(np.exp((x - greatest).astype(float)).sum(axis=axis, keepdims=True))
    bound = (total + 4 * logarithm + spread + np.abs(reference.run(op, x))) * EPS
    assert_within(bound, op, x, kernel="log_softmax_f32")


def test_the_logarithm_of_large_and_infinite_values():
    x = np.array([[1e30, 1e30, -1e30], [0, -np.inf, -200], [np.inf, 0, 1], [np.nan, 0, 1]],
                 np.float32)
    y = run(Softmax(log=True), x)
    np.testing.assert_array_equal(y[:2], np.float32([[-np.log(2), -np.log(2), -2e30],
                                                     [0, -np.inf, -200]]))
    assert np.isnan(y[2, 0])
    assert np.isnan(y[3]).all()


def test_large_values_do_not_overflow_and_sums_are_one():
    y = run(Softmax(), np.array([[1e30, 1e30, -1e30], [-1e30, -1e30, -1e30]], np.float32))
    np.testing.assert_array_equal(y, np.float32([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_nan_spoils_its_own_row_only():
    x = np.array([[1, np.nan, 3], [1, 2, 3]], np.float32)
    y = run(Softmax(), x)
    assert np.isnan(y[0]).all()
    assert not np.isnan(y[1]).any()
