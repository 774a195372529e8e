"""Depthwise convolution on CUDA: compiled-in windows and any other, at every width."""
import numpy as np
import pytest
from checks import integers, normal, sum_bound
from cuda_checks import DTYPES, assert_exact, assert_resources, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from test_depthwise import WEIGHTS, arrays

from kernels import ops
from kernels.cuda import depthwise_run, sass, vector
from kernels.cuda.host import depthwise
from kernels.ops import Conv2d, TensorSpec

# Compiling the windows takes most of the time; bfloat16 differs from float16 in vector.py alone.
FEWER = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("pixels", depthwise.PIXELS)
@pytest.mark.parametrize(("kernel", "stride"), depthwise.COMPILED_IN)
def test_the_common_windows_are_exact(kernel, stride, pixels, dtype, runner, monkeypatch):
    monkeypatch.setattr(depthwise, "run_length", lambda *_: 0)
    p, fast = kernel // 2, pixels == max(depthwise.PIXELS)
    op = Conv2d((stride, stride), (p, p, p, p), (1, 1), 16, ops.Relu())
    for width in (1, 9):                # narrower than a thread's pixels, and not a multiple
        assert_exact(op, *arrays(integers, 2, 6, width, 16, (kernel, kernel)), weights=WEIGHTS,
                     dtype=dtype, multiprocessors=0 if fast else 132, runner=runner,
                     kernel=f"depthwise_{kernel}x{kernel}_s{stride}_{vector.short(dtype)}x"
                            f"{vector.lanes(dtype)}_p{pixels}_clip")


def run_name(kernel, stride, dtype):
    return depthwise.run_kernel(dtype, (kernel, stride), "clip").name


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("run", [1, 3, 9])      # of 4 to 7 rows: single ones, a rest, all in one
@pytest.mark.parametrize(("kernel", "stride"), depthwise.RUNS)
def test_runs_of_rows_are_exact(kernel, stride, run, dtype, runner, monkeypatch):
    monkeypatch.setattr(depthwise, "run_length", lambda columns, rows, *_: min(run, rows))
    for height, width, padding in ((7, 9, (1, 1, 1, 1)), (8, 5, (0, 2, 3, 0))):
        op = Conv2d((stride, stride), padding, (1, 1), 24, ops.Relu())
        assert_exact(op, *arrays(integers, 3, height, width, 24, (kernel, kernel)),
                     weights=WEIGHTS, dtype=dtype, runner=runner,
                     kernel=run_name(kernel, stride, dtype))


@st.composite
def runs(draw):
    """Problems for runs, with more padding than a window has rows or columns."""
    kernel, stride = draw(st.sampled_from(list(depthwise.RUNS)))
    padding = tuple(draw(st.integers(0, kernel + 1)) for _ in range(4))
    h, w = (max(1, kernel - sum(padding[i::2])) + draw(st.integers(0, 9)) for i in (0, 1))
    c = draw(st.sampled_from([4, 20, 72]))
    activation = draw(st.sampled_from([None, ops.Clip(0.0, 6.0)]))
    op = Conv2d((stride, stride), padding, (1, 1), c, activation)
    shape = draw(st.integers(1, 3)), h, w, c, (kernel, kernel)
    return op, shape, draw(st.integers(1, 8)), draw(st.booleans())


@given(runs(), st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_any_run_is_exact_on_integers(problem, dtype):
    op, shape, run, has_residual = problem
    inputs = arrays(integers, *shape)
    out = op.output_shape(*(array.shape for array in inputs))
    residual = [integers(np.random.default_rng(1), *out)] * has_residual
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "run_length", lambda columns, rows, *_: min(run, rows))
        assert_exact(op, *inputs, *residual, weights=WEIGHTS, dtype=dtype,
                     kernel=run_name(shape[4][0], op.stride[0], dtype))


def test_runs_are_for_many_pixels():
    """By numbers of an H200 with 132 multiprocessors, on which 512 threads of each are at work."""
    full = 132 * 512
    assert depthwise.run_length(256 * 144 * 4, 14, 2, full) == 7
    assert depthwise.run_length(256 * 36 * 14, 56, 2, full) == 56
    assert depthwise.run_length(1 * 36 * 14, 56, 2, full) == 0     # a batch of one fills no GPU,
    assert depthwise.run_length(32 * 36 * 14, 14, 4, full) == 0    # nor do runs that are worth it


@pytest.mark.parametrize(("channels", "dilation"), [(6, (1, 1)), (16, (2, 2))])
def test_what_has_no_run_goes_row_by_row(channels, dilation):
    op = Conv2d((1, 1), (1, 1, 1, 1), dilation, channels)
    shape = (1, 9, 9, channels, (3, 3))
    name = "depthwise_3x3_s1_f16x2_p4_clip" if channels == 6 else "depthwise_any_f16x8_p4_clip"
    assert_exact(op, *arrays(integers, *shape), weights=WEIGHTS, dtype="float16",
                 multiprocessors=0, kernel=name)


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
@pytest.mark.parametrize("run", [0, 3])
@pytest.mark.parametrize("activation", [None, ops.Silu()])
def test_floats_are_within_the_bound(activation, run, dtype, runner, monkeypatch):
    monkeypatch.setattr(depthwise, "run_length", lambda *_: run)
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
@pytest.mark.parametrize("run", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_travel_as_ieee_says(value, run, dtype, runner, monkeypatch):
    monkeypatch.setattr(depthwise, "run_length", lambda *_: run)
    op = Conv2d(padding=(1, 1, 1, 1), groups=12)
    x, weight, bias = arrays(integers, 1, 8, 9, 12, (3, 3))
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
        if kernel.make is depthwise_run.make:
            assert_runs_are_lean(kernel, found)
            continue
        _, lanes, pixels, window, stride, _ = kernel.config
        if window and lanes == vector.lanes(dtype):
            # Each input column of a row once; the fp32 weights are 16 bytes for 4 channels.
            inputs = window * ((pixels - 1) * stride + window)
            weights = (window * window + 1) * lanes // 4
            assert found.counts["LDG.E.128"] == inputs + weights + pixels   # and the residual
            assert found.counts["STG.E.128"] == pixels


def assert_runs_are_lean(kernel, found):
    """As many blocks fit as the host counts on, and a row of x is loaded once, in one loop."""
    _, lanes, pixels, window, stride, _ = kernel.config
    assert found.registers * depthwise.depthwise.THREADS * depthwise_run.BLOCKS <= 65536
    loop = sass.loop_opcodes(found.cubin, "FFMA")
    columns = (pixels - 1) * stride + window
    assert sass.number(loop, "LDG") == columns * stride + pixels            # and the residual
    assert sass.number(loop, "STG") == pixels
    assert sass.number(loop, "FFMA") == window * window * pixels * lanes    # each product once
    assert loop.total() < 3 * window * window * pixels * lanes + 50
