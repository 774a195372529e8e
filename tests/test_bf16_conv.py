"""Convolution in bfloat16: shapes swept for tiles and vectors, by each way to read the image."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bf16_checks import assert_sums_right, every_unit, lacking, prepared_in_bfloat16  # noqa: F401
from checks import aligned, assert_exact, integers, normal, prepare, run
from conv_problems import arrays, problems
from edges import UNITS
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.cpu import backend, dot_units
from kernels.cpu.dot_units import BLOCK, COLUMNS, GROUP
from kernels.cpu.geometry import ConvGeometry
from kernels.cpu.host import dot_conv, unit_choice
from kernels.ops import Conv2d, TensorSpec
from kernels.step import Options

WEIGHTS = (1, 2)
PADDED = Conv2d(padding=(1, 1, 1, 1))


ANY = problems([1, 2, 3, 8, 17, 32], [1, 2, 5, COLUMNS, COLUMNS + 1, BLOCK, BLOCK + COLUMNS + 3],
               12)


@every_unit
@given(problem=ANY, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_convolution_is_exact_on_integers(unit, problem, seed):
    op, shape = problem
    inputs = arrays(integers, op, *shape, seed=seed)
    kernel = f"conv2d_{shape[5][0]}x{shape[5][1]}_bf16_{unit.name}_"
    assert_exact(op, *inputs, weights=WEIGHTS, unit=unit, kernel=kernel)


@every_unit
@given(problem=ANY, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_convolution_is_within_the_bounds_on_floats(unit, problem, seed):
    op, shape = problem
    inputs = arrays(normal, op, *shape, seed=seed)
    plain = Conv2d(op.stride, op.padding, op.dilation, op.groups)
    assert_sums_right(op, plain, inputs[1][0].size, *inputs, weights=WEIGHTS, unit=unit)


WAYS = [
    # height, width, channels, outputs, kernel, op, the way of AMX and that of AVX512
    (8, 32, 32, BLOCK, (3, 3), PADDED, "rows", "images"),
    (8, 50, 64, 7, (1, 1), Conv2d(), "images", "images"),
    (7, 7, 24, 40, (1, 1), Conv2d(), "images", "images"),
    (3, 11, 512, 32, (1, 1), Conv2d(), "images", "images"),     # far to rows beyond the last pixel
    (9, 57, 64, 32, (1, 1), Conv2d((2, 2)), "rows", "rows"),
    (7, 7, 64, 32, (3, 3), PADDED, "images", "rows"),
    (28, 28, 32, 32, (3, 3), PADDED, "images", "rows"),
    (9, 40, 32, 20, (2, 1), Conv2d((1, 2)), "images", "images"),
    (14, 14, 32, 32, (3, 3), Conv2d((2, 2), (1, 1, 1, 1)), "planes", "rows"),
    (15, 11, 33, 32, (1, 1), Conv2d((2, 2)), "planes", "rows"),
    (14, 14, 64, 32, (1, 1), Conv2d((2, 2)), "planes", "rows"),
    (21, 11, 40, 20, (3, 2), Conv2d((3, 2), (1, 0, 0, 3), (2, 3)), "planes", "rows"),
    (12, 17, 24, 20, (3, 2), Conv2d((3, 2), (1, 0, 0, 3), (2, 3)), "planes", "planes"),
    (12, 11, 7, 20, (3, 2), Conv2d((2, 2), (1, 0, 0, 3)), "images", "rows"),   # taps of 7
    (9, 28, 16, 32, (3, 3), PADDED, "images", "rows"),          # 48 inputs a line: two steps of 24
    (9, 28, 5, 32, (3, 3), Conv2d((2, 2), (1, 1, 1, 1)), "rows", "rows"),
    (9, 28, 3, 32, (3, 3), Conv2d((2, 2), (1, 1, 1, 1)), "rows", "rows"),
    (6, 6, 37, 32, (1, 1), Conv2d(), "images", "images"),       # 37 channels become 40
    (8, 32, 32, 32, (3, 3), Conv2d(padding=(2, 2, 2, 2), dilation=(2, 2)), "rows", "rows"),
    (8, 32, 64, 32, (3, 3), Conv2d(padding=(1, 1, 1, 1), groups=2), "rows", "images"),
    (8, 32, 10, 20, (3, 3), Conv2d(padding=(1, 1, 1, 1), groups=2), "rows", "images"),
    (8, 32, 64, 64, (3, 3), Conv2d(padding=(1, 1, 1, 1), groups=16), "rows", "images"),
]


@every_unit
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("height", "width", "channels", "outputs", "kernel", "op", "tiles",
                          "vectors"), WAYS)
def test_each_way_to_read_the_image_runs_where_it_should(
        unit, height, width, channels, outputs, kernel, op, tiles, vectors, residual):
    inputs = arrays(integers, op, 2, height, width, channels, outputs, kernel, residual)
    top, left, bottom, right = op.padding
    out_height, out_width = op.output_shape(*(a.shape for a in inputs))[1:3]
    g = ConvGeometry(height + top + bottom, width + left + right, channels, out_height, out_width,
                     outputs, *kernel, *op.stride, 0, 0, *op.dilation, inputs[1].shape[3])
    cut = dot_conv.cut_tiles(2, g, unit)
    rows = dot_conv.cut_rows(2, g, unit)
    in_rows = cut.pitch == rows.pitch and np.array_equal(cut.position, rows.position)
    channels = dot_conv.padded_channels(g, op.groups, unit)
    p = g._replace(channels=channels * op.groups, per_group=channels)
    way = "rows" if in_rows else "images"
    if dot_conv.planes_if_faster(p, op.groups, unit):
        way = "planes"
    assert way == (tiles if unit.depth > 2 else vectors)
    assert_exact(op, *inputs, weights=WEIGHTS, unit=unit)


@pytest.mark.parametrize("unit", unit_choice.BF16.values(), ids=unit_choice.BF16)
@pytest.mark.parametrize("length", [1, 6, 7, 8, 14, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("back", [0, 1, 5])
def test_tiles_cover_every_pixel_once(unit, length, back):
    """Of two images of 3 x length pixels, under windows of 2 x 3, begun `back` positions earlier
    where their micro-kernel has the room."""
    g = ConvGeometry(4, length + 2, 5, 3, length, 8, 2, 3, 1, 1, 0, 0, 1, 1, 5)
    for cut in dot_conv.cut_rows(2, g, unit), dot_conv.cut_images(2, g, unit):
        earlier = np.minimum(back, cut.computed(unit) - cut.rows)
        table, patterns = dot_conv.tabulate(cut, earlier, g, unit)
        assert patterns.shape[1] % GROUP == 0
        pixels, inputs = [], []
        for rows, first, offset, pattern in table:
            assert rows <= unit.rows
            places = patterns[pattern]
            assert (places[rows:] == -1).all()
            written = np.flatnonzero(places >= 0)
            pixels += [*first + places[written]]
            inputs += [*offset + 5 * written]
        assert sorted(pixels) == list(range(6 * length))
        row, column = np.divmod(pixels, length)
        image, row = np.divmod(row, 3)
        np.testing.assert_array_equal(inputs, ((image * 4 + row) * (length + 2) + column) * 5)


@pytest.mark.parametrize("unit", [*unit_choice.BF16.values(), *unit_choice.INT8.values()],
                         ids=lambda unit: unit.constant.name)
@pytest.mark.parametrize("samples", [9, 50, 197, 785])
def test_samples_are_multiplied_many_at_a_time(unit, samples):
    """A line each, they could be cut into tiles of one, which compute no rows for nothing."""
    g = ConvGeometry(samples, 1, 64, samples, 1, 8, 1, 1, 1, 1, 0, 0, 1, 1, 64)
    assert len(dot_conv.cut_tiles(1, g, unit).rows) == -(-samples // unit.rows)


@pytest.mark.parametrize("unit", unit_choice.BF16.values(), ids=unit_choice.BF16)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3, 16, 24, 37, 48, 74, 80, 144, 1024])
@pytest.mark.parametrize(("kernel", "dilation"), [((1, 1), (1, 1)), ((3, 3), (1, 1)),
                                                  ((7, 7), (1, 1)), ((3, 2), (2, 1)),
                                                  ((2, 3), (1, 3))])
def test_taps_are_the_inputs_of_a_window_in_even_steps(unit, groups, channels, kernel, dilation):
    g = ConvGeometry(50, 40, channels * groups, 1, 1, 8, *kernel, 1, 1, 0, 0, *dilation, channels)
    padded = dot_conv.padded_channels(g, groups, unit)
    assert channels <= padded <= 2 * channels or channels == 1
    p = g._replace(channels=padded * groups, per_group=padded)
    taps = dot_conv.cut_taps(p, unit)
    assert taps.depth % 2 == 0
    assert taps.depth <= unit.depth
    assert taps.steps == 1 or unit.depth == 2
    lines, columns = (np.arange(size) * step for size, step in zip(kernel, dilation, strict=True))
    window = (lines[:, None] * 40 + columns).ravel()[:, None] * padded * groups + np.arange(padded)
    found = taps.starts[:, None] + np.arange(taps.steps * taps.depth)
    np.testing.assert_array_equal(found.ravel(), window.ravel())
    assert taps.span == window.max() + 1
    # Not many more steps than channels need that are multiples of what a step can take.
    wide = dot_conv.up_to(channels, unit.depth)
    run = dot_conv.run(g._replace(channels=wide * groups, per_group=wide))
    runs = kernel[0] * kernel[1] * wide // run
    assert len(taps.starts) * taps.steps <= 1.25 * runs * -(-run // unit.depth)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [
    ((3, 3), (2, 2), (1, 1)), ((1, 1), (2, 2), (1, 1)), ((2, 5), (3, 2), (1, 1)),
    ((3, 3), (2, 3), (2, 1))])
def test_planes_hold_what_each_tap_reads_and_nothing_else(kernel, stride, dilation):
    """Pixels are numbered: window by window, the taps find the numbers that the image has there."""
    g = ConvGeometry(13, 17, 2, 3, 3, 8, *kernel, *stride, 0, 0, *dilation, 2)
    planes = dot_conv.cut_planes(g, dot_units.AVX512_BF16)
    numbers = np.full((-(-13 // stride[0]) * stride[0], -(-17 // stride[1]) * stride[1]), -1)
    numbers[:13, :17] = np.arange(13 * 17).reshape(13, 17)
    image = np.concatenate([numbers[row::stride[0], column::stride[1]].ravel()
                            for row, column in planes.phases])
    assert len(image) == planes.image.height * planes.image.width
    phases = {(line * dilation[0] % stride[0], tap * dilation[1] % stride[1])
              for line in range(kernel[0]) for tap in range(kernel[1])}
    assert set(map(tuple, planes.phases)) == phases
    for row in range(3):
        for column in range(3):
            first = row * planes.image.width + column
            found = image[first + planes.taps.starts // 2]
            lines, taps = (np.arange(size) * step for size, step in zip(kernel, dilation,
                                                                        strict=True))
            window = numbers[(row * stride[0] + lines)[:, None], column * stride[1] + taps]
            np.testing.assert_array_equal(found, window.ravel())


@pytest.mark.parametrize("blocks", [1, 2, 5, 8, 32])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("tiles", [1, 2, 7, 100])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [1, 3, 99])
def test_passes_are_even_shares_of_all_blocks(blocks, groups, tiles, threads, most):
    passes = dot_conv.cut_passes(blocks * groups, groups, most, tiles, threads, 10)
    assert [block for first, end, _ in passes for block in range(first, end)] == list(
        range(blocks * groups))
    assert all(offset == 10 * (first // blocks) == 10 * ((end - 1) // blocks)
               for first, end, offset in passes)
    sizes = passes[:, 1] - passes[:, 0]
    assert sizes.max() <= most
    share = -(-len(passes) * tiles // threads) * sizes.max()
    alone = -(-blocks * groups * tiles // threads)      # were each block a pass
    assert share <= 1.05 * alone


@pytest.mark.parametrize("by_tile", [False, True])
def test_units_are_all_pairs_of_pass_and_tile(by_tile):
    units = dot_conv.order_units(3, 5, by_tile)
    assert sorted(map(tuple, units)) == [(i, j) for i in range(3) for j in range(5)]
    assert (np.diff(units[:, 1 if by_tile else 0]) >= 0).all()


@every_unit
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("worth", [0, 1e9])
def test_pixels_or_outputs_are_parted(monkeypatch, unit, threads, worth):
    monkeypatch.setattr(dot_conv, "WORTH", worth)
    inputs = arrays(integers, PADDED, 1, 9, 32, 32, 5 * BLOCK + 3, (3, 3))
    step = prepare(PADDED, inputs, WEIGHTS, threads=threads, unit=unit)
    y = np.empty(PADDED.output_shape(*(array.shape for array in inputs)), np.float32)
    units = step.bind(inputs, y, aligned(step.workspace))[1].arguments[UNITS]
    assert (np.diff(units[:, 1 if worth else 0]) >= 0).all()
    assert_exact(PADDED, *inputs, weights=WEIGHTS, unit=unit)


@every_unit
@pytest.mark.parametrize(("threads", "at_once"), [(1, 1), (1, 2), (2, 2)])
def test_many_passes_over_large_weights(monkeypatch, unit, threads, at_once):
    monkeypatch.setattr(dot_conv, "PASS_BYTES", at_once * 9 * 32 * BLOCK * 2)
    inputs = arrays(integers, PADDED, 1, 5, 32, 32, 5 * BLOCK + 3, (3, 3))
    assert_exact(PADDED, *inputs, weights=WEIGHTS, unit=unit)


@every_unit
@pytest.mark.parametrize("activation", [None, ops.Relu(), ops.Clip(0.0, 6.0), ops.Sigmoid(),
                                        ops.HardSigmoid(0.2, 0.5)])
def test_fused_activations_and_residual(unit, activation):
    op = Conv2d(padding=(1, 1, 1, 1), activation=activation)
    inputs = arrays(normal, op, 2, 6, 9, 8, 20, (3, 3), residual=True)
    name = "" if activation is None else f"_{activation.kind.lower()}"
    assert prepare(op, inputs, WEIGHTS, unit=unit).kernel == (
        f"conv2d_3x3_bf16_{unit.name}_{unit.rows}x{BLOCK}{name}")
    # No activation's slope exceeds 1; sigmoid rounds a few times more.
    assert_sums_right(op, PADDED, 72, *inputs, slack=4e-7, weights=WEIGHTS, unit=unit)


@every_unit
@pytest.mark.parametrize("op", [PADDED, Conv2d((2, 2), dilation=(2, 2)), Conv2d(groups=2)])
def test_some_channels_of_a_wider_output(unit, op):
    """As those of a Concat's output are; with a residual none can be written so."""
    inputs = arrays(integers, op, 2, 7, 9, 32, BLOCK + 6, (3, 3))
    assert_exact(op, *inputs, weights=WEIGHTS, unit=unit, gap=37)
    residual = arrays(integers, op, 2, 7, 9, 32, BLOCK + 6, (3, 3), residual=True)
    assert not prepare(op, residual, WEIGHTS, unit=unit).strided


@every_unit
def test_a_convolution_without_bias(unit):
    x, weight, _ = arrays(integers, Conv2d(), 1, 4, 5, 3, 6, (2, 2))
    assert_exact(Conv2d(), x, weight, weights=(1,), unit=unit)


@every_unit
@pytest.mark.parametrize("op", [PADDED, Conv2d(padding=(2, 2, 2, 2), dilation=(2, 2)),
                                Conv2d(padding=(1, 1, 1, 1), activation=ops.Relu())])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [3, 32])
def test_nan_and_infinity_travel_as_ieee_says(unit, op, value, channels):
    x, weight, bias = arrays(integers, op, 1, 9, 32, channels, 8, (3, 3))
    weight[weight == 0] = 1
    x[0, 4, 5, 1] = value
    assert_exact(op, x, weight, bias, weights=WEIGHTS, unit=unit)


@every_unit
@pytest.mark.parametrize("channels", [3, 17, 32, 40])
def test_the_input_beside_the_image_is_never_used(unit, channels):
    """Everything beyond the image is NaN: a tile that uses one number too many shows."""
    for op in (Conv2d(), PADDED):
        x, weight, bias = arrays(integers, op, 1, 5, 18, channels, 9, (3, 3))
        block = np.full(x.size + 256, np.nan, np.float32)
        inside = block[128:128 + x.size].reshape(x.shape)
        inside[...] = x
        assert_exact(op, inside, weight, bias, weights=WEIGHTS, unit=unit)


# Inputs, output and scratch memory end where memory ends that may be touched, and the last of two
# threads, whose scratch is the last, does all the work.
AT_THE_EDGE = """
import sys
import numpy as np
sys.path.insert(0, "tests")
from bf16_checks import backend, narrow, prepare_stored
from edges import copy_at_the_edge, run_on_the_last_thread
from test_bf16_conv import WAYS, arrays, integers
from test_bf16_values import IN_PLACE
from kernels import reference
from kernels.cpu.host import unit_choice

unit = unit_choice.BF16[sys.argv[1]]
backend.PREPARE.update(backend.narrow())
problems = [(*way[:4], *way[4:6]) for way in WAYS]
problems += [(h, w, c, 40, kernel, op) for h, w, c, kernel, op in IN_PLACE]
problems += [(1, pixels, 24, 40, (1, 1), IN_PLACE[0][-1]) for pixels in (1, 7, 13, 17, 33)]
for height, width, channels, outputs, kernel, op in problems:
    for dtype in ("float32", "bfloat16"):
        given = arrays(integers, op, 1, height, width, channels, outputs, kernel, True)
        expected = reference.run(op, *given).astype(np.float32).astype(dtype)
        given[0], given[3] = given[0].astype(dtype), given[3].astype(dtype)
        inputs = [copy_at_the_edge(array) for array in given]
        step = prepare_stored(op, inputs, dtype, 2, unit=unit)
        y = copy_at_the_edge(np.zeros_like(given[3]))
        run_on_the_last_thread(step, inputs, y, unit)
        assert np.array_equal(y, expected), op
print("never beyond")
"""


@every_unit
def test_nothing_beyond_the_input_the_output_and_the_scratch_is_touched(unit):
    done = subprocess.run([sys.executable, "-c", AT_THE_EDGE, unit.name],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout == "never beyond\n", done.stderr


def test_nothing_before_the_scratch_is_touched():
    unit = dot_units.AMX_EMULATED_BF16
    inputs = arrays(integers, PADDED, 1, 7, 7, 16, 40, (3, 3))
    step = prepare(PADDED, inputs, WEIGHTS, unit=unit)
    block = aligned(step.workspace + 64)
    y = np.empty(PADDED.output_shape(*(array.shape for array in inputs)), np.float32)
    for launch in step.bind(inputs, y, block[64:]):
        launch()
    assert (block[:64] == 0xFF).all()


@every_unit
def test_weights_are_packed_once_for_all_programs(unit):
    inputs = arrays(integers, PADDED, 1, 9, 32, 32, 6, (3, 3))
    options = Options(1)
    for batch in (1, 2):
        spec = TensorSpec((batch, 9, 32, 32))
        output = TensorSpec(PADDED.output_shape(spec.shape, inputs[1].shape))
        dot_conv.prepare_conv2d(PADDED, [spec, *(TensorSpec(a.shape) for a in inputs[1:])], output,
                                 [None, *inputs[1:]], options, unit)
    assert len(options.packed) == 1


def test_a_depthwise_convolution_keeps_its_float32_kernel(monkeypatch):
    monkeypatch.setenv("CNN_BF16", "amx_emulated")
    op = Conv2d(padding=(1, 1, 1, 1), groups=8)
    x, weight, bias = arrays(normal, op, 1, 9, 9, 8, 8, (3, 3))
    specs = [TensorSpec(array.shape) for array in (x, weight, bias)]
    step = backend.prepare(op, specs, specs[0], [None, weight, bias], Options(1, "bfloat16"))
    assert step.kernel.startswith("depthwise_3x3_f32")


def test_weights_must_be_constants():
    inputs = arrays(integers, Conv2d(), 1, 4, 5, 3, 6, (2, 2))
    with pytest.raises(ValueError, match="must be constants"):
        run(Conv2d(), *inputs, weights=())


def test_a_second_process_compiles_nothing():
    code = ("import sys, numpy as np\n"
            "from kernels.cpu import backend\n"
            "from kernels.ops import Conv2d, TensorSpec\n"
            "from kernels.step import Options\n"
            "x, w, b = np.ones((1, 4, 4, 3), 'f'), np.ones((3, 1, 1, 3), 'f'), np.ones(3, 'f')\n"
            "specs = [TensorSpec(a.shape) for a in (x, w, b)]\n"
            "step = backend.prepare(Conv2d(), specs, specs[0], [None, w, b],\n"
            "                       Options(1, 'bfloat16'))\n"
            "step.bind([x, w, b], np.empty_like(x), np.empty(step.workspace, np.uint8))\n"
            "print('numba' in sys.modules)")
    environment = {**os.environ, "CNN_BF16": "amx_emulated"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                              env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
