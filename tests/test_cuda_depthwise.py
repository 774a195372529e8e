"""Depthwise convolution on CUDA: compiled-in windows and any other, at every width."""
import numpy as np
import pytest
from checks import integers, normal, sum_bound
from cuda_checks import DTYPES, assert_exact, assert_resources, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from test_depthwise import WEIGHTS, arrays

from kernels import ops
from kernels.cuda import vector
from kernels.cuda.host import depthwise
from kernels.ops import Conv2d, TensorSpec

# Compiling the windows takes most of the time; bfloat16 differs from float16 in vector.py alone.
FEWER = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("pixels", depthwise.PIXELS)
@pytest.mark.parametrize(("kernel", "stride"), depthwise.COMPILED_IN)
def test_the_common_windows_are_exact(kernel, stride, pixels, dtype, runner):
    p, fast = kernel // 2, pixels == max(depthwise.PIXELS)
    op = Conv2d((stride, stride), (p, p, p, p), (1, 1), 16, ops.Relu())
    for width in (1, 9):                # narrower than a thread's pixels, and not a multiple
        assert_exact(op, *arrays(integers, 2, 6, width, 16, (kernel, kernel)), weights=WEIGHTS,
                     dtype=dtype, multiprocessors=0 if fast else 132, runner=runner,
                     kernel=f"depthwise_{kernel}x{kernel}_s{stride}_{vector.short(dtype)}x"
                            f"{vector.lanes(dtype)}_p{pixels}_clip")


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("channels", [1, 6, 12, 136])
def test_any_number_of_channels_is_exact(channels, dtype, runner):
    op = Conv2d((1, 1), (1, 1, 1, 1), (1, 1), channels)
    lanes = vector.lanes(dtype, channels)
    assert_exact(op, *arrays(integers, 1, 5, 6, channels, (3, 3)), weights=WEIGHTS, dtype=dtype,
                 kernel=f"depthwise_3x3_s1_{vector.short(dtype)}x{lanes}_", runner=runner)


@st.composite
def problems(draw):
    """Small, for the emulator; windows of any shape."""
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (1, 3), (4, 2), (7, 7), (1, 1)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = max(1, reach[0] - padding[0] - padding[2])
    h = least + draw(st.integers(0, 6))
    least = max(1, reach[1] - padding[1] - padding[3])
    w = least + draw(st.integers(0, 10))
    c = draw(st.sampled_from([5, 16]))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    op = Conv2d(stride, padding, dilation, c, draw(st.sampled_from([None, ops.Clip(0.0, 6.0)])))
    return op, (draw(st.integers(1, 2)), h, w, c, kernel)


@given(problems(), st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_any_window_is_exact_on_integers(problem, dtype):
    op, shape = problem
    assert_exact(op, *arrays(integers, *shape), weights=WEIGHTS, dtype=dtype, kernel="depthwise_")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, ops.Silu()])
def test_floats_are_within_the_bound(activation, dtype, runner):
    op = Conv2d((1, 1), (1, 1, 1, 1), (1, 1), 16, activation)
    inputs = arrays(normal, 1, 5, 7, 16, (3, 3))
    # No activation is steeper than 1.1.
    bound = 1.1 * sum_bound(Conv2d(op.stride, op.padding, op.dilation, 16), 9, *inputs) + 4e-7
    assert_within(bound, op, *inputs, weights=WEIGHTS, dtype=dtype, kernel="depthwise_3x3",
                  runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_before_the_activation(dtype, runner):
    op = Conv2d((1, 1), (1, 1, 1, 1), (1, 1), 16, ops.Relu())
    inputs = arrays(integers, 1, 5, 7, 16, (3, 3))
    residual = integers(np.random.default_rng(1), 1, 5, 7, 16) * 8
    assert_exact(op, *inputs, residual, weights=WEIGHTS, dtype=dtype, kernel="depthwise_3x3",
                 runner=runner)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_travel_as_ieee_says(value, dtype, runner):
    op = Conv2d(padding=(1, 1, 1, 1), groups=5)
    x, weight, bias = arrays(integers, 1, 8, 9, 5, (3, 3))
    weight[weight == 0] = 1
    x[0, 3, 8, 2] = value
    assert_exact(op, x, weight, bias, weights=WEIGHTS, dtype=dtype, kernel="depthwise_",
                 runner=runner)


def test_only_one_filter_per_channel_fits():
    x, one = TensorSpec((1, 8, 8, 4)), TensorSpec((4, 3, 3, 1))
    assert depthwise.fits(Conv2d(groups=4), [x, one])
    assert not depthwise.fits(Conv2d(groups=4), [x, TensorSpec((8, 3, 3, 1))])
    assert not depthwise.fits(Conv2d(groups=2), [x, TensorSpec((4, 3, 3, 2))])
    assert not depthwise.fits(Conv2d(), [TensorSpec((1, 8, 8, 1)), TensorSpec((4, 3, 3, 1))])


@pytest.mark.parametrize("dtype", FEWER)
def test_resources(dtype, arch):
    for kernel in depthwise.kernels(dtype):
        found = assert_resources(kernel, arch)
        _, lanes, pixels, window, stride, _ = kernel.config
        if window and lanes == vector.lanes(dtype):
            # Each input column of a row once; the fp32 weights are 16 bytes for 4 channels.
            inputs = window * ((pixels - 1) * stride + window)
            weights = (window * window + 1) * lanes // 4
            assert found.counts["LDG.E.128"] == inputs + weights + pixels   # and the residual
            assert found.counts["STG.E.128"] == pixels
