"""Integer instructions against Python's own integers: arithmetic, bits, comparisons, carries."""
import numpy as np
import pytest
from emulator_checks import compute, elementwise, integers, signed
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.emulator import UnknownInstruction

BITS = (16, 32, 64)


def unsigned(bits):
    return np.dtype(f"u{bits // 8}")


def quotient(x, y):
    """Truncated towards zero, as in C."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


ARITHMETIC = {
    "add.{}": lambda x, y, bits: x + y,
    "sub.{}": lambda x, y, bits: x - y,
    "mul.lo.{}": lambda x, y, bits: x * y,
    "mul.hi.{}": lambda x, y, bits: x * y >> bits,
    "min.{}": lambda x, y, bits: min(x, y),
    "max.{}": lambda x, y, bits: max(x, y),
    "div.{}": lambda x, y, bits: quotient(x, y),
    "rem.{}": lambda x, y, bits: x - quotient(x, y) * y,
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", ["u", "s"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, sign, bits):
    a, b = integers(bits, seed=1), integers(bits, seed=2)
    if name.startswith(("div", "rem")):
        b[b == 0] = 3
    read = (lambda x: signed(x, bits)) if sign == "s" else int
    instruction = name.format(f"{sign}{bits}")
    np.testing.assert_array_equal(
        compute(f"{instruction} d, a, b;", unsigned(bits), a=a, b=b),
        elementwise(lambda x, y: ARITHMETIC[name](read(x), read(y), bits), unsigned(bits), a, b))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", ["u", "s"])
def test_multiply_add_keeps_the_low_or_the_high_half(sign, bits):
    a, b, c = (integers(bits, seed=seed) for seed in (1, 2, 3))
    read = (lambda x: signed(x, bits)) if sign == "s" else int
    for half, shift in (("lo", 0), ("hi", bits)):
        np.testing.assert_array_equal(
            compute(f"mad.{half}.{sign}{bits} d, a, b, c;", unsigned(bits), a=a, b=b, c=c),
            elementwise(lambda x, y, z, shift=shift: (read(x) * read(y) >> shift) + z,
                        unsigned(bits), a, b, c))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("sign", ["u", "s"])
def test_wide_products_have_twice_the_bits(sign, bits):
    a, b, c = integers(bits, seed=1), integers(bits, seed=2), integers(2 * bits, seed=3)
    read = (lambda x: signed(x, bits)) if sign == "s" else int
    np.testing.assert_array_equal(
        compute(f"mul.wide.{sign}{bits} d, a, b;", unsigned(2 * bits), a=a, b=b),
        elementwise(lambda x, y: read(x) * read(y), unsigned(2 * bits), a, b))
    np.testing.assert_array_equal(
        compute(f"mad.wide.{sign}{bits} d, a, b, c;", unsigned(2 * bits), a=a, b=b, c=c),
        elementwise(lambda x, y, z: read(x) * read(y) + z, unsigned(2 * bits), a, b, c))


@pytest.mark.parametrize("bits", BITS)
def test_one_operand(bits):
    a = integers(bits, seed=1)
    for instruction, function in {
        f"not.b{bits}": lambda x: ~x,
        f"cnot.b{bits}": lambda x: int(x == 0),
        f"neg.s{bits}": lambda x: -x,
        f"abs.s{bits}": lambda x: abs(signed(x, bits)),
    }.items():
        np.testing.assert_array_equal(compute(f"{instruction} d, a;", unsigned(bits), a=a),
                                      elementwise(function, unsigned(bits), a), instruction)


@pytest.mark.parametrize("sign", ["u", "s"])
def test_sum_of_absolute_differences(sign):
    a, b, c = (integers(32, seed=seed) for seed in (1, 2, 3))
    read = (lambda x: signed(x, 32)) if sign == "s" else int
    np.testing.assert_array_equal(
        compute(f"sad.{sign}32 d, a, b, c;", np.uint32, a=a, b=b, c=c),
        elementwise(lambda x, y, z: z + abs(read(x) - read(y)), np.uint32, a, b, c))


# -------------------------------------------------------------------------------------------- bits

@pytest.mark.parametrize("bits", BITS)
def test_logic(bits):
    a, b = integers(bits, seed=1), integers(bits, seed=2)
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or,
                           "xor": np.bitwise_xor}.items():
        np.testing.assert_array_equal(
            compute(f"{name}.b{bits} d, a, b;", unsigned(bits), a=a, b=b), function(a, b), name)


@pytest.mark.parametrize("bits", BITS)
def test_shifts_by_more_than_the_width_are_clamped(bits):
    a = integers(bits, seed=1)
    b = np.concatenate([np.arange(80), integers(32, seed=2, count=176)]).astype(np.uint32)
    for instruction, function in {
        f"shl.b{bits}": lambda x, n: x << min(n, bits),
        f"shr.u{bits}": lambda x, n: x >> min(n, bits),
        f"shr.s{bits}": lambda x, n: signed(x, bits) >> min(n, bits),
    }.items():
        np.testing.assert_array_equal(
            compute(f"{instruction} d, a, b;", unsigned(bits), a=a, b=b),
            elementwise(function, unsigned(bits), a, b), instruction)


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(side, mode):
    a, b = integers(32, seed=1), integers(32, seed=2)
    c = np.concatenate([np.arange(80), integers(32, seed=3, count=176)]).astype(np.uint32)

    def reference(low, high, n):
        n = n % 32 if mode == "wrap" else min(n, 32)
        both = high << 32 | low
        return both << n >> 32 if side == "l" else both >> n

    np.testing.assert_array_equal(
        compute(f"shf.{side}.{mode}.b32 d, a, b, c;", np.uint32, a=a, b=b, c=c),
        elementwise(reference, np.uint32, a, b, c))


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_and_reversing_bits(bits):
    a = integers(bits, seed=1)
    np.testing.assert_array_equal(compute(f"popc.b{bits} d, a;", np.uint32, a=a),
                                  elementwise(int.bit_count, np.uint32, a))
    np.testing.assert_array_equal(compute(f"clz.b{bits} d, a;", np.uint32, a=a),
                                  elementwise(lambda x: bits - x.bit_length(), np.uint32, a))
    np.testing.assert_array_equal(
        compute(f"brev.b{bits} d, a;", unsigned(bits), a=a),
        elementwise(lambda x: int(f"{x:0{bits}b}"[::-1], 2), unsigned(bits), a))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", ["u", "s"])
def test_the_most_significant_bit_that_is_no_sign(sign, bits):
    """All ones if there is none."""
    def reference(x):
        if sign == "s" and x >> (bits - 1):
            x ^= 2 ** bits - 1
        return x.bit_length() - 1

    a = integers(bits, seed=1)
    np.testing.assert_array_equal(compute(f"bfind.{sign}{bits} d, a;", np.uint32, a=a),
                                  elementwise(reference, np.uint32, a))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", ["u", "s"])
def test_bit_field_extract(sign, bits):
    a = integers(bits, seed=1)
    rng = np.random.default_rng(2)
    start, length = rng.integers(0, bits + 3, (2, 256)).astype(np.uint32)

    def reference(x, start, length):
        top = (x >> min(start + length - 1, bits - 1) & 1) if sign == "s" and length else 0
        return sum((x >> (start + i) & 1 if i < length and start + i < bits else top) << i
                   for i in range(bits))

    np.testing.assert_array_equal(
        compute(f"bfe.{sign}{bits} d, a, start, length;", unsigned(bits), a=a, start=start,
                length=length),
        elementwise(reference, unsigned(bits), a, start, length))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits):
    a, b = integers(bits, seed=1), integers(bits, seed=2)
    rng = np.random.default_rng(3)
    start, length = rng.integers(0, bits + 3, (2, 256)).astype(np.uint32)

    def reference(x, into, start, length):
        for i in range(min(length, bits - start)):
            into = into & ~(1 << (start + i)) | (x >> i & 1) << (start + i)
        return into

    np.testing.assert_array_equal(
        compute(f"bfi.b{bits} d, a, b, start, length;", unsigned(bits), a=a, b=b, start=start,
                length=length),
        elementwise(reference, unsigned(bits), a, b, start, length))


@pytest.mark.parametrize("table", [0x00, 0x1B, 0x80, 0x96, 0xE8, 0xFE, 0xFF])
def test_any_logic_of_three_operands(table):
    a, b, c = (integers(32, seed=seed) for seed in (1, 2, 3))

    def reference(x, y, z):
        return sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i
                   for i in range(32))

    np.testing.assert_array_equal(
        compute(f"lop3.b32 d, a, b, c, {table:#x};", np.uint32, a=a, b=b, c=c),
        elementwise(reference, np.uint32, a, b, c))


def test_byte_permutation():
    a, b, c = (integers(32, seed=seed) for seed in (1, 2, 3))

    def reference(x, y, selector):
        source, result = (x | y << 32).to_bytes(8, "little"), []
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = source[pick & 7]
            result.append((255 if byte >> 7 else 0) if pick & 8 else byte)
        return int.from_bytes(bytes(result), "little")

    np.testing.assert_array_equal(compute("prmt.b32 d, a, b, c;", np.uint32, a=a, b=b, c=c),
                                  elementwise(reference, np.uint32, a, b, c))


@pytest.mark.parametrize("mode", ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_a_mode_of_the_byte_permutation_is_right_or_refused(mode):
    """The six special modes of prmt, as the table of the ISA lists their bytes, first one high."""
    table = {"f4e": ["3210", "4321", "5432", "6543"], "b4e": ["5670", "6701", "7012", "0123"],
             "rc8": ["0000", "1111", "2222", "3333"], "ecl": ["3210", "3211", "3222", "3333"],
             "ecr": ["0000", "1110", "2210", "3210"], "rc16": ["1010", "3232", "1010", "3232"]}
    a, b, c = (integers(32, seed=seed) for seed in (1, 2, 3))

    def reference(x, y, selector):
        source = (x | y << 32).to_bytes(8, "little")
        return int.from_bytes(bytes(source[int(i)] for i in table[mode][selector % 4]), "big")

    try:
        found = compute(f"prmt.b32.{mode} d, a, b, c;", np.uint32, a=a, b=b, c=c)
    except UnknownInstruction:
        return
    np.testing.assert_array_equal(found, elementwise(reference, np.uint32, a, b, c))


@pytest.mark.parametrize("left", ["u", "s"])
@pytest.mark.parametrize("right", ["u", "s"])
def test_the_scalar_product_of_four_bytes(left, right):
    a, b, c = (integers(32, seed=seed) for seed in (1, 2, 3))

    def values(x, sign):
        return [signed(v, 8) if sign == "s" else v for v in x.to_bytes(4, "little")]

    np.testing.assert_array_equal(
        compute(f"dp4a.{left}32.{right}32 d, a, b, c;", np.uint32, a=a, b=b, c=c),
        elementwise(lambda x, y, z: z + sum(v * w for v, w in zip(
            values(x, left), values(y, right), strict=True)), np.uint32, a, b, c))


def test_registers_are_packed_least_significant_first():
    a, b = integers(32, seed=1), integers(32, seed=2)
    np.testing.assert_array_equal(
        compute("mov.b64 d, {a, b};", np.uint64, a=a, b=b),
        elementwise(lambda x, y: x | y << 32, np.uint64, a, b))
    np.testing.assert_array_equal(
        compute("mov.b32 {%h0, %h1}, a;\nmov.b32 d, {%h1, %h0};", np.uint32, a=a),
        elementwise(lambda x: x >> 16 | x << 16, np.uint32, a))
    np.testing.assert_array_equal(
        compute("mov.b64 {%r0, _}, a;\nmov.b32 d, %r0;", np.uint32, a=integers(64, seed=3)),
        integers(64, seed=3).astype(np.uint32))


# ------------------------------------------------------------------------------------- comparisons

COMPARE = {"eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
           "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y}
COMPARE_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [*(f"{name}.{sign}" for name in COMPARE for sign in "us"),
                                  *(f"{name}.u" for name in COMPARE_UNSIGNED)])
def test_comparison_and_selection(name, bits):
    a, b = integers(bits, seed=1), integers(bits, seed=2)
    b[::3] = a[::3]
    compare, sign = name.split(".")
    read = (lambda x: signed(x, bits)) if sign == "s" else int
    function = COMPARE[COMPARE_UNSIGNED.get(compare, compare)]
    np.testing.assert_array_equal(
        compute(f"setp.{name}{bits} p, a, b;\nselp.b{bits} d, a, b, p;", unsigned(bits), a=a, b=b),
        elementwise(lambda x, y: x if function(read(x), read(y)) else y, unsigned(bits), a, b))


@pytest.mark.parametrize("name", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", ["", "!"])
def test_a_comparison_joined_with_a_predicate_and_its_opposite(name, negated):
    """setp.cmp.bool p|q, a, b, c is p = (a cmp b) bool c and q = !(a cmp b) bool c."""
    a, b, c = (integers(32, seed=seed) for seed in (1, 2, 3))
    joined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name]
    third = (c % 2 == 1) ^ bool(negated)
    found = compute(f"""
        and.b32 %r1, c, 1;
        setp.ne.s32 %p1, %r1, 0;
        setp.lt.{name}.u32 p|q, a, b, {negated}%p1;
        selp.u32 %r2, 1, 0, p;
        selp.u32 %r3, 2, 0, q;
        or.b32 d, %r2, %r3;""", np.uint32, a=a, b=b, c=c)
    np.testing.assert_array_equal(found, joined(a < b, third) + 2 * joined(~(a < b), third))


def test_predicates_have_logic_of_their_own():
    a, b = integers(32, seed=1), integers(32, seed=2)
    x, y = a > 2 ** 31, b > 2 ** 31
    for name, expected in {"and.pred p, p, q;": x & y, "or.pred p, p, q;": x | y,
                           "xor.pred p, p, q;": x ^ y, "not.pred p, q;": ~y,
                           "mov.pred p, q;": y}.items():
        found = compute(f"setp.gt.u32 p, a, 0x80000000;\nsetp.gt.u32 q, b, 0x80000000;\n{name}\n"
                        "selp.u32 d, 1, 0, p;", np.uint32, a=a, b=b)
        np.testing.assert_array_equal(found, expected, name)


def test_selection_by_sign():
    a, b, c = (integers(32, seed=seed) for seed in (1, 2, 3))
    np.testing.assert_array_equal(compute("slct.u32.s32 d, a, b, c;", np.uint32, a=a, b=b, c=c),
                                  np.where(c.view(np.int32) >= 0, a, b))


def test_an_instruction_under_a_predicate_leaves_other_threads_alone():
    a, b = integers(32, seed=1), integers(32, seed=2)
    found = compute("setp.lt.u32 p, a, b;\nmov.b32 d, 7;\n@p mov.b32 d, a;\n@!p mov.b32 d, b;",
                    np.uint32, a=a, b=b)
    np.testing.assert_array_equal(found, np.minimum(a, b))


# ----------------------------------------------------------------------------------------- carries

WORDS = st.integers(0, 2 ** 96 - 1) | st.sampled_from(
    [0, 1, 2 ** 32 - 1, 2 ** 32, 2 ** 64 - 1, 2 ** 64, 2 ** 96 - 1])


def split(values):
    """Three 32-bit columns of each 96-bit number, least significant first."""
    return [np.array([x >> shift & 0xFFFFFFFF for x in values], np.uint32)
            for shift in (0, 32, 64)]


def joined_words(instructions, columns):
    """The 96-bit numbers that `instructions` leave in %r0, %r1 and %r2."""
    words = [compute(f"{instructions}\nmov.b32 d, %r{i};", np.uint32, **columns) for i in range(3)]
    return [int(x) | int(y) << 32 | int(z) << 64 for x, y, z in zip(*words, strict=True)]


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=32))
@settings(max_examples=20, deadline=None)
def test_carry_and_borrow_travel_over_three_words(pairs):
    a, b = (split(column) for column in zip(*pairs, strict=True))
    columns = {f"{name}{i}": word for name, words in (("a", a), ("b", b))
               for i, word in enumerate(words)}
    assert joined_words("add.cc.u32 %r0, a0, b0;\naddc.cc.u32 %r1, a1, b1;\n"
                        "addc.u32 %r2, a2, b2;", columns) == [
        (x + y) % 2 ** 96 for x, y in pairs]
    assert joined_words("sub.cc.u32 %r0, a0, b0;\nsubc.cc.u32 %r1, a1, b1;\n"
                        "subc.u32 %r2, a2, b2;", columns) == [
        (x - y) % 2 ** 96 for x, y in pairs]


@given(st.lists(st.tuples(st.integers(0, 2 ** 32 - 1) | st.just(2 ** 32 - 1), WORDS),
                min_size=1, max_size=32))
@settings(max_examples=20, deadline=None)
def test_a_long_number_times_a_word_plus_a_long_number(pairs):
    """mad.lo.cc starts the carry, madc.hi.cc takes it and gives it on."""
    factor = np.array([x for x, _ in pairs], np.uint32)
    low, middle, high = split([y for _, y in pairs])
    found = joined_words("""
        mad.lo.cc.u32 %r0, f, f, low;
        madc.hi.cc.u32 %r1, f, f, middle;
        addc.u32 %r2, high, 0;""", {"f": factor, "low": low, "middle": middle, "high": high})
    assert found == [(x * x + y) % 2 ** 96 for x, y in pairs]
