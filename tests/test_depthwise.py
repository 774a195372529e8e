"""Depthwise convolution: every window size, stride, dilation and border."""
import numpy as np
import pytest
from checks import assert_exact, assert_within, integers, normal, sum_bound
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cpu.geometry import ConvGeometry
from kernels.cpu.host import depthwise
from kernels.cpu.sizes import DEPTHWISE_GROUP as GROUP
from kernels.cpu.sizes import DEPTHWISE_PIXELS as PIXELS
from kernels.cpu.sizes import LANES, WINDOWS
from kernels.ops import Conv2d

WEIGHTS = (1, 2)


def arrays(make, n, h, w, c, kernel, seed=0):
    rng = np.random.default_rng(seed)
    return make(rng, n, h, w, c), make(rng, c, *kernel, 1), make(rng, c)


@st.composite
def problems(draw):
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (1, 3), (4, 2), (7, 7), (3, 5), (1, 1)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    h = draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 18))
    w = draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 30))
    c = draw(st.sampled_from([2, 3, LANES - 1, LANES, LANES + 1, GROUP + 5]))
    op = Conv2d((draw(st.integers(1, 3)), draw(st.integers(1, 3))), padding, dilation, c,
                draw(st.sampled_from([None, ops.Relu(), ops.Clip(0.0, 6.0)])))
    return op, (draw(st.integers(1, 2)), h, w, c, kernel)


@given(problems(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_window_is_exact_on_integers(problem, seed):
    op, shape = problem
    assert_exact(op, *arrays(integers, *shape, seed=seed), weights=WEIGHTS, kernel="depthwise_")


@given(problems(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_window_is_within_the_bound_on_floats(problem, seed):
    op, shape = problem
    inputs = arrays(normal, *shape, seed=seed)
    bound = sum_bound(Conv2d(op.stride, op.padding, op.dilation, op.groups), inputs[1][0].size,
                      *inputs)
    assert_within(bound, op, *inputs, weights=WEIGHTS, kernel="depthwise_")


@pytest.mark.parametrize("width", [1, 2, PIXELS - 1, PIXELS, PIXELS + 1, 2 * PIXELS])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)])
def test_the_common_windows_at_every_width(width, kernel, stride):
    p = kernel // 2
    op = Conv2d((stride, stride), (p, p, p, p), (1, 1), LANES + 3, ops.Relu())
    assert_exact(op, *arrays(integers, 2, 6, width, LANES + 3, (kernel, kernel)), weights=WEIGHTS,
                 kernel=f"depthwise_{kernel}x{kernel}_f32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_travel_as_ieee_says(value):
    op = Conv2d(padding=(1, 1, 1, 1), groups=5)
    x, weight, bias = arrays(integers, 1, 8, 9, 5, (3, 3))
    weight[weight == 0] = 1
    x[0, 3, 8, 2] = value
    assert_exact(op, x, weight, bias, weights=WEIGHTS, kernel="depthwise_")


def test_other_activations_are_fused_too():
    """One of them, for each takes long to compile; test_traced.py has all."""
    op = Conv2d(padding=(1, 1, 1, 1), groups=6, activation=ops.Sigmoid())
    inputs = arrays(normal, 1, 5, 8, 6, (3, 3))
    bound = sum_bound(Conv2d(padding=(1, 1, 1, 1), groups=6), 9, *inputs) + 4e-7
    assert_within(bound, op, *inputs, weights=WEIGHTS, kernel="depthwise_3x3")


def test_more_filters_than_channels_or_a_residual_go_the_general_way():
    rng = np.random.default_rng(0)
    x, weight, bias = integers(rng, 1, 6, 7, 4), integers(rng, 8, 3, 3, 1), integers(rng, 8)
    assert_exact(Conv2d(groups=4), x, weight, bias, weights=WEIGHTS, kernel="conv2d_3x3")
    op = Conv2d(groups=4, padding=(1, 1, 1, 1))
    inputs = arrays(integers, 1, 6, 7, 4, (3, 3))
    assert_exact(op, *inputs, integers(rng, 1, 6, 7, 4), weights=WEIGHTS, kernel="conv2d_3x3")


@pytest.mark.parametrize(("family", "number"), [
    (family, number) for family, windows in enumerate(WINDOWS) for number in range(len(windows))])
def test_each_window_of_the_micro_kernel(family, number):
    taps, stride, left, right = WINDOWS[family][number]
    width = (PIXELS - 1) * stride + taps - left - right
    op = Conv2d((stride, stride), (left, left, right, right), (1, 1), LANES + 3)
    channels = LANES + 3
    g = ConvGeometry(width, width, channels, 7, 7, channels, taps, taps, stride, stride, left, left,
                     1, 1, 1)
    assert depthwise.cut_columns(g).tolist() == [[0, PIXELS, number, left]]
    assert_exact(op, *arrays(integers, 1, width, width, LANES + 3, (taps, taps)), weights=WEIGHTS,
                 kernel="depthwise_")


def test_common_networks_have_no_other_windows():
    """Padding 1 and 2 as PyTorch has it, and TensorFlow's SAME."""
    for taps, pads in ((3, [(1, 1), (0, 1)]), (5, [(2, 2), (1, 2)]), (7, [(3, 3)])):
        for width in (7, 14, 28, 56, 112):
            for stride in (1, 2)[:len(pads)]:
                for before, after in pads if stride == 2 else pads[:1]:
                    out = (width + before + after - taps) // stride + 1
                    g = ConvGeometry(width, width, 8, out, out, 8, taps, taps, stride, stride,
                                     before, before, 1, 1, 1)
                    if out >= PIXELS:
                        assert (depthwise.cut_columns(g)[:, 2] >= 0).all(), (taps, width, stride)
