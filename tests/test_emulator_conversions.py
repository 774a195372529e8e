"""cvt between all formats, with every rounding, saturation and the rules for NaN."""
import math

import numpy as np
import pytest
from emulator_checks import (
    FORMATS,
    ROUNDINGS,
    STORAGE,
    bits,
    compute,
    elementwise,
    exactly,
    floats,
    integers,
    packed,
    signed,
)

from kernels.emulator import UnknownInstruction


def raw(x):
    return bits(x) if x.itemsize == 2 else x


def convert(instruction, target, *columns):
    """The converted values as float64; the formats that are no register type travel as bits."""
    dtype = {"f16": np.uint16, "bf16": np.uint16, "tf32": np.uint32}.get(target, STORAGE[target])
    names = dict(zip("ab", map(raw, columns), strict=False))
    found = compute(f"{instruction} d, {', '.join(names)};", dtype, **names)
    return found.view(STORAGE[target]).astype(np.float64)


def halfway(source, target, seed):
    """Numbers of `source`, many of them exactly between two numbers of `target`."""
    x = floats(source, seed=seed, count=512)
    digits = FORMATS[target][0]
    rng = np.random.default_rng(seed)
    whole = rng.integers(2 ** (digits - 1), 2 ** digits, 256)
    middle = (whole + 0.5) * 2.0 ** rng.integers(-8, 3, 256) * rng.choice([-1, 1], 256)
    x[256:] = middle.astype(x.dtype)
    return x


@pytest.mark.parametrize(("source", "target"), [("f16", "f32"), ("f16", "f64"), ("bf16", "f32"),
                                                ("f32", "f64")])
def test_a_wider_format_holds_every_number(source, target):
    x = floats(source, seed=1)
    np.testing.assert_array_equal(convert(f"cvt.{target}.{source}", target, x),
                                  x.astype(np.float64))


@pytest.mark.parametrize(("source", "target", "rounding"), [
    *(("f32", "f16", rounding) for rounding in ("rn", "rz", "rm", "rp")),
    *(("f64", "f32", rounding) for rounding in ("rn", "rz", "rm", "rp")),
    *(("f64", "f16", rounding) for rounding in ("rn", "rz")),
    ("f32", "bf16", "rn"), ("f32", "bf16", "rz"),
    ("f32", "tf32", "rna"), ("f32", "tf32", "rn"), ("f32", "tf32", "rz"),
])
def test_a_narrower_format_is_rounded_as_asked_for(source, target, rounding):
    x = halfway(source, target, seed=1)
    try:
        found = convert(f"cvt.{rounding}.{target}.{source}", target, x)
    except UnknownInstruction:
        if rounding in ("rn", "rna"):
            raise
        pytest.skip("this rounding is refused, which is right also")
    np.testing.assert_array_equal(found, exactly(lambda v: v, target, x, rounding=rounding))


@pytest.mark.parametrize("target", ["f16", "bf16"])
@pytest.mark.parametrize("rounding", ["rn", "rz"])
def test_two_numbers_are_packed_the_first_one_high(target, rounding):
    a, b = halfway("f32", target, seed=1), halfway("f32", target, seed=2)
    found = compute(f"cvt.{rounding}.{target}x2.f32 d, a, b;", np.uint32, a=a, b=b)
    for half, x in ((found >> 16, a), (found & 0xFFFF, b)):
        np.testing.assert_array_equal(
            half.astype(np.uint16).view(STORAGE[target]).astype(np.float64),
            exactly(lambda v: v, target, x, rounding=rounding))


@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_a_relu_in_the_conversion_makes_negative_numbers_zero(target):
    x = floats("f32", seed=1)
    x = x[~np.isnan(x)]
    exact = exactly(lambda v: v, target, x)
    np.testing.assert_array_equal(convert(f"cvt.rn.relu.{target}.f32", target, x),
                                  np.maximum(exact, 0))


@pytest.mark.parametrize("kind", ["f32", "f64", "f16"])
@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
def test_rounding_to_whole_numbers(kind, rounding):
    x = floats(kind, seed=1)
    x[:64] = np.arange(-32, 32) / 2
    exact = [float(ROUNDINGS[rounding](v)) if math.isfinite(v) else v for v in x.tolist()]
    np.testing.assert_array_equal(convert(f"cvt.{rounding}i.{kind}.{kind}", kind, x), exact)


@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_whole_numbers_are_clamped_to_the_integer_type(source, target, rounding):
    x = floats(source, seed=1)
    x[:64] = np.arange(-32, 32) / 2
    x = x[~np.isnan(x)]
    size = int(target[1:])
    low, high = (-2 ** (size - 1), 2 ** (size - 1) - 1) if target[0] == "s" else (0, 2 ** size - 1)

    def reference(v):
        if math.isinf(v):
            return high if v > 0 else low
        return min(max(ROUNDINGS[rounding[:2]](v), low), high)

    np.testing.assert_array_equal(
        compute(f"cvt.{rounding}.{target}.{source} d, a;", f"u{size // 8}", a=raw(x)),
        elementwise(reference, f"u{size // 8}", x))


@pytest.mark.parametrize(("target", "source", "expected"), [
    ("s32", "f32", 0), ("u32", "f32", 0), ("s16", "f32", 0), ("s32", "f16", 0),
    ("s64", "f32", 2 ** 63), ("u64", "f32", 2 ** 63), ("s32", "f64", 2 ** 31),
    ("u32", "f64", 2 ** 31), ("s64", "f64", 2 ** 63)])
def test_nan_becomes_zero_or_the_top_bit(target, source, expected):
    """PTX ISA 9.0, cvt: zero if neither f64 nor a 64-bit integer takes part, else the top bit."""
    x = np.full(4, np.nan, STORAGE[source])
    found = compute(f"cvt.rzi.{target}.{source} d, a;", f"u{int(target[1:]) // 8}", a=raw(x))
    assert found.tolist() == [expected] * 4


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("target", ["f16", "f32", "f64"])
def test_integers_become_the_nearest_float(source, target):
    size = int(source[1:])
    x = integers(size, seed=1)
    whole = np.array([signed(v, size) if source[0] == "s" else v for v in x.tolist()], object)
    with np.errstate(over="ignore"):
        expected = [STORAGE[target](v) if target != "f32" else nearest_f32(v) for v in whole]
    np.testing.assert_array_equal(convert(f"cvt.rn.{target}.{source}", target, x),
                                  np.array(expected, np.float64))


def nearest_f32(whole):
    """Rounded once, to 24 digits; a detour over float64 would round twice."""
    shift = max(0, abs(whole).bit_length() - 24)
    quotient, rest = divmod(abs(whole), 1 << shift)
    half = 1 << shift >> 1
    quotient += rest > half or (shift > 0 and rest == half and quotient % 2 == 1)
    return math.copysign(float(quotient << shift), whole)


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32"])
@pytest.mark.parametrize("target", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_are_cut_or_extended_by_the_sign_of_the_source(source, target):
    from_bits, to_bits = int(source[1:]), int(target[1:])
    x = integers(max(16, from_bits), seed=1)

    def reference(v):
        v %= 2 ** from_bits
        return signed(v, from_bits) if source[0] == "s" else v

    np.testing.assert_array_equal(
        compute(f"cvt.{target}.{source} d, a;", f"u{to_bits // 8}", a=x),
        elementwise(reference, f"u{to_bits // 8}", x))


@pytest.mark.parametrize(("target", "source"), [("u8", "s32"), ("s8", "s32"), ("u16", "s32"),
                                                ("s16", "u32"), ("s32", "u32"), ("u32", "s64")])
def test_saturation_of_integers(target, source):
    from_bits, to_bits = int(source[1:]), int(target[1:])
    x = integers(from_bits, seed=1)
    low, high = ((-2 ** (to_bits - 1), 2 ** (to_bits - 1) - 1) if target[0] == "s"
                 else (0, 2 ** to_bits - 1))
    register = max(32, to_bits)

    def reference(v):
        return min(max(signed(v, from_bits) if source[0] == "s" else v, low), high)

    np.testing.assert_array_equal(
        compute(f"cvt.sat.{target}.{source} d, a;", f"u{register // 8}", a=x),
        elementwise(reference, f"u{register // 8}", x))


def test_saturation_of_floats_clips_to_zero_and_one():
    x = floats("f32", seed=1)
    np.testing.assert_array_equal(
        convert("cvt.sat.f32.f32", "f32", x),
        np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(np.float64))


def test_a_packed_pair_is_what_two_registers_would_be():
    a, b = floats("f16", seed=1), floats("f16", seed=2)
    found = compute("mov.b32 d, {a, b};", np.uint32, a=bits(a), b=bits(b))
    np.testing.assert_array_equal(found, packed(a, b))
