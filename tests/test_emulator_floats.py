"""Floating-point arithmetic: every result is the exact one, rounded once to the format."""
import math
from fractions import Fraction

import numpy as np
import pytest
from emulator_checks import FORMATS as DIGITS
from emulator_checks import STORAGE, bits, compute, exactly, floats, packed

from kernels.emulator import UnknownInstruction

FORMATS = ["f16", "bf16", "f32", "f64"]


def run(instruction, kind, **inputs):
    """The result of an instruction on registers of a format, as float64."""
    raw = {name: bits(x) if x.itemsize == 2 else x for name, x in inputs.items()}
    dtype = np.uint16 if kind in ("f16", "bf16") else STORAGE[kind]
    return compute(instruction, dtype, **raw).view(STORAGE[kind]).astype(np.float64)


ARITHMETIC = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_sums_and_products_are_rounded_once(name, kind):
    a, b = floats(kind, seed=1), floats(kind, seed=2)
    np.testing.assert_array_equal(run(f"{name}.rn.{kind} d, a, b;", kind, a=a, b=b),
                                  exactly(ARITHMETIC[name], kind, a, b))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_fused_multiply_add_rounds_once(kind):
    a, b, c = (floats(kind, seed=seed) for seed in (1, 2, 3))
    digits = DIGITS[kind][0]
    for i in range(32):              # the product is halfway between two numbers, and a third one
        a[i] = 1 + 2.0 ** -(digits // 2)        # far below decides: rounding twice would be seen
        b[i] = 1 + 2.0 ** -(digits - digits // 2)
        c[i] = (-1) ** i * 2.0 ** (-20 - i // 8 if kind == "f16" else -60 - 2 * i)
    np.testing.assert_array_equal(run(f"fma.rn.{kind} d, a, b, c;", kind, a=a, b=b, c=c),
                                  exactly(lambda x, y, z: x * y + z, kind, a, b, c))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_two_halves_in_a_register_are_computed_apart(kind):
    a, b, c = (floats(kind, seed=seed) for seed in (1, 2, 3))
    halves = [(x, np.roll(x, 1)) for x in (a, b, c)]
    for instruction, function, operands in (
            (f"fma.rn.{kind}x2 d, a, b, c;", lambda x, y, z: x * y + z, 3),
            (f"add.rn.{kind}x2 d, a, b;", lambda x, y: x + y, 2),
            (f"mul.rn.{kind}x2 d, a, b;", lambda x, y: x * y, 2)):
        found = compute(instruction, np.uint32, **{
            name: packed(*pair) for name, pair in zip("abc"[:operands], halves, strict=False)})
        for i, half in enumerate((found.astype(np.uint16), (found >> 16).astype(np.uint16))):
            np.testing.assert_array_equal(
                half.view(STORAGE[kind]).astype(np.float64),
                exactly(function, kind, *(pair[i] for pair in halves[:operands])), instruction)


@pytest.mark.parametrize("kind", FORMATS)
def test_minimum_and_maximum_prefer_a_number_to_nan(kind):
    a, b = floats(kind, seed=1), floats(kind, seed=2)
    x, y = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_array_equal(run(f"min.{kind} d, a, b;", kind, a=a, b=b), np.fmin(x, y))
    np.testing.assert_array_equal(run(f"max.{kind} d, a, b;", kind, a=a, b=b), np.fmax(x, y))


def test_minimum_and_maximum_order_the_zeros():
    a, b = np.float32([0.0, -0.0, -0.0]), np.float32([-0.0, 0.0, -0.0])
    assert np.signbit(run("min.f32 d, a, b;", "f32", a=a, b=b)).tolist() == [True, True, True]
    assert np.signbit(run("max.f32 d, a, b;", "f32", a=a, b=b)).tolist() == [False, False, True]


@pytest.mark.parametrize("kind", FORMATS)
def test_signs_change_without_rounding(kind):
    a = floats(kind, seed=1)
    x = a.astype(np.float64)
    np.testing.assert_array_equal(run(f"neg.{kind} d, a;", kind, a=a), -x)
    np.testing.assert_array_equal(run(f"abs.{kind} d, a;", kind, a=a), np.abs(x))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_copysign_takes_the_sign_of_its_first_operand(kind):
    a, b = floats(kind, seed=1), floats(kind, seed=2)
    np.testing.assert_array_equal(run(f"copysign.{kind} d, a, b;", kind, a=a, b=b),
                                  np.copysign(b, a))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_quotients_and_roots_are_rounded_once(kind):
    a, b = floats(kind, seed=1), floats(kind, seed=2)
    a, b = a[np.isfinite(a)], b[np.isfinite(b) & (b != 0)]
    a = a[:len(b)]
    np.testing.assert_array_equal(run(f"div.rn.{kind} d, a, b;", kind, a=a, b=b),
                                  exactly(lambda x, y: x / y, kind, a, b))
    np.testing.assert_array_equal(run(f"rcp.rn.{kind} d, b;", kind, b=b),
                                  exactly(lambda y: 1 / y, kind, b))
    root = run(f"sqrt.rn.{kind} d, a;", kind, a=np.abs(a))
    for x, found in zip(np.abs(a).tolist(), root.tolist(), strict=True):    # nearest of its kind
        below, above = (float(np.nextafter(STORAGE[kind](found), STORAGE[kind](end)))
                        for end in (-np.inf, np.inf))
        half = [(Fraction(found) + Fraction(end)) / 2 for end in (below, above)]
        assert max(half[0], 0) ** 2 <= Fraction(x) <= half[1] ** 2


def test_division_by_zero_and_roots_of_negative_numbers():
    a, b = np.float32([1, -1, 0, np.inf, 5]), np.float32([0, 0, 0, np.inf, np.inf])
    np.testing.assert_array_equal(run("div.rn.f32 d, a, b;", "f32", a=a, b=b),
                                  [np.inf, -np.inf, np.nan, np.nan, 0])
    np.testing.assert_array_equal(run("sqrt.rn.f32 d, a;", "f32", a=a),
                                  [1, np.nan, 0, np.inf, np.float32(np.sqrt(5))])


# PTX ISA: the largest error of each approximation, relative or absolute, on these inputs
APPROXIMATIONS = {
    "rcp.approx.f32": (lambda x: 1 / x, (0.01, 100), 2.0 ** -23, 0),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), (0.01, 100), 2.0 ** -22.4, 0),
    "sqrt.approx.f32": (np.sqrt, (0.01, 100), 2.0 ** -23, 0),
    "ex2.approx.f32": (np.exp2, (-20, 20), 2.0 ** -22, 0),
    "lg2.approx.f32": (np.log2, (0.01, 100), 2.0 ** -22, 2.0 ** -22),
    "sin.approx.f32": (np.sin, (-math.pi, math.pi), 0, 2.0 ** -20.5),
    "cos.approx.f32": (np.cos, (-math.pi, math.pi), 0, 2.0 ** -20.5),
    "tanh.approx.f32": (np.tanh, (-5, 5), 2.0 ** -11, 0),
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_an_approximation_is_as_near_as_the_isa_says(name):
    function, span, relative, absolute = APPROXIMATIONS[name]
    a = np.random.default_rng(1).uniform(*span, 256).astype(np.float32)
    np.testing.assert_allclose(run(f"{name} d, a;", "f32", a=a), function(a.astype(np.float64)),
                               rtol=relative, atol=absolute)


def test_fast_division_is_near():
    a, b = (np.random.default_rng(seed).uniform(0.01, 100, 256).astype(np.float32)
            for seed in (1, 2))
    for name in ("div.approx.f32", "div.full.f32"):
        np.testing.assert_allclose(run(f"{name} d, a, b;", "f32", a=a, b=b),
                                   a.astype(np.float64) / b, rtol=2.0 ** -21)


def test_saturation_clips_to_zero_and_one():
    a, b = floats("f32", seed=1), floats("f32", seed=2)
    exact = exactly(lambda x, y: x + y, "f32", a, b)
    np.testing.assert_array_equal(run("add.sat.f32 d, a, b;", "f32", a=a, b=b),
                                  np.where(np.isnan(exact), 0, np.clip(exact, 0, 1)))


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
def test_a_rounding_is_as_asked_for_or_refused(rounding, kind):
    a, b = floats(kind, seed=1), floats(kind, seed=2)
    for name, function in ARITHMETIC.items():
        try:
            found = run(f"{name}.{rounding}.{kind} d, a, b;", kind, a=a, b=b)
        except UnknownInstruction:
            continue
        np.testing.assert_array_equal(found, exactly(function, kind, a, b, rounding=rounding))


@pytest.mark.parametrize("name", ["min", "max"])
def test_a_minimum_that_keeps_nan_is_as_asked_for_or_refused(name):
    a, b = floats("f32", seed=1), floats("f32", seed=2)
    try:
        found = run(f"{name}.NaN.f32 d, a, b;", "f32", a=a, b=b)
    except UnknownInstruction:
        return
    np.testing.assert_array_equal(found, {"min": np.minimum, "max": np.maximum}[name](a, b))


ORDERED = {"eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
           "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y}


@pytest.mark.parametrize("kind", FORMATS)
def test_comparisons_with_nan_are_ordered_or_not(kind):
    """eq ... ge are false of NaN, equ ... geu are true of it."""
    a, b = floats(kind, seed=1), floats(kind, seed=2)
    b[::3] = a[::3]
    x, y = a.astype(np.float64), b.astype(np.float64)
    unordered = np.isnan(x) | np.isnan(y)
    expected = {"num": ~unordered, "nan": unordered}
    for name, function in ORDERED.items():
        expected[name] = function(x, y) & ~unordered
        expected[name + "u"] = function(x, y) | unordered
    raw = {"a": bits(a), "b": bits(b)} if a.itemsize == 2 else {"a": a, "b": b}
    for name, answer in expected.items():
        found = compute(f"setp.{name}.{kind} p, a, b;\nselp.u32 d, 1, 0, p;", np.uint32, **raw)
        np.testing.assert_array_equal(found, answer, name)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_numbers_are_classified(kind):
    a = floats(kind, seed=1)
    tiny = np.finfo(a.dtype).tiny
    for name, expected in {
            "finite": np.isfinite(a), "infinite": np.isinf(a), "number": ~np.isnan(a),
            "notanumber": np.isnan(a), "normal": np.isfinite(a) & (np.abs(a) >= tiny),
            "subnormal": (a != 0) & (np.abs(a) < tiny)}.items():
        found = compute(f"testp.{name}.{kind} p, a;\nselp.u32 d, 1, 0, p;", np.uint32, a=a)
        np.testing.assert_array_equal(found, expected, name)


def test_constants_are_written_in_hexadecimal():
    tid = np.zeros(4, np.float32)
    assert (run("add.rn.f32 d, a, 0f3FC00000;", "f32", a=tid) == 1.5).all()
    assert (run("add.rn.f64 d, a, 0dBFF8000000000000;", "f64", a=tid.astype(float)) == -1.5).all()
    assert (run("mov.b32 d, 0x40000000;", "f32", a=tid) == 2).all()
