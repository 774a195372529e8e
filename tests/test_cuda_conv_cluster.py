"""Sums over k that a cluster of blocks splits among itself: exact in every tile and remainder, the
bits of sums by planes, and every barrier needed. The choice of it: test_cuda_conv_choice.py."""
import re

import numpy as np
import pytest
from cuda_checks import assert_exact, assert_resources, bits, number_of, run, skip_on_others
from test_cuda_conv import WEIGHTS, arrays, name, signs, small

from kernels import ops
from kernels.cuda import compiler, emulate
from kernels.cuda.conv_gemm import CLUSTER
from kernels.cuda.host import conv
from kernels.cuda.host.conv_choice import MMA_TILES, TILES, WGMMA_TILES
from kernels.emulator import Race
from kernels.ops import Conv2d, Linear

SMALLEST = {"mma": MMA_TILES[4], "wgmma": WGMMA_TILES[-1]}      # 64x64
# One of each way to multiply; 192x256, whose warps' rows pass in two parts.
FAST = ("float32", small("float32")), ("float16", SMALLEST["wgmma"]), ("float16", WGMMA_TILES[0])
ALL = [pytest.param(dtype, tile, marks=() if (dtype, tile) in FAST else pytest.mark.slow)
       for dtype in TILES for tile in TILES[dtype]]
KINDS = [pytest.param("float32", small("float32"), marks=pytest.mark.slow),
         pytest.param("float16", SMALLEST["mma"], marks=pytest.mark.slow),
         ("float16", SMALLEST["wgmma"])]


@pytest.fixture
def runner(runner):
    skip_on_others(runner, "clusters need sm_90", lambda arch: number_of(arch) >= 90)
    return runner


def check(op, *inputs, dtype, tile, splits, **options):
    """assert_exact of the kernel for clusters."""
    assert_exact(op, *inputs, weights=WEIGHTS[:len(inputs) - 1], dtype=dtype, tile=tile,
                 splits=splits, cluster=True, kernel=name(dtype, tile, CLUSTER), **options)


@pytest.mark.parametrize(("dtype", "tile"), ALL, ids=str)
def test_every_tile_is_exact(dtype, tile, runner):
    """Pixels, channels and depth with a remainder, and the last split shorter."""
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Clip(-6.0, 20.0))
    inputs = arrays(signs, 1, 13, 11, 72, tile.block_n + 8, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 13, 11, tile.block_n + 8)
    check(op, *inputs, residual, dtype=dtype, tile=tile, splits=3, runner=runner)


@pytest.mark.parametrize(("dtype", "tile"), KINDS, ids=str)
@pytest.mark.parametrize("out_channels", [24, 9])
@pytest.mark.parametrize("splits", [2, 5, 8])
def test_any_number_of_splits_adds_up(splits, out_channels, dtype, tile, runner):
    """5 and 8 are more than are read at once; rows of 9 outputs are not aligned."""
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Relu())
    inputs = arrays(signs, 1, 5, 6, 64, out_channels, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 5, 6, out_channels)
    check(op, *inputs, residual, dtype=dtype, tile=tile, splits=splits, runner=runner)


@pytest.mark.parametrize(("dtype", "tile"), KINDS, ids=str)
def test_groups_several_tiles_and_images(dtype, tile, runner):
    inputs = arrays(signs, 2, 8, 9, 48, 144, (3, 3), 2)
    check(Conv2d((1, 1), (1, 1, 1, 1), (1, 1), 2), *inputs, dtype=dtype, tile=tile, splits=3,
          runner=runner)


@pytest.mark.slow
def test_another_activation_and_no_bias(runner):
    x, weight, _ = arrays(signs, 1, 5, 6, 64, 24, (3, 3))
    options = {"dtype": "float16", "weights": (1,), "tile": SMALLEST["wgmma"], "splits": 3,
               "runner": runner}
    op = Conv2d(activation=ops.Silu())
    together = run(op, x, weight, cluster=True, **options)
    np.testing.assert_array_equal(bits(together), bits(run(op, x, weight, **options)))


@pytest.mark.parametrize("runs", [2, 3])
def test_linear_layers(runs, runner):
    rng = np.random.default_rng(0)
    check(Linear(ops.Relu()), signs(rng, 66, 330), signs(rng, 40, 330), signs(rng, 40),
          dtype="float16", tile=SMALLEST["wgmma"], splits=runs, runner=runner)


def test_floats_have_the_bits_of_sums_by_planes(runner):
    rng = np.random.default_rng(0)
    inputs = (rng.standard_normal((1, 5, 6, 64)), rng.standard_normal((24, 3, 3, 64)) / 24,
              rng.standard_normal(24), rng.standard_normal((1, 3, 4, 24)))
    found = [run(Conv2d(), *inputs, dtype="float16", weights=WEIGHTS, tile=SMALLEST["wgmma"],
                 splits=5, cluster=cluster, runner=runner) for cluster in (False, True)]
    np.testing.assert_array_equal(*map(bits, found))


def test_nan_and_infinity_travel_as_ieee_says(runner):
    x, weight, bias = arrays(signs, 1, 8, 9, 64, 24, (3, 3))
    weight[weight == 0] = 1
    x[0, 0, 0, 2], x[0, 3, 8, 5], x[0, 7, 1, 60] = np.nan, np.inf, -np.inf
    check(Conv2d(), x, weight, bias, dtype="float16", tile=SMALLEST["wgmma"], splits=4,
          runner=runner)


@pytest.mark.parametrize(("nth", "fault"), [
    (1, "may not have started"), (2, "is of a block that ends: .* has read its shared address")])
def test_each_barrier_is_needed(nth, fault, monkeypatch):
    """That without one the emulator finds a fault is what makes it a proof that none is missing."""
    inputs = arrays(signs, 1, 6, 6, 64, 64, (3, 3))
    tile = SMALLEST["wgmma"]
    whole = compiler.ptx(conv.conv_kernel("float16", tile, "clip", CLUSTER))

    def convolve():
        return run(Conv2d(), *inputs, dtype="float16", weights=WEIGHTS, tile=tile, splits=3,
                   cluster=True)
    convolve()
    broken = whole
    for barrier in (r"barrier\.cluster\.arrive\.\w+;", r"barrier\.cluster\.wait\.acquire;"):
        found = [*re.finditer(barrier, broken)]
        assert len(found) == 2
        begin, end = found[nth - 1].span()
        broken = broken[:begin] + broken[end:]
    monkeypatch.setattr(emulate, "ptx", lambda kernel: broken)
    with pytest.raises(Race, match=fault):
        convolve()


@pytest.mark.parametrize(("dtype", "tile"), ALL, ids=str)
def test_resources(dtype, tile):
    """It takes no more registers than are there for the blocks that share a multiprocessor."""
    kernel = conv.conv_kernel(dtype, tile, "clip", CLUSTER)
    found = assert_resources(kernel, "sm_90a")
    registers = -(-found.registers // 8) * 8                        # as they are allocated
    assert registers * tile.threads * tile.blocks <= 65536
    assert number_of(kernel.arch) == 90
    assert not compiler.runs_on(kernel, "sm_89")
