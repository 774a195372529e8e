"""Elementwise ops, with broadcasting, and at the edges of float32."""
import numpy as np
import pytest
from checks import EPS, TINY, assert_exact, assert_within, integers, normal, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops, reference
from kernels.axes import collapse

EDGES = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1, -1, 88, 88.5, 89, -87, -88, -104, 1e30, -1e30,
                  np.inf, -np.inf, np.nan], np.float32)

SMOOTH = [ops.Sigmoid(), ops.Tanh(), ops.Silu(), ops.HardSwish(), ops.Elu(), ops.Elu(0.7),
          ops.Gelu(), ops.Erf()]
EVERY = [*SMOOTH, ops.Gelu(tanh=True), ops.HardSigmoid(), ops.HardSigmoid(0.2, 0.4),
         ops.LeakyRelu(), ops.Relu(), ops.Clip(-1.0, 6.0), ops.Sqrt(), ops.StarRelu(0.9, -0.4),
         ops.FakeQuantize(0.1, 100), ops.FakeQuantize(0.1, 100, first=ops.Gelu())]


@pytest.mark.parametrize("op", [ops.Relu(), ops.Clip(0.0, 6.0), ops.Clip(-2.0), ops.Clip()])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_clips_are_exact(op, size):
    x = np.resize(np.concatenate([EDGES, normal(np.random.default_rng(0), 100) * 9]), size)
    assert_exact(op, np.where(np.abs(x) < 1e30, x, np.copysign(np.inf, x)).astype(np.float32),
                 kernel=f"{op.kind.lower()}_f32")


@pytest.mark.parametrize("op", SMOOTH)
def test_smooth_activations_are_within_four_roundings(op):
    x = np.concatenate([np.linspace(-100, 100, 200_001), np.linspace(-14, 14, 100_001),
                        np.linspace(-1, 1, 100_001), np.linspace(-1e-6, 1e-6, 101)])
    x = x.astype(np.float32)
    # exp adds a rounding of its argument to its own two; 1 + e and the division are two more.
    bound = 8 * EPS * np.abs(reference.run(op, x))
    assert_within(bound, op, x, kernel=f"{op.kind.lower()}_f32")


def test_gelu_by_tanh_is_within_what_the_rounding_of_an_exponent_amounts_to():
    op = ops.Gelu(tanh=True)
    x = np.concatenate([np.linspace(-15, 15, 300_001), np.linspace(-1e-3, 1e-3, 1001)])
    x = x.astype(np.float32)
    # Four roundings of s move e ** s by 4 EPS * |s| of itself.
    s = np.sqrt(8 / np.pi) * (np.abs(x) + 0.044715 * np.abs(x.astype(float)) ** 3)
    assert_within((8 + 4 * s) * EPS * np.abs(reference.run(op, x)), op, x, kernel="gelu_f32")


@pytest.mark.parametrize("op", [ops.HardSigmoid(0.25, 0.5), ops.LeakyRelu(0.25),
                                ops.LeakyRelu(-2.0)])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_piecewise_linear_activations_of_whole_numbers_are_exact(op, size):
    x = integers(np.random.default_rng(0), size, low=-9, high=10)
    assert_exact(op, x, kernel=f"{op.kind.lower()}_f32")


@pytest.mark.parametrize("op", [ops.HardSigmoid(), ops.HardSigmoid(0.2, 0.4), ops.LeakyRelu()])
def test_piecewise_linear_activations_round_once_an_operation(op):
    x = normal(np.random.default_rng(0), 10_007) * 4
    beta = op.beta if isinstance(op, ops.HardSigmoid) else 0.0
    bound = 3 * EPS * (op.alpha * np.abs(x) + beta)
    assert_within(bound, op, x, kernel=f"{op.kind.lower()}_f32")


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_star_relu_of_whole_numbers_is_exact(size):
    x = np.resize(np.concatenate([EDGES[-3:], integers(np.random.default_rng(0), 97)]), size)
    assert_exact(ops.StarRelu(0.5, -3.0), x, kernel="starrelu_f32")


def test_star_relu_rounds_once_an_operation():
    op, x = ops.StarRelu(0.8944, -0.4472), normal(np.random.default_rng(0), 10_007) * 4
    bound = 3 * EPS * (op.scale * x.astype(float) ** 2 + abs(op.bias))
    assert_within(bound, op, x, kernel="starrelu_f32")


@pytest.mark.parametrize("op", [ops.FakeQuantize(0.25, 0), ops.FakeQuantize(2.0, 128),
                                ops.FakeQuantize(1.0, 255), ops.FakeQuantize(2.0 ** -20, 7),
                                ops.FakeQuantize(2.0, 128, relu=True)])
@pytest.mark.parametrize("size", [1, 17, 1000])
def test_fake_quantisation_is_exact(op, size):
    """Halves between two codes go to the even one, before the zero point is added."""
    ties = np.arange(-600, 601, dtype=np.float32) * np.float32(op.scale / 2)
    x = np.resize(np.concatenate([EDGES, ties]), size)
    assert_exact(op, x, kernel="fakequantize_f32")


def test_fake_quantisation_is_off_by_a_code_at_most_where_a_quotient_is_nearly_a_half():
    op = ops.FakeQuantize(float(np.float32(0.0173)), 77)
    x = normal(np.random.default_rng(0), 99_991)
    quotients = x / op.scale
    tie = np.abs(np.abs(quotients - np.trunc(quotients)) - 0.5) <= 2 * EPS * np.abs(quotients)
    bound = 3 * EPS * np.abs(reference.run(op, x)) + op.scale * tie
    assert_within(bound, op, x, kernel="fakequantize_f32")


def test_a_square_root_is_rounded_once():
    x = np.abs(normal(np.random.default_rng(0), 10_007)) * np.float32(1e-30)
    assert_within(EPS * reference.run(ops.Sqrt(), x), ops.Sqrt(), x, kernel="sqrt_f32")
    assert_exact(ops.Sqrt(), integers(np.random.default_rng(0), 1000) ** 2)


def test_activations_at_the_edges():
    for op in EVERY:
        found, expected = run(op, EDGES), reference.run(op, EDGES)
        finite = np.abs(expected) < np.finfo(np.float32).max
        with np.errstate(over="ignore"):        # of StarRelu(1e30)
            rest = expected[~finite].astype(np.float32)
        assert np.array_equal(found[~finite], rest, equal_nan=True), op
        assert (np.abs(found[finite] - expected[finite])
                <= 8 * EPS * np.abs(expected[finite]) + TINY).all(), op
    assert run(ops.Sigmoid(), np.array([-np.inf, np.inf], np.float32)).tolist() == [0, 1]
    assert run(ops.Erf(), np.array([-np.inf, np.inf], np.float32)).tolist() == [-1, 1]


@pytest.mark.parametrize("op", EVERY)
def test_an_element_has_the_same_bits_wherever_it_lies(op):
    """In a vector, or alone behind the last: an image of a batch has those that it would alone."""
    x = normal(np.random.default_rng(0), 1000) * 4
    whole = run(op, x)
    for length in (1, 3, 7, 13, 29):
        parts = [run(op, x[start:start + length]) for start in range(0, 15 * length, length)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[:15 * length])


@pytest.mark.parametrize("op", [ops.HardSigmoid(), ops.Gelu(), ops.Gelu(tanh=True), ops.LeakyRelu(),
                                ops.Elu(), ops.Erf()])
def test_a_convolution_is_followed_by_any_activation(op):
    rng = np.random.default_rng(0)
    x, weight, bias = integers(rng, 1, 5, 7, 6), integers(rng, 19, 3, 3, 6) / 16, integers(rng, 19)
    fused = run(ops.Conv2d(activation=op), x, weight, bias, weights=(1, 2))
    np.testing.assert_array_equal(fused, run(op, run(ops.Conv2d(), x, weight, bias,
                                                     weights=(1, 2))))


@st.composite
def broadcasts(draw):
    """Two shapes of up to six axes that broadcast."""
    full = [draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 6)))]
    pair = [[draw(st.sampled_from([size, size, 1])) for size in full] for _ in range(2)]
    cut = draw(st.integers(0, len(full) - 1))
    pair[draw(st.integers(0, 1))] = pair[draw(st.integers(0, 1))][cut:]
    return pair


@given(broadcasts(), st.sampled_from([ops.Add(), ops.Mul()]), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_any_broadcast_is_exact(shapes, op, seed):
    rng = np.random.default_rng(seed)
    a, b = (integers(rng, *shape) for shape in shapes)
    assert_exact(op, a, b, kernel=f"{op.kind.lower()}_f32")


@given(broadcasts(), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_any_quotient_is_rounded_once(shapes, seed):
    rng = np.random.default_rng(seed)
    a, b = (normal(rng, *shape) for shape in shapes)
    assert_within(EPS * np.abs(reference.run(ops.Div(), a, b)), ops.Div(), a, b, kernel="div_f32")


@pytest.mark.parametrize(("a", "b", "axes"), [
    ((2, 3, 4, 5), (2, 3, 4, 5), 1),      # the same shape: one long axis
    ((2, 3, 4, 5), (5,), 2),              # per channel
    ((2, 3, 4, 5), (1,), 1),              # a scalar
    ((2, 3, 4, 5), (2, 1, 1, 5), 3),      # per image and channel
])
def test_axes_are_merged_where_they_can_be(a, b, axes):
    sizes, _ = collapse(np.broadcast_shapes(a, b), a, b)
    assert len(sizes) == axes


@pytest.mark.parametrize("op", [ops.Add(), ops.Mul(), ops.Div()])
def test_large_arrays_are_shared_by_the_threads(op):
    rng = np.random.default_rng(0)
    powers = np.exp2(integers(rng, 50, 1))      # so that quotients are exact
    for pair in ((integers(rng, 3, 50, 41), powers), (powers, np.exp2(integers(rng, 3, 50, 41)))):
        assert_exact(op, *pair)
    assert_exact(op, EDGES[[0, 1, 5, 15, 16]], np.float32([2, -4, 0, 1, 8]))


@pytest.mark.parametrize("op", [ops.Add(), ops.Mul(), ops.Div()])
def test_random_floats_round_once(op):
    rng = np.random.default_rng(0)
    a, b = normal(rng, 4, 5, 6), normal(rng, 6)
    assert_within(EPS * np.abs(reference.run(op, a, b)), op, a, b)
