"""Batch norm that stands alone, on CUDA."""
import numpy as np
import pytest
from checks import EPS, integers, normal
from cuda_checks import (
    COMPILED_DTYPES,
    DTYPES,
    assert_exact,
    assert_in_place,
    assert_resources,
    assert_within,
    run,
)

from kernels.cuda.host import norm
from kernels.ops import BatchNorm, Relu, Silu

WEIGHTS = (1, 2, 3, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 7, 7, 64), (9, 12), (1, 1)])
def test_floats_are_within_the_bound(shape, dtype, runner):
    rng = np.random.default_rng(0)
    scale, bias, mean = (normal(rng, shape[-1]) for _ in range(3))
    var = rng.uniform(0.1, 2, shape[-1]).astype(np.float32)
    x, op = normal(rng, *shape), BatchNorm(1e-3)
    s = np.abs(scale.astype(np.float64)) / np.sqrt(var + 1e-3)
    bound = 3 * EPS * (2 * np.abs(x) * s + np.abs(mean) * s + np.abs(bias))
    assert_within(bound, op, x, scale, bias, mean, var, weights=WEIGHTS, dtype=dtype,
                  kernel="batch_norm_", runner=runner)


@pytest.mark.parametrize("activation", [Relu(), Silu()])
def test_an_activation_runs_with_it(activation, runner):
    rng = np.random.default_rng(0)
    scale, bias, mean = (normal(rng, 12) for _ in range(3))
    var = rng.uniform(0.1, 2, 12).astype(np.float32)
    x, op = normal(rng, 2, 5, 12), BatchNorm(1e-3, activation)
    s = np.abs(scale.astype(np.float64)) / np.sqrt(var + 1e-3)
    bound = 12 * EPS * (2 * np.abs(x) * s + np.abs(mean) * s + np.abs(bias))
    name = "clip" if activation == Relu() else "silu"
    assert_within(bound, op, x, scale, bias, mean, var, weights=WEIGHTS, dtype="float32",
                  kernel=f"batch_norm_f32x4_{name}", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype):
    rng = np.random.default_rng(0)
    assert_in_place(BatchNorm(), normal(rng, 2, 3, 5, 12), *(normal(rng, 12) for _ in range(3)),
                    rng.uniform(0.1, 2, 12), dtype=dtype, weights=WEIGHTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_nan_and_infinity_are_exact(dtype, runner):
    rng = np.random.default_rng(0)
    x, one = integers(rng, 3, 5, 16), np.ones(16, np.float32)
    x[0, 0, :3] = np.nan, np.inf, -np.inf
    scale = rng.choice([-2, -1, 1, 2], 16).astype(np.float32)
    assert_exact(BatchNorm(0.0), x, scale, integers(rng, 16), integers(rng, 16), one,
                 weights=WEIGHTS, dtype=dtype, runner=runner)


def test_parameters_must_be_constants():
    one = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="must be constants"):
        run(BatchNorm(), np.ones((2, 3), np.float32), one, one, one, one)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_resources(dtype, arch):
    for kernel in norm.kernels(dtype):
        found = assert_resources(kernel, arch)
        if "f32x4" in kernel.name or "f16x8" in kernel.name:
            assert found.counts["STG.E.128"] == norm.norm.PIXELS
