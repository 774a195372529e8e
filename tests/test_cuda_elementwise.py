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
    rounded,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elementwise import EDGES, broadcasts

from kernels import ops, reference
from kernels.cuda.host import elementwise
from kernels.ops import TensorSpec

BINARY = [ops.Add(), ops.Mul(), ops.Div()]
SMOOTH = [ops.Sigmoid(), ops.Tanh(), ops.Silu(), ops.HardSwish()]
FEW = (1, 7, 8, 9, 4103)    # elements: less than a vector, whole vectors, more than a block


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [ops.Relu(), ops.Clip(0.0, 6.0), ops.Clip(-2.0), ops.Clip()])
def test_clips_are_exact_for_every_length_of_the_tail(op, dtype, runner):
    x = np.concatenate([integers(np.random.default_rng(0), 100), EDGES[-3:]])
    for size in FEW:
        assert_exact(op, np.resize(x, size), dtype=dtype, kernel="clip_", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "kernel"), [
    (ops.LeakyRelu(0.25), "leaky_relu_"), (ops.HardSigmoid(0.25, 0.5), "hard_sigmoid_"),
    (ops.HardSigmoid(-0.5, -0.25), "hard_sigmoid_"), (ops.StarRelu(0.5, -2.0), "star_relu_")])
def test_what_has_two_numbers_is_exact_for_whole_ones(op, kernel, dtype, runner):
    x = np.concatenate([EDGES[-3:], integers(np.random.default_rng(0), 100)])
    for size in FEW:
        assert_exact(op, np.resize(x, size), dtype=dtype, kernel=kernel, runner=runner)


def rounding(op, x):
    """Bound of the error in float32; of libdevice's functions what the CUDA C++ Programming Guide
    says, 2 ulp for erf and exp and 1 for expm1, an ulp being two roundings. What is less than the
    least normal float32 may be taken for 0 on the way."""
    y, below = np.abs(reference.run(op, x)), np.minimum(x, 0)
    match op:
        case ops.HardSigmoid(_, beta):      # where it is not clipped, |alpha * x| <= 1 + |beta|
            return 3 * EPS * (1 + 2 * abs(beta))
        case ops.Gelu(tanh=True):           # z: the argument of exp, rounded 5 times
            z = np.sqrt(8 / np.pi) * (below + 0.044715 * below ** 3)
            cancelled = 2.0 ** -52 * np.minimum(np.abs(x), 10)      # in the float64 of 1 + tanh(z)
            return (5 * np.abs(z) + 9) * EPS * y + cancelled + np.abs(x) * 2.0 ** -126
        case ops.Gelu():                    # its reciprocal is within 1 ulp, which counts twice
            return 14 * EPS * y + np.abs(x) * 2.0 ** -126
    return 4 * EPS * y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "kernel"), [
    (ops.HardSigmoid(), "hard_sigmoid_"), (ops.HardSigmoid(0.2, 0.6), "hard_sigmoid_"),
    (ops.LeakyRelu(), "leaky_relu_"), (ops.Elu(), "elu_"), (ops.Elu(1.7), "elu_"),
    (ops.Sqrt(), "sqrt_"),
    (ops.Gelu(), "gelu_f"), (ops.Gelu(tanh=True), "gelu_tanh_"), (ops.Erf(), "erf_")])
def test_other_activations_keep_their_digits_to_both_ends(op, kernel, dtype, runner):
    x = np.concatenate([np.linspace(-100, 100, 801), np.linspace(-14, 14, 1401),
                        np.linspace(-1, 1, 401), EDGES])
    x = rounded(x, dtype).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        bound = rounding(op, x)
    kernel = kernel if dtype != "bfloat16" else kernel.replace("_f", "_bf")
    assert_within(bound, op, x.astype(np.float32), dtype=dtype, kernel=kernel, runner=runner)


@pytest.mark.parametrize("op", [ops.FakeQuantize(0.25, 0), ops.FakeQuantize(2.0, 128),
                                ops.FakeQuantize(2.0, 128, relu=True)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fake_quantisation_is_exact(op, dtype, runner):
    ties = np.arange(-600, 601, dtype=np.float32) * np.float32(op.scale / 2)
    x = np.concatenate([EDGES[-3:], ties])
    kernel = "relu_fake_quantize_" if op.relu else "fake_quantize_"
    assert_exact(op, x, dtype=dtype, kernel=kernel, runner=runner)


@pytest.mark.parametrize("first", [ops.Gelu(), ops.Gelu(tanh=True), ops.Silu(), ops.HardSwish()])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_function_gives_is_quantised(first, dtype, runner):
    """Off by a code only where the function's own rounding decides it."""
    op = ops.FakeQuantize(0.25, 4, first=first)
    x = rounded(np.concatenate([np.linspace(-10, 80, 901), EDGES]), dtype).astype(np.float32)
    name = {ops.Gelu(): "gelu", ops.Gelu(tanh=True): "gelu_tanh", ops.Silu(): "silu",
            ops.HardSwish(): "hard_swish"}[first]
    y = run(op, x, dtype=dtype, kernel=f"{name}_fake_quantize_", runner=runner)
    with np.errstate(invalid="ignore"):
        exact = np.clip(reference.run(first, x) / op.scale, *op.bounds)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
    found = (y / op.scale)[~np.isnan(y)]
    np.testing.assert_array_equal(found, np.rint(found))
    assert np.abs(found - exact[~np.isnan(y)]).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("grid", [(0.25, 0), (2.0, 128), (1.0, 255), (0.5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantisation_of_a_sum_is_exact(grid, dtype, runner):
    """Of numbers that the dtype has; half of the sums are ties."""
    op, rng = ops.AddFakeQuantize(*grid), np.random.default_rng(0)
    for size in FEW:
        a, b = (integers(rng, size, low=-200, high=201) * op.scale / 2 for _ in range(2))
        assert_exact(op, a, b, dtype=dtype, kernel="add_fake_quantize_", runner=runner)
    edges, zeros = np.float32([np.nan, np.inf, -np.inf, 1e30, -0.0]), np.zeros(5, np.float32)
    for a, b in ((edges, zeros), (zeros, edges)):
        assert_exact(op, a, b, dtype=dtype, kernel="add_fake_quantize_", runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantisation_of_a_sum_is_off_by_a_code_at_ties_alone(dtype, runner):
    op, rng = ops.AddFakeQuantize(0.3, 100), np.random.default_rng(0)
    a, b = (rounded(normal(rng, 4103) * 20, dtype).astype(np.float32) for _ in range(2))
    quotient = (a.astype(float) + b) / op.scale
    unclear = np.abs(quotient - np.floor(quotient) - 0.5) < 1e-4
    bound = np.where(unclear, op.scale * 1.001, 200 * op.scale * EPS)
    assert_within(bound, op, a, b, dtype=dtype, kernel="add_fake_quantize_", runner=runner)


def test_what_fake_quantisation_adds_is_of_one_shape(runner):
    rng = np.random.default_rng(0)
    a = integers(rng, 2, 3, 4, 5)
    assert_exact(ops.AddFakeQuantize(2.0, 3), a, a, runner=runner)      # a value and itself
    with pytest.raises(ValueError, match="two values of one shape"):
        run(ops.AddFakeQuantize(2.0, 3), a, integers(rng, 5), runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_star_relu_rounds_once_an_operation(dtype, runner):
    op, x = ops.StarRelu(0.9, -0.4), rounded(np.linspace(-100, 100, 2001), dtype)
    bound = 3 * EPS * (0.9 * x.astype(np.float64) ** 2 + 0.4)
    assert_within(bound, op, x.astype(np.float32), dtype=dtype, kernel="star_relu_", runner=runner)


def test_gelu_far_from_zero(runner):
    x = np.float32([-1e30, 1e30, np.inf])
    for op in (ops.Gelu(), ops.Gelu(tanh=True)):
        assert run(op, x, runner=runner).tolist() == [0, np.float32(1e30), np.inf]
        assert np.isnan(run(op, np.float32([np.nan, -np.inf]), runner=runner)).all()


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
    name = f"{op.kind.lower()}_{kernel}"
    if isinstance(op, ops.Div) and a == (2, 1, 1, 8):
        name = name.replace("div", "divide")        # its operands change places
    assert_exact(op, *operands(op, a, b), dtype=dtype, runner=runner, kernel=name)


def operands(op, *shapes):
    """Whole numbers; for a division powers of two, whose quotients are exact."""
    rng = np.random.default_rng(0)
    arrays = [integers(rng, *shape) for shape in shapes]
    return [np.exp2(array) for array in arrays] if isinstance(op, ops.Div) else arrays


@given(broadcasts(), st.sampled_from(BINARY), st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_any_broadcast_is_exact_or_refused(shapes, op, dtype):
    try:
        assert_exact(op, *operands(op, *shapes), dtype=dtype,
                     kernel="div" if isinstance(op, ops.Div) else f"{op.kind.lower()}_")
    except ValueError as error:
        assert "walk over at most 4" in str(error)      # noqa: PT017


@pytest.mark.parametrize("op", BINARY)
def test_nan_infinity_and_rounding(op, runner):
    a, b = EDGES[[0, 1, 5, 15, 16, 17]], np.float32([2, -4, 0, 1, 8, 1])
    assert_exact(op, a, b, runner=runner)
    rng = np.random.default_rng(0)
    a, b = normal(rng, 4, 5, 6), normal(rng, 6)
    assert_within(EPS * np.abs(reference.run(op, a, b)), op, a, b, runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype):
    rng = np.random.default_rng(0)
    x = normal(rng, 2, 3, 4, 16)
    for op, others in ((ops.Silu(), []), (ops.Add(), [normal(rng, 2, 3, 4, 16)]),
                       (ops.AddFakeQuantize(0.25, 128), [normal(rng, 2, 3, 4, 16)]),
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
        if kernel.name.startswith(("clip", "gelu_f", "add", "mul_broadcast")) and (
                kernel.name.endswith(("f32x4", "f16x8"))):      # one of each kind
            assert found.counts["STG.E.128"] > 0
