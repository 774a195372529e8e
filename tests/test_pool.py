"""Pooling: overlapping, padded, ceil_mode, count_include_pad; any number of channels."""
import numpy as np
import pytest
from checks import EPS, assert_exact, assert_within, integers, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops, reference
from kernels.ops import AvgPool2d, GlobalAvgPool2d, GlobalL2Pool2d, GlobalMaxPool2d, MaxPool2d


@st.composite
def problems(draw, dilated):
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 3))) if dilated else (1, 1)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    most = [draw(st.integers(0, reach[i % 2] // 2)) for i in range(4)]
    h = draw(st.integers(max(1, reach[0] - most[0] - most[2]), 15))
    w = draw(st.integers(max(1, reach[1] - most[1] - most[3]), 15))
    stride = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shape = draw(st.integers(1, 3)), h, w, draw(st.sampled_from([1, 3, 16, 21, 70]))
    return shape, kernel, stride, tuple(most), dilation, draw(st.booleans())


@given(problems(dilated=True), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_max_pool_is_exact(problem, seed):
    shape, kernel, stride, padding, dilation, ceil_mode = problem
    op = MaxPool2d(kernel, stride, padding, dilation, ceil_mode)
    x = normal(np.random.default_rng(seed), *shape) - 3     # so that padding with 0 would show
    assert_exact(op, x, kernel=f"max_pool2d_{kernel[0]}x{kernel[1]}_f32")


@given(problems(dilated=False), st.booleans(), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_avg_pool_is_within_the_bound(problem, include_pad, seed):
    shape, kernel, stride, padding, dilation, ceil_mode = problem
    op = AvgPool2d(kernel, stride, padding, dilation, ceil_mode, include_pad)
    x = normal(np.random.default_rng(seed), *shape)
    bound = (kernel[0] * kernel[1] + 2) * EPS * reference.run(op, np.abs(x))
    assert_within(bound, op, x, kernel=f"avg_pool2d_{kernel[0]}x{kernel[1]}_f32")


@pytest.mark.parametrize("include_pad", [False, True])
def test_avg_pool_of_whole_numbers_over_windows_of_four_is_exact(include_pad):
    op = AvgPool2d((2, 2), (2, 2), (1, 1, 0, 0), (1, 1), False, include_pad)
    assert_exact(op, integers(np.random.default_rng(0), 2, 7, 9, 5) * 4)


GLOBAL = [(1, 1, 1, 1), (2, 7, 7, 130), (1, 1, 9, 64), (3, 5, 1, 63)]


@pytest.mark.parametrize("shape", GLOBAL)
def test_global_average(shape):
    x = normal(np.random.default_rng(0), *shape)
    bound = (shape[1] * shape[2] + 2) * EPS * reference.run(GlobalAvgPool2d(), np.abs(x))
    assert_within(bound, GlobalAvgPool2d(), x, kernel="global_avg_pool2d_f32")


@pytest.mark.parametrize("op", [GlobalAvgPool2d(), AvgPool2d((16, 12))])
def test_means_are_of_the_sums_of_lines(op):
    """So that an error is of one line and of as many sums as lines, not of as many as pixels: after
    the first one here, one sum of all would take none of the other pixels in."""
    x = np.ones((1, 16, 12, 70), np.float32)
    x[:, 0, 0] = 2 ** 24
    bound = (16 + 12 + 2) * EPS * reference.run(op, x)
    assert_within(bound, op, x, kernel="global_avg_pool2d_f32" if op == GlobalAvgPool2d() else
                  "avg_pool2d_16x12_f32")


@pytest.mark.parametrize("shape", GLOBAL)
def test_global_maximum(shape):
    x = normal(np.random.default_rng(0), *shape) - 3
    assert_exact(GlobalMaxPool2d(), x, kernel="global_max_pool2d_f32")


@pytest.mark.parametrize("shape", GLOBAL)
def test_global_l2_norm(shape):
    x = normal(np.random.default_rng(0), *shape) * 1000
    # Half of the sum's relative error, and the root's own.
    bound = (shape[1] * shape[2] / 2 + 2) * EPS * reference.run(GlobalL2Pool2d(), x)
    assert_within(bound, GlobalL2Pool2d(), x, kernel="global_l2_pool2d_f32")
    same = np.full(shape, 3, np.float32)[:, :1, :1]
    assert_exact(GlobalL2Pool2d(), np.tile(same, (1, 4, 4, 1)))     # the root of 16 * 9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", [MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)), GlobalAvgPool2d(),
                                GlobalMaxPool2d(), AvgPool2d((2, 2), (1, 1))])
def test_nan_and_infinity_travel_as_ieee_says(op, value):
    x = integers(np.random.default_rng(0), 1, 4, 4, 20)
    for place in ((0, 0, 0, 3), (0, 2, 2, 7), (0, 3, 3, 19)):
        x[place] = value
    assert_exact(op, x)


def test_padding_that_no_window_could_see_is_refused():
    with pytest.raises(ValueError, match="see no input"):
        ops.MaxPool2d((2, 2), padding=(2, 0, 0, 0)).output_shape((1, 8, 8, 1))
