"""The convolution of an image of few channels: windows, edges, tiles, and when it serves."""
import numpy as np
import pytest
from checks import sum_bound
from cuda_checks import (
    assert_exact,
    assert_resources,
    assert_within,
    number_of,
    run,
    skip_on_others,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_conv import WEIGHTS, arrays, representable, signs

from kernels import ops
from kernels.cuda import compiler, emulate, sass
from kernels.cuda.host import conv_image
from kernels.emulator import EmulatorError
from kernels.ops import Conv2d, TensorSpec

DTYPES = ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
SAME = (1, 1, 1, 1)
PROBLEMS = {        # (op, (batch, height, width, channels, outputs, kernel))
    "ResNet": (Conv2d((2, 2), (3, 3, 3, 3)), (2, 33, 38, 3, 64, (7, 7))),
    "VGG": (Conv2d((1, 1), SAME), (1, 17, 33, 3, 64, (3, 3))),
    "MobileNet": (Conv2d((2, 2), SAME), (2, 31, 34, 3, 32, (3, 3))),
    "TensorFlow's padding": (Conv2d((2, 2), (0, 0, 1, 1)), (1, 20, 22, 3, 32, (3, 3))),
    "one channel": (Conv2d((1, 1), (2, 2, 2, 2)), (1, 12, 14, 1, 8, (5, 5))),
    "two channels": (Conv2d((2, 1), (0, 1, 0, 1)), (1, 12, 14, 2, 40, (2, 3))),
    "four channels": (Conv2d((1, 2)), (1, 12, 35, 4, 72, (1, 4))),
    "less than a tile": (Conv2d((1, 1), SAME), (3, 3, 2, 3, 40, (3, 3))),
    "wide padding": (Conv2d((2, 2), (4, 6, 5, 3)), (1, 5, 4, 3, 16, (3, 3))),
}


@pytest.fixture
def runner(runner):
    skip_on_others(runner, "float16 needs sm_80", lambda arch: number_of(arch) >= 80)
    return runner


def check(op, *inputs, dtype="float16", **options):
    assert_exact(op, *inputs, weights=WEIGHTS[:len(inputs) - 1], dtype=dtype,
                 kernel="conv_image_", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [
    pytest.param(problem, marks=[pytest.mark.slow] * problem.endswith(("channel", "channels")))
    for problem in PROBLEMS])       # each number of channels is a kernel to compile
def test_every_kind_of_window_is_exact(problem, dtype, runner):
    """On one multiprocessor a block goes through several parts of the larger images."""
    op, shape = PROBLEMS[problem]
    check(op, *arrays(signs, *shape), dtype=dtype, runner=runner, multiprocessors=1)


@st.composite
def problems(draw):
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    h = draw(st.integers(max(1, kernel[0] - padding[0] - padding[2]), 12))
    w = draw(st.integers(max(1, kernel[1] - padding[1] - padding[3]), 20))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    op = Conv2d(stride, padding, activation=draw(st.sampled_from([None, ops.Relu()])))
    return op, (draw(st.integers(1, 2)), h, w, draw(st.integers(2, 4)), 8, kernel)


@pytest.mark.slow
@given(problems())
@settings(max_examples=25, deadline=None)
def test_any_window_is_exact_on_integers(problem):
    op, shape = problem
    check(op, *arrays(signs, *shape))


@pytest.mark.parametrize("activation", [ops.Clip(0.0, 6.0), pytest.param(
    ops.Silu(), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_within_the_bound(dtype, activation, runner):
    op = Conv2d((2, 2), SAME, activation=activation)
    inputs = arrays(representable(dtype), 1, 19, 36, 3, 32, (3, 3))
    # As of conv_mma.py: tensor cores truncate, and no activation is steeper than 1.1.
    bound = 2.2 * sum_bound(Conv2d(op.stride, op.padding), 27, *inputs) + 4e-7
    assert_within(bound, op, *inputs, weights=WEIGHTS, dtype=dtype, kernel="conv_image_",
                  runner=runner)


def test_bias_may_be_left_out(runner):
    x, weight, _ = arrays(signs, 1, 9, 18, 3, 32, (3, 3))
    check(Conv2d((2, 2), SAME), x, weight, runner=runner)


@pytest.mark.slow
def test_nan_and_infinity_travel_as_ieee_says(runner):
    """Where the kernel's width is whole steps of the tensor cores."""
    x, weight, bias = arrays(signs, 1, 9, 18, 3, 32, (4, 4))
    weight[weight == 0] = 1
    x[0, 0, 0, 2], x[0, 3, 8, 1], x[0, 8, 17, 0] = np.nan, np.inf, -np.inf
    check(Conv2d((1, 1), SAME), x, weight, bias, runner=runner)


@pytest.mark.parametrize("instruction", ["bar.sync \t0;", "cp.async.wait_group 0;",
                                         "griddepcontrol.wait;"])
def test_each_wait_is_needed(instruction, monkeypatch):
    op, shape = PROBLEMS["MobileNet"]
    inputs = arrays(signs, *shape)
    whole = compiler.ptx(conv_image.kernel_of("float16", conv_image.COMPILED_IN[3], "clip"))
    assert instruction in whole
    for nth in range(whole.count(instruction)):
        pieces = whole.split(instruction)
        broken = (instruction.join(pieces[:nth + 1]) + "mov.u32 %r1, %r1;"
                  + instruction.join(pieces[nth + 1:]))
        monkeypatch.setattr(emulate, "ptx", lambda kernel, broken=broken: broken)
        with pytest.raises(EmulatorError):
            run(op, *inputs, dtype="float16", weights=WEIGHTS, multiprocessors=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_resources(dtype, arch):
    for kernel, window in zip(conv_image.kernels(dtype), conv_image.COMPILED_IN, strict=True):
        found = assert_resources(kernel, arch)
        assert found.registers <= 65536 // (conv_image.THREADS * conv_image.BLOCKS)
        # Each product once, of all of the sum, two rows of y and all channels of the tile.
        assert sass.number(found.counts, "HMMA") == window.chunks // 2 * 2 * window.block_n // 8
        # The upper row's patches of a kernel row are the lower row's of another, and read once.
        loads = sass.number(found.counts, "LDSM")
        assert loads <= window.chunks // 2 * (2 + window.block_n // 16)


def specs(channels=3, outputs=64, kernel=(7, 7), groups=1, residual=False):
    shapes = [(1, 32, 32, channels), (outputs, *kernel, channels // groups), (outputs,),
              (1, 16, 16, outputs)]
    return [TensorSpec(shape, "float16") for shape in shapes[:4 if residual else 3]]


@pytest.mark.parametrize(("op", "given", "dtype"), [
    (Conv2d(), specs(), "float32"), (Conv2d(), specs(), "tf32"), (Conv2d(), specs(5), "float16"),
    (Conv2d(), specs(outputs=20), "float16"), (Conv2d(), specs(residual=True), "float16"),
    (Conv2d((4, 4)), specs(), "float16"), (Conv2d(dilation=(2, 2)), specs(), "float16"),
    (Conv2d(groups=2), specs(4, groups=2), "float16"),
    (Conv2d(), specs(kernel=(15, 16)), "float16")])
def test_other_layers_are_left_to_other_kernels(op, given, dtype):
    assert conv_image.fits(Conv2d(), specs(), "float16")
    assert not conv_image.fits(op, given, dtype)
