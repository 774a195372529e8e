"""Elementwise ops on CUDA: every activation, every way of broadcasting."""
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
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elementwise import EDGES, SMOOTH, broadcasts

from kernels import ops, reference
from kernels.cuda.host import elementwise
from kernels.ops import TensorSpec

BINARY = [ops.Add(), ops.Mul()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [ops.Relu(), ops.Clip(0.0, 6.0), ops.Clip(-2.0), ops.Clip()])
def test_clips_are_exact_for_every_length_of_the_tail(op, dtype, runner):
    x = np.concatenate([integers(np.random.default_rng(0), 100), EDGES[-3:]])
    for size in (1, 7, 8, 9, 4103):     # less than a vector, whole vectors, more than a block
        assert_exact(op, np.resize(x, size), dtype=dtype, kernel="clip_", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", SMOOTH)
def test_smooth_activations_are_within_four_roundings(op, dtype, runner):
    x = np.concatenate([np.linspace(-100, 100, 2001), np.linspace(-1, 1, 1001), EDGES[-3:]])
    bound = 8 * EPS * np.abs(reference.run(op, x))
    assert_within(bound, op, x.astype(np.float32), dtype=dtype, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a", "b", "kernel"), [
    ((3, 5, 7), (3, 5, 7), ""),
    ((3, 5, 7), (1, 3, 5, 7), ""),                                  # same elements, another rank
    ((2, 3, 4, 16), (16,), "broadcast_"),                           # per channel
    ((2, 3, 4, 16), (2, 1, 1, 16), "broadcast_"),                   # per image and channel
    ((2, 3, 4, 6), (2, 1, 1, 6), "broadcast_"),                     # narrower vectors
    ((2, 3, 4, 5), (2, 3, 4, 1), "repeat_"),                        # per pixel
    ((7, 8), (1,), "repeat_"),                                      # a scalar
    ((2, 1, 1, 8), (2, 3, 4, 8), "broadcast_"),                     # the first is broadcast
    ((1, 3, 1, 5), (2, 1, 4, 1), "repeat_"),                        # both are
])
@pytest.mark.parametrize("op", BINARY)
def test_common_broadcasts_are_exact(op, a, b, kernel, dtype, runner):
    rng = np.random.default_rng(0)
    assert_exact(op, integers(rng, *a), integers(rng, *b), dtype=dtype, runner=runner,
                 kernel=f"{op.kind.lower()}_{kernel}")


@given(broadcasts(), st.sampled_from(BINARY), st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_any_broadcast_is_exact_or_refused(shapes, op, dtype):
    rng = np.random.default_rng(0)
    a, b = (integers(rng, *shape) for shape in shapes)
    try:
        assert_exact(op, a, b, dtype=dtype, kernel=f"{op.kind.lower()}_")
    except ValueError as error:
        assert "walk over at most 4" in str(error)      # noqa: PT017


@pytest.mark.parametrize("op", BINARY)
def test_nan_infinity_and_rounding(op, runner):
    a, b = EDGES[[0, 1, 5, 15, 16, 17]], np.float32([2, -3, 0, 1, 5, 1])
    assert_exact(op, a, b, runner=runner)
    rng = np.random.default_rng(0)
    a, b = normal(rng, 4, 5, 6), normal(rng, 6)
    assert_within(EPS * np.abs(reference.run(op, a, b)), op, a, b, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype):
    rng = np.random.default_rng(0)
    x = normal(rng, 2, 3, 4, 16)
    for op, others in ((ops.Silu(), []), (ops.Add(), [normal(rng, 2, 3, 4, 16)]),
                       (ops.Mul(), [normal(rng, 16)]), (ops.Mul(), [normal(rng, 2, 3, 4, 1)])):
        assert_in_place(op, x, *others, dtype=dtype)


def test_tensors_beyond_32_bit_indices_are_refused():
    huge = TensorSpec((1 << 16, 1 << 15), "float16")
    with pytest.raises(ValueError, match="2,147,483,648 elements"):
        elementwise.prepare_unary(ops.Relu(), [huge], huge, [None], None)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_resources(dtype, arch):
    for kernel in elementwise.kernels(dtype):
        found = assert_resources(kernel, arch)
        if kernel.name.endswith(("f32x4", "f16x8")):
            assert found.counts["STG.E.128"] > 0
