"""The convolution by wgmma: every window, tile and end, its waits and fences, its machine code."""
import numpy as np
import pytest
from checks import sum_bound
from cuda_checks import assert_exact, assert_resources, assert_within, run, skip_on_others
from hypothesis import given, settings
from test_cuda_conv import FOR_ALL, PROBLEMS, WEIGHTS, arrays, name, problems, representable, signs

from kernels import ops
from kernels.cuda import compiler, conv_epilogue, conv_wgmma, emulate, sass
from kernels.cuda.conv_gemm import PLANE, WHOLE, Tile
from kernels.cuda.errors import CudaError
from kernels.cuda.host import conv
from kernels.cuda.host.conv_choice import WGMMA_TILES, most_blocks
from kernels.cuda.ptx import asm_op, cuda, uint32, uint64
from kernels.emulator import AsyncNotWaited, Emulator, Race
from kernels.ops import Conv2d, Linear

SMALL = WGMMA_TILES[-1]                             # the least work for the emulator
ALONE = Tile(64, 64, 128, 3, 16, 64, 1, True)       # as small, with a product in flight
DTYPES = ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
FAST = SMALL, WGMMA_TILES[0], WGMMA_TILES[3]        # of each kind: small, alone, shared


@pytest.fixture
def runner(runner):
    skip_on_others(runner, f"wgmma needs {conv_wgmma.ARCH}",
                   lambda arch: arch == conv_wgmma.ARCH)
    return runner


def check(op, *inputs, dtype="float16", tile=SMALL, splits=1, **options):
    """assert_exact of the kernel by wgmma."""
    kernel = name(dtype, tile, PLANE if splits > 1 else WHOLE)
    assert kernel.startswith("conv_wgmma_")
    assert_exact(op, *inputs, weights=WEIGHTS[:len(inputs) - 1], dtype=dtype, tile=tile,
                 splits=splits, kernel=kernel, **options)


@pytest.mark.parametrize("tile", [SMALL, ALONE], ids=["shared", "alone"])
@pytest.mark.parametrize(("problem", "dtype"), [
    pytest.param(problem, dtype, marks=() if dtype == "float16" and problem in FOR_ALL
                 else pytest.mark.slow) for problem in PROBLEMS for dtype in conv_wgmma.DTYPES])
def test_every_kind_of_window_is_exact(problem, dtype, tile, runner):
    op, shape = PROBLEMS[problem]
    check(op, *arrays(signs, *shape), dtype=dtype, tile=tile, runner=runner)


@pytest.mark.parametrize(("dtype", "tile"), [
    pytest.param(dtype, tile, marks=() if dtype == "float16" and tile in FAST
                 else pytest.mark.slow) for dtype in conv_wgmma.DTYPES for tile in WGMMA_TILES],
    ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_every_tile_is_exact(splits, dtype, tile, runner):
    """Pixels, channels and depth with a remainder; the ring goes round."""
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=ops.Clip(-6.0, 20.0))
    inputs = arrays(signs, 1, 13, 11, 72, tile.block_n + 8, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 13, 11, tile.block_n + 8)
    check(op, *inputs, residual, dtype=dtype, tile=tile, splits=splits, runner=runner)


@given(problem=problems())
@settings(max_examples=10, deadline=None)
def test_any_window_is_exact_on_integers(problem):
    op, shape = problem
    if not op.groups == shape[3] == shape[4]:       # depthwise.py's
        check(op, *arrays(signs, *shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_channels", [24, 9])
def test_a_residual_is_added_before_the_activation(out_channels, dtype, runner):
    inputs = arrays(signs, 1, 5, 7, 16, out_channels, (3, 3))
    residual = signs(np.random.default_rng(1), 1, 3, 5, out_channels)
    check(Conv2d(activation=ops.Relu()), *inputs, residual, dtype=dtype, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, pytest.param(ops.Silu(), marks=pytest.mark.slow)])
def test_floats_are_within_the_bound(activation, dtype, runner):
    op = Conv2d((1, 1), (1, 1, 1, 1), activation=activation)
    inputs = arrays(representable(dtype), 1, 5, 7, 40, 16, (3, 3))
    # As of mma.sync: tensor cores truncate, and no activation is steeper than 1.1.
    bound = 2.2 * sum_bound(Conv2d(op.stride, op.padding), 360, *inputs)
    assert_within(bound + 4e-7 * (activation is not None), op, *inputs, weights=WEIGHTS,
                  dtype=dtype, tile=SMALL, splits=1, kernel="conv_wgmma_", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_travel_as_ieee_says(dtype, runner):
    x, weight, bias = arrays(signs, 1, 8, 9, 16, 24, (3, 3))
    weight[weight == 0] = 1
    x[0, 0, 0, 2], x[0, 3, 8, 5], x[0, 7, 1, 15] = np.nan, np.inf, -np.inf
    check(Conv2d(padding=(1, 1, 1, 1)), x, weight, bias, dtype=dtype, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(65, 72, 10), (66, 13, 8), (3, 6, 20, 136)])
def test_matrix_products_are_exact(sizes, dtype, runner):
    rng = np.random.default_rng(0)
    *batch, features, outputs = sizes
    check(Linear(ops.Relu()), signs(rng, *batch, features), signs(rng, outputs, features),
          signs(rng, outputs), dtype=dtype, runner=runner)


@pytest.mark.parametrize(("tile", "before", "after", "fault"), [
    (SMALL, "fence.proxy.async.shared::cta;", "", Race),
    (SMALL, "cp.async.wait_group 0;", "", AsyncNotWaited),
    (SMALL, "bar.sync \t0;", "", Race),
    (SMALL, "wgmma.wait_group.sync.aligned 0;", "", (Race, AsyncNotWaited)),
    (ALONE, "fence.proxy.async.shared::cta;", "", Race),
    (ALONE, "cp.async.wait_group 0;", "", AsyncNotWaited),
    (ALONE, "wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;",
     (Race, AsyncNotWaited)),
    (ALONE, "wgmma.wait_group.sync.aligned 0;", "", AsyncNotWaited),
], ids=lambda value: value if isinstance(value, str) else "")
def test_each_wait_and_fence_is_needed(tile, before, after, fault, monkeypatch):
    """That without one the emulator finds a fault is what makes it a proof that none is missing."""
    inputs = arrays(signs, 1, 6, 6, 64, 64, (3, 3))
    whole = compiler.ptx(conv.conv_kernel("float16", tile, "clip", WHOLE))
    assert before in whole

    def convolve():
        return run(Conv2d(), *inputs, dtype="float16", weights=WEIGHTS, tile=tile, splits=1)
    convolve()
    monkeypatch.setattr(emulate, "ptx", lambda kernel: whole.replace(before, after, 1))
    with pytest.raises(fault):
        convolve()


@pytest.mark.parametrize("tile", [
    SMALL._replace(wgmma=False), SMALL._replace(row_bytes=64), SMALL._replace(stages=1),
    SMALL._replace(blocks=1), SMALL._replace(block_n=192, warp_n=192),
    Tile(192, 128, 128, 3, 32, 128, 1, True),
    Tile(64, 64, 128, 3, 32, 64, 2, True), Tile(64, 512, 128, 2, 16, 512, 1, True)], ids=str)
def test_a_tile_that_can_not_be_cut_is_refused(tile):
    with pytest.raises(ValueError, match="can not be cut evenly"):
        conv_wgmma.make("float16", tile, "clip", WHOLE)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100a", "sm_120"])
def test_no_other_architecture_assembles_it(arch):
    kernel = conv.conv_kernel("float16", SMALL, "clip", WHOLE)
    assert not compiler.runs_on(kernel, arch)
    with pytest.raises(CudaError, match=f"runs on GPUs of sm_90a alone and this one is {arch}"):
        compiler.cubin(kernel, arch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [pytest.param(tile, marks=() if tile in FAST else pytest.mark.slow)
                                  for tile in WGMMA_TILES], ids=str)
def test_resources(tile, dtype):
    found = assert_resources(conv.conv_kernel(dtype, tile, "clip", WHOLE), "sm_90a")
    registers = -(-found.registers // 8) * 8                        # as they are allocated
    assert most_blocks(tile, "sm_90a") == tile.blocks
    assert registers * tile.threads * tile.blocks <= 65536
    # Four products of a slice stand once, in the loop, and nothing reads operands into registers.
    loop = sass.loop_opcodes(found.cubin, "HGMMA")
    assert sass.number(found.counts, "HGMMA") == sass.number(loop, "HGMMA") == 4
    assert sass.number(found.counts, "LDSM") == 0
    copies = tile.block_m // tile.rows + -(-tile.block_n // tile.rows)
    assert sass.number(loop, "LDGSTS") == copies
    assert sass.number(found.counts, "LDGSTS") == copies * (1 + conv_wgmma.ahead(tile))
    # They run one after the other without a wait between: the assembler did not serialise them.
    assert sass.number(loop, "WARPGROUP") == 2
    assert loop.total() <= 112


@pytest.mark.slow
@pytest.mark.parametrize("dtype", conv_wgmma.DTYPES)
def test_resources_of_all(dtype):
    kernels = [kernel for kernel in conv.kernels(dtype) if kernel.arch == "sm_90a"]
    assert len(kernels) >= 2 * len(WGMMA_TILES)             # whole and split
    for kernel in kernels:
        assert_resources(kernel, "sm_90a")


@pytest.mark.parametrize("tile", [*WGMMA_TILES, Tile(128, 128, 64, 4, 64, 64, 2)], ids=str)
def test_each_line_of_the_residual_is_requested_once(tile, monkeypatch):
    """Where a block has rows and columns of it: a request that counts stands in for the hint."""
    pixels, channels = 3 * tile.block_m - 20, tile.block_n + 64
    monkeypatch.setattr(conv_epilogue, "prefetch_l2", asm_op(
        "count", "red.global.add.u32 [$0], 1;", None, [uint64], memory=True))
    request = conv_epilogue.residual_request("float16", tile)

    def make():
        def requests(residual, first_m, first_n, pixels, channels):
            request(uint32(cuda.threadIdx.x), first_m, first_n, uint32(0), residual, pixels,
                    channels, channels)
        return requests
    kernel = compiler.Kernel("requests", make, (), ("pointer",) + ("uint32",) * 4, tile.threads)
    text = compiler.compile_ptx(kernel)
    for first_m in (tile.block_m, 2 * tile.block_m):
        for first_n in (0, tile.block_n):
            lines = np.zeros((pixels, channels // 64, 32), np.uint32)       # 128 bytes each
            Emulator().launch(text, "requests", 1, tile.threads,
                              [lines, first_m, first_n, pixels, channels])
            right = np.zeros((pixels, channels // 64), np.uint32)
            right[first_m:first_m + tile.block_m, first_n // 64:(first_n + tile.block_n) // 64] = 1
            np.testing.assert_array_equal(lines[..., 0], right)
            assert not lines[..., 1:].any()
