"""Attention and products of computed matrices in bfloat16 on the CPU."""
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from bf16_checks import (  # noqa: F401
    BF16_EPS,
    every_unit,
    narrow,
    prepared_in_bfloat16,
    rounded,
    run_stored,
    unit_of_each_kind,
)
from checks import assert_exact, assert_within, integers, normal, run, sum_bound
from test_attention import HEADS_LAST, SIZES, bound, turned

from kernels import reference
from kernels.cpu import backend
from kernels.ops import Attention, MatMul, TensorSpec, Window
from kernels.step import Options

AS_IS, TURNED = (0, 1, 2), (0, 2, 1)
# Queries, keys, columns of both and of the values.
PROBLEMS = [(1, 1, 1, 1), (197, 197, 64, 64), (49, 49, 32, 32), (1, 197, 64, 64), (50, 13, 24, 40),
            (7, 33, 5, 3), (15, 16, 16, 128), (33, 65, 40, 17)]


# ---- products ---------------------------------------------------------------------------------

@every_unit
@pytest.mark.parametrize("size", SIZES)
def test_products_of_whole_numbers_are_exact(unit, size):
    """However the matrices lie."""
    rows, depth, columns = size
    rng = np.random.default_rng(0)
    a, b = integers(rng, 3, rows, depth), integers(rng, 3, depth, columns)
    options = {"kernel": f"matmul_bf16_{unit.name}_{unit.rows}x32", "unit": unit}
    assert_exact(MatMul(), a, b, **options)
    assert_exact(MatMul((AS_IS, TURNED, AS_IS), scale=2.0), a, turned(b), **options)
    assert_exact(MatMul((TURNED, AS_IS, AS_IS), scale=-0.5), turned(a), b, **options)


@unit_of_each_kind
def test_columns_that_are_apart_are_gathered(unit):
    """Neither rows nor columns of these lie in one piece."""
    rng, order = np.random.default_rng(0), (0, 2, 3, 1)
    a, b = integers(rng, 2, 3, 35, 41), integers(rng, 2, 3, 41, 50)
    op = MatMul((order, order, (0, 1, 2, 3)))
    given = [np.ascontiguousarray(array.transpose(0, 3, 1, 2)) for array in (a, b)]
    assert_exact(op, *given, unit=unit)


@unit_of_each_kind
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_products_of_floats_are_within_the_bound(unit, scale):
    """Both factors are rounded, and what a scale makes of one."""
    rng, op = np.random.default_rng(0), MatMul(scale=scale)
    for rows, depth, columns in SIZES:
        a, b = normal(rng, 2, rows, depth), normal(rng, 2, depth, columns)
        size = reference.run(MatMul(scale=scale), np.abs(a), np.abs(b))
        rounding = ((1 + BF16_EPS) ** 2 - 1) * size
        assert_within(rounding + 2 * sum_bound(op, depth, a, b), op, a, b, unit=unit)


@unit_of_each_kind
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"),
                                    ("bfloat16", "bfloat16")])
def test_inputs_and_output_are_each_of_any_dtype(unit, dtypes):
    rng, (given, y) = np.random.default_rng(0), dtypes
    for orders in ((AS_IS,) * 3, (TURNED, TURNED, AS_IS)):
        a, b = integers(rng, 2, 37, 33), integers(rng, 2, 33, 45)
        expected = (a @ b).astype(y)
        arrays = [array if order == AS_IS else turned(array)
                  for array, order in zip((a, b), orders, strict=False)]
        found = run_stored(MatMul(orders), [array.astype(given) for array in arrays], y, unit=unit)
        np.testing.assert_array_equal(found, expected)


@unit_of_each_kind
def test_nan_and_infinity_stay_in_their_row(unit):
    rng = np.random.default_rng(0)
    a, b = integers(rng, 40, 30), integers(rng, 30, 40)
    a[3, 7], a[35, 2] = np.nan, np.inf
    b[2] = 1
    y = run(MatMul(), a, b, unit=unit)
    assert np.isnan(y[3]).all()
    assert (y[35] == np.inf).all()
    assert np.isfinite(np.delete(y, (3, 35), axis=0)).all()


# ---- attention --------------------------------------------------------------------------------

def assert_attention_right(unit, op, *arrays):
    """Shares are rounded to bfloat16, and nothing else that was not so before: a scale is a power
    of 2."""
    given = [*map(rounded, arrays[:3]), *arrays[3:]]
    weighed = reference.run(op, *given[:2], np.abs(given[2]), *given[3:])
    allowed = bound(op, *given) + BF16_EPS * weighed
    assert_within(allowed, op, *given, unit=unit, kernel=f"attention_bf16_{unit.name}_")
    expected = run(op, *given, unit=unit)
    stored = [*map(narrow, given[:3]), *given[3:]]
    found = run_stored(op, stored, "bfloat16", unit=unit)
    assert found.tobytes() == expected.astype(ml_dtypes.bfloat16).tobytes()


@unit_of_each_kind
@pytest.mark.parametrize("problem", PROBLEMS)
def test_attention_is_within_the_bound(unit, problem):
    queries, keys, depth, width = problem
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 2, 3, *size) for size in (
        (queries, depth), (keys, depth), (keys, width)))
    assert_attention_right(unit, Attention(scale=0.25), q, k, v)


@unit_of_each_kind
@pytest.mark.parametrize("shape", [(), (1, 30), (20, 1), (2, 1, 20, 30)])
def test_a_bias_is_broadcast(unit, shape):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 20, 3, 16), normal(rng, 2, 30, 3, 16), normal(rng, 2, 30, 3, 16)
    op = Attention((HEADS_LAST,) * 4, scale=0.25)
    assert_attention_right(unit, op, q, k, v, normal(rng, *shape))


@unit_of_each_kind
def test_windows_are_read_where_they_lie(unit):
    """Queries, keys and values of one array."""
    qkv, order = normal(np.random.default_rng(0), 2, 40, 3, 3, 24), HEADS_LAST
    windows = tuple(Window(2, i, i + 1, gone=True) for i in range(3))
    parts = [np.ascontiguousarray(qkv[:, :, i]) for i in range(3)]
    apart = run(Attention((order,) * 4, scale=0.25), *parts, unit=unit)
    op = Attention((order,) * 4, windows, 0.25)
    np.testing.assert_array_equal(run(op, qkv, qkv, qkv, unit=unit), apart)


@unit_of_each_kind
def test_whole_numbers_of_equal_scores_are_exact(unit):
    """Of 32 keys with the same score each counts 1 / 32."""
    rng = np.random.default_rng(0)
    q, k, v = integers(rng, 2, 39, 8), np.ones((2, 32, 8), np.float32), integers(rng, 2, 32, 24)
    assert_exact(Attention(), q, k, v * 32, unit=unit)


@unit_of_each_kind
def test_what_is_masked_counts_for_nothing_and_nan_stays_with_its_query(unit):
    rng = np.random.default_rng(0)
    q, k, v = (rounded(normal(rng, 3, size, 16)) for size in (20, 30, 30))
    mask = np.zeros((20, 30), np.float32)
    mask[:, 7:] = -np.inf
    v[:, 7:], q[1, 4, 3] = 1e30, np.nan
    few = run(Attention(), q, *(np.ascontiguousarray(each[:, :7]) for each in (k, v)), unit=unit)
    found = run(Attention(), q, k, v, mask, unit=unit)
    np.testing.assert_allclose(found, few, rtol=1e-5, atol=1e-6)
    assert np.isnan(found[1, 4]).all()
    assert np.isfinite(np.delete(found, 4, axis=1)).all()


# ---- memory -----------------------------------------------------------------------------------

# Every array ends where memory does, and so does the scratch of the thread that does all the work.
AT_THE_EDGE = """
import sys
import numpy as np
sys.path.insert(0, "tests")
from bf16_checks import backend, prepare_stored
from checks import integers
from edges import at_the_edge, copy_at_the_edge
from test_bf16_attention import PROBLEMS, TURNED, turned
from kernels import reference
from kernels.cpu.dot_attention import attention_units
from kernels.cpu.dot_matmul import matmul_units
from kernels.cpu.host import unit_choice
from kernels.ops import Attention, MatMul

unit = unit_choice.BF16[sys.argv[1]]
backend.PREPARE.update(backend.narrow())
rng = np.random.default_rng(0)

def check(op, given, units, matrices, right):
    for dtype in ("float32", "bfloat16"):
        inputs = [copy_at_the_edge(array.astype(dtype)) for array in given]
        step = prepare_stored(op, inputs, dtype, 2, unit=unit)
        expected = reference.run(op, *given)
        y = copy_at_the_edge(np.zeros(expected.shape, dtype))
        launch, = step.bind(inputs, y, at_the_edge(step.workspace))
        *arguments, threads = launch.arguments
        arguments[0] = unit
        count = arguments.pop(matrices) * arguments[BANDS[units]]
        units(threads - 1, 0, count, *arguments)
        assert right(y.astype(np.float32), expected), (op, given[0].shape)

BANDS = {matmul_units: 9, attention_units: 12}
for queries, keys, depth, width in PROBLEMS:
    q, k, v = (integers(rng, 2, *size) for size in ((queries, depth), (keys, depth), (keys, width)))
    check(Attention(scale=2.0 ** -4), (q, k, v), attention_units, 6,
          lambda y, expected: np.abs(y - expected).max() < 0.05)
    for op, given in ((MatMul(), (k.swapaxes(1, 2).copy(), v)),
                      (MatMul((TURNED, TURNED, (0, 1, 2))), (k, turned(v)))):
        check(op, given, matmul_units, 4,
              lambda y, expected: np.allclose(y, expected, rtol=2.0 ** -8))
print("never beyond")
"""


@unit_of_each_kind
def test_nothing_beyond_the_inputs_the_output_and_the_scratch_is_touched(unit):
    done = subprocess.run([sys.executable, "-c", AT_THE_EDGE, unit.name],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout == "never beyond\n", done.stderr


def test_without_bfloat16_they_are_multiplied_in_float32():
    """As in a file of 8 bits, whose kernels are looked for among the same."""
    specs = [TensorSpec((2, 5, 4))] * 3
    for op, count, kernel in ((Attention(), 3, "attention_f32_"),
                              (MatMul((AS_IS, TURNED, AS_IS)), 2, "matmul_f32_")):
        step = backend.PREPARE[type(op)](op, specs[:count], TensorSpec(
            op.output_shape(*[(2, 5, 4)] * count)), [None] * count, Options())
        assert step.kernel.startswith(kernel)
