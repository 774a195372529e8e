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


def test_large_values_do_not_overflow_and_sums_are_one():
    y = run(Softmax(), np.array([[1e30, 1e30, -1e30], [-1e30, -1e30, -1e30]], np.float32))
    np.testing.assert_array_equal(y, np.float32([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_nan_spoils_its_own_row_only():
    x = np.array([[1, np.nan, 3], [1, 2, 3]], np.float32)
    y = run(Softmax(), x)
    assert np.isnan(y[0]).all()
    assert not np.isnan(y[1]).any()
