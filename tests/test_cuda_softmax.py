"""Softmax and its logarithm on CUDA: rows of a warp, rows of a block, columns."""
import numpy as np
import pytest
from checks import EPS, normal
from cuda_checks import COMPILED_DTYPES, DTYPES, assert_resources, assert_within, rounded, run

from kernels import reference
from kernels.cuda.host import softmax
from kernels.ops import Softmax


def check(shape, axis, dtype, kernel, runner):
    x = normal(np.random.default_rng(0), *shape) * 10
    op = Softmax(axis)
    # exp turns the rounding of x - max, relative to its size, into a relative error; the sum is
    # taken relative to a maximum that may grow, which costs such a rounding more.
    spread = np.abs(x - x.max(axis=axis, keepdims=True))
    bound = (2 * spread + shape[axis] + 12) * EPS * reference.run(op, x)
    assert_within(bound, op, x, dtype=dtype, kernel=kernel, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "kernel"), [
    ((3, 1000), -1, ""),                        # the classes of ImageNet
    ((5, 7), -1, "softmax_warp_"),              # shorter than a warp, odd
    ((2, 2, 1024), 2, ""),
    ((2, 4104), 1, "softmax_block_"),
    ((2, 131), 1, ""),
    ((3, 5, 9), 1, "softmax_columns_"),
    ((4, 3, 2, 2), 0, "softmax_columns_"),
    ((1, 1), -1, "softmax_warp_"),
])
def test_any_axis_is_within_the_bound(shape, axis, kernel, dtype, runner):
    check(shape, axis, dtype, kernel, runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "kernel"), [
    ((3, 1000), -1, "log_softmax_"), ((5, 7), -1, "log_softmax_warp_"),
    ((2, 4104), 1, "log_softmax_block_"), ((3, 5, 9), 1, "log_softmax_columns_"),
    ((1, 1), -1, "log_softmax_warp_")])
def test_logarithms_are_within_the_bound(shape, axis, kernel, dtype, runner):
    x, op = rounded(normal(np.random.default_rng(0), *shape) * 10, dtype), Softmax(axis, log=True)
    spread = np.abs(x.astype(np.float64) - x.astype(np.float64).max(axis=axis, keepdims=True))
    # A relative error of the sum is an absolute one of its logarithm; terms far below the maximum
    # weigh as little as they are, so that each one's own error is at most EPS * |d| * exp(d) < EPS.
    bound = (shape[axis] * 2 + 12 + 2 * spread) * EPS
    assert_within(bound, op, x, dtype=dtype, kernel=kernel, runner=runner)


@pytest.mark.parametrize("axis", [0, 1])
def test_logarithms_of_large_values(axis, runner):
    x = np.array([[1e30, 1e30, -1e30], [-np.inf, 0, 0], [200, 0, 0]], np.float32)
    y = run(Softmax(axis, log=True), np.ascontiguousarray(x if axis else x.T), runner=runner)
    half = np.float32(-np.log(2))
    expected = np.float32([[half, half, -2e30], [-np.inf, half, half], [0, -200, -200]])
    np.testing.assert_allclose(y if axis else y.T, expected, rtol=2 * EPS)


@pytest.mark.parametrize("axis", [0, 1])
def test_large_values_do_not_overflow_and_sums_are_one(axis, runner):
    x = np.array([[1e30, 1e30, -1e30], [-1e30, -1e30, -1e30], [-np.inf, 0, 0]], np.float32)
    y = run(Softmax(axis), np.ascontiguousarray(x if axis else x.T), runner=runner)
    expected = np.float32([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5]])
    np.testing.assert_array_equal(y if axis else y.T, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("length", [3, 600])
@pytest.mark.parametrize("log", [False, True])
def test_what_is_not_finite_spoils_its_own_row_only(log, value, length, runner):
    x = np.ones((2, length), np.float32)
    x[0] = value if value < 0 else x[0]     # a row of minus infinity alone has no softmax
    x[0, length // 2] = value
    y = run(Softmax(log=log), x, runner=runner)
    assert np.isnan(y[0]).all()
    np.testing.assert_allclose(y[1], -np.log(length) if log else 1 / length, rtol=8 * EPS)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_resources(dtype, arch):
    for kernel in softmax.kernels(dtype):
        found = assert_resources(kernel, arch)
        if kernel.name.endswith(("f32x4", "f16x8")):
            assert found.counts["LDG.E.128"] >= 2
            assert found.counts["STG.E.128"] >= 1
