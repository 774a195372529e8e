"""Local response norm on CUDA: windows that reach into the vectors beside a thread's own."""
import numpy as np
import pytest
from checks import EPS, integers, normal
from cuda_checks import (
    COMPILED_DTYPES,
    DTYPES,
    assert_exact,
    assert_resources,
    assert_within,
    rounded,
)

from kernels import reference
from kernels.cuda import sass, vector
from kernels.cuda.host import local_response_norm
from kernels.ops import LocalResponseNorm


def rounding(op, x):
    """Bound of the error in float32: a sum of `size` products, whose relative error becomes an
    absolute one of its logarithm, and the rounding of logarithm, product and exponential."""
    power = np.abs(np.log(np.abs(x / reference.run(op, x))))     # beta * log(..)
    return ((op.size + 8) * op.beta + 6 * power + 8) * EPS * np.abs(reference.run(op, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "op", "lanes"), [
    ((2, 3, 5, 96), LocalResponseNorm(), 8),                        # AlexNet's
    ((2, 3, 3, 32), LocalResponseNorm(5, 0.9, 0.75, 2.0), 8),       # squares that count
    ((3, 2, 20), LocalResponseNorm(4, 0.5, 0.5, 1.5), 4),           # even: one more after
    ((2, 7), LocalResponseNorm(3, 1.0, 1.25, 1.0), 1),
    ((3, 16), LocalResponseNorm(1, 1.0, 0.75, 1.0), 8),             # its own square alone
    ((2, 2, 16), LocalResponseNorm(19, 1.0, 0.75, 1.0), 8),         # wider than all channels
    ((301, 8), LocalResponseNorm(5, 1.0, 0.75, 0.1), 8),            # two blocks
])
def test_floats_are_within_the_bound(shape, op, lanes, dtype, runner):
    x = rounded(normal(np.random.default_rng(0), *shape) * 3, dtype).astype(np.float64)
    x[x == 0] = 1
    most = vector.lanes(dtype)
    name = f"local_response_norm_{op.size}_{vector.short(dtype)}x{min(lanes, most)}"
    assert_within(rounding(op, x), op, x.astype(np.float32), dtype=dtype, kernel=name,
                  runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_squares_nothing_changes(dtype, runner):
    x = integers(np.random.default_rng(0), 2, 3, 24)
    assert_exact(LocalResponseNorm(alpha=0.0), x, dtype=dtype, runner=runner)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [7, 24])
def test_what_is_not_finite_is_seen_by_its_window_only(channels, value, runner):
    x, op = integers(np.random.default_rng(0), 3, channels, low=1), LocalResponseNorm(alpha=1.0)
    bound = rounding(op, x).max()
    x[1, 3] = value
    assert np.isnan(reference.run(op, x)[1, 3])
    assert_within(bound, op, x, runner=runner)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_resources(dtype, arch):
    for kernel in local_response_norm.kernels(dtype):
        counts = assert_resources(kernel, arch).counts
        assert sass.number(counts, "LDG") == 3      # its own vector and some of those beside it
        assert counts["STG.E.128"] == 1
