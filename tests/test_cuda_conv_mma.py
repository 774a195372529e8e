"""Tensor-core convolution on CUDA: every tile, tap and remainder, split-K, and all epilogues."""
import numpy as np
import pytest
from checks import integers, normal, sum_bound
from cuda_checks import assert_exact, assert_resources, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cuda.launch import CudaOptions

from kernels import ops
from kernels.cuda.host import conv, conv_choice, splitk
from kernels.cuda.host.conv_choice import TILES
from kernels.ops import Conv2d, TensorSpec

WEIGHTS = (1, 2)
SMALL = TILES[4]            # 64x64: the least work for the emulator
# The dtypes differ in one instruction and in the size of an element.
FEWER = ["float16", "tf32", pytest.param("bfloat16", marks=pytest.mark.slow)]


def arrays(make, n, h, w, c, o, kernel, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    return make(rng, n, h, w, c), make(rng, o, *kernel, c // groups), make(rng, o)


def signs(rng, *shape):
    """-1, 0 and 1: sums of hundreds of products are still exact in bfloat16."""
    return integers(rng, *shape, low=-1, high=2)


@pytest.fixture
def force(monkeypatch):
    """force(tile, splits): what the next convolutions use."""
    def set_choice(tile=SMALL, splits=1):
        monkeypatch.setattr(conv, "choose", lambda *_: (tile, splits))
    return set_choice


def name(dtype, tile):
    short = {"float16": "f16", "bfloat16": "bf16", "tf32": "tf32"}[dtype]
    depth = tile.row_bytes // (4 if dtype == "tf32" else 2)
    return f"conv_mma_{short}_{tile.block_m}x{tile.block_n}x{depth}_s{tile.stages}_"


PROBLEMS = {
    "pointwise": (Conv2d(), (2, 5, 7, 72, 80, (1, 1))),
    "one slice, fewer than stages": (Conv2d(), (1, 3, 3, 8, 8, (1, 1))),
    "3x3": (Conv2d((1, 1), (1, 1, 1, 1)), (1, 9, 10, 64, 72, (3, 3))),
    "stride 2": (Conv2d((2, 2), (1, 1, 1, 1)), (2, 9, 10, 24, 16, (3, 3))),
    "stride > kernel": (Conv2d((3, 2)), (1, 10, 11, 16, 16, (1, 1))),
    "asymmetric, dilated": (Conv2d((1, 2), (1, 0, 2, 3), (2, 3)), (1, 9, 12, 16, 24, (3, 2))),
    "1xN": (Conv2d((1, 1), (0, 2, 0, 2)), (1, 1, 70, 16, 8, (1, 5))),
    "Nx1": (Conv2d((1, 1), (2, 0, 2, 0)), (1, 70, 1, 16, 8, (5, 1))),
    "groups": (Conv2d((1, 1), (1, 1, 1, 1), groups=3), (1, 6, 6, 48, 72, (3, 3), 3)),
    "odd outputs of odd groups": (Conv2d(groups=2), (1, 4, 5, 10, 14, (3, 3), 2)),
    "image of 3 channels": (Conv2d((2, 2), (3, 3, 3, 3)), (2, 12, 13, 3, 8, (7, 7))),
    "one channel": (Conv2d((1, 1), (1, 1, 1, 1)), (1, 6, 7, 1, 5, (3, 3))),
    "widest masks": (Conv2d((1, 1), (7, 8, 7, 8)), (1, 4, 4, 8, 8, (15, 16))),
}


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_kind_of_window_is_exact(problem, dtype, force, runner):
    force()
    op, shape = PROBLEMS[problem]
    assert_exact(op, *arrays(signs, *shape), weights=WEIGHTS, dtype=dtype, runner=runner,
                 kernel=name(dtype, SMALL) + "clip")


@pytest.mark.parametrize("dtype", conv.MMA_DTYPES)
@pytest.mark.parametrize("tile", [TILES[1], *(pytest.param(t, marks=pytest.mark.slow)
                                              for t in TILES if t != TILES[1])], ids=str)
def test_every_tile_is_exact(tile, dtype, force, runner):
    if dtype == "bfloat16" and tile == TILES[1]:
        pytest.skip("compiles for long and differs from float16 in one instruction")
    force(tile)
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Relu())
    x, weight, bias = arrays(signs, 1, 13, 11, 40, tile.block_n + 8, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 13, 11, tile.block_n + 8)
    assert_exact(op, x, weight, bias, residual, weights=WEIGHTS, dtype=dtype, runner=runner,
                 kernel=name(dtype, tile) + "clip")


@st.composite
def problems(draw):
    """Small, for the emulator; windows of any shape."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    h = draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 9))
    w = draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 12))
    groups = draw(st.sampled_from([1, 1, 2]))
    c, o = draw(st.integers(1, 20)) * groups, draw(st.integers(1, 20)) * groups
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    op = Conv2d(stride, padding, dilation, groups, draw(st.sampled_from([None, ops.Relu()])))
    return op, (draw(st.integers(1, 2)), h, w, c, o, kernel, groups)


@given(problems(), st.integers(1, 3), st.sampled_from(["float16", "tf32"]))
@settings(max_examples=12, deadline=None)
def test_any_window_is_exact_on_integers(problem, splits, dtype):
    op, shape = problem
    if op.groups == shape[3] == shape[4]:
        return                                      # depthwise.py's
    with pytest.MonkeyPatch.context() as patch:     # a fixture would live as long as all examples
        patch.setattr(conv, "choose", lambda *_: (SMALL, splits))
        assert_exact(op, *arrays(signs, *shape), weights=WEIGHTS, dtype=dtype, kernel="conv_mma_")


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("out_channels", [24, 9])
@pytest.mark.parametrize("splits", [2, 3])
def test_splits_of_the_sum_add_up(splits, out_channels, dtype, force, runner):
    force(SMALL, splits)
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Clip(-3.0, 20.0))
    x, weight, bias = arrays(signs, 1, 5, 6, 40, out_channels, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 5, 6, out_channels)
    assert_exact(op, x, weight, bias, residual, weights=WEIGHTS, dtype=dtype, runner=runner,
                 kernel=name(dtype, SMALL) + "splitk")


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("out_channels", [24, 9])
@pytest.mark.parametrize("activation", [None, ops.Relu(), ops.Clip(0.0, 6.0)])
def test_a_residual_is_added_before_the_activation(activation, out_channels, dtype, force, runner):
    force()
    op = Conv2d(activation=activation)
    inputs = arrays(signs, 1, 5, 7, 16, out_channels, (3, 3))
    residual = integers(np.random.default_rng(1), 1, 3, 5, out_channels)
    assert_exact(op, *inputs, residual, weights=WEIGHTS, dtype=dtype, kernel="conv_mma_",
                 runner=runner)


def test_bias_may_be_left_out(force, runner):
    force()
    assert_exact(Conv2d(), *arrays(signs, 1, 4, 5, 16, 8, (1, 1))[:2], weights=(1,),
                 dtype="float16", kernel="conv_mma_", runner=runner)


def representable(dtype):
    """Normal floats that the dtype holds exactly, so that only the sums round."""
    def make(rng, *shape):
        values = normal(rng, *shape)
        if dtype == "tf32":
            return conv.round_to_tf32(values)
        import ml_dtypes  # noqa: F401 (gives NumPy the dtype)
        return values.astype(dtype).astype(np.float32)
    return make


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("activation", [None, pytest.param(ops.Silu(), marks=pytest.mark.slow)])
def test_floats_are_within_the_bound(activation, dtype, force, runner):
    force()
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=activation)
    inputs = arrays(representable(dtype), 1, 5, 7, 40, 16, (3, 3))
    # No activation is steeper than 1.1; tensor cores truncate where fp32 units round to nearest.
    bound = 1.1 * 2 * sum_bound(Conv2d(op.stride, op.padding), 360, *inputs) + 4e-7
    assert_within(bound, op, *inputs, weights=WEIGHTS, dtype=dtype, kernel="conv_mma_",
                  runner=runner)


def test_tf32_drops_13_bits_of_activations_and_rounds_weights(force, runner):
    force()
    x, weight, bias = arrays(normal, 1, 5, 7, 16, 16, (3, 3))
    op = Conv2d()
    magnitude = sum_bound(op, 1, np.abs(x), np.abs(weight), np.abs(bias)) / 4 * 2 ** 24
    bound = (2.0 ** -10 + 2.0 ** -11 + 2.0 ** -21 + 400 * 2.0 ** -24) * magnitude
    assert_within(bound, op, x, weight, bias, weights=WEIGHTS, dtype="tf32", kernel="conv_mma_",
                  runner=runner)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FEWER)
def test_nan_and_infinity_travel_as_ieee_says(value, dtype, force, runner):
    force()
    op = Conv2d(padding=(1, 1, 1, 1))
    x, weight, bias = arrays(signs, 1, 8, 9, 16, 24, (3, 3))
    weight[weight == 0] = 1
    x[0, 3, 8, 2] = value
    assert_exact(op, x, weight, bias, weights=WEIGHTS, dtype=dtype, kernel="conv_mma_",
                 runner=runner)


def test_folding_keeps_pixels_whole_and_products_few():
    first = conv.Conv(1, 224, 224, 3, 112, 112, 64, (7, 7), (2, 2), 3, 3, (1, 1), 1)
    folded = conv.folded(first, 8)
    assert folded.channels == 8
    assert (folded.kernel, folded.stride) == ((7, 4), (2, 1))
    assert folded.depth == 224                  # padding the channels alone would make it 392
    assert conv.folded(first._replace(channels=64), 8) == first._replace(channels=64)
    assert conv.folded(first._replace(stride=(1, 1)), 8).channels == 8


def test_large_layers_get_large_tiles_and_late_ones_are_split():
    options = CudaOptions(dtype="float16", arch="sm_80", multiprocessors=108, upload=lambda a: a)
    tile, splits = conv_choice.choose(64 * 56 * 56, 256, 576, 1, "float16", options)
    assert (tile.block_m, splits) == (128, 1)
    assert tile.block_n >= 128
    tile, splits = conv_choice.choose(49, 512, 4608, 1, "float16", options)
    assert splits > 1
    options = CudaOptions(dtype="float16", arch="sm_86", multiprocessors=80, upload=lambda a: a)
    assert conv_choice.choose(1 << 20, 256, 4608, 1, "float16", options)[0] != TILES[0]
    with pytest.raises(ValueError, match="more shared memory than sm_86 has"):
        conv_choice.choose(1 << 20, 256, 4608, 1, "float16", options, TILES[0])


def prepare(op, *shapes, dtype="float16", constant=True):
    stored = {"tf32": "float32"}.get(dtype, dtype)
    weights = [None, *(np.zeros(shape, np.float32) if constant else None for shape in shapes[1:])]
    options = CudaOptions(dtype=dtype, arch="sm_80", multiprocessors=4, upload=lambda a: a)
    return conv.prepare_conv2d(op, [TensorSpec(shape, stored) for shape in shapes],
                               TensorSpec(op.output_shape(*shapes), stored), weights, options)


def test_what_can_not_run_is_said():
    with pytest.raises(ValueError, match=r"kernel of \(16, 1\) is too large"):
        prepare(Conv2d(), (1, 20, 20, 8), (8, 16, 1, 8))
    with pytest.raises(ValueError, match="must be constants"):
        prepare(Conv2d(), (1, 4, 4, 8), (8, 1, 1, 8), constant=False)


@pytest.mark.parametrize("dtype", FEWER)
def test_resources(dtype, arch):
    for kernel in (k for k in conv.kernels(dtype) if k.name.startswith("conv_mma")
                   and k.name.endswith(("_clip", "_splitk"))):
        _, tile, _, partial = kernel.config
        if (partial or tile not in (TILES[1], SMALL)):
            continue
        counts = assert_resources(kernel, arch).counts
        # Each product, fragment and copy stands in the loop once, copies once more before it per
        # stage: nothing was unrolled twice and nothing fell back to plain loads.
        mi, ni, steps = tile.warp_m // 16, tile.warp_n // 8, tile.row_bytes // 32
        copies = (tile.block_m + tile.block_n) * (tile.row_bytes // 16) // tile.threads
        assert total(counts, "HMMA") == mi * ni * steps
        assert total(counts, "LDSM") == (mi + ni // 2) * steps
        assert total(counts, "LDGSTS") == copies * tile.stages
        assert total(counts, "LDL") == total(counts, "STL") == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", conv.MMA_DTYPES)
def test_resources_of_all(dtype, arch):
    for kernel in conv.kernels(dtype):
        assert_resources(kernel, arch)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_resources_of_the_reduction(dtype, arch):
    for kernel in splitk.kernels(dtype):
        assert_resources(kernel, arch)


def total(counts, opcode):
    return sum(n for text, n in counts.items() if text.split(".")[0] == opcode)
