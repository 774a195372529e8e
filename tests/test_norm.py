"""Batch norm that stands alone."""
import numpy as np
import pytest
from checks import EPS, GUARD, THREADS, assert_within, normal, run

from cnn.image import Photos, Preprocess
from kernels import reference
from kernels.cpu.host.norm import normalise
from kernels.cpu.threads import team
from kernels.ops import BatchNorm, Clip, Relu, Silu

WEIGHTS = (1, 2, 3, 4)


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
