"""Attention and products of computed matrices, on CUDA."""
import numpy as np
import pytest
from checks import EPS, integers, normal
from cuda_checks import (
    COMPILED_DTYPES,
    DTYPES,
    ROUNDOFF,
    assert_exact,
    assert_resources,
    assert_within,
    expected,
    prepare,
    rounded,
    run,
)

from kernels import ops, reference
from kernels.cuda.host import attention, matmul
from kernels.cuda.launch import CudaOptions
from kernels.ops import Attention, MatMul, Window

HALF = ["float16", "bfloat16"]
HEADS_LAST = (0, 2, 1, 3)


# ---- products ---------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 3, 7), (70, 40, 68), (1, 9, 33), (64, 16, 64), (49, 32, 1),
                                  (130, 17, 12)])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_products_of_whole_numbers_are_exact(size, leading, dtype, runner):
    """However the matrices lie."""
    rows, depth, columns = size
    rng, rank = np.random.default_rng(0), len(leading) + 2
    a, b = integers(rng, *leading, rows, depth), integers(rng, *leading, depth, columns)
    as_is = tuple(range(rank))
    swapped = (*as_is[:-2], rank - 1, rank - 2)
    lanes = 1 if columns % 4 else 4
    options = {"dtype": dtype, "runner": runner}
    assert_exact(MatMul(), a, b, kernel=f"matmul_{short(dtype)}_64x64x{lanes}", **options)
    assert_exact(MatMul((as_is, swapped, as_is), scale=2.0), a, b.swapaxes(-1, -2), **options)
    assert_exact(MatMul((swapped, as_is, as_is), scale=-0.5), a.swapaxes(-1, -2), b, **options)


def short(dtype):
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]


@pytest.mark.parametrize(("a", "b"), [((1, 3, 5, 4), (2, 3, 4, 6)), ((2, 3, 5, 4), (2, 1, 4, 6)),
                                      ((5, 4), (2, 3, 4, 6))])
def test_one_matrix_serves_all_of_an_axis(a, b, runner):
    rng = np.random.default_rng(0)
    assert_exact(MatMul(), integers(rng, *a), integers(rng, *b), runner=runner)


def test_the_order_of_the_output(runner):
    """Heads of a row side by side."""
    rng, as_is = np.random.default_rng(0), (0, 1, 2, 3)
    assert_exact(MatMul((HEADS_LAST, as_is, HEADS_LAST)), integers(rng, 2, 9, 3, 8),
                 integers(rng, 2, 3, 8, 20), dtype="float16", runner=runner)


@pytest.mark.parametrize("op", [MatMul, Attention])
def test_too_many_leading_axes_are_refused_before_anything_runs(op):
    """Of which no two neighbours can be one."""
    order = (4, 3, 2, 1, 0, 5, 6)
    matrices = [np.zeros((2, 3, 2, 3, 2, 8, 8), np.float32)] * op.arity[0]
    with pytest.raises(ValueError, match=r"5 axes .* at most 4"):
        prepare(op((order, *[tuple(range(7))] * op.arity[0])), matrices, "float32", (),
                CudaOptions())


def test_nan_stays_in_its_row(runner):
    rng = np.random.default_rng(0)
    a, b = integers(rng, 70, 20), integers(rng, 20, 40)
    a[66, 7] = np.nan
    y = run(MatMul(), a, b, runner=runner)
    assert np.isnan(y[66]).all()
    assert np.isfinite(np.delete(y, 66, axis=0)).all()


# ---- attention --------------------------------------------------------------------------------

def bound(op: Attention, dtype, q, k, v, bias=0.0):
    """As on the CPU; shares are rounded to half precision, too, and exponentials and their
    arguments a few times more."""
    q, k, v = (rounded(array, dtype).astype(np.float64).transpose(op.order(i, array.ndim))
               for i, array in enumerate((q, k, v)))
    sums = abs(op.scale) * np.abs(q) @ np.abs(k).swapaxes(-1, -2)
    scores = op.scale * q @ k.swapaxes(-1, -2) + rounded(np.asarray(bias), dtype).astype(float)
    of_scores = ((q.shape[-1] + 4) * EPS * sums + 8 * EPS * np.abs(scores)).max(-1, keepdims=True)
    shares = reference.run(ops.Softmax(), scores)
    relative = np.expm1(2 * of_scores) + (2 * k.shape[-2] + 32) * EPS
    if dtype in HALF:       # what is below the least number of float16 is lost
        relative = relative + ROUNDOFF[dtype]
    y = relative * (shares @ np.abs(v)) + 2.0 ** -24 * np.abs(v).sum(-2, keepdims=True)
    return y.transpose(np.argsort(op.order(-1, y.ndim)))


@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"])
@pytest.mark.parametrize(("queries", "keys", "depth", "width"), [
    (197, 197, 64, 64), (49, 49, 32, 32), (5, 70, 24, 40), (1, 130, 16, 8), (64, 64, 128, 128),
    (65, 63, 8, 72), (3, 1, 8, 8), (70, 66, 36, 60)])
def test_attention_is_within_the_bound(queries, keys, depth, width, dtype, runner):
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 2, rows, 3, columns) for rows, columns in (
        (queries, depth), (keys, depth), (keys, width)))
    op = Attention((HEADS_LAST,) * 4, scale=depth ** -0.5)
    kernel = "matmul_f32_"
    if dtype in HALF:
        kernel = f"attention_{short(dtype)}x{4 if depth % 8 else 8}_"

    assert_within(bound(op, dtype, q, k, v), op, q, k, v, dtype=dtype, kernel=kernel, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (70, 90), (1, 90), (70, 1), (3, 70, 90), (2, 1, 70, 90),
                                   (2, 3, 70, 90), (3, 1, 1)])
def test_a_bias_is_broadcast(shape, dtype, runner):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 70, 3, 16), normal(rng, 2, 90, 3, 16), normal(rng, 2, 90, 3, 16)
    op, bias = Attention((HEADS_LAST,) * 4, scale=0.25), normal(rng, *shape)
    assert_within(bound(op, dtype, q, k, v, bias), op, q, k, v, bias, dtype=dtype, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_are_read_where_they_lie(dtype, runner):
    """Of (batch, row, 3, head, column), as one Linear layer gives all three."""
    rng = np.random.default_rng(0)
    x, order = normal(rng, 2, 70, 3, 3, 16), HEADS_LAST
    op = Attention((order,) * 4, tuple(Window(2, i, i + 1, gone=True) for i in range(3)), 0.25)
    parts = [np.ascontiguousarray(x[:, :, i]) for i in range(3)]
    apart = Attention((order,) * 4, scale=0.25)
    kernel = f"attention_{short(dtype)}x8_" if dtype in HALF else "matmul_f32_"
    assert_within(bound(apart, dtype, *parts), op, x, x, x, dtype=dtype, kernel=kernel,
                  runner=runner)


@pytest.mark.parametrize("dtype", HALF)
def test_columns_that_do_not_fill_chunks_take_the_other_way(dtype, runner):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 3, 20, 10), normal(rng, 3, 30, 10), normal(rng, 3, 30, 10)
    assert_within(bound(Attention(), dtype, q, k, v), Attention(), q, k, v, dtype=dtype,
                  kernel=f"matmul_{short(dtype)}_f32_64x64x1 + softmax", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_masked_counts_for_nothing(dtype, runner):
    """Also where a whole tile is masked, the first or the last."""
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 66, 16), normal(rng, 200, 16), integers(rng, 200, 16)
    for first, end in ((0, 7), (130, 150), (70, 80)):
        mask = np.full((66, 200), -np.inf, np.float32)
        mask[:, first:end] = 0
        few = q, k[first:end], v[first:end]
        right = expected(Attention(), few, dtype, ())
        y = run(Attention(), q, k, v, mask, dtype=dtype, runner=runner).astype(float)
        allowed = bound(Attention(), dtype, *few) + ROUNDOFF[dtype] * np.abs(right)
        assert (np.abs(y - right) <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_of_equal_scores_are_exact(dtype, runner):
    """Of 128 keys with the same score each counts 1 / 128."""
    rng = np.random.default_rng(0)
    q, k, v = integers(rng, 2, 9, 8), np.ones((2, 128, 8), np.float32), integers(rng, 2, 128, 24)
    assert_exact(Attention(), q, k, v * 128, dtype=dtype, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_with_its_query_and_scores_may_be_large(dtype, runner):
    rng = np.random.default_rng(0)
    q, k, v = 30 * normal(rng, 70, 16), 30 * normal(rng, 90, 16), integers(rng, 90, 16)
    q[66, 3] = np.nan
    y = run(Attention(), q, k, v, dtype=dtype, runner=runner)
    assert np.isnan(y[66]).all()
    q, k = (rounded(array, dtype).astype(np.float64) for array in (np.delete(q, 66, axis=0), k))
    scores = np.sort(q @ k.T, axis=1)
    clear = scores[:, -1] - scores[:, -2] > 30          # then all others count for nothing
    assert clear.sum() > 40
    best = v[np.argmax(q @ k.T, axis=1)]
    found = np.delete(y, 66, axis=0)[clear].astype(float)
    np.testing.assert_allclose(found, best[clear], rtol=0, atol=1e-9)


# ---- machine code -----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_products_do_not_spill(dtype, arch):
    for kernel in (*matmul.kernels(dtype)[-2:], *attention.kernels(dtype)[:4]):
        if kernel.name.startswith("matmul"):
            assert assert_resources(kernel, arch).counts["FFMA"] >= 256


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("depth", "width", "lanes"), [
    (32, 32, 8), (64, 64, 8), (16, 64, 8), (128, 128, 8), (48, 48, 4)])
def test_attention_does_not_spill_and_multiplies_on_tensor_cores(depth, width, lanes, dtype, biased,
                                                                 arch):
    kernel = attention.fused_kernel(dtype, depth, width, lanes, biased)
    found = assert_resources(kernel, arch)
    products = sum(n for opcode, n in found.counts.items() if opcode.startswith("HMMA.16816"))
    assert products == (depth // 16) * 8 + (width // 8) * 4
    turned = sum(n for opcode, n in found.counts.items() if opcode.startswith("LDSM.16.MT88.4"))
    assert turned == width // 16 * 4
