"""Attention and products of computed matrices: the CPU's kernels."""
import numpy as np
import pytest
from checks import EPS, assert_exact, assert_within, integers, normal, run, sum_bound

from kernels import ops, reference
from kernels.ops import Attention, MatMul, Window

# Rows of a, columns of a, columns of b.
SIZES = [(1, 1, 1), (5, 3, 7), (14, 64, 197), (49, 32, 49), (1, 9, 33), (33, 9, 1), (30, 17, 40),
         (200, 5, 16), (3, 130, 2), (29, 1, 31)]
HEADS_LAST = (0, 2, 1, 3)       # (batch, row, head, column), as Linear layers leave it


def turned(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.swapaxes(-1, -2))


# ---- products ---------------------------------------------------------------------------------

@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_products_of_whole_numbers_are_exact(size, leading):
    """However the matrices lie."""
    rows, depth, columns = size
    rng, rank = np.random.default_rng(0), len(leading) + 2
    a, b = integers(rng, *leading, rows, depth), integers(rng, *leading, depth, columns)
    as_is = tuple(range(rank))
    swapped = (*as_is[:-2], rank - 1, rank - 2)
    assert_exact(MatMul(), a, b, kernel="matmul_f32_")
    assert_exact(MatMul((as_is, swapped, as_is), scale=2.0), a, turned(b), kernel="matmul_f32_")
    assert_exact(MatMul((swapped, as_is, as_is), scale=-0.5), turned(a), b, kernel="matmul_f32_")


def test_products_of_floats_are_within_the_bound():
    rng = np.random.default_rng(0)
    for rows, depth, columns in SIZES:
        a, b = normal(rng, 2, rows, depth), normal(rng, 2, depth, columns)
        op = MatMul(scale=0.3)
        assert_within(sum_bound(op, depth, a, b), op, a, b)


@pytest.mark.parametrize(("a", "b"), [((1, 3, 5, 4), (2, 3, 4, 6)), ((2, 3, 5, 4), (2, 1, 4, 6)),
                                      ((5, 4), (2, 3, 4, 6)), ((3, 5, 4), (4, 6))])
def test_one_matrix_serves_all_of_an_axis(a, b):
    rng = np.random.default_rng(0)
    assert_exact(MatMul(), integers(rng, *a), integers(rng, *b))


def test_nan_and_infinity_stay_in_their_row():
    rng = np.random.default_rng(0)
    a, b = integers(rng, 20, 30), integers(rng, 30, 40)
    a[3, 7], a[5, 2] = np.nan, np.inf
    b[2] = 1
    y = run(MatMul(), a, b)
    assert np.isnan(y[3]).all()
    assert (y[5] == np.inf).all()
    assert np.isfinite(np.delete(y, (3, 5), axis=0)).all()


@pytest.mark.parametrize(("shapes", "sentence"), [
    ([(2, 3), (4, 5)], "rows of 3 and columns of 4"), ([(2, 5, 3), (3, 3, 5)], "leading axes"),
    ([(3,), (3,)], "takes matrices")])
def test_products_that_do_not_fit_are_named(shapes, sentence):
    with pytest.raises(ValueError, match=sentence):
        MatMul().output_shape(*shapes)


def test_columns_of_an_output_stay_last():
    with pytest.raises(ValueError, match="can not lie in order"):
        MatMul(((0, 1), (0, 1), (1, 0))).output_shape((2, 3), (3, 4))


# ---- attention --------------------------------------------------------------------------------

def bound(op: Attention, q, k, v, bias=0.0):
    """The error of a score, e, changes a share by a factor of exp(2 e) at most; exponentials, sums
    and the second product round as often as they have terms, and a few times more."""
    wide = [array.transpose(op.order(i, array.ndim)).astype(np.float64)
            for i, array in enumerate((q, k, v))]
    q, k, v = wide
    sums = abs(op.scale) * np.abs(q) @ np.abs(k).swapaxes(-1, -2)
    scores = op.scale * q @ k.swapaxes(-1, -2) + bias
    of_scores = ((q.shape[-1] + 4) * EPS * sums + 4 * EPS * np.abs(scores)).max(-1, keepdims=True)
    shares = reference.run(ops.Softmax(), scores)
    relative = np.expm1(2 * of_scores) + (2 * k.shape[-2] + 16) * EPS
    y = relative * (shares @ np.abs(v))
    return y.transpose(np.argsort(op.order(-1, y.ndim)))


@pytest.mark.parametrize(("queries", "keys", "depth", "width"), [
    (1, 1, 1, 1), (197, 197, 64, 64), (49, 49, 32, 32), (1, 197, 64, 64), (50, 13, 24, 40),
    (7, 33, 5, 3), (15, 16, 16, 128)])
def test_attention_is_within_the_bound(queries, keys, depth, width):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 3, queries, depth), normal(rng, 2, 3, keys, depth), normal(
        rng, 2, 3, keys, width)
    op = Attention(scale=depth ** -0.5)
    assert_within(bound(op, q, k, v), op, q, k, v, kernel="attention_f32_")


@pytest.mark.parametrize("shape", [(), (20, 30), (1, 30), (20, 1), (3, 20, 30), (2, 1, 20, 30),
                                   (2, 3, 20, 30), (3, 1, 1)])
def test_a_bias_is_broadcast(shape):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 20, 3, 16), normal(rng, 2, 30, 3, 16), normal(rng, 2, 30, 3, 16)
    op, bias = Attention((HEADS_LAST,) * 4, scale=0.25), normal(rng, *shape)
    assert_within(bound(op, q, k, v, bias), op, q, k, v, bias)


@pytest.mark.parametrize("windows", [
    [Window(2, i, i + 1, gone=True) for i in range(3)],         # of (batch, row, 3, head, column)
    [Window(4, 8 * i, 8 * i + 8) for i in range(3)], [Window(4, 1, 6), None, Window(4, 2, 7)]])
def test_windows_are_read_where_they_lie(windows):
    rng = np.random.default_rng(0)
    order = HEADS_LAST if windows[0].gone else (0, 2, 3, 1, 4)
    op = Attention((order,) * 4, tuple(windows), 0.3)
    inputs = [normal(rng, 2, 30, 3, 3, 24 if window else 5) for window in windows]
    parts = [array if window is None else cut(array, window)
             for array, window in zip(inputs, windows, strict=True)]
    apart = Attention((order,) * 4, scale=0.3)
    np.testing.assert_array_equal(run(op, *inputs), run(apart, *parts))
    assert_within(bound(apart, *parts), op, *inputs)


def cut(array, window):
    part = np.take(array, range(window.start, window.stop), window.axis)
    return part.squeeze(window.axis) if window.gone else part


def test_what_is_masked_counts_for_nothing():
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 3, 20, 16), normal(rng, 3, 30, 16), integers(rng, 3, 30, 16)
    mask = np.zeros((20, 30), np.float32)
    mask[:, 7:] = -np.inf
    v[:, 7:] = 1e30
    few = run(Attention(), q, np.ascontiguousarray(k[:, :7]), np.ascontiguousarray(v[:, :7]))
    np.testing.assert_allclose(run(Attention(), q, k, v, mask), few, rtol=1e-5, atol=1e-6)


def test_whole_numbers_of_equal_scores_are_exact():
    """Of 32 keys with the same score each counts 1 / 32."""
    rng = np.random.default_rng(0)
    q, k, v = integers(rng, 2, 9, 8), np.ones((2, 32, 8), np.float32), integers(rng, 2, 32, 24)
    assert_exact(Attention(), q, k, v * 32)


def test_nan_stays_with_its_query_and_scores_may_be_large():
    rng = np.random.default_rng(0)
    q, k, v = 1e3 * normal(rng, 20, 16), 1e3 * normal(rng, 30, 16), integers(rng, 30, 16)
    q[4, 3] = np.nan
    y = run(Attention(), q, k, v)
    assert np.isnan(y[4]).all()
    rest = np.delete(y, 4, axis=0)
    best = np.argmax(np.delete(q, 4, axis=0).astype(np.float64) @ k.T, axis=1)
    np.testing.assert_array_equal(rest, v[best])


@pytest.mark.parametrize(("shapes", "sentence"), [
    ([(5, 4), (6, 3), (6, 4)], "are not"), ([(5, 4), (6, 4), (7, 4)], "are not"),
    ([(5, 4), (6, 4), (6, 4), (5, 5)], "is not broadcast to")])
def test_attention_that_does_not_fit_is_named(shapes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Attention().output_shape(*shapes)


def test_its_work_is_that_of_two_products():
    assert Attention().macs((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 8)) == 2 * 3 * 5 * 7 * (4 + 8)
    assert MatMul().macs((2, 5, 4), (2, 4, 7)) == 2 * 5 * 4 * 7


def test_bytes_are_those_that_windows_show():
    op = Attention(windows=tuple(Window(0, i, i + 1, gone=True) for i in range(3)))
    assert op.bytes(*[(3, 5, 4)] * 3) == 4 * (3 * 5 * 4 + 5 * 4)
