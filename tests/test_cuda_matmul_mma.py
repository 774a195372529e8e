"""Linear layers on tensor cores: the convolution's kernel over an image of one row."""
import numpy as np
import pytest
from checks import integers, normal, sum_bound
from cuda_checks import assert_exact, assert_within

from kernels import ops
from kernels.cuda.host import conv
from kernels.cuda.host.conv_choice import TILES
from kernels.ops import Linear

WEIGHTS = (1, 2)
DTYPES = ["float16", "tf32", pytest.param("bfloat16", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def small_tile(monkeypatch):
    monkeypatch.setattr(conv, "choose", lambda *_: (TILES[4], 1))


def arrays(make, *sizes, seed=0):
    rng = np.random.default_rng(seed)
    *batch, features, outputs = sizes
    return make(rng, *batch, features), make(rng, outputs, features), make(rng, outputs)


def signs(rng, *shape):
    return integers(rng, *shape, low=-1, high=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 64, 64), (65, 72, 10), (17, 200, 71), (3, 6, 20, 8),
                                   (66, 13, 8)])
def test_products_are_exact(sizes, dtype, runner):
    assert_exact(Linear(ops.Relu()), *arrays(signs, *sizes), weights=WEIGHTS, dtype=dtype,
                 kernel="conv_mma_", runner=runner)


@pytest.mark.parametrize("splits", [2, 5])
def test_splits_of_the_sum_add_up(splits, monkeypatch, runner):
    monkeypatch.setattr(conv, "choose", lambda *_: (TILES[4], splits))
    assert_exact(Linear(), *arrays(signs, 17, 350, 24), weights=WEIGHTS, dtype="float16",
                 kernel="conv_mma_f16_64x64x64_s3_splitk", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_within_the_bound(dtype, runner):
    def make(rng, *shape):
        values = normal(rng, *shape)
        return conv.round_to_tf32(values) if dtype == "tf32" else (
            values.astype(dtype).astype(np.float32))

    inputs = arrays(make, 20, 136, 24)
    # Tensor cores truncate where fp32 units round to nearest.
    assert_within(2 * sum_bound(Linear(), 136, *inputs), Linear(), *inputs, weights=WEIGHTS,
                  dtype=dtype, kernel="conv_mma_", runner=runner)
