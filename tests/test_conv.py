"""Convolution on the direct kernel: shapes swept, each path forced and named."""
from dataclasses import replace

import checks
import numpy as np
import pytest
from checks import assert_exact, assert_within, integers, normal, prepare, run, sum_bound
from conv_problems import arrays, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cpu import backend
from kernels.cpu.geometry import ConvGeometry
from kernels.cpu.host import conv
from kernels.cpu.sizes import BLOCK, HALF_ROWS, LANES, NARROW_HALF_ROWS, NARROW_ROWS
from kernels.cpu.sizes import TILE_ROWS as TILE
from kernels.groups import merge, merged
from kernels.ops import Conv2d, Linear, TensorSpec
from kernels.step import Options

DIRECT = {"weights": (1, 2), "tile": 0}        # and not Winograd


ANY = problems(range(1, 10), [1, 2, 5, LANES, LANES + 1, BLOCK, BLOCK + LANES + 3], 20)


@given(ANY, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_convolution_is_exact_on_integers(problem, seed):
    op, shape = problem
    assert_exact(op, *arrays(integers, op, *shape, seed=seed), **DIRECT)


@given(ANY, st.sampled_from([1, 5, LANES, BLOCK + 3]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_convolution_without_residual_may_be_a_part_of_its_output(problem, gap, seed):
    op, (*shape, _) = problem
    inputs = arrays(integers, op, *shape, seed=seed)
    assert_exact(op, *inputs, **DIRECT, gap=gap)


@pytest.mark.parametrize("tiles", [1, 2, 7, 11])
@pytest.mark.parametrize("blocks", [1, 5])
def test_threads_part_the_pixels_where_weights_are_few(monkeypatch, tiles, blocks):
    """In bands that come out even or not, with passes as small as they get."""
    monkeypatch.setattr(checks, "THREADS", [1, 2, 3, 5])
    monkeypatch.setattr(conv, "SMALL_PASS_BYTES", 1)
    op, shape = Conv2d(), (1, tiles, TILE, 8, blocks * BLOCK, (1, 1))
    for worth in (0, 1 << 20):
        monkeypatch.setattr(conv, "WORTH", worth)
        assert_exact(op, *arrays(integers, op, *shape), **DIRECT)
    assert [conv.cut_bands(tiles, threads, 100, 1) for threads in (1, 2, 3)] == [
        tiles, -(-tiles // 2) if tiles > 1 else 1, -(-tiles // 3) if tiles > 2 else tiles]
    assert conv.cut_bands(tiles, 2, 101 << 20, 100) == tiles


@given(ANY, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_convolution_is_within_the_bound_on_floats(problem, seed):
    op, shape = problem
    inputs = arrays(normal, op, *shape, seed=seed)
    plain = Conv2d(op.stride, op.padding, op.dilation, op.groups)
    bound = sum_bound(plain, inputs[1][0].size, *inputs)
    assert_within(bound, op, *inputs, **DIRECT)


@pytest.mark.parametrize(("height", "width", "channels", "outputs", "kernel", "op", "tiles"), [
    (8, TILE * 2, 5, BLOCK, (3, 3), Conv2d(padding=(1, 1, 1, 1)), "direct"),
    (8, TILE * 2, 64, 7, (1, 1), Conv2d(), "direct"),
    (9, TILE * 2, 3, 32, (7, 7), Conv2d((2, 2), (3, 3, 3, 3)), "direct"),
    (3, TILE + 1, 6, 32, (3, 3), Conv2d(padding=(1, 1, 1, 1)), "gather"),
    (8, TILE, 6, 32, (3, 3), Conv2d(padding=(2, 2, 2, 2), dilation=(2, 2)), "direct"),
    (8, TILE, 6, 32, (3, 3), Conv2d(padding=(1, 1, 1, 1), groups=2), "direct"),
    (3, TILE + 1, 6, 32, (3, 3), Conv2d(padding=(1, 1, 1, 1), groups=2), "gather"),
    (6, TILE + 1, 6, 32, (7, 1), Conv2d(padding=(3, 0, 3, 0)), "direct"),
    (9, TILE + 1, 6, 32, (3, 1), Conv2d(padding=(2, 0, 1, 0), dilation=(2, 1), groups=2), "direct"),
    (6, TILE + 1, 6, 32, (7, 1), Conv2d((2, 1), (3, 0, 3, 0)), "gather"),
    (6, TILE + 1, 6, 32, (7, 1), Conv2d(padding=(3, 1, 3, 0)), "direct"),
])
def test_each_way_to_cut_tiles_runs_where_it_should(monkeypatch, height, width, channels, outputs,
                                                    kernel, op, tiles):
    cut = []
    across = conv.cut_across
    monkeypatch.setattr(conv, "cut_across",
                        lambda *arguments: cut.append("gather") or across(*arguments))
    inputs = arrays(integers, op, 1, height, width, channels, outputs, kernel)
    for gap in (0, 3):
        assert_exact(op, *inputs, **DIRECT, kernel=f"conv2d_{kernel[0]}x{kernel[1]}_f32", gap=gap)
    assert set(cut) == ({"gather"} if tiles == "gather" else set())


@pytest.mark.parametrize(("groups", "channels", "outputs"), [
    (8, 32, 32), (6, 12, 12), (3, 9, 9), (10, 10, 20), (8, 16, 8 * (LANES + 1)), (7, 7, 14)])
@pytest.mark.parametrize("op", [Conv2d((2, 1), (1, 1, 1, 1)), Conv2d(padding=(2, 2, 2, 2),
                                                                     dilation=(2, 2))])
def test_narrow_groups_share_a_vector(groups, channels, outputs, op):
    op = replace(op, groups=groups)
    inputs = arrays(integers, op, 2, 9, 2 * TILE, channels, outputs, (3, 3))
    assert_exact(op, *inputs, **DIRECT, kernel="conv2d_3x3_f32")
    together = merged(outputs, groups, LANES)
    assert groups % together == 0
    assert together == 1 or together * outputs // groups <= LANES
    # No product of one group with another is anything but zero.
    wide = merge(inputs[1], groups, together).reshape(groups, outputs // groups, 9, together, -1)
    for group in range(groups):
        for other in range(together):
            assert wide[group, :, :, other].any() == (other == group % together)


@pytest.mark.parametrize(("most", "half"), [(TILE, HALF_ROWS), (NARROW_ROWS, NARROW_HALF_ROWS)])
@pytest.mark.parametrize("length", range(1, 4 * TILE + 2))
def test_cover_covers_every_pixel_with_the_sizes_there_are(length, most, half):
    covered = set()
    for start, rows in conv.cover(length, most):
        assert rows in (most, half, 1)
        assert start >= 0
        assert start + rows <= length
        covered.update(range(start, start + rows))
    assert covered == set(range(length))


@pytest.mark.parametrize("width", [NARROW_HALF_ROWS, NARROW_ROWS, 2 * NARROW_ROWS, 3])
def test_narrow_groups_get_tiles_of_more_pixels_where_these_fit(width):
    g = ConvGeometry(9, width + 2, 4 * LANES, 7, width, 4 * LANES, 3, 3, 1, 1, 0, 0, 1, 1, LANES)
    rows = set(conv.cut_rows(2, g, narrow=True)[:, 0])
    assert rows == {min(width, NARROW_ROWS)} if width > 3 else rows <= {HALF_ROWS, 1}
    op = Conv2d(padding=(1, 1, 1, 1), groups=4)
    assert_exact(op, *arrays(integers, op, 2, 5, width, 4 * LANES, 4 * LANES, (3, 3)), **DIRECT)


@pytest.mark.parametrize("outputs", [1, LANES - 1, LANES, LANES + 1, BLOCK, 3 * BLOCK + LANES // 2])
def test_many_passes_over_large_weights(outputs, monkeypatch):
    """Weights beyond PASS_BYTES: several passes, and several blocks in one."""
    op = Conv2d(padding=(1, 1, 1, 1))
    inputs = arrays(integers, op, 1, 5, TILE, 40, outputs, (3, 3))
    for at_once in (1, 2):
        monkeypatch.setattr(conv, "PASS_BYTES", at_once * 9 * 40 * BLOCK * 4)
        assert_exact(op, *inputs, **DIRECT)


@pytest.mark.parametrize(("activation", "kernel"), [
    (None, "conv2d_3x3_f32_"), (ops.Relu(), "_relu"), (ops.Clip(0.0, 6.0), "_clip"),
    (ops.Sigmoid(), "_sigmoid"), (ops.Tanh(), "_tanh")])
def test_fused_activations_and_residual(activation, kernel):
    op = Conv2d(padding=(1, 1, 1, 1), activation=activation)
    inputs = arrays(normal, op, 2, 6, 9, 8, 20, (3, 3), residual=True)
    assert kernel in prepare(op, inputs, **DIRECT).kernel
    plain = Conv2d(padding=(1, 1, 1, 1))
    # No activation's slope exceeds 1; sigmoid and tanh round a few times more.
    assert_within(sum_bound(plain, 72, *inputs) + 4e-7, op, *inputs, **DIRECT)


@pytest.mark.parametrize(("activation", "residual", "strided"), [
    (None, False, True), (ops.Relu(), False, True), (ops.Clip(0.0, 6.0), False, True),
    (None, True, False), (ops.Silu(), False, False), (ops.Sigmoid(), False, False)])
def test_what_walks_through_the_whole_output_is_not_strided(activation, residual, strided):
    op = Conv2d(activation=activation)
    inputs = arrays(normal, op, 1, 4, 5, 3, 6, (2, 2), residual)
    assert prepare(op, inputs, **DIRECT).strided == strided


def test_a_convolution_without_bias():
    op = Conv2d()
    x, weight, _ = arrays(integers, op, 1, 4, 5, 3, 6, (2, 2))
    assert_exact(op, x, weight, weights=(1,), tile=0)


@pytest.mark.parametrize("op", [Conv2d(padding=(1, 1, 1, 1)),
                                Conv2d(padding=(2, 2, 2, 2), dilation=(2, 2)),
                                Conv2d(padding=(1, 1, 1, 1), activation=ops.Relu())])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_travel_as_ieee_says(op, value):
    x, weight, bias = arrays(integers, op, 1, 9, TILE, 4, 8, (3, 3))
    weight[weight == 0] = 1
    x[0, 4, 5, 1] = value
    assert_exact(op, x, weight, bias, **DIRECT)


def test_the_input_beside_a_tile_is_never_read():
    """Everything beyond the image is NaN: a tile that reads one float too many shows."""
    op = Conv2d()
    x, weight, bias = arrays(integers, op, 1, 5, TILE + 2, 7, 9, (3, 3))
    block = np.full(x.size + 256, np.nan, np.float32)
    inside = block[128:128 + x.size].reshape(x.shape)
    inside[...] = x
    assert_exact(op, inside, weight, bias, **DIRECT)


def test_weights_are_packed_once_for_all_programs():
    op = Conv2d()
    inputs = arrays(integers, op, 1, 4, 5, 3, 6, (2, 2))
    options = Options(1)
    for batch in (1, 2):
        spec = TensorSpec((batch, 4, 5, 3))
        backend.prepare(op, [spec, *(TensorSpec(a.shape) for a in inputs[1:])],
                        TensorSpec(op.output_shape(spec.shape, inputs[1].shape)),
                        [None, *inputs[1:]], options)
    assert len(options.packed) == 1


@pytest.mark.parametrize(("op", "shape"), [
    (Conv2d(), (96, 1, 1, 64)), (Conv2d(padding=(1, 1, 1, 1)), (96, 3, 3, 64)),
    (Conv2d(groups=64), (64, 3, 3, 1)), (Linear(), (1000, 64))])
@pytest.mark.parametrize("unit", [None, "amx_emulated"])
def test_packed_weights_begin_with_a_cache_line(op, shape, unit, monkeypatch):
    if unit:
        monkeypatch.setenv("CNN_BF16", unit)
    options = Options(1, "bfloat16" if unit else "float32")
    x = TensorSpec((1, 56, 56, 64) if isinstance(op, Conv2d) else (1, 64))
    backend.prepare(op, [x, TensorSpec(shape)], TensorSpec(op.output_shape(x.shape, shape)),
                    [None, np.ones(shape, np.float32)], options)
    (_, packed), = options.packed.values()
    assert packed.ctypes.data % 64 == 0


def test_weights_must_be_constants():
    op = Conv2d()
    inputs = arrays(integers, op, 1, 4, 5, 3, 6, (2, 2))
    with pytest.raises(ValueError, match="must be constants"):
        run(op, *inputs, weights=())
