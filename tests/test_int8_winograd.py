"""Convolutions of 8 bits by Winograd's algorithm in float32, where that is faster than what the CPU
has for 8 bits: what it reads and writes as codes, and when it is chosen."""
import itertools

import numpy as np
import pytest
from bf16_checks import lacking
from int8_checks import codes, expected_codes, quantise, run_prepared, specs, values
from test_winograd import both_tiles

from kernels import ops, reference
from kernels.cpu import backend
from kernels.cpu.dot_units import BLOCK
from kernels.cpu.host import conv, dot_conv, narrow, unit_choice
from kernels.cpu.sizes import LANES
from kernels.ops import Conv2d, Grid, TensorSpec
from kernels.step import Options

# Powers of two, and sums below 2 ** 24 quarters: tiles of 2 are exact.
IN, OTHER, OUT, WEIGHT = Grid(0.5, 19), Grid(0.25, 77), Grid(2.0, 102), 0.125
SHAPES = [(2, 9, 14, 5, BLOCK + 13), (1, 16, 16, 2 * LANES, 2 * BLOCK), (3, 3, 30, LANES, 3)]


def arrays(shape, op, x_grid=IN, other=None, scale=WEIGHT, seed=0):
    """(x, weight, bias[, residual]) as numbers; weights are small."""
    n, h, w, c, outputs = shape
    rng = np.random.default_rng(seed)
    weight = (rng.integers(-15, 16, (outputs, 3, 3, c)) * scale).astype(np.float32)
    found = [values(rng, x_grid, n, h, w, c), weight,
             (rng.integers(-99, 100, outputs) * x_grid.scale * WEIGHT).astype(np.float32)]
    if other is not None:
        found.append(values(rng, other, *op.output_shape(found[0].shape, weight.shape)))
    return found


def as_stored(found, narrow_inputs, x_grid=IN, other=OTHER):
    """The inputs as float32, or as codes where they are among these positions."""
    grids = {0: x_grid, 3: other}
    return [codes(array, grids[i]) if i in narrow_inputs else array
            for i, array in enumerate(found)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 3)])
@pytest.mark.parametrize("narrow_inputs", [(0,), (3,), (0, 3)])
@pytest.mark.parametrize("last", [None, ops.Relu(), quantise(OUT),
                                  ops.FakeQuantize(*OUT, relu=True)])
def test_codes_are_read_and_written_exactly(shape, padding, narrow_inputs, last):
    """Around the image lies 0, whatever code that is."""
    op = Conv2d(padding=padding, activation=last)
    found = arrays(shape, op, other=OTHER)
    grid = OUT if isinstance(last, ops.FakeQuantize) else None
    y, step = run_prepared(conv.prepare_conv2d, op, as_stored(found, narrow_inputs),
                           [IN, None, None, OTHER], grid, tile=2)
    assert step.kernel.startswith("winograd_2x2_3x3_f32")
    expected = reference.run(op, *found)
    np.testing.assert_array_equal(y, expected if grid is None else codes(expected, grid))
    assert len(np.unique(y)) > 20


@both_tiles
@pytest.mark.parametrize("x_zero", [0, 128, 255])
def test_any_scales_are_off_by_a_code_at_most_where_a_quotient_is_nearly_a_half(tile, x_zero):
    x_grid, other, out = Grid(0.0173, x_zero), Grid(0.021, 4), Grid(0.1, 98)
    op = Conv2d(padding=(1, 1, 1, 1), activation=quantise(out))
    found = arrays((2, 11, 18, 24, 40), op, x_grid, other, scale=0.0113)
    y, _ = run_prepared(conv.prepare_conv2d, op, as_stored(found, (0, 3), x_grid, other),
                        [x_grid, None, None, other], out, tile=tile)
    sums = reference.run(Conv2d(padding=(1, 1, 1, 1)), *found)
    exact = np.clip(sums / out.scale, -out.zero_point, 255 - out.zero_point) + out.zero_point
    assert np.abs(y - exact).max() <= 0.5 + 1e-3
    assert len(np.unique(y)) > 50


@both_tiles
def test_a_function_is_applied_before_codes_are_written(tile):
    out = Grid(0.0625, 3)           # an odd zero point: only behind a function
    last = ops.FakeQuantize(*out, first=ops.Gelu())
    op = Conv2d(padding=(1, 1, 1, 1), activation=last)
    found = arrays((1, 12, 13, 16, 20), op, Grid(0.01, 128))
    y, _ = run_prepared(conv.prepare_conv2d, op, as_stored(found, (0,), Grid(0.01, 128)),
                        [Grid(0.01, 128), None, None], out, tile=tile)
    expected = expected_codes(op, found, out)
    assert np.abs(y.astype(int) - expected).max() <= 1
    assert (y == expected).mean() > 0.99


def test_the_output_may_be_a_part_of_another():
    op = Conv2d(padding=(1, 1, 1, 1), activation=quantise(OUT))
    found = arrays(SHAPES[0], op)
    given = as_stored(found, (0,))
    inputs, output = specs(op, given, [IN, None, None])
    *places, channels = output.shape
    wide = np.full((*places, channels + 7), 0xEE, np.uint8)
    step = conv.prepare_conv2d(op, inputs, TensorSpec(output.shape, "uint8", OUT),
                               [None, *found[1:]], Options(1), 2)
    assert step.strided
    for launch in step.bind(given, wide[..., 3:3 + channels], np.empty(step.workspace, np.uint8)):
        launch()
    np.testing.assert_array_equal(wide[..., 3:3 + channels], expected_codes(op, found, OUT))
    assert (wide[..., :3] == 0xEE).all()
    assert (wide[..., 3 + channels:] == 0xEE).all()


# ---- the choice -------------------------------------------------------------------------------

def units():
    return [name for name, unit in unit_choice.INT8.items() if not lacking(unit)]


@pytest.mark.parametrize("name", units())
@pytest.mark.parametrize(("size", "tile"), [(16, 4), (14, 2), (4, 0)])
@pytest.mark.parametrize("zero_point", [2, 3])
def test_winograd_is_chosen_where_it_is_faster_than_8_bits(monkeypatch, name, size, tile,
                                                           zero_point):
    """And said to write codes where it can: of an even zero point."""
    monkeypatch.setenv("CNN_INT8", name)
    op = Conv2d(padding=(1, 1, 1, 1), activation=ops.FakeQuantize(1.0, zero_point))
    found = arrays((1, size, size, 64, 64), op)
    found[1][:, 0, 0, 0] = 127 * WEIGHT         # by which it is seen that they are of 8 bits
    inputs, output = specs(op, found, [IN, None, None])
    constants = [None, *found[1:]]
    kernel = backend.prepare(op, inputs, output, constants, Options(1)).kernel
    by_winograd = name == "avx2" and tile > 0
    assert kernel.startswith(f"winograd_{tile}x{tile}_3x3_f32" if by_winograd
                             else f"conv2d_3x3_int8_{name}")
    can = narrow.codes(op, inputs, constants, Options(1))
    assert can.reads == (0, 3)
    assert can.writes == (zero_point == 2 or not by_winograd)


def test_only_avx2_is_slower_than_winograd():
    fast = [unit for unit in unit_choice.INT8.values() if unit.name != "avx2"]
    for unit, (height, width) in itertools.product(fast, [(16, 16), (224, 224), (14, 14)]):
        weight = np.zeros((64, 3, 3, 64), np.float32)
        assert dot_conv.winograd_tile(Conv2d(padding=(1, 1, 1, 1)), weight, (height, width),
                                      unit) == 0
