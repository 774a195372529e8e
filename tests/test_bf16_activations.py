"""Activations that a layer of bfloat16 applies to its sums, and what is less exact of them where a
result is rounded to bfloat16 anyway."""
from dataclasses import replace

import numba
import numpy as np
import pytest
from bf16_checks import (  # noqa: F401
    BF16_EPS,
    narrow,
    prepared_in_bfloat16,
    run_stored,
    unit_of_each_kind,
)
from checks import EPS, TINY, integers, normal
from conv_problems import arrays

from kernels import ops, reference
from kernels.cpu import scalar
from kernels.cpu.dot_units import AVX512_EMULATED_BF16, BLOCK, COLUMNS
from kernels.cpu.host.epilogue import in_registers
from kernels.ops import Conv2d

PADDED = Conv2d(padding=(1, 1, 1, 1))
NARROW = [(ops.Silu(), "narrow_silu", 2.0 ** -13), (ops.Gelu(), "narrow_gelu", 2.0 ** -11.5),
          (ops.Gelu(tanh=True), "narrow_gelu_tanh", 2.0 ** -13)]


@numba.njit(fastmath={"contract"}, error_model="numpy")
def sweep(function, x, y, a=0, b=0):
    for i in range(len(x)):
        y[i] = function(x[i], np.float32(a), np.float32(b))


@pytest.mark.parametrize(("op", "name", "bound"), NARROW)
def test_narrow_activations_are_within_an_eighth_of_the_rounding(op, name, bound):
    x = np.concatenate([np.linspace(-30, 30, 300_001), np.linspace(-1e-3, 1e-3, 1001)])
    x = x.astype(np.float32)
    y, expected = np.empty_like(x), reference.run(op, x)
    sweep(getattr(scalar, name), x, y)
    assert bound <= BF16_EPS / 8
    # Far below 0 shares of x that float32 would round away from 1 count for nothing.
    assert (np.abs(y - expected) <= bound * np.abs(expected) + EPS * np.abs(x)).all()


@pytest.mark.parametrize(("op", "name", "bound"), NARROW)
def test_narrow_activations_far_from_zero(op, name, bound):
    x = np.array([np.nan, np.inf, 1e30, 50, 0.0, -0.0, -50, -1e6, -1e30], np.float32)
    y = np.empty_like(x)
    sweep(getattr(scalar, name), x, y)
    assert np.isnan(y[0])
    np.testing.assert_allclose(y[1:4], x[1:4], rtol=1e-6)
    assert np.array_equal(y[4:6].view(np.uint32), x[4:6].view(np.uint32))
    assert (np.abs(y[6:]) < 1e-7).all()


def assert_activation_right(plain, activation, given, **choice):
    """In float32 and in bfloat16: of the very sums that the layer without activation gives."""
    op = replace(plain, activation=activation)
    sums = run_stored(plain, given, "float32", **choice)
    expected = reference.run(activation, sums)
    rounding = 16 * EPS * (np.abs(expected) + np.abs(sums)) + TINY
    wide = run_stored(op, given, "float32", **choice)
    np.testing.assert_array_less(np.abs(wide - expected), rounding, err_msg=activation.kind)
    found = run_stored(op, given, "bfloat16", **choice).astype(np.float64)
    allowed = (1 + 1 / 8) * BF16_EPS * np.abs(expected) + rounding
    np.testing.assert_array_less(np.abs(found - expected), allowed, err_msg=activation.kind)


@pytest.mark.parametrize("activation", [ops.Gelu(), ops.HardSigmoid(0.2, 0.4), ops.Tanh()],
                         ids=lambda op: op.kind)
def test_activations_are_applied(activation):
    """One that is less exact in bfloat16, one with numbers of its own, and one that is neither;
    test_traced.py has all."""
    given = arrays(normal, PADDED, 1, 5, 7, 8, BLOCK + 5, (3, 3), residual=True)
    assert_activation_right(PADDED, activation, given, unit=AVX512_EMULATED_BF16)


@pytest.mark.parametrize("activation", [ops.Silu(), ops.HardSwish()],
                         ids=lambda op: op.kind)
def test_depthwise_convolutions_and_batch_norms_apply_it(activation):
    for op, width, kernel in ((Conv2d(padding=(1, 1, 1, 1), groups=37), 9, (3, 3)),
                              (Conv2d((1, 3), (1, 2, 0, 2), (2, 1), groups=20), 14, (2, 4))):
        given = arrays(normal, op, 2, 9, width, op.groups, op.groups, kernel)
        assert_activation_right(op, activation, given)
    rng = np.random.default_rng(0)
    x, *of_channel = normal(rng, 2, 3, 5, 37), *(normal(rng, 37) for _ in range(3))
    given = [x, *of_channel, rng.random(37, np.float32)]
    assert_activation_right(ops.BatchNorm(), activation, given)


@unit_of_each_kind
@pytest.mark.parametrize("channels", [1, COLUMNS, COLUMNS + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("residual", [False, True])
def test_any_channels_and_pixels(unit, channels, residual):
    for height, width in ((1, 1), (5, 7), (9, 32)):
        given = arrays(normal, PADDED, 2, height, width, 8, channels, (3, 3), residual=residual)
        assert_activation_right(PADDED, ops.Silu(), given, unit=unit)


@unit_of_each_kind
def test_piecewise_linear_ones_of_whole_numbers_are_exact(unit):
    """What is added, activated and written is each row's own."""
    given = arrays(integers, PADDED, 2, 6, 9, 16, BLOCK + 8, (3, 3), residual=True)
    op = Conv2d(padding=PADDED.padding, activation=ops.LeakyRelu(0.25))
    expected = reference.run(op, *given)
    np.testing.assert_array_equal(run_stored(op, given, "float32", unit=unit), expected)
    stored = [narrow(given[0]), *given[1:3], narrow(given[3])]
    np.testing.assert_array_equal(run_stored(op, stored, "bfloat16", unit=unit),
                                  narrow(expected.astype(np.float32)))


def test_what_is_not_rounded_is_exact():
    """The less exact functions are for results in bfloat16 alone."""
    assert in_registers(ops.Gelu(), "float32")[0].name == "gelu"
    assert in_registers(ops.Gelu(tanh=True), "bfloat16")[0].name == "narrow_gelu_tanh"
    assert in_registers(ops.Tanh(), "bfloat16")[0].name == "tanh"
    assert in_registers(ops.Relu(), "bfloat16")[0] == 0
