"""What the estimates choose for the layers of well-known networks."""
import json
from statistics import geometric_mean

import pytest
from common import ROOT

from kernels.cuda.conv_gemm import Tile
from kernels.cuda.host.conv_choice import (
    ITEMSIZE,
    MMA_TILES,
    REDUCTION_CYCLES,
    TILES,
    WGMMA_TILES,
    candidates,
    choose,
    cycles,
)
from kernels.cuda.launch import Choice, CudaOptions

MEASURED = ROOT / "profiling" / "results" / "2026-11-26_h200_tiles.json"
GPUS = {"sm_80": 108, "sm_90a": 132}        # A100; H100 and H200
BATCHES = 1, 8, 64, 256
DTYPES = list(TILES)


def resnet50():
    """(pixels of an image, output channels, depth) of all convolutions but the first."""
    channels = 64
    for side, width in ((56, 64), (28, 128), (14, 256), (7, 512)):
        before = side if channels == 64 else 2 * side       # where a stage's first block begins
        yield from ((before ** 2, width, channels), (side ** 2, 4 * width, channels),
                    (side ** 2, width, 4 * width), (side ** 2, width, 9 * width),
                    (side ** 2, 4 * width, width))
        channels = 4 * width


def vgg16():
    sizes = (224, 64, 64), (112, 64, 128), (112, 128, 128), (56, 128, 256), (56, 256, 256), (
        28, 256, 512), (28, 512, 512), (14, 512, 512)
    return [(side ** 2, out, 9 * channels) for side, channels, out in sizes]


def mobile(factor=6):
    """The pointwise convolutions of MobileNetV2; EfficientNet-Lite0's are like them."""
    sizes = (112, 16, 24), (56, 24, 32), (28, 32, 64), (14, 64, 96), (14, 96, 160), (7, 160, 320)
    for side, channels, out in sizes:
        yield side ** 2, factor * channels, channels
        yield side ** 2, out, factor * channels
    yield 49, 1280, 320


LAYERS = [*resnet50(), *vgg16(), *mobile()]


def options(arch, dtype):
    return CudaOptions(dtype=dtype, arch=arch, multiprocessors=GPUS[arch])


def blocks(choice, pixels, out):
    tile, splits, _ = choice
    return -(-pixels // tile.block_m) * -(-out // tile.block_n) * splits


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_layer_multiplies_mostly_zeros(dtype, arch):
    """A tile much wider than a layer, or a slice much deeper, is no choice."""
    for batch in BATCHES:
        for pixels, out, depth in LAYERS:
            tile, splits, _ = choose(batch * pixels, out, depth, 1, dtype, options(arch, dtype))
            row = tile.row_bytes // ITEMSIZE[dtype]
            slices = -(-depth // row)
            padded = (-(-batch * pixels // tile.block_m) * tile.block_m * -(-out // tile.block_n)
                      * tile.block_n * -(-slices // splits) * splits * row)
            shallow = max(depth, 32)        # no slice is less deep
            assert padded <= 4 * batch * pixels * out * shallow, (batch, pixels, out, depth)


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_image_occupies_much_of_the_gpu(dtype, arch):
    """A quarter of it at least, but for sums so short that a second launch would take longer."""
    for pixels, out, depth in resnet50():
        choice = choose(pixels, out, depth, 1, dtype, options(arch, dtype))
        estimate = cycles(choice, pixels, out, depth, 1, dtype, options(arch, dtype))
        few = blocks(choice, pixels, out) < GPUS[arch] / 4
        short = choice.splits == 1 and estimate < 3 * REDUCTION_CYCLES
        assert short or not few, (pixels, out, depth, choice)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_grids_are_of_large_tiles_and_whole_sums(dtype):
    for pixels, out, depth in (*resnet50(), *vgg16()):
        if 256 * pixels * out < 256 * 28 * 28 * 128:        # 4 waves and more of 128 x 128
            continue
        tile, splits, _ = choose(256 * pixels, out, depth, 1, dtype, options("sm_90a", dtype))
        assert splits == 1
        assert tile.block_m * tile.block_n >= 64 * min(out, 128)
        assert tile.block_n >= min(out, 64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])     # of others, stores take longer
def test_sums_of_one_slice_get_blocks_that_hide_each_others_epilogues(dtype):
    for pixels, out, depth in LAYERS:
        if depth * ITEMSIZE[dtype] <= 128:
            tile = choose(256 * pixels, out, depth, 1, dtype, options("sm_90a", dtype)).tile
            assert tile.blocks >= 2, (pixels, out, depth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_work_is_never_estimated_cheaper(dtype):
    """Of one tile, in one dimension at a time."""
    for tile in TILES[dtype]:
        for pixels, out, depth in LAYERS:
            def estimate(*sizes, tile=tile):
                return cycles(Choice(tile), *sizes, 1, dtype, options("sm_90a", dtype))
            least = estimate(pixels, out, depth) * (1 - 1e-12)
            assert estimate(2 * pixels, out, depth) >= least
            assert estimate(pixels, 2 * out, depth) >= least
            assert estimate(pixels, out, 2 * depth) >= least


def test_candidates_are_all_tiles_that_fit_the_best_first():
    found = candidates(3136, 64, 576, 1, "float16", options("sm_90a", "float16"))
    assert {choice.tile for _, choice in found} == set(TILES["float16"])
    estimates = [estimate for estimate, _ in found]
    assert estimates == sorted(estimates)
    assert found[0][1] == choose(3136, 64, 576, 1, "float16", options("sm_90a", "float16"))
    small = candidates(3136, 64, 576, 1, "float16", CudaOptions(arch="sm_86"))
    assert {choice.tile for _, choice in small} == set(MMA_TILES[1:])
    one = TILES["float16"][3]
    kept = candidates(3136, 64, 576, 1, "float16", options("sm_90a", "float16"), one, 3)
    assert [choice for _, choice in kept] == [Choice(one, 3)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100", "sm_120"])
def test_clusters_are_offered_where_each_block_has_a_multiprocessor_of_its_own(arch):
    found = {choice for _, choice in candidates(49, 512, 4608, 1, "float16", CudaOptions(
        dtype="float16", arch=arch))}
    assert {choice for choice in found if choice.cluster} == {
        choice._replace(cluster=True) for choice in found
        if 1 < choice.splits <= 8 and blocks(choice, 49, 512) <= 108
        and arch in ("sm_90a", "sm_100")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])     # others meet with larger tiles
def test_clusters_take_the_place_of_planes(dtype):
    """Of one image, on a GPU that has them; planes are left to more splits than a cluster has, and
    to more blocks than there are multiprocessors."""
    split = [(choice, blocks(choice, pixels, out)) for pixels, out, depth in resnet50() if (
        choice := choose(pixels, out, depth, 1, dtype, options("sm_90a", dtype))).splits > 1]
    assert len(split) >= 6
    assert all(choice.cluster or choice.splits > 8 or count > 132 for choice, count in split)
    assert any(choice.cluster for choice, _ in split)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_100a", "sm_120"])
def test_wgmma_is_offered_on_sm_90a_alone(arch, dtype):
    sizes = 256 * 3136, 256, 2304, 1, dtype
    found = candidates(*sizes, CudaOptions(dtype=dtype, arch=arch))
    assert found
    assert not any(choice.tile.wgmma for _, choice in found)
    found = candidates(*sizes, options("sm_90a", dtype))
    assert {choice.tile for _, choice in found if choice.tile.wgmma} == set(WGMMA_TILES)
    with pytest.raises(ValueError, match=f"needs instructions or more shared memory than {arch}"):
        choose(*sizes, CudaOptions(dtype=dtype, arch=arch), WGMMA_TILES[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_large_grids_of_an_h200_are_by_wgmma(dtype):
    for pixels, out, depth in (*resnet50(), *vgg16()):
        assert choose(256 * pixels, out, depth, 1, dtype, options("sm_90a", dtype)).tile.wgmma


def test_what_was_measured_on_an_h200():
    """Of the layers of ResNet-50, MobileNetV2 and VGG-16, and of matrix products: what is chosen
    took at most 15 % longer than the fastest tile, and 2 % in the mean. Clusters were not there."""
    slower = []
    for row in json.loads(MEASURED.read_text())["rows"]:
        times = {Choice(Tile(*one["tile"]), one["splits"]): one["microseconds"]
                 for one in row["choices"] if one["tile"]}
        choice = choose(*row["sizes"], "float16", options("sm_90a", "float16"))
        if choice.cluster:
            continue
        slower.append(times[choice] / min(times.values()))
        assert slower[-1] <= 1.15, (row["layer"], str(choice))
    assert len(slower) > 80
    assert geometric_mean(slower) <= 1.02
