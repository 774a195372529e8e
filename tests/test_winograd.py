"""Winograd convolution: shapes swept for both tiles, against a bound computed from its matrices."""
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from bf16_checks import prepare_stored, run_stored
from checks import EPS, assert_exact, assert_within, integers, normal, prepare, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cpu import backend
from kernels.cpu.geometry import WinogradGeometry
from kernels.cpu.host import conv, winograd
from kernels.cpu.sizes import BLOCK, GRID_ROWS, HALF_ROWS, LANES, TILE_ROWS
from kernels.cpu.winograd_matrices import INPUT, OUTPUT, WEIGHT
from kernels.ops import Conv2d, TensorSpec
from kernels.step import Options

WEIGHTS = (1, 2)
PADDED = Conv2d(padding=(1, 1, 1, 1))
both_tiles = pytest.mark.parametrize("tile", [2, 4])


def arrays(make, op, n, h, w, c, o, residual=False, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = make(rng, n, h, w, c), make(rng, o, 3, 3, c)
    found = [x, weight, make(rng, o)]
    if residual:
        found.append(make(rng, *op.output_shape(x.shape, weight.shape)))
    return found


def error_bound(op, tile, x, weight, bias, residual=None):
    """Bound of each output's error, with every matrix and operand by its absolute value:

        |error| <= gamma(n) * |A^T| [sum over channels of (|G||g||G^T|) * (|B^T||d||B|)] |A|
                       + gamma(2) * (|bias| + |residual|)

    as in Barabasz, Anderson, Soodhalter and Gregg, "Error Analysis and Improving the Accuracy of
    Winograd Convolution for Deep Neural Networks" (2020), arXiv:1803.10986, by element
    instead of by norm. n counts the roundings on one product's way: each transform rounds once a
    term and axis, the weight's only once (it is computed in float64), the sum once a channel.
    """
    b, g, a = (np.abs(np.array(matrices[tile], float)) for matrices in (INPUT, WEIGHT, OUTPUT))
    terms = [int((matrix != 0).sum(axis=1).max()) for matrix in (b, a)]
    n = (2 * sum(terms) + 1 + x.shape[3] + 2) * EPS
    batch, out_h, out_w, channels = op.output_shape(x.shape, weight.shape)
    high, wide = -(-out_h // tile), -(-out_w // tile)
    top, left = op.padding[:2]
    image = np.zeros((batch, high * tile + 2, wide * tile + 2, x.shape[3]))
    inside = image[:, top:top + x.shape[1], left:left + x.shape[2]]
    inside[...] = np.abs(x[:, :inside.shape[1], :inside.shape[2]])
    u = np.einsum("pk,okmc,qm->pqco", g, np.abs(weight.astype(float)), g)
    bound = np.zeros((batch, high * tile, wide * tile, channels))
    for i in range(0, high * tile, tile):
        for j in range(0, wide * tile, tile):
            d = image[:, i:i + tile + 2, j:j + tile + 2]
            products = np.einsum("pk,nkmc,qm,pqco->npqo", b, d, b, u, optimize=True)
            bound[:, i:i + tile, j:j + tile] = np.einsum("ip,npqo,jq->nijo", a, products, a,
                                                         optimize=True)
    added = np.abs(bias) + (0 if residual is None else np.abs(residual))
    return n / (1 - n) * bound[:, :out_h, :out_w] + 2 * EPS / (1 - 2 * EPS) * added


@st.composite
def problems(draw):
    """Any 3x3 convolution that fits: one-sided padding, maps of one row or column, batches."""
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    h = draw(st.integers(max(1, 3 - padding[0] - padding[2]), 20))
    w = draw(st.integers(max(1, 3 - padding[1] - padding[3]), 40))
    c = draw(st.sampled_from([1, 3, LANES, LANES + 5, 2 * LANES]))
    o = draw(st.sampled_from([1, 5, LANES, LANES + 1, BLOCK, 4 * BLOCK + LANES + 3]))
    op = Conv2d(padding=padding,
                activation=draw(st.sampled_from([None, ops.Relu(), ops.Clip(-3.0, 6.0)])))
    return op, (draw(st.integers(1, 3)), h, w, c, o, draw(st.booleans()))


@given(problems(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_tiles_of_2_are_exact_on_integers(problem, seed):
    """Its matrices hold 0, 1 and 1/2 only: quarters of small integers are exact."""
    op, shape = problem
    inputs = arrays(integers, op, *shape, seed=seed)
    assert_exact(op, *inputs, weights=WEIGHTS, tile=2, kernel="winograd_2x2_3x3_f32")


@both_tiles
@given(problem=problems(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_random_floats_are_within_the_bound(tile, problem, seed):
    op, shape = problem
    inputs = arrays(normal, op, *shape, seed=seed)
    assert_within(error_bound(op, tile, *inputs), op, *inputs, weights=WEIGHTS, tile=tile,
                  kernel=f"winograd_{tile}x{tile}_3x3_f32")


@both_tiles
@given(problem=problems(), gap=st.sampled_from([1, 5, LANES, BLOCK + 3]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_output_may_be_a_part_of_another(tile, problem, gap, seed):
    op, shape = problem
    inputs = arrays(integers, op, *shape, seed=seed)
    whole, part = (run(op, *inputs, weights=WEIGHTS, tile=tile, gap=g) for g in (0, gap))
    assert np.array_equal(whole, part)


@both_tiles
@pytest.mark.parametrize("activation", [ops.Relu(), ops.Silu()])
def test_it_may_be_so_with_any_activation(tile, activation):
    op = Conv2d(padding=(1, 1, 1, 1), activation=activation)
    inputs = arrays(normal, op, 1, 4, 5, 3, 6)
    assert prepare(op, inputs, WEIGHTS, tile=tile).strided
    whole, part = (run(op, *inputs, weights=WEIGHTS, tile=tile, gap=gap) for gap in (0, 5))
    assert np.array_equal(whole, part)


@both_tiles
@pytest.mark.parametrize("narrow", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("shape", [(2, 9, 14, 37, BLOCK + 13), (1, 16, 16, 2 * LANES, 2 * BLOCK)])
def test_what_is_stored_in_bfloat16_is_rounded_and_else_the_same(tile, narrow, shape):
    """Of x, the residual and y each."""
    op = Conv2d(padding=(1, 1, 1, 1), activation=ops.Relu())
    given = [array.astype(ml_dtypes.bfloat16).astype(np.float32)
             for array in arrays(normal, op, *shape, residual=True)]
    expected = run(op, *given, weights=WEIGHTS, tile=tile)
    stored = [array.astype(ml_dtypes.bfloat16) if i in (0, 3) and narrow[i // 3] else array
              for i, array in enumerate(given)]
    dtype = "bfloat16" if narrow[2] else "float32"
    found = run_stored(op, stored, dtype, tile=tile)
    np.testing.assert_array_equal(found, expected.astype(found.dtype))
    assert prepare_stored(op, stored, dtype, tile=tile).kernel.startswith(f"winograd_{tile}x{tile}")


@both_tiles
@pytest.mark.parametrize(("height", "width", "channels", "outputs"), [
    (7, 7, 160, 3 * BLOCK), (30, 30, 40, 5 * BLOCK), (1, 150, 24, BLOCK), (150, 1, 24, BLOCK)])
def test_layers_of_many_blocks_and_groups(tile, height, width, channels, outputs):
    inputs = arrays(normal, PADDED, 2, height, width, channels, outputs, residual=True)
    assert_within(error_bound(PADDED, tile, *inputs), PADDED, *inputs, weights=WEIGHTS, tile=tile)


@both_tiles
def test_the_matrices_are_winograds_identity_exactly(tile):
    """For every product of a unit input and a unit weight, hence for all: in fractions."""
    b, g, a = ([[Fraction(value).limit_denominator(24) for value in row] for row in matrices[tile]]
               for matrices in (INPUT, WEIGHT, OUTPUT))
    for i in range(tile):
        for k in range(tile + 2):
            for tap in range(3):
                total = sum(a[i][p] * b[p][k] * g[p][tap] for p in range(tile + 2))
                assert total == (k == i + tap)
    assert all(1 in row for matrices in (INPUT, OUTPUT) for row in matrices[tile])


@both_tiles
@pytest.mark.parametrize(("activation", "slope", "slack"), [
    (ops.Sigmoid(), 1, 4e-7), (ops.Tanh(), 1, 4e-7), (ops.Relu(), 1, 4e-7),
    (ops.Clip(0.0, 6.0), 1, 4e-7), (ops.Silu(), 1.1, 1e-6), (ops.Gelu(), 1.13, 1e-6)])
def test_fused_activations(tile, activation, slope, slack):
    """slope: the steepest; slack: for what they round themselves."""
    op = Conv2d(padding=(1, 1, 1, 1), activation=activation)
    inputs = arrays(normal, op, 2, 6, 9, 8, 20, residual=True)
    name = prepare(op, inputs, WEIGHTS, tile=tile).kernel
    assert name.endswith(f"_{activation.kind.lower()}")
    assert_within(slope * error_bound(PADDED, tile, *inputs) + slack, op, *inputs, weights=WEIGHTS,
                  tile=tile)


@both_tiles
def test_a_convolution_without_bias(tile):
    x, weight, bias = arrays(normal, PADDED, 1, 4, 5, 3, 6)
    bound = error_bound(PADDED, tile, x, weight, 0 * bias)
    assert_within(bound, PADDED, x, weight, weights=(1,), tile=tile)


@both_tiles
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_lost_and_stays_in_its_tiles(tile, value):
    inputs = arrays(integers, PADDED, 1, 3 * tile, 3 * tile, LANES, 8)
    x, weight, _ = inputs
    weight[weight == 0] = 1
    x[0, tile, tile, 1] = value                 # which the first two tiles of each axis read
    finite = np.isfinite(run(PADDED, *inputs, weights=WEIGHTS, tile=tile))[0]
    assert not finite[tile - 1:tile + 2, tile - 1:tile + 2].any()
    assert finite[2 * tile:].all()
    assert finite[:, 2 * tile:].all()


@both_tiles
def test_great_inputs_do_not_overflow_early(tile):
    """The transforms scale by up to 10 * 10 and 19 * 19; sums of some hundred terms come on top."""
    inputs = arrays(normal, PADDED, 1, 9, 9, LANES, BLOCK)
    inputs[0] *= np.float32(np.finfo(np.float32).max / 1e9)
    inputs[2] *= 0
    assert_within(error_bound(PADDED, tile, *inputs), PADDED, *inputs, weights=WEIGHTS, tile=tile)


@both_tiles
def test_the_input_beside_the_image_is_never_read(tile):
    """Everything beyond the image is NaN: a tile that reads one float too many shows."""
    for op, channels in ((Conv2d(), 7), (Conv2d(), LANES), (PADDED, LANES)):
        x, weight, bias = arrays(normal, op, 1, 2 * tile + 3, 2 * tile + 2, channels, 9)
        block = np.full(x.size + 2048, np.nan, np.float32)
        inside = block[1024:1024 + x.size].reshape(x.shape)
        inside[...] = x
        assert_within(error_bound(op, tile, inside, weight, bias), op, inside, weight, bias,
                      weights=WEIGHTS, tile=tile)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("tiles", range(1, 80))
def test_blocks_hold_all_tiles_in_few_rows(tiles, blocks):
    rows, size = winograd.cut_blocks(tiles, blocks)
    assert blocks * size >= tiles
    full, left = divmod(-(-tiles // blocks), rows)
    assert rows in (TILE_ROWS, GRID_ROWS)
    assert size == full * rows + (0, HALF_ROWS, rows)[(left > 0) + (left > HALF_ROWS)]


def test_the_16_tiles_of_small_maps_fill_their_micro_kernels():
    assert winograd.cut_blocks(16, 1) == (GRID_ROWS, 16)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("size", "outputs"), [(14, 32), (28, 32), (14, 2 * BLOCK)])
def test_few_channels_still_keep_all_threads_busy(threads, size, outputs):
    inputs = arrays(integers, PADDED, 1, size, size, 32, outputs)
    step = prepare(PADDED, inputs, WEIGHTS, threads=threads, tile=4)
    y = np.empty((1, size, size, outputs), np.float32)
    launch, = step.bind(inputs, y, np.empty(step.workspace, np.uint8))
    g = next(WinogradGeometry(*numbers) for numbers in launch.arguments
             if isinstance(numbers, tuple) and len(numbers) == len(WinogradGeometry._fields))
    assert -(-g.tiles // g.block_tiles) * -(-outputs // g.group) >= threads


def test_weights_are_packed_once_a_tile_for_all_programs():
    inputs = arrays(integers, PADDED, 1, 4, 5, 3, 6)
    options = Options(1)
    for tile in (2, 4):
        for batch in (1, 2):
            spec = TensorSpec((batch, 4, 5, 3))
            output = TensorSpec(PADDED.output_shape(spec.shape, inputs[1].shape))
            conv.prepare_conv2d(PADDED, [spec, *(TensorSpec(a.shape) for a in inputs[1:])], output,
                                [None, *inputs[1:]], options, tile)
    assert len(options.packed) == 2


@pytest.mark.parametrize(("op", "kernel", "tile"), [
    (Conv2d(stride=(2, 2)), (3, 3), 2), (Conv2d(dilation=(2, 2)), (3, 3), 4),
    (Conv2d(groups=2), (3, 3), 4), (Conv2d(), (3, 1), 4), (Conv2d(), (3, 3), 6)])
def test_what_winograd_can_not_compute_is_refused(op, kernel, tile):
    rng = np.random.default_rng(0)
    inputs = [normal(rng, 1, 9, 9, 4), normal(rng, 8, *kernel, 4 // op.groups), normal(rng, 8)]
    with pytest.raises(ValueError, match="Winograd takes 3x3 weights"):
        run(op, *inputs, weights=WEIGHTS, tile=tile)


@pytest.mark.parametrize(("channels", "outputs", "height", "width", "tile"), [
    (64, 64, 224, 224, 4), (512, 512, 16, 16, 4), (16, 16, 9, 9, 4), (16, 64, 2, 60, 4),
    (512, 512, 14, 14, 2), (63, 512, 14, 14, 4),                    # whose weights are fetched
    (512, 512, 7, 7, 2), (64, 64, 5, 9, 2), (512, 512, 4, 4, 0),    # few tiles
    (63, 64, 7, 7, 0), (15, 64, 56, 56, 0), (64, 15, 56, 56, 0),    # few channels
    (256, 256, 1, 99, 0), (256, 256, 99, 1, 0)])                    # tiles that stick out
def test_winograd_runs_where_it_pays(channels, outputs, height, width, tile):
    assert winograd.choose(PADDED, (outputs, 3, 3, channels), (height, width)) == tile


def test_winograd_is_not_chosen_for_other_windows():
    for op, kernel in ((Conv2d(stride=(2, 1)), (3, 3)), (Conv2d(dilation=(1, 2)), (3, 3)),
                       (Conv2d(groups=2), (3, 3)), (Conv2d(), (3, 1)), (Conv2d(), (5, 5))):
        assert winograd.choose(op, (64, *kernel, 64), (56, 56)) == 0


def chosen(inputs, dtype="float32") -> str:
    """The kernel that the CPU's `prepare` takes by itself."""
    specs = [TensorSpec(array.shape) for array in inputs]
    output = TensorSpec(PADDED.output_shape(inputs[0].shape, inputs[1].shape))
    return backend.prepare(PADDED, specs, output, [None, *inputs[1:]],
                           Options(1, dtype)).kernel


def test_an_environment_variable_keeps_to_the_direct_kernel(monkeypatch):
    inputs = arrays(normal, PADDED, 1, 12, 12, 16, 16)
    assert chosen(inputs).startswith("winograd_4x4_3x3_f32")
    monkeypatch.setenv("CNN_WINOGRAD", "0")
    assert chosen(inputs).startswith("conv2d_3x3_f32")
    monkeypatch.setenv("CNN_WINOGRAD", "off")
    with pytest.raises(ValueError, match="CNN_WINOGRAD is 'off'; it must be 0 or 1"):
        chosen(inputs)


@pytest.mark.parametrize(("unit", "size", "kernel"), [
    ("avx512_emulated", 16, "winograd_4x4_3x3_f32"), ("amx_emulated", 16, "conv2d_3x3_bf16_amx"),
    ("avx512_emulated", 14, "conv2d_3x3_bf16_avx512")])     # a map for tiles of 2
def test_winograd_is_chosen_where_it_is_faster_than_bfloat16(monkeypatch, unit, size, kernel):
    monkeypatch.setenv("CNN_BF16", unit)
    inputs = arrays(normal, PADDED, 1, size, size, 64, 64)
    assert chosen(inputs, "bfloat16").startswith(kernel)
    monkeypatch.setenv("CNN_WINOGRAD", "0")
    assert chosen(inputs, "bfloat16").startswith("conv2d_3x3_bf16")


def test_a_second_process_compiles_nothing():
    code = ("import sys, numpy as np, kernels\n"
            "x, weight = np.ones((1, 12, 12, 16), 'f'), np.ones((16, 3, 3, 16), 'f')\n"
            "kernels.conv2d(x, weight, padding=1)\n"
            "print('numba' in sys.modules)")
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                              capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
