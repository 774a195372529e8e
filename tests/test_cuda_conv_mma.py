"""The tensor-core convolution: what it does to tf32, and its machine code."""
import numpy as np
import pytest
from checks import normal, sum_bound
from cuda_checks import assert_resources, assert_within
from test_cuda_conv import SLOW, WEIGHTS, arrays, small

from kernels.cuda import compiler, conv_mma, sass
from kernels.cuda.conv_gemm import WHOLE, Tile
from kernels.cuda.host import conv, splitk, weights
from kernels.cuda.host.conv_choice import MMA_TILES
from kernels.ops import Conv2d


def test_tf32_drops_13_bits_of_activations_and_rounds_weights(runner):
    x, weight, bias = arrays(normal, 1, 5, 7, 16, 16, (3, 3))
    op = Conv2d()
    magnitude = sum_bound(op, 1, np.abs(x), np.abs(weight), np.abs(bias)) / 4 * 2 ** 24
    bound = (2.0 ** -10 + 2.0 ** -11 + 2.0 ** -21 + 400 * 2.0 ** -24) * magnitude
    assert_within(bound, op, x, weight, bias, weights=WEIGHTS, dtype="tf32", tile=small("tf32"),
                  splits=1, kernel="conv_mma_tf32", runner=runner)


def test_weights_round_to_the_nearest_tf32():
    ulp = 2.0 ** -10
    values = [1 + ulp * 0.5, 1 + ulp * 0.49, -1 - ulp * 0.51, np.inf, np.nan]
    np.testing.assert_array_equal(weights.round_to_tf32(np.array(values, np.float32)),
                                  [1 + ulp, 1, -1 - ulp, np.inf, np.nan])


@pytest.mark.parametrize("tile", [Tile(64, 64, 32, 3, 32, 32, 1), Tile(96, 64, 64, 3, 24, 32, 1),
                                  Tile(64, 64, 64, 1, 32, 32, 1)], ids=str)
def test_a_tile_that_can_not_be_cut_is_refused(tile):
    with pytest.raises(ValueError, match="can not be cut evenly"):
        conv_mma.make("float16", tile, "clip", WHOLE)


@pytest.mark.parametrize("dtype", ["float16", *SLOW])
@pytest.mark.parametrize("tile", [small("float16"), *(
    pytest.param(tile, marks=pytest.mark.slow) for tile in MMA_TILES[:2])], ids=str)
def test_resources(tile, dtype, arch):
    counts = assert_resources(conv.conv_kernel(dtype, tile, "clip", WHOLE), arch).counts
    # Each product, fragment and copy stands in the loop once, copies once more before it per
    # stage: nothing was unrolled twice and nothing fell back to plain loads.
    mi, ni, steps = tile.warp_m // 16, tile.warp_n // 8, tile.row_bytes // 32
    copies = (tile.block_m + tile.block_n) * tile.chunks // tile.threads
    assert sass.number(counts, "HMMA") == mi * ni * steps
    assert sass.number(counts, "LDSM") == (mi + ni // 2) * steps
    assert sass.number(counts, "LDGSTS") == copies * tile.stages
    assert sass.number(counts, "LDL") == sass.number(counts, "STL") == 0


def test_the_main_loop_is_dense(arch):
    """Per 64 products of a 64x64 warp tile at most 138 instructions, as a plain GEMM needs."""
    kernel = conv.conv_kernel("float16", MMA_TILES[1], "clip", WHOLE)
    assert_resources(kernel, arch)
    counts = sass.loop_opcodes(compiler.cubin(kernel, arch), "HMMA")
    assert sass.number(counts, "HMMA") == 64
    assert counts.total() <= 138


@pytest.mark.slow
@pytest.mark.parametrize("dtype", conv.MMA_DTYPES)
def test_resources_of_all(dtype, arch):
    for kernel in conv.kernels(dtype):
        if kernel.arch != "sm_90a":                 # test_cuda_conv_wgmma.py's
            assert_resources(kernel, arch)


@pytest.mark.parametrize("dtype", ["float32", "float16", SLOW[1]])
def test_resources_of_the_reduction(dtype, arch):
    for kernel in splitk.kernels(dtype):
        assert_resources(kernel, arch)
