"""Functions of scalar.py as vector code: they give what loops over them do."""
import numba
import numpy as np
import pytest
from checks import EPS, TINY, normal
from numba import types
from numba.extending import intrinsic
from test_elementwise import EDGES

from kernels.cpu import scalar
from kernels.cpu.simd import at, broadcast, each_vector, load, store
from kernels.cpu.sizes import LANES
from kernels.cpu.traced import activate, function_of

NAMES = ["sigmoid", "tanh", "silu", "hard_swish", "hard_sigmoid", "leaky_relu", "elu", "sqrt",
         "star_relu", "fake_quantize", "relu_fake_quantize", "gelu", "gelu_tanh", "erf",
         "narrow_silu", "narrow_gelu", "narrow_gelu_tanh", "gelu_fake_quantize",
         "gelu_tanh_fake_quantize", "silu_fake_quantize", "hard_swish_fake_quantize",
         "code_of_silu", "code_of_gelu", "code_of_gelu_tanh", "code_of_hard_swish"]
NUMBERS = np.float32(0.25), np.float32(3)       # for those that take some


@intrinsic
def apply(typingctx, function, x, y, count, a, b):
    """y[i] = function(x[i], a, b), a vector at a time; of a number in its place y = x."""
    def codegen(context, builder, sig, args):
        _, x, y, count, *numbers = args
        numbers = [broadcast(builder, number) for number in numbers]

        def vector(first, mask):
            value = load(builder, builder.gep(x, [first]), mask)
            value = activate(builder, function_of(function), value, *numbers)
            store(builder, value, builder.gep(y, [first]), mask)
        each_vector(builder, count, vector)
        return context.get_dummy_value()
    return types.void(function, x, y, types.intp, a, b), codegen


@numba.njit
def by_vectors(function, x, y, a, b):
    apply(function, at(x, 0), at(y, 0), len(x), a, b)


@numba.njit(fastmath={"contract"}, error_model="numpy")
def by_numbers(function, x, y, a, b):
    for i in range(len(x)):
        y[i] = function(x[i], a, b)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_get_what_numbers_get(name):
    rng = np.random.default_rng(0)
    x = np.concatenate([EDGES, 4 * normal(rng, 10 * LANES), np.linspace(-20, 20, 501)])
    x = x.astype(np.float32)
    found, expected = np.empty_like(x), np.empty_like(x)
    by_vectors(getattr(scalar, name), x, found, *NUMBERS)
    by_numbers(getattr(scalar, name), x, expected, *NUMBERS)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    # Products and sums may be fused in other places.
    found, expected = found[finite], expected[finite]
    assert (np.abs(found - expected) <= 16 * EPS * np.abs(expected) + TINY).all()
    assert not np.array_equal(found, x[finite])


def test_without_a_function_a_vector_stays_as_it_is():
    x = np.arange(3 * LANES + 1, dtype=np.float32)
    y = np.empty_like(x)
    by_vectors(0, x, y, *NUMBERS)
    np.testing.assert_array_equal(y, x)
