"""FakeQuantize, also of sums, of what is stored in codes of 8 bits: exact where scales are powers
of two, and else within the code that rounding decides."""
import itertools

import numpy as np
import pytest
from checks import normal
from code_checks import run_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_checks import codes, expected_codes, quantise, stored, values

from kernels import ops, reference
from kernels.ops import AddFakeQuantize, Grid, TensorSpec

SIZES = [1, 17, 4096, 4097, 10_000]
BOTH = ["float32", "uint8"]
SHORT = {"float32": "f32", "uint8": "u8"}
# Those of the sums reach beyond both ends of what they are quantised to.
A, B, SUM = Grid(0.5, 3), Grid(0.25, 201), Grid(0.5, 77)
ZERO_POINTS = [0, 1, 128, 254, 255]


def spec(shape, dtype, grid):
    return TensorSpec(shape, dtype, grid)


def given_as(dtype, array, grid):
    return codes(array, grid) if dtype == "uint8" else array


def beside_ties(quotient):
    """Where float32 may round a quotient to either side."""
    return np.abs(quotient - np.floor(quotient) - 0.5) < 1e-4


def assert_near(found, quotient, grid):
    """Codes are those of the quotients, but for what lies between two."""
    expected = np.clip(np.rint(quotient) + grid.zero_point, 0, 255).astype(int)
    wrong = found.astype(int) != expected
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert beside_ties(quotient)[wrong].all()


def kernel_of(op, dtypes, result):
    what = "add_quantize" if isinstance(op, AddFakeQuantize) else "quantize"
    return f"{what}_{'_'.join(SHORT[dtype] for dtype in dtypes)}_to_{SHORT[result]}"


# ---- of one value -----------------------------------------------------------------------------

@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("x_dtype", "y_dtype"), [("uint8", "uint8"), ("uint8", "float32"),
                                                  ("float32", "uint8")])
@pytest.mark.parametrize(("grid", "wanted"), [
    (Grid(0.5, 3), Grid(1.0, 5)),               # half of all numbers are ties
    (Grid(0.5, 128), Grid(0.125, 100)),         # both ends are passed
    (Grid(4.0, 200), Grid(4.0, 199)), (Grid(2.0 ** -20, 0), Grid(2.0 ** -20, 0))])
def test_quantising_is_exact_from_codes_and_to_codes(size, x_dtype, y_dtype, grid, wanted):
    x, op = values(np.random.default_rng(size), grid, size), quantise(wanted)
    y = run_codes(op, [given_as(x_dtype, x, grid)], [grid], spec((size,), y_dtype, wanted),
                  kernel_of(op, [x_dtype], y_dtype))
    np.testing.assert_array_equal(y, given_as(y_dtype, reference.run(op, x), wanted))


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0 ** 10])
def test_ties_go_to_even_before_the_zero_point_is_added(scale, zero_point):
    grid = Grid(scale, zero_point)
    x = np.arange(-1200, 1201, dtype=np.float32) * np.float32(scale / 4)
    x = np.concatenate([x, np.float32([np.inf, -np.inf, 1e30, -1e30, -0.0, 1e-45])])
    y = run_codes(quantise(grid), [x], [None], spec(x.shape, "uint8", grid), "quantize_f32_to_u8")
    np.testing.assert_array_equal(y, expected_codes(quantise(grid), [x], grid))
    assert (y.min(), y.max()) == (0, 255)


@given(st.floats(1e-3, 1e3), st.integers(0, 255), st.floats(1e-3, 1e3), st.integers(0, 255))
@settings(max_examples=40, deadline=None)
def test_any_grid_to_any_other(scale, zero_point, wanted_scale, wanted_zero):
    grid, wanted = Grid(scale, zero_point), Grid(wanted_scale, wanted_zero)
    x = np.arange(256, dtype=np.uint8)
    y = run_codes(quantise(wanted), [x], [grid], spec((256,), "uint8", wanted))
    quotient = (x.astype(float) - zero_point) * scale / wanted_scale
    np.testing.assert_allclose(
        run_codes(quantise(wanted), [x], [grid]),
        (y.astype(float) - wanted_zero) * wanted_scale, rtol=1e-6)
    if np.abs(quotient).max() < 300:        # beyond, a rounding is more than it may be
        assert_near(y, quotient, wanted)


@given(st.integers(0, 999), st.floats(0.01, 0.1), st.integers(0, 255))
@settings(max_examples=40, deadline=None)
def test_any_numbers_to_any_grid(seed, scale, zero_point):
    grid, x = Grid(scale, zero_point), normal(np.random.default_rng(seed), 5000) * 2
    y = run_codes(quantise(grid), [x], [None], spec(x.shape, "uint8", grid))
    assert_near(y, x.astype(float) / scale, grid)


def test_its_own_codes_stay():
    for zero_point in range(0, 256, 5):
        grid, x = Grid(0.1, zero_point), np.arange(256, dtype=np.uint8)
        np.testing.assert_array_equal(
            run_codes(quantise(grid), [x], [grid], spec((256,), "uint8", grid)), x)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 4, 16), (3, 4097), (1, 9000), (300, 1)])
@pytest.mark.parametrize(("x_dtype", "y_dtype"), [("uint8", "uint8"), ("uint8", "float32"),
                                                  ("float32", "uint8")])
@pytest.mark.parametrize("gap", [1, 6, 40])
def test_a_part_of_a_concat_is_written_where_it_lies(shape, x_dtype, y_dtype, gap):
    x, op = values(np.random.default_rng(0), A, *shape), quantise(SUM)
    y = run_codes(op, [given_as(x_dtype, x, A)], [A], spec(shape, y_dtype, SUM), gap=gap)
    np.testing.assert_array_equal(y, given_as(y_dtype, reference.run(op, x), SUM))


# ---- of sums ----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("a_dtype", "b_dtype", "y_dtype"), list(itertools.product(BOTH, repeat=3)))
def test_sums_are_exact_of_codes_and_numbers_to_either(size, a_dtype, b_dtype, y_dtype):
    rng, op = np.random.default_rng(size), AddFakeQuantize(*SUM)
    a, b = values(rng, A, size), values(rng, B, size)
    expected = reference.run(op, a, b)
    y = run_codes(op, [given_as(a_dtype, a, A), given_as(b_dtype, b, B)], [A, B],
                  spec((size,), y_dtype, SUM), kernel_of(op, [a_dtype, b_dtype], y_dtype))
    np.testing.assert_array_equal(y, given_as(y_dtype, expected, SUM))
    if size > 1000:
        found = codes(expected, SUM)
        assert (found.min(), found.max()) == (0, 255)
        assert ((a + b) / SUM.scale % 1 == 0.5).any()


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize(("a_dtype", "b_dtype"), list(itertools.product(BOTH, repeat=2)))
def test_every_pair_of_codes_is_added_right(a_dtype, b_dtype, zero_point):
    a_grid, b_grid, grid = Grid(1.0, 10), Grid(0.5, 0), Grid(1.0, zero_point)
    a, b = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2)
    reals = [stored(a, a_grid), stored(b, b_grid)]
    op = AddFakeQuantize(*grid)
    arrays = [a if a_dtype == "uint8" else reals[0], b if b_dtype == "uint8" else reals[1]]
    y = run_codes(op, arrays, [a_grid, b_grid], spec(a.shape, "uint8", grid))
    np.testing.assert_array_equal(y, expected_codes(op, reals, grid))


@pytest.mark.parametrize("y_dtype", BOTH)
def test_numbers_that_are_of_no_grid_are_added_too(y_dtype):
    op, a = AddFakeQuantize(0.25, 9), np.float32([np.inf, -np.inf, 1e30, -1e30, 0.125, 0.375, -0.0])
    y = run_codes(op, [a, np.zeros_like(a)], [None, None], spec(a.shape, y_dtype, op.grid))
    np.testing.assert_array_equal(y if y_dtype == "float32" else stored(y, op.grid),
                                  reference.run(op, a, np.zeros_like(a)))


@given(st.integers(0, 999), st.lists(st.floats(0.01, 0.5), min_size=3, max_size=3),
       st.lists(st.integers(0, 255), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_sums_of_any_grids_are_off_by_a_code_at_ties_alone(seed, scales, zero_points):
    a_grid, b_grid, grid = map(Grid, scales, zero_points)
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 256, 3000).astype(np.uint8) for _ in range(2))
    y = run_codes(AddFakeQuantize(*grid), [a, b], [a_grid, b_grid], spec((3000,), "uint8", grid))
    total = ((a.astype(float) - a_grid.zero_point) * a_grid.scale
             + (b.astype(float) - b_grid.zero_point) * b_grid.scale) / grid.scale
    near = np.abs(total) < 400      # those beyond are clipped
    assert_near(y[near], total[near], grid)
    np.testing.assert_array_equal(
        y[~near], np.clip(np.rint(total[~near]) + grid.zero_point, 0, 255))


@pytest.mark.parametrize("shape", [(1,), (2, 3), (2, 5, 7, 3), (1, 1, 1, 4097)])
def test_a_value_is_added_to_itself(shape):
    a, op = values(np.random.default_rng(0), A, *shape), AddFakeQuantize(*SUM)
    x = codes(a, A)
    y = run_codes(op, [x, x], [A, A], spec(shape, "uint8", SUM), "add_quantize_u8_u8_to_u8")
    np.testing.assert_array_equal(y, expected_codes(op, [a, a], SUM))


@pytest.mark.parametrize(("a", "b"), [
    ((3, 4), (4,)), ((3, 4), (3, 1)), ((1, 4), (3, 4)), ((2, 3), ()), ((3, 1), (1, 3)),
    ((None, 4), (None, 1)), ((1, 4), (None, 4))])
def test_shapes_that_differ_are_refused(a, b):
    with pytest.raises(ValueError, match="AddFakeQuantize takes two values of one shape, not "):
        AddFakeQuantize(0.5, 3).output_shape(a, b)


def test_shapes_of_one_size_are_not():
    for shape in ((3, 4), (), (None, 4), (1, 1, 2), (None, None, 1)):
        assert AddFakeQuantize(0.5, 3).output_shape(shape, shape) == shape
    assert AddFakeQuantize(0.5, 3).output_shape((None, 4), (2, 4)) == (2, 4)
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(3, 5\) do not broadcast"):
        AddFakeQuantize(0.5, 3).output_shape((3, 4), (3, 5))


def test_the_grid_is_the_ops_own():
    assert AddFakeQuantize(0.5, 3).grid == ops.FakeQuantize(0.5, 3).grid == Grid(0.5, 3)


@pytest.mark.parametrize("output", ["uint8", "float32"])
def test_a_relu_bounds_the_codes(output):
    rng, grid = np.random.default_rng(0), Grid(0.5, 128)
    a, b = values(rng, A, 5000), values(rng, B, 5000)
    for op, arrays, grids in ((AddFakeQuantize(*grid, relu=True), [a, b], [A, B]),
                             (ops.FakeQuantize(*grid, relu=True), [a], [A])):
        expected = reference.run(op, *arrays)
        assert expected.min() == 0
        stored_as = [codes(array, of) for array, of in zip(arrays, grids, strict=True)]
        y = run_codes(op, stored_as, grids, spec((5000,), output, grid))
        if output == "uint8":
            y = (y.astype(float) - 128) * 0.5
        np.testing.assert_array_equal(y, expected)
