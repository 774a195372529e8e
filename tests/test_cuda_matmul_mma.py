"""Linear layers of many samples: the convolution's kernels over an image of one row."""
import numpy as np
import pytest
from checks import sum_bound
from cuda_checks import assert_exact, assert_within
from test_cuda_conv import FEWER, FP32, WEIGHTS, name, representable, signs, small

from kernels import ops
from kernels.cuda.conv_gemm import PLANE
from kernels.ops import Linear


def arrays(make, *sizes, seed=0):
    rng = np.random.default_rng(seed)
    *batch, features, outputs = sizes
    return make(rng, *batch, features), make(rng, outputs, features), make(rng, outputs)


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("sizes", [(65, 72, 10), (17, 200, 71), (3, 6, 20, 8), (66, 13, 8)])
def test_products_are_exact(sizes, dtype, runner):
    assert_exact(Linear(ops.Relu()), *arrays(signs, *sizes), weights=WEIGHTS, dtype=dtype,
                 tile=small(dtype), splits=1, kernel=name(dtype, small(dtype)), runner=runner)


@pytest.mark.parametrize("dtype", FP32)
@pytest.mark.parametrize("splits", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_splits_of_the_sum_add_up(splits, dtype, runner):
    assert_exact(Linear(), *arrays(signs, 17, 350, 24), weights=WEIGHTS, dtype=dtype,
                 tile=small(dtype), splits=splits, kernel=name(dtype, small(dtype), PLANE),
                 runner=runner)


@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("samples", [1, 65])
def test_a_residual_is_added_before_the_activation(samples, dtype, runner):
    """Also of one sample, whose own product takes none."""
    inputs = arrays(signs, samples, 72, 16)
    residual = signs(np.random.default_rng(1), samples, 16)
    assert_exact(Linear(ops.Relu()), *inputs, residual, weights=WEIGHTS, dtype=dtype,
                 kernel="conv_", runner=runner)


@pytest.mark.parametrize("dtype", FEWER)
def test_floats_are_within_the_bound(dtype, runner):
    inputs = arrays(representable(dtype), 20, 136, 24)
    # Tensor cores truncate where fp32 units round to nearest.
    assert_within(2 * sum_bound(Linear(), 136, *inputs), Linear(), *inputs, weights=WEIGHTS,
                  dtype=dtype, tile=small(dtype), splits=1, kernel="conv_", runner=runner)
