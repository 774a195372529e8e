"""Pooling on CUDA: windows of every kind, averages split over blocks."""
import numpy as np
import pytest
from checks import EPS, integers, normal
from cuda_checks import (
    COMPILED_DTYPES,
    DTYPES,
    assert_exact,
    assert_resources,
    assert_within,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pool import problems

from kernels import reference
from kernels.cuda import vector
from kernels.cuda.host import pool
from kernels.cuda.pool import FLIGHT
from kernels.ops import AvgPool2d, GlobalAvgPool2d, GlobalL2Pool2d, GlobalMaxPool2d, MaxPool2d

# kernel, stride, padding, dilation, ceil_mode
WINDOWS = [
    ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), False),      # overlapping, as in ResNet
    ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), True),
    ((3, 3), (1, 1), (1, 0, 0, 1), (1, 1), False),      # asymmetric padding
    ((3, 2), (2, 1), (1, 0, 1, 1), (2, 1), True),       # dilated, no window compiled in
    ((1, 2), (3, 4), (0, 0, 0, 0), (1, 1), False),      # stride beyond the kernel
]


def name(kind, kernel):
    return f"{kind}_pool2d_" + (f"{kernel[0]}x{kernel[1]}" if kernel in pool.COMPILED_IN else "any")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 6, 16])
@pytest.mark.parametrize("window", WINDOWS)
def test_max_pool_is_exact(window, channels, dtype, runner):
    x = integers(np.random.default_rng(0), 2, 7, 9, channels) - 5   # padding with 0 would show
    assert_exact(MaxPool2d(*window), x, dtype=dtype, kernel=name("max", window[0]), runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize("window", WINDOWS[:3])
def test_avg_pool_is_within_the_bound(window, include_pad, dtype, runner):
    op = AvgPool2d(*window, count_include_pad=include_pad)
    x = normal(np.random.default_rng(0), 2, 7, 9, 16)
    bound = (window[0][0] * window[0][1] + 2) * EPS * reference.run(op, np.abs(x))
    assert_within(bound, op, x, dtype=dtype, kernel=name("avg", window[0]), runner=runner)


@given(problems(dilated=True), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_max_pool_is_exact(problem, seed):
    shape, kernel, stride, padding, dilation, ceil_mode = problem
    op = MaxPool2d(kernel, stride, padding, dilation, ceil_mode)
    assert_exact(op, normal(np.random.default_rng(seed), *shape) - 3, kernel=name("max", kernel))


@given(problems(dilated=False), st.booleans(), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_avg_pool_is_within_the_bound(problem, include_pad, seed):
    shape, kernel, stride, padding, dilation, ceil_mode = problem
    op = AvgPool2d(kernel, stride, padding, dilation, ceil_mode, include_pad)
    x = normal(np.random.default_rng(seed), *shape)
    bound = (kernel[0] * kernel[1] + 2) * EPS * reference.run(op, np.abs(x))
    assert_within(bound, op, x, kernel=name("avg", kernel))


WHOLE = [
    ((2, 7, 7, 136), False),    # more than one block of channels, the last one partly filled
    ((1, 1, 1, 1), False),
    ((1, 20, 30, 7), True),     # one block's worth of channels: pixels are split
    ((2, 17, 31, 16), True),    # pixels that do not divide evenly
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "split"), WHOLE)
def test_global_maximum_is_exact(shape, split, dtype, runner):
    x = integers(np.random.default_rng(0), *shape, low=-99, high=-1)    # 0 for no pixel would show
    partial = vector.short(dtype, "float32") if split else vector.short(dtype)
    assert_exact(GlobalMaxPool2d(), x, dtype=dtype, runner=runner,
                 kernel=f"global_max_pool2d_{partial}x")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "split"), WHOLE)
def test_global_average(shape, split, dtype, runner):
    x = normal(np.random.default_rng(0), *shape)
    bound = (shape[1] * shape[2] + 2) * EPS * reference.run(GlobalAvgPool2d(), np.abs(x))
    partial = vector.short(dtype, "float32") if split else vector.short(dtype)
    assert_within(bound, GlobalAvgPool2d(), x, dtype=dtype, runner=runner,
                  kernel=f"global_avg_pool2d_{partial}x")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "split"), WHOLE)
def test_global_l2_norm(shape, split, dtype, runner):
    x = normal(np.random.default_rng(0), *shape) * 1000     # squares are beyond float16
    bound = (shape[1] * shape[2] / 2 + 2) * EPS * reference.run(GlobalL2Pool2d(), x)
    kernel = (f"global_squares_pool2d_{vector.short(dtype, 'float32')}x" if split else
              f"global_l2_pool2d_{vector.short(dtype)}x")
    assert_within(bound, GlobalL2Pool2d(), x, dtype=dtype, runner=runner, kernel=kernel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "kind"), [(GlobalAvgPool2d(), "avg"), (GlobalMaxPool2d(), "max"),
                                          (GlobalL2Pool2d(), "l2")])
@pytest.mark.parametrize("size", [(7, 7), (1, 3), (9, 13)])
def test_warps_alone_where_there_is_enough_for_all(size, op, kind, dtype, runner):
    """The last block has less to do, and its last vectors of channels are not there."""
    x = normal(np.random.default_rng(0), 11, *size, 440)
    bound = 0 if kind == "max" else (np.prod(size) + 2) * EPS * reference.run(op, np.abs(x))
    assert_within(bound, op, x, dtype=dtype, runner=runner,
                  kernel=f"global_{kind}_pool2d_{vector.short(dtype)}x{vector.lanes(dtype)}_w1")


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 11), (7, 7), (9, 13), (31, 33)])
def test_means_are_divided_to_the_nearest(size, runner):
    """Of one number and zeros, so that the sum is exact."""
    x = np.zeros((11, *size, 64), np.float32)
    x[:, 0, 0] = normal(np.random.default_rng(0), 11, 64) * 10.0 ** np.arange(-30, 34)
    np.testing.assert_array_equal(run(GlobalAvgPool2d(), x, runner=runner)[:, 0, 0],
                                  x[:, 0, 0] / np.float32(np.prod(size)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", [MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)), GlobalAvgPool2d(),
                                GlobalMaxPool2d(), AvgPool2d((2, 2), (1, 1))])
def test_nan_and_infinity_travel_as_ieee_says(op, value, runner):
    x = integers(np.random.default_rng(0), 1, 4, 4, 20)
    for place in ((0, 0, 0, 3), (0, 2, 2, 7), (0, 3, 3, 19)):
        x[place] = value
    assert_exact(op, x, runner=runner)
    if isinstance(op, MaxPool2d | GlobalMaxPool2d):
        assert_exact(op, x, dtype="float16", runner=runner)
        assert_exact(op, x, dtype="bfloat16", runner=runner)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_resources(dtype, arch):
    for kernel in pool.kernels(dtype):
        found = assert_resources(kernel, arch)
        if kernel.config[:2] == ("max", dtype) and kernel.config[2:] == (vector.lanes(dtype), 3, 3):
            assert found.counts["LDG.E.128"] == 9
            assert found.counts["STG.E.128"] == 1
        if kernel.name.endswith("_w1") and kernel.config[3] > 1:
            assert found.counts["LDG.E.128"] == FLIGHT[1]
            assert found.registers <= 64        # 32 warps
