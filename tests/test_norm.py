"""Norms that stand alone: batch norm, layer norm, and that of neighbouring channels."""
import numpy as np
import pytest
from checks import EPS, GUARD, THREADS, assert_exact, assert_within, integers, normal, run

from cnn.image import Photos, Preprocess
from kernels import reference
from kernels.cpu import backend
from kernels.cpu.host.norm import normalise
from kernels.cpu.threads import team
from kernels.ops import (
    BatchNorm,
    Clip,
    LayerNorm,
    LocalResponseNorm,
    Relu,
    Silu,
    TensorSpec,
)
from kernels.step import Options

WEIGHTS = (1, 2, 3, 4)
SHAPES = [(2, 3, 4, 5), (1, 7, 7, 64), (9, 33), (3, 96), (1, 1), (5, 1), (2, 1000), (7,)]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 7, 7, 64), (9, 33), (1, 1)])
def test_floats_are_within_the_bound(shape):
    rng = np.random.default_rng(0)
    scale, bias, mean = (normal(rng, shape[-1]) for _ in range(3))
    var = rng.uniform(0.1, 2, shape[-1]).astype(np.float32)
    x, op = normal(rng, *shape), BatchNorm(1e-3)
    s = np.abs(scale.astype(np.float64)) / np.sqrt(var + 1e-3)
    bound = 3 * EPS * (np.abs(x) * s + np.abs(mean) * s + np.abs(bias))
    assert_within(bound, op, x, scale, bias, mean, var, weights=WEIGHTS, kernel="batch_norm_f32")
    assert reference.run(op, x, scale, bias, mean, var).shape == shape


@pytest.mark.parametrize("threads", THREADS)
def test_channels_of_a_wider_array_are_read_where_they_lie(threads):
    """As those of a dense block are; of the others one number is used nowhere."""
    rng = np.random.default_rng(0)
    wide = np.full((2, 5, 6, 40), np.nan, np.float32)
    x, weights = integers(rng, 2, 5, 6, 19), [integers(rng, 19) for _ in range(3)]
    weights.append(np.ones(19, np.float32))
    wide[..., 3:22] = x
    op = BatchNorm(0.0, Relu())
    specs = [TensorSpec(array.shape) for array in (x, *weights)]
    step = backend.prepare(op, specs, specs[0], [None, *weights], Options(threads))
    assert step.reads_strided
    y = np.full_like(x, np.nan)
    with team(threads):
        for launch in step.bind([wide[..., 3:22], *weights], y, np.empty(0, np.uint8)):
            launch()
    assert np.array_equal(y, reference.run(op, x, *weights))


@pytest.mark.parametrize("activation", [Relu(), Clip(-0.5, 0.5), Silu()])
def test_an_activation_runs_with_it(activation):
    rng = np.random.default_rng(0)
    scale, bias, mean = (normal(rng, 12) for _ in range(3))
    var = rng.uniform(0.1, 2, 12).astype(np.float32)
    x, op = normal(rng, 2, 5, 12), BatchNorm(1e-3, activation)
    s = np.abs(scale.astype(np.float64)) / np.sqrt(var + 1e-3)
    # SiLU's slope is at most 1.1, and it rounds a few times more.
    bound = 8 * EPS * (np.abs(x) * s + np.abs(mean) * s + np.abs(bias))
    assert_within(bound, op, x, scale, bias, mean, var, weights=WEIGHTS,
                  kernel=f"batch_norm_f32_{activation.kind.lower()}")


def test_parameters_must_be_constants():
    one = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="must be constants"):
        run(BatchNorm(), np.ones((2, 3), np.float32), one, one, one, one)


# ---- layer norm -------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0, 30])
def test_a_layer_norm_is_within_the_bound(shape, offset):
    rng, op = np.random.default_rng(0), LayerNorm(1e-3)
    x, scale, bias = normal(rng, *shape) + offset, normal(rng, shape[-1]), normal(rng, shape[-1])
    wide, n = x.astype(np.float64), shape[-1]
    centred = np.abs(wide - wide.mean(-1, keepdims=True))
    variance = (centred ** 2).mean(-1, keepdims=True) + 1e-3
    # The sum behind the mean rounds at most n times, and each difference from it once more. An
    # error that all differences share only squared adds to the variance.
    shared = (n + 1) * EPS * np.abs(wide).mean(-1, keepdims=True)
    error = shared + EPS * centred
    of_variance = (n + 6) * EPS + shared ** 2 / variance
    bound = np.abs(scale) / np.sqrt(variance) * (error + centred * (of_variance / 2 + 4 * EPS))
    bound += EPS * np.abs(reference.run(op, x, scale, bias))
    assert_within(bound, op, x, scale, bias, weights=(1, 2), kernel="layer_norm_f32")


def test_a_layer_norm_of_whole_numbers_is_exact():
    """Rows of as many 1 as -1, or 3 and -1, of which all steps are whole numbers or halves."""
    x = np.tile(np.float32([1, -1, -1, 1]), (6, 10))
    x[3:] = x[3:] * 2 + 1
    scale, bias = integers(np.random.default_rng(0), 40), integers(np.random.default_rng(1), 40)
    assert_exact(LayerNorm(0.0), x, scale, bias, kernel="layer_norm_f32")


def test_nan_and_infinity_spoil_their_own_pixel_only():
    x = normal(np.random.default_rng(0), 4, 20)
    x[1, 3], x[2, 19] = np.nan, np.inf
    one, zero = np.ones(20, np.float32), np.zeros(20, np.float32)
    y = run(LayerNorm(), x, one, zero)
    assert np.isnan(y[1:3]).all()
    assert np.isfinite(y[[0, 3]]).all()
    y = run(LocalResponseNorm(3), x)
    expected = reference.run(LocalResponseNorm(3), x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert (y[2, 18], np.isnan(y[2, 19])) == (0, True)


# ---- local response norm ----------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [
    LocalResponseNorm(), LocalResponseNorm(5, 0.5, 0.75, 2.0), LocalResponseNorm(4, 0.5),
    LocalResponseNorm(1, 0.5), LocalResponseNorm(2, 0.5), LocalResponseNorm(9, 2.0, 0.5),
    LocalResponseNorm(3, 1.0, 1.0, 0.1), LocalResponseNorm(80, 1.0, 2.5),
    LocalResponseNorm(3, 0.5, -0.75)])
def test_a_local_response_norm_is_within_the_bound(shape, op):
    x = normal(np.random.default_rng(0), *shape) * 3
    # x / y is the base to the power of beta. What rounds the base, at most size + 4 times, counts
    # beta times; and the logarithm of the base rounds before its exponential is taken.
    base = np.abs(x.astype(np.float64) / reference.run(op, x)) ** (1 / op.beta)
    rounded = abs(op.beta) * (op.size + 4 + 4 * np.abs(np.log(base))) + 8
    assert_within(rounded * EPS * np.abs(reference.run(op, x)), op, x,
                  kernel="local_response_norm_f32")


def test_a_local_response_norm_of_powers_of_two_is_exact():
    """The base is 16, of which the root of the root is 2, or 1 on both ends."""
    x = np.zeros((3, 50), np.float32)
    x[:, 10:40] = 4
    y = run(LocalResponseNorm(1, 15 / 16, 0.75, 1.0), x, kernel="local_response_norm_f32")
    np.testing.assert_array_equal(y, x / 8)


# ---- pixels -----------------------------------------------------------------------------------

def test_pixels_need_a_mean_for_each_channel():
    pixels, y = np.zeros((1, 4, 5, 1), np.uint8), np.zeros((1, 4, 5, 1), np.float32)
    with pytest.raises(ValueError, match="have 1 channels, and there are 3 means and 3 deviations"):
        normalise(pixels, (1, 2, 3), (1, 2, 3), y, 1)


@pytest.mark.parametrize("shape", [(1, 4, 5, 3), (3, 7, 33, 3), (2, 16, 16, 1), (1, 1, 1, 3)])
def test_pixels_get_the_bits_that_numpy_gives_them(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    settings = Preprocess(shape[1:3], mean=(123.675, 0.1, 3.0)[:shape[3]],
                          std=(58.395, 3.0, -0.7)[:shape[3]])
    wanted = Photos(pixels, settings).normalised()
    for threads in THREADS:
        block = np.full(pixels.size + 2 * GUARD, np.nan, np.float32)
        y = block[GUARD:-GUARD].reshape(shape)
        with team(threads):
            normalise(pixels, settings.mean, settings.std, y, threads)()
        np.testing.assert_array_equal(y, wanted)
        assert np.isnan(block[:GUARD]).all()
        assert np.isnan(block[-GUARD:]).all()
