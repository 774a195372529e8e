"""A batch norm and a convolution of 1x1 in one kernel: the bits of the two apart, in every tile."""
import networks
import numpy as np
import onnx
import pytest
from checks import integers, normal
from cuda_checks import (
    assert_exact,
    assert_resources,
    bits,
    number_of,
    rounded,
    run,
    skip_on_others,
)
from test_cuda_conv import signs
from test_cuda_parts import check

import cnn
from kernels.cuda import sass
from kernels.cuda.compiler import cubin
from kernels.cuda.conv_gemm import CLUSTER, ENDINGS, PLANE, WHOLE
from kernels.cuda.host import norm_conv
from kernels.cuda.host.conv import conv_kernel
from kernels.cuda.host.norm_conv import TILES
from kernels.cuda.launch import CudaOptions
from kernels.ops import BatchNorm, Conv2d, NormConv2d, Relu, Silu, TensorSpec

WEIGHTS = (1, 2, 3, 4, 5, 6)
DTYPES = ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
SMALL = TILES[3]                # 64x64
OP = NormConv2d(BatchNorm(1e-3, Relu()), Conv2d(activation=Relu()))


@pytest.fixture
def runner(runner):
    skip_on_others(runner, "mma.sync needs sm_80", lambda arch: number_of(arch) >= 80)
    return runner


def arrays(batch, height, width, channels, outputs, seed=0):
    rng = np.random.default_rng(seed)
    return (normal(rng, batch, height, width, channels) + 1, normal(rng, channels),
            normal(rng, channels), normal(rng, channels),
            rng.uniform(0.1, 2, channels).astype(np.float32),
            normal(rng, outputs, 1, 1, channels), normal(rng, outputs))


def assert_as_apart(op, *inputs, dtype, tile, end, runner, before="norm_relu"):
    """What the norm's kernel and the convolution's give, one after the other."""
    splits, cluster = 1 if end == WHOLE else 2, end == CLUSTER
    choice = {"tile": tile, "splits": splits, "cluster": cluster, "runner": runner, "dtype": dtype}
    found = run(op, *inputs, weights=WEIGHTS[:len(inputs) - 1], **choice,
                kernel=conv_kernel(dtype, tile, "clip", end, before).name)
    between = run(op.norm, *inputs[:5], weights=(1, 2, 3, 4), dtype=dtype, runner=runner,
                  kernel="batch_norm_")
    right = run(op.conv, between.astype(np.float32), *inputs[5:], weights=(1, 2)[:len(inputs) - 5],
                **choice, kernel=conv_kernel(dtype, tile, "clip", end).name)
    np.testing.assert_array_equal(bits(found), bits(right))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile", "end"), [
    pytest.param(tile, end, marks=() if tile == SMALL or (tile, end) == (TILES[1], WHOLE)
                 else pytest.mark.slow) for tile in TILES for end in ENDINGS], ids=str)
def test_every_tile(tile, end, dtype, runner):
    """Pixels, channels and depth with a remainder, the second split shorter; the ring goes round.
    """
    if end == CLUSTER:
        skip_on_others(runner, "clusters need sm_90", lambda arch: number_of(arch) >= 90)
    inputs = arrays(1, 13, 11, 360, tile.block_n + 8)
    assert_as_apart(OP, *inputs, dtype=dtype, tile=tile, end=end, runner=runner)


@pytest.mark.parametrize(("op", "before", "bias"), [
    (NormConv2d(BatchNorm(1e-3), Conv2d()), "norm", True),
    (NormConv2d(BatchNorm(1e-3, Relu()), Conv2d((2, 3))), "norm_relu", False)],
    ids=["no activation", "stride, no bias"])
def test_other_norms_and_convolutions(op, before, bias, runner):
    inputs = arrays(2, 7, 9, 40, 24)
    assert_as_apart(op, *inputs[:6 + bias], dtype="float16", tile=SMALL, end=WHOLE, runner=runner,
                    before=before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_are_exact(dtype, runner):
    rng = np.random.default_rng(0)
    channels, ones = 72, np.ones(72, np.float32)
    assert_exact(NormConv2d(BatchNorm(0.0, Relu()), Conv2d()), integers(rng, 2, 5, 7, channels),
                 rng.choice([-1, 1, 2], channels).astype(np.float32), integers(rng, channels),
                 integers(rng, channels), ones, signs(rng, 80, 1, 1, channels), signs(rng, 80),
                 weights=WEIGHTS, dtype=dtype, kernel="conv_mma_norm_relu_", runner=runner)


def test_nan_and_infinity_travel_as_apart(runner):
    inputs = arrays(1, 5, 6, 40, 24)
    inputs[0][0, 0, 0, 3], inputs[0][0, 1, 1, 7], inputs[0][0, 2, 2, 39] = np.nan, np.inf, -np.inf
    assert_as_apart(OP, *inputs, dtype="float16", tile=SMALL, end=WHOLE, runner=runner)


def test_what_is_normalised_may_be_a_part_of_a_concats_memory(runner):
    check(OP, *arrays(2, 5, 6, 40, 24), weights=WEIGHTS, dtype="float16", tile=SMALL,
          kernel="conv_mma_norm_relu_", runner=runner)


def test_the_choice_is_among_tiles_of_mma_sync():
    """Also where a convolution alone would run by wgmma."""
    for pixels, channels in ((256 * 56 * 56, 224), (49, 1024)):
        inputs = [TensorSpec((1, pixels, 1, channels), "float16")] + [TensorSpec((channels,))] * 4
        constants = [None, *np.ones((4, channels), np.float32),
                     np.ones((128, 1, 1, channels), np.float32)]
        step = norm_conv.prepare_norm_conv(
            NormConv2d(BatchNorm(), Conv2d()), [*inputs, TensorSpec((128, 1, 1, channels))],
            TensorSpec((1, pixels, 1, 128), "float16"), constants,
            CudaOptions(dtype="float16", arch="sm_90a", multiprocessors=132))
        assert step.kernel.startswith("conv_mma_norm_f16_")
        assert (step.kernel.endswith("_cluster_clip")) == (pixels == 49)


@pytest.mark.parametrize(("norm", "conv", "shape", "dtype", "serves"), [
    (BatchNorm(), Conv2d(), (64, 1, 1, 32), "float16", True),
    (BatchNorm(1e-3, Relu()), Conv2d((2, 2)), (64, 1, 1, 32), "bfloat16", True),
    (BatchNorm(1e-3, Silu()), Conv2d(), (64, 1, 1, 32), "float16", False),
    (BatchNorm(), Conv2d(), (64, 3, 3, 32), "float16", False),
    (BatchNorm(), Conv2d(padding=(1, 0, 0, 0)), (64, 1, 1, 32), "float16", False),
    (BatchNorm(), Conv2d(groups=2), (64, 1, 1, 32), "float16", False),
    (BatchNorm(), Conv2d(), (64, 1, 1, 36), "float16", False),
    (BatchNorm(), Conv2d(), (64, 1, 1, 32), "float32", False)])
def test_when_the_two_are_one(norm, conv, shape, dtype, serves):
    assert norm_conv.serves(norm, conv, shape, dtype) == serves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", [WHOLE, *(pytest.param(end, marks=pytest.mark.slow)
                                          for end in (PLANE, CLUSTER))])
def test_resources(end, dtype, arch):
    """Of two elements both become float32, are normalised, and become a word again."""
    for tile in TILES:
        kernel = conv_kernel(dtype, tile, "clip", end, "norm_relu")
        assert kernel in norm_conv.kernels(dtype)
        assert_resources(kernel, arch)
        counts = sass.loop_opcodes(cubin(kernel, arch), "HMMA")
        fragments = tile.warp_m // 16 * 4 * tile.row_bytes // 32
        assert sass.number(counts, "F2FP") == fragments
        assert sass.number(counts, "FFMA") == 2 * fragments


@pytest.mark.parametrize("device", [
    pytest.param("emulator", marks=pytest.mark.slow), "emulator:sm_90a",
    pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_network_stores_no_norm_but_what_is_asked_for(device, tmp_path):
    net = networks.Builder(0, 16)
    x = net.max_pool(net.conv("input", "stem", 16, 3, stride=2), "pool", 2, stride=2)
    x = net.conv(net.relu(net.batch_norm(x, "norm")), "conv", 24, 1)
    net.linear(net.global_pool(x), "head", 10)
    onnx.save(net.model("network"), tmp_path / "net.onnx")
    image = np.random.default_rng(1).standard_normal((2, 16, 16, 3), dtype=np.float32)
    model = cnn.load(tmp_path / "net.onnx", device=device, dtype="float16")
    kernels = {row.layer: row.kernel for row in model.summary(2).rows}
    assert kernels["conv"].startswith("conv_mma_norm_relu_")
    assert "norm" not in kernels
    one, apart = model.trace(image, layers=["conv"]), model.trace(image)
    assert rounded(apart["norm.relu"], "float16").min() == 0
    np.testing.assert_allclose(one["conv"], apart["conv"], rtol=2e-3, atol=2e-3)
