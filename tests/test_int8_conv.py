"""Convolutions and Linear layers of 8 bits, by tiles and by vectors: exact where scales are powers
of two, and within a code of the reference for others."""
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conv_problems import problems
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_checks import (
    IN,
    OUT,
    WEIGHT,
    codes,
    every_int8_unit,
    expected_codes,
    quantise,
    run_prepared,
    specs,
    values,
    weights,
)
from test_bf16_conv import WAYS

from kernels import ops, reference
from kernels.cpu.dot_units import BLOCK, COLUMNS, VNNI_EMULATED_INT8
from kernels.cpu.geometry import ConvGeometry
from kernels.cpu.host import dot_conv, dot_matmul, unit_choice
from kernels.ops import Conv2d, Grid, Linear
from kernels.step import Options

ANY = problems([1, 2, 3, 4, 8, 17, 32, 64], [1, 2, 5, COLUMNS, COLUMNS + 1, BLOCK,
                                             BLOCK + COLUMNS + 3], 12)


def layer(op, n, h, w, c, outputs, kernel, residual=False, seed=0):
    """(x, weight, bias[, residual]) as numbers."""
    rng = np.random.default_rng(seed)
    arrays = [values(rng, IN, n, h, w, c), weights(rng, outputs, *kernel, c // op.groups),
              (rng.integers(-99, 100, outputs) * IN.scale * WEIGHT).astype(np.float32)]
    if residual:
        shape = op.output_shape(*(array.shape for array in arrays))
        arrays.append(rng.integers(-9, 10, shape).astype(np.float32))
    return arrays


@every_int8_unit
@given(problem=ANY, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_convolution_is_exact(unit, problem, seed):
    """From numbers or codes, to either."""
    op, shape = problem
    op = Conv2d(op.stride, op.padding, op.dilation, op.groups)
    x, *rest = layer(op, *shape, seed=seed)
    last = Conv2d(op.stride, op.padding, op.dilation, op.groups, quantise(OUT))
    grids = [IN, *[None] * len(rest)]
    for given_x in (x, codes(x, IN)):
        y, step = run_prepared(dot_conv.prepare_conv2d, op, [given_x, *rest], grids, unit=unit)
        np.testing.assert_array_equal(y, reference.run(op, x, *rest))
        assert f"_int8_{unit.name}_" in step.kernel or "depthwise" in step.kernel
        if "depthwise" in step.kernel:
            break
        y, _ = run_prepared(dot_conv.prepare_conv2d, last, [given_x, *rest], grids, OUT, unit=unit)
        np.testing.assert_array_equal(y, expected_codes(last, [x, *rest], OUT))


@every_int8_unit
@given(samples=st.integers(1, 40), features=st.integers(1, 150),
       outputs=st.sampled_from([1, COLUMNS - 1, COLUMNS, BLOCK, 2 * BLOCK + 5]),
       seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_linear_layer_is_exact(unit, samples, features, outputs, seed):
    rng = np.random.default_rng(seed)
    x, *rest = (values(rng, IN, samples, features), weights(rng, outputs, features),
                (rng.integers(-99, 100, outputs) * IN.scale * WEIGHT).astype(np.float32))
    grids, name = [IN, None, None], unit.name
    if samples < dot_matmul.FEW:
        name = name.replace("amx", "vnni")
    for given_x in (x, codes(x, IN)):
        y, step = run_prepared(dot_matmul.prepare_linear, Linear(), [given_x, *rest], grids,
                               unit=unit)
        assert step.kernel.startswith(f"linear_int8_{name}_")
        np.testing.assert_array_equal(y, reference.run(Linear(), x, *rest))
        y, _ = run_prepared(dot_matmul.prepare_linear, Linear(quantise(OUT)), [given_x, *rest],
                            grids, OUT, unit=unit)
        np.testing.assert_array_equal(y, expected_codes(Linear(quantise(OUT)), [x, *rest], OUT))


@pytest.mark.parametrize("unit", unit_choice.INT8.values(), ids=unit_choice.INT8)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("channels", [3, 5, 8, 64])
def test_runs_that_are_no_whole_words_read_nothing_beyond_the_input(unit, channels, kernel):
    """Their last word has inputs that are another pixel's, or nobody's."""
    in_place = set()
    for height, width, stride in itertools.product((3, 4, 9), range(3, 80), (1, 2)):
        op = Conv2d((stride, stride))
        out = op.output_shape((1, height, width, channels), (8, *kernel, channels))
        g = ConvGeometry(height, width, channels, *out[1:], *kernel, *op.stride, 0, 0, 1, 1,
                         channels)
        image = dot_conv.lay_out(1, g, (0, 0), 1, unit, "uint8")
        if image.phases is None:
            assert image.geometry == g          # whose channels are not padded
        assert image.taps.run % unit.together == 0
        assert image.taps.inputs >= kernel[0] * kernel[1] * channels
        in_place.add(image.in_place)
        if not image.in_place:
            continue
        rows, _, offset, _ = image.tiles.table.T
        assert (offset >= 0).all()
        computed = np.array(unit.sizes)[np.searchsorted(unit.sizes, rows)]
        end = offset + (computed - 1) * image.x_step + image.taps.span
        assert end.max() <= height * width * channels
    assert any(in_place) == (unit.stored == "uint8")


@every_int8_unit
@pytest.mark.parametrize("of_codes", [False, True])
@pytest.mark.parametrize("activation", [None, ops.Relu(), quantise(OUT),
                                        ops.FakeQuantize(*OUT, relu=True)])
def test_a_residual_of_numbers_or_codes_is_added(unit, of_codes, activation):
    op, other = Conv2d(padding=(1, 1, 1, 1), activation=activation), Grid(2.0, 17)
    x, *rest = layer(op, 2, 7, 9, 12, 40, (3, 3), residual=True)
    if of_codes:
        rest[2] = values(np.random.default_rng(1), other, *rest[2].shape)
    given_x = [codes(x, IN), *rest[:2], codes(rest[2], other) if of_codes else rest[2]]
    grid = OUT if isinstance(activation, ops.FakeQuantize) else None
    y, _ = run_prepared(dot_conv.prepare_conv2d, op, given_x, [IN, None, None, other], grid,
                        unit=unit)
    expected = reference.run(op, x, *rest)
    np.testing.assert_array_equal(y, expected if grid is None else codes(expected, grid))


@every_int8_unit
@pytest.mark.parametrize(("height", "width", "channels", "outputs", "kernel", "op"),
                         [way[:6] for way in WAYS])
@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_each_way_to_read_the_image(unit, height, width, channels, outputs, kernel, op,
                                    zero_point):
    """Padding is 0, whatever code that is."""
    grid = Grid(IN.scale, zero_point)
    _, *rest = layer(op, 2, height, width, channels, outputs, kernel)
    x = values(np.random.default_rng(5), grid, 2, height, width, channels)
    for given_x in (x, codes(x, grid)):
        y, _ = run_prepared(dot_conv.prepare_conv2d, op, [given_x, *rest], [grid, None, None],
                            unit=unit)
        np.testing.assert_array_equal(y, reference.run(op, x, *rest))


@every_int8_unit
def test_any_scales_are_off_by_a_code_at_most_where_a_quotient_is_nearly_a_half(unit):
    rng = np.random.default_rng(0)
    grid, out = (Grid(float(np.float32(scale)), zero) for scale, zero in ((0.0173, 12), (0.4, 99)))
    op = Conv2d(padding=(1, 1, 1, 1), activation=quantise(out))
    scales = rng.uniform(0.001, 0.02, (40, 1, 1, 1))
    x, weight = values(rng, grid, 2, 9, 11, 24), weights(rng, 40, 3, 3, 24, scale=scales)
    bias = rng.standard_normal(40).astype(np.float32)
    y, _ = run_prepared(dot_conv.prepare_conv2d, op, [codes(x, grid), weight, bias],
                        [grid, None, None], out, unit=unit)
    sums = reference.run(Conv2d(padding=(1, 1, 1, 1)), x, weight, bias)
    exact = np.clip(sums / out.scale, -out.zero_point, 255 - out.zero_point) + out.zero_point
    error = np.abs(y - exact)
    assert error.max() <= 0.5 + 1e-3
    assert len(np.unique(y)) > 100


@every_int8_unit
@pytest.mark.parametrize("size", [20_000, 65_535])
@pytest.mark.parametrize("weight_code", [127, -127])
def test_the_greatest_sums_fit(unit, size, weight_code):
    x, grid = np.full((2, size), 255, np.uint8), Grid(1.0, 0)
    weight = np.full((3, size), weight_code, np.float32)
    y, step = run_prepared(dot_matmul.prepare_linear, Linear(), [x, weight], [grid, None],
                           unit=unit)
    assert (y == np.float32(255 * size * weight_code)).all()
    assert "_int8_" in step.kernel


@pytest.mark.parametrize(("weight", "grid"), [
    (np.random.default_rng(0).standard_normal((8, 1, 1, 64)).astype(np.float32), IN),
    (np.ones((8, 1, 1, 64), np.float32), None)])
def test_what_is_not_of_8_bits_is_multiplied_in_float32(weight, grid):
    x = values(np.random.default_rng(1), IN, 1, 4, 4, 64)
    y, step = run_prepared(dot_conv.prepare_conv2d, Conv2d(), [x, weight], [grid, None])
    assert step.kernel.startswith("conv2d_1x1_f32")
    np.testing.assert_allclose(y, reference.run(Conv2d(), x, weight), rtol=1e-5, atol=1e-3)


def test_sums_of_too_many_products_are_left_to_float32():
    x, weight = values(np.random.default_rng(1), IN, 1, 65_536), np.ones((2, 65_536), np.float32)
    _, step = run_prepared(dot_matmul.prepare_linear, Linear(), [x, weight], [IN, None])
    assert "_f32" in step.kernel


AT_THE_EDGE = """
import sys
import subprocess
import sys
from pathlib import Path

import numpy as np
sys.path.insert(0, "tests")
from edges import copy_at_the_edge, run_on_the_last_thread
from int8_checks import IN, OUT, codes, expected_codes, quantise, specs
from test_int8_conv import Conv2d, Options, WAYS, dot_conv, layer
from test_bf16_values import IN_PLACE
from kernels import reference
from kernels.cpu.host import unit_choice
from kernels.ops import TensorSpec

unit = unit_choice.INT8[sys.argv[1]]
problems = [(*way[:4], *way[4:6]) for way in WAYS]
problems += [(h, w, c, 40, kernel, op) for h, w, c, kernel, op in IN_PLACE]
problems += [(1, pixels, 24, 40, (1, 1), Conv2d()) for pixels in (1, 7, 13, 17, 33)]
for height, width, channels, outputs, kernel, op in problems:
    op = Conv2d(op.stride, op.padding, op.dilation, op.groups, quantise(OUT))
    x, *rest = layer(op, 1, height, width, channels, outputs, kernel, True)
    expected = expected_codes(op, [x, *rest], OUT)
    inputs = [copy_at_the_edge(array) for array in (codes(x, IN), *rest)]
    output = TensorSpec(expected.shape, "uint8", OUT)
    step = dot_conv.prepare_conv2d(op, *specs(op, inputs, [IN, None, None, None], output),
                                   [None, *rest], Options(2), unit)
    y = copy_at_the_edge(np.zeros_like(expected))
    run_on_the_last_thread(step, inputs, y, unit)
    assert np.array_equal(y, expected), op
print("never beyond")
"""


@every_int8_unit
def test_nothing_beyond_the_input_the_output_and_the_scratch_is_touched(unit):
    done = subprocess.run([sys.executable, "-c", AT_THE_EDGE, unit.name],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout == "never beyond\n", done.stderr


def test_weights_are_packed_once_for_all_programs():
    op, options = Conv2d(), Options(1)
    arrays = layer(op, 1, 4, 4, 8, 8, (1, 1))
    inputs, output = specs(op, arrays, [IN, None, None])
    for _ in range(2):
        dot_conv.prepare_conv2d(op, inputs, output, [None, *arrays[1:]], options,
                                VNNI_EMULATED_INT8)
    assert len(options.packed) == 3     # scales, sums and panels
