"""Convolution on CUDA, on tensor cores and CUDA cores alike: every tile, tap and remainder,
split-K, and all epilogues. What is special to either: test_cuda_conv_mma.py and _simt.py. Those of
wgmma: test_cuda_conv_wgmma.py."""
import numpy as np
import pytest
from checks import integers, normal, sum_bound
from cuda_checks import assert_exact, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cuda.activation import activation_of
from kernels.cuda.conv_gemm import PLANE, WHOLE
from kernels.cuda.host import conv, conv_choice, weights
from kernels.cuda.host.conv_choice import TILES
from kernels.cuda.host.conv_shape import Conv, folded
from kernels.cuda.launch import CudaOptions
from kernels.ops import Conv2d, TensorSpec

WEIGHTS = (1, 2)
# The 16-bit types and tf32 differ in one instruction and in the size of an element.
SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("tf32", "bfloat16")]
FEWER = ["float32", "float16", *SLOW]
FP32 = ["float32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in conv.MMA_DTYPES)]


def small(dtype):
    """64x64, on any architecture: the least work for the emulator."""
    return next(tile for tile in TILES[dtype]
                if tile.block_m == tile.block_n == 64 and not tile.wgmma)


def name(dtype, tile, end=WHOLE):
    return conv.conv_kernel(dtype, tile, "clip", end).name


def arrays(make, n, h, w, c, o, kernel, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    return make(rng, n, h, w, c), make(rng, o, *kernel, c // groups), make(rng, o)


def signs(rng, *shape):
    """-1, 0 and 1: sums of hundreds of products are still exact in bfloat16."""
    return integers(rng, *shape, low=-1, high=2)


def check(dtype, op, *inputs, tile=None, splits=1, **options):
    """assert_exact with the small tile or this one."""
    tile = tile or small(dtype)
    assert_exact(op, *inputs, weights=WEIGHTS[:len(inputs) - 1], dtype=dtype, tile=tile,
                 splits=splits, kernel=name(dtype, tile, PLANE if splits > 1 else WHOLE), **options)


PROBLEMS = {
    "pointwise": (Conv2d(), (2, 5, 7, 72, 80, (1, 1))),
    "one slice, fewer than stages": (Conv2d(), (1, 3, 3, 8, 8, (1, 1))),
    "less than a slice": (Conv2d(), (1, 3, 3, 4, 8, (1, 1))),
    "3x3": (Conv2d((1, 1), (1, 1, 1, 1)), (1, 9, 10, 24, 72, (3, 3))),
    "stride 2": (Conv2d((2, 2), (1, 1, 1, 1)), (2, 9, 10, 24, 16, (3, 3))),
    "stride > kernel": (Conv2d((3, 2)), (1, 10, 11, 16, 16, (1, 1))),
    "patches": (Conv2d((4, 4)), (2, 8, 12, 3, 16, (4, 4))),
    "patches, rows and columns left": (Conv2d((2, 4)), (1, 9, 13, 5, 8, (4, 4))),
    "patches, rows left": (Conv2d((5, 4)), (1, 9, 12, 8, 8, (4, 4))),
    "patches of 16": (Conv2d((16, 16)), (2, 32, 48, 3, 24, (16, 16))),
    "patches of 32": (Conv2d((32, 2)), (1, 64, 6, 4, 8, (32, 2))),
    "asymmetric, dilated": (Conv2d((1, 2), (1, 0, 2, 3), (2, 3)), (1, 9, 12, 16, 24, (3, 2))),
    "1xN": (Conv2d((1, 1), (0, 2, 0, 2)), (1, 1, 70, 16, 8, (1, 5))),
    "Nx1": (Conv2d((1, 1), (2, 0, 2, 0)), (1, 70, 1, 16, 8, (5, 1))),
    "groups": (Conv2d((1, 1), (1, 1, 1, 1), groups=3), (1, 6, 6, 48, 72, (3, 3), 3)),
    "odd outputs of odd groups": (Conv2d(groups=2), (1, 4, 5, 10, 38, (3, 3), 2)),
    "narrow groups": (Conv2d((2, 1), (1, 1, 1, 1), groups=8), (1, 6, 6, 32, 32, (3, 3), 8)),
    "more of them": (Conv2d((1, 1), (1, 1, 1, 1), groups=12), (1, 5, 6, 36, 96, (3, 3), 12)),
    "image of 3 channels": (Conv2d((2, 2), (3, 3, 3, 3)), (2, 12, 13, 3, 8, (7, 7))),
    "one channel": (Conv2d((1, 1), (1, 1, 1, 1)), (1, 6, 7, 1, 5, (3, 3))),
    "widest masks": (Conv2d((1, 1), (7, 8, 7, 8)), (1, 4, 4, 4, 8, (15, 16))),
}


# Taps and rows are found by the same text for all dtypes, so that a few windows do for the others.
FOR_ALL = ("one slice, fewer than stages", "3x3", "groups", "narrow groups",
           "image of 3 channels")


@pytest.mark.parametrize(("problem", "dtype"), [
    pytest.param(problem, dtype, marks=() if dtype == "float32" or (
        dtype == "float16" and problem in FOR_ALL) else pytest.mark.slow)
    for problem in PROBLEMS for dtype in TILES])
def test_every_kind_of_window_is_exact(problem, dtype, runner):
    op, shape = PROBLEMS[problem]
    check(dtype, op, *arrays(signs, *shape), runner=runner)


@pytest.mark.parametrize(("dtype", "tile"), [
    pytest.param(dtype, tile, marks=() if tile == TILES["float32"][0] else pytest.mark.slow)
    for dtype in TILES for tile in TILES[dtype] if not tile.wgmma], ids=str)
def test_every_tile_is_exact(dtype, tile, runner):
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Relu())
    inputs = arrays(signs, 1, 13, 11, 40, tile.block_n + 8, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 13, 11, tile.block_n + 8)
    check(dtype, op, *inputs, residual, tile=tile, runner=runner)


@st.composite
def problems(draw):
    """Small, for the emulator; windows of any shape."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    h = draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 9))
    w = draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 13))
    groups = draw(st.sampled_from([1, 1, 3]))
    c, o = draw(st.integers(1, 20)) * groups, draw(st.sampled_from([1, 4, 9, 20])) * groups
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    op = Conv2d(stride, padding, dilation, groups, draw(st.sampled_from([None, ops.Relu()])))
    return op, (draw(st.integers(1, 2)), h, w, c, o, kernel, groups)


@pytest.mark.parametrize("dtype", FP32)
@given(problems(), st.sampled_from([1, 3]))
@settings(max_examples=10, deadline=None)
def test_any_window_is_exact_on_integers(dtype, problem, splits):
    op, shape = problem
    if op.groups == shape[3] == shape[4]:
        return                                      # depthwise.py's
    assert_exact(op, *arrays(signs, *shape), weights=WEIGHTS, dtype=dtype, tile=small(dtype),
                 splits=splits, kernel="conv_")     # a short sum is not split


@pytest.mark.parametrize("dtype", FP32)
@pytest.mark.parametrize("out_channels", [24, 9])
@pytest.mark.parametrize("splits", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_splits_of_the_sum_add_up(splits, out_channels, dtype, runner):
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Clip(-3.0, 20.0))
    inputs = arrays(signs, 1, 5, 6, 40, out_channels, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 5, 6, out_channels)
    check(dtype, op, *inputs, residual, splits=splits, runner=runner)


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("out_channels", [24, 9])
@pytest.mark.parametrize("activation", [None, ops.Clip(0.0, 6.0)])
def test_a_residual_is_added_before_the_activation(activation, out_channels, dtype, runner):
    inputs = arrays(signs, 1, 5, 7, 16, out_channels, (3, 3))
    residual = integers(np.random.default_rng(1), 1, 3, 5, out_channels)
    check(dtype, Conv2d(activation=activation), *inputs, residual, runner=runner)


def test_groups_split_and_batched_at_once(runner):
    op = Conv2d((2, 1), (1, 2, 0, 1), (1, 2), 2, ops.Relu())
    inputs = arrays(integers, 2, 8, 9, 36, 40, (3, 3), 2)
    check("float32", op, *inputs, splits=3, runner=runner)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bias_may_be_left_out(dtype, runner):
    check(dtype, Conv2d(), *arrays(signs, 1, 4, 5, 16, 8, (1, 1))[:2], runner=runner)


def representable(dtype):
    """Normal floats that the dtype holds exactly, so that only the sums round."""
    def make(rng, *shape):
        values = normal(rng, *shape)
        if dtype == "tf32":
            return weights.round_to_tf32(values)
        import ml_dtypes  # noqa: F401 (gives NumPy the dtype)
        return values.astype(dtype).astype(np.float32)
    return make


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("activation", [None, pytest.param(ops.Silu(), marks=pytest.mark.slow)])
def test_floats_are_within_the_bound(activation, dtype, runner):
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=activation)
    inputs = arrays(representable(dtype), 1, 5, 7, 40, 16, (3, 3))
    # Tensor cores truncate where fp32 units round to nearest. No activation is steeper than 1.1,
    # and its own arithmetic rounds a few times.
    truncation = 1 if dtype == "float32" else 2
    bound = 1.1 * truncation * sum_bound(Conv2d(op.stride, op.padding), 360, *inputs)
    assert_within(bound + 4e-7 * (activation is not None), op, *inputs, weights=WEIGHTS,
                  dtype=dtype, tile=small(dtype), splits=1, kernel="conv_", runner=runner)


@pytest.mark.parametrize(("activation", "dtype"), [
    (ops.HardSigmoid(0.2, 0.5), "float32"), (ops.Gelu(), "float16"),
    pytest.param(ops.LeakyRelu(0.2), "float16", marks=pytest.mark.slow),
    pytest.param(ops.Elu(1.5), "float16", marks=pytest.mark.slow),
    pytest.param(ops.Gelu(tanh=True), "float16", marks=pytest.mark.slow)])
def test_an_activation_gets_its_two_numbers(activation, dtype, runner):
    op, tile = Conv2d(activation=activation), small(dtype)
    inputs = arrays(representable(dtype), 1, 5, 7, 40, 16, (3, 3))
    # As above; ELU is as steep as its alpha.
    bound = 1.5 * 2 * sum_bound(Conv2d(), 360, *inputs) + 6e-7
    kernel = conv.conv_kernel(dtype, tile, activation_of(activation)[0], WHOLE).name
    assert_within(bound, op, *inputs, weights=WEIGHTS, dtype=dtype, tile=tile, splits=1,
                  kernel=kernel, runner=runner)


@pytest.mark.parametrize("dtype", FEWER)
def test_nan_and_infinity_travel_as_ieee_says(dtype, runner):
    x, weight, bias = arrays(signs, 1, 8, 9, 16, 24, (3, 3))
    weight[weight == 0] = 1
    x[0, 0, 0, 2], x[0, 3, 8, 5], x[0, 7, 1, 15] = np.nan, np.inf, -np.inf
    check(dtype, Conv2d(padding=(1, 1, 1, 1)), x, weight, bias, runner=runner)


def test_folding_keeps_pixels_whole_and_products_few():
    first = Conv(1, 224, 224, 3, 112, 112, 64, (7, 7), (2, 2), 3, 3, (1, 1), 1)
    halves = folded(first, 8)
    assert halves.channels == 8
    assert (halves.kernel, halves.stride) == ((7, 4), (2, 1))
    assert halves.depth == 224                  # padding the channels alone would make it 392
    assert folded(first, 4).depth == 196        # and here folding would make it 224
    assert folded(first._replace(channels=64), 8) == first._replace(channels=64)
    assert folded(first._replace(stride=(1, 1)), 8).channels == 8


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_layers_get_large_tiles_and_late_ones_are_split(dtype):
    options = CudaOptions(dtype=dtype, arch="sm_80", multiprocessors=108)
    tile, splits, _ = conv_choice.choose(64 * 56 * 56, 256, 576, 1, dtype, options)
    assert (tile.block_m, splits) == (128, 1)
    assert tile.block_n >= (64 if dtype == "float32" else 128)
    assert conv_choice.choose(64 * 56 * 56, 64, 576, 1, dtype, options)[0].block_n == 64
    assert conv_choice.choose(64 * 112 * 112, 24, 96, 1, dtype, options)[0].block_n == 32
    assert conv_choice.choose(49, 512, 4608, 1, dtype, options)[1] > 1


def test_a_tile_must_fit_shared_memory():
    options = CudaOptions(dtype="float16", arch="sm_86", multiprocessors=80)
    largest = conv_choice.MMA_TILES[0]
    assert conv_choice.choose(1 << 20, 256, 4608, 1, "float16", options)[0] != largest
    with pytest.raises(ValueError, match="more shared memory than sm_86 has"):
        conv_choice.choose(1 << 20, 256, 4608, 1, "float16", options, largest)


def prepare(op, *shapes, dtype="float16", arch="sm_80", constant=True):
    stored = conv.stored_as(dtype)
    weights = [None, *(np.zeros(shape, np.float32) if constant else None for shape in shapes[1:])]
    options = CudaOptions(dtype=dtype, arch=arch, multiprocessors=4)
    return conv.prepare_conv2d(op, [TensorSpec(shape, stored) for shape in shapes],
                               TensorSpec(op.output_shape(*shapes), stored), weights, options)


def test_what_can_not_run_is_said():
    shapes = (1, 20, 20, 8), (8, 16, 1, 8)
    with pytest.raises(ValueError, match=r"kernel of \(16, 1\) is too large"):
        prepare(Conv2d(), *shapes)
    shapes = (1, 4, 4, 8), (8, 1, 1, 8)
    with pytest.raises(ValueError, match="must be constants"):
        prepare(Conv2d(), *shapes, constant=False)
    for dtype in conv.MMA_DTYPES:
        with pytest.raises(ValueError, match=f"{dtype}.* needs the tensor cores of sm_80 or later, "
                                             "and this GPU is sm_75; use dtype 'float32'"):
            prepare(Conv2d(), *shapes, dtype=dtype, arch="sm_75")
    assert prepare(Conv2d(), *shapes, dtype="float32", arch="sm_75").kernel.startswith("conv_simt")
    with pytest.raises(ValueError, match="no compute type 'float64'"):
        prepare(Conv2d(), *shapes, dtype="float64")
