"""Layer norm on CUDA: rows that a few threads, a warp or a block hold, and rows read again."""
import numpy as np
import pytest
from checks import EPS, normal
from cuda_checks import (
    COMPILED_DTYPES,
    DTYPES,
    assert_exact,
    assert_in_place,
    assert_resources,
    assert_within,
    rounded,
    run,
)

from kernels.cuda import vector
from kernels.cuda.host import layer_norm
from kernels.ops import FakeQuantize, LayerNorm

WEIGHTS = (1, 2)


def arrays(*shape, offset=0.0):
    rng = np.random.default_rng(0)
    return normal(rng, *shape) + np.float32(offset), normal(rng, shape[-1]), normal(rng, shape[-1])


def rounding(op, x, scale, bias):
    """Bound of the error in float32 (Higham, "Accuracy and Stability of Numerical Algorithms",
    3.1): an element is added n times on its way into a sum, by a thread that holds up to 32, or
    has one in 128, and between threads; what the mean is off by shifts all elements, and its
    square the variance."""
    x = x.astype(np.float64)
    n = min(x.shape[-1], 40 + x.shape[-1] // 128) + 10
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + op.epsilon)
    off = n * EPS * np.abs(x).mean(axis=-1, keepdims=True)
    relative = (n / 2 + 6) * EPS + (off / deviation) ** 2
    y = np.abs(centred * scale / deviation)
    return (off + EPS * np.abs(centred)) * np.abs(scale) / deviation + relative * y + EPS * (
        y + np.abs(bias))


def check(op, x, scale, bias, dtype, **options):
    x = rounded(x, dtype)
    assert_within(rounding(op, x, scale, bias), op, x, scale, bias, weights=WEIGHTS, dtype=dtype,
                  **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "words", "halves"), [
    ((2, 3, 5, 96), "x4_32x1", "x8_16x1"),      # the channels of ConvNeXt
    ((3, 768), "x4_32x6", "x8_32x3"),
    ((21, 24), "x4_8x1", "x8_8x1"),             # rows left over in the last warp
    ((17, 7), "x1_8x1", "x1_8x1"),              # odd
    ((3, 333), "x1_32x11", "x1_32x11"),
    ((2, 1032), "x4_long", "x8_long"),          # one vector more than a warp holds
    ((2, 1025), "x1_long", "x1_long"),
    ((5, 1), "x1_8x1", "x1_8x1"),
])
def test_floats_are_within_the_bound(shape, words, halves, dtype, runner):
    kernel = f"layer_norm_{vector.short(dtype)}" + (words if dtype == "float32" else halves)
    check(LayerNorm(1e-3), *arrays(*shape), dtype, kernel=kernel, runner=runner)


@pytest.mark.parametrize("length", [96, 1032])
def test_a_large_mean_leaves_the_variance_its_digits(length, runner):
    """E[x * x] - E[x] * E[x] would lose six of its seven."""
    check(LayerNorm(), *arrays(3, length, offset=1000.0), "float32", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [6, 64, 1032])
def test_halves_of_minus_and_plus_two_are_exact(length, dtype, runner):
    rng = np.random.default_rng(0)
    x = np.stack([rng.permutation(np.resize([7, 3], length)) for _ in range(5)])
    scale, bias = (rng.integers(-4, 5, length).astype(np.float32) for _ in range(2))
    assert_exact(LayerNorm(0.0), x, scale, bias, weights=WEIGHTS, dtype=dtype, runner=runner)


def test_a_row_of_equal_elements_is_the_bias(runner):
    _, scale, bias = arrays(2, 40)
    y = run(LayerNorm(), np.full((2, 40), 3, np.float32), scale, bias, weights=WEIGHTS,
            runner=runner)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (2, 40)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("length", [40, 1032])
def test_what_is_not_finite_spoils_its_own_row_only(length, value, runner):
    x, scale, bias = arrays(5, length)
    clean = run(LayerNorm(), x, scale, bias, weights=WEIGHTS, runner=runner)
    x[1, length // 2] = value
    y = run(LayerNorm(), x, scale, bias, weights=WEIGHTS, runner=runner)
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype):
    for length in (24, 1032):
        assert_in_place(LayerNorm(), *arrays(3, length), dtype=dtype, weights=WEIGHTS)


@pytest.mark.parametrize("length", [24, 1032])
def test_what_it_gives_is_quantised(length, runner):
    """In a launch of its own, so exactly as by itself."""
    given, last = arrays(3, length), FakeQuantize(0.03125, 100)
    normal = run(LayerNorm(), *given, weights=WEIGHTS, runner=runner)
    y = run(LayerNorm(activation=last), *given, weights=WEIGHTS, runner=runner)
    np.testing.assert_array_equal(y, run(last, normal, runner=runner))
    assert not np.array_equal(y, normal)


def test_parameters_must_be_constants():
    with pytest.raises(ValueError, match="scale and bias must be constants"):
        run(LayerNorm(), *arrays(2, 3))


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_resources(dtype, arch):
    for kernel in layer_norm.kernels(dtype):
        found = assert_resources(kernel, arch)
        if kernel.make is layer_norm.layer_norm.held and kernel.config[-1] > 1:
            *_, vectors = kernel.config     # of x each, and 16 bytes of scale and of bias for 4
            constants = 2 * vectors * vector.lanes(dtype) // 4
            assert found.counts["LDG.E.128"] == vectors + constants
            assert found.counts["STG.E.128"] == vectors
