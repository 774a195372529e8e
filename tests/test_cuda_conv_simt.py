"""The fp32 convolution on CUDA cores: its accuracy, and its machine code."""
import numpy as np
import pytest
from cuda_checks import assert_exact, assert_resources
from test_cuda_conv import WEIGHTS, arrays, small

from kernels.cuda import conv_simt, sass
from kernels.cuda.compiler import ptx
from kernels.cuda.conv_gemm import WHOLE, Tile
from kernels.cuda.host import conv
from kernels.cuda.host.conv_choice import SIMT_TILES
from kernels.ops import Conv2d

# 8x8 sums of a thread, and 8x4
TYPICAL = SIMT_TILES[0], small("float32")


def test_all_24_bits_of_a_product_count(runner):
    """Integers that no shorter type holds, and whose sums float32 does."""
    def wide(rng, *shape):
        return rng.integers((1 << 20) - 1000, 1 << 20, shape).astype(np.float32)

    x, _, bias = arrays(wide, 1, 4, 5, 8, 16, (1, 1))
    weight = np.zeros((16, 1, 1, 8), np.float32)
    weight[np.arange(16), 0, 0, np.arange(16) % 8] = np.where(np.arange(16) < 8, 3, -5)
    assert_exact(Conv2d(), x, weight, bias, weights=WEIGHTS, kernel="conv_simt_f32",
                 tile=small("float32"), splits=1, runner=runner)


@pytest.mark.parametrize("tile", [Tile(128, 128, 128, 2, 32, 64, 1),
                                  Tile(128, 128, 32, 2, 64, 64, 1),
                                  Tile(128, 128, 32, 3, 32, 64, 1)], ids=str)
def test_a_tile_that_can_not_be_cut_is_refused(tile):
    with pytest.raises(ValueError, match="can not be cut evenly"):
        conv_simt.make(tile, "clip", WHOLE)


@pytest.mark.parametrize("tile", [pytest.param(tile, marks=() if tile in TYPICAL else
                                               pytest.mark.slow) for tile in SIMT_TILES], ids=str)
def test_the_loop_is_mostly_products(tile, arch):
    kernel = conv.conv_kernel("float32", tile, "clip", WHOLE)
    found = assert_resources(kernel, arch)
    assert found.registers * tile.threads * tile.blocks <= 65536
    loop = sass.loop_opcodes(found.cubin, "FFMA")
    columns, depth = tile.warp_n // 8, tile.row_bytes // 4
    # Products and reads of shared memory stand in the loop once, and nowhere else.
    assert sass.number(found.counts, "FFMA") == sass.number(loop, "FFMA") == 8 * columns * depth
    assert sass.number(loop, "LDS") == (2 + columns // 4) * depth
    copies = (tile.block_m + tile.block_n) * tile.chunks // tile.threads
    assert sass.number(loop, "LDG") == copies
    # A thread of 8x4 sums reads 12 numbers for 32 products, one of 8x8 16 for 64.
    assert sass.number(loop, "FFMA") / loop.total() >= {8: 0.85, 4: 0.8}[columns]


@pytest.mark.parametrize("tile", SIMT_TILES, ids=str)
def test_a_warp_accesses_distinct_banks(tile):
    """Stores of the chunks of x; and reads of 16 bytes, which are served for half a warp at a time
    where neighbours read the same."""
    bank_of_chunk, lane_row, lane_column = (f.py_func for f in (
        conv_simt.bank_of_chunk, conv_simt.lane_row, conv_simt.lane_column))
    for first in range(0, tile.threads, 32):
        places = ((tid % tile.chunks, tid // tile.chunks) for tid in range(first, first + 32))
        banks = {(chunk * 4 * tile.block_m + (row ^ bank_of_chunk(np.uint32(chunk)))) % 32
                 for chunk, row in places}
        assert len(banks) == 32
    lanes = np.arange(32, dtype=np.uint32)
    assert len({(lane_row(lane), lane_column(lane)) for lane in lanes}) == 32
    for half in (lanes[:16], lanes[16:]):
        assert len({lane_column(lane) for lane in half}) == 8       # times 16 bytes: 32 banks
        assert all(lane_column(lane) == lane_column(lane ^ 1) for lane in half)
        assert all(lane_row(lane) == lane_row(lane ^ 2) for lane in half)


def test_no_instruction_is_newer_than_the_oldest_gpu():
    text = ptx(conv.conv_kernel("float32", small("float32"), "clip", WHOLE))
    assert ".target sm_75" in text
    assert "cp.async" not in text
    assert "div." not in text
    assert "rem." not in text


@pytest.mark.slow
def test_resources_of_all(arch):
    for kernel in conv.kernels("float32"):
        assert_resources(kernel, arch)
