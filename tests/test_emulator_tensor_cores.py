"""ldmatrix and mma.sync, whose fragments are laid out lane by lane after the figures of the ISA."""
import numpy as np
import pytest
from emulator_checks import launch, truncated
from ml_dtypes import bfloat16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_is_spread_over_the_lanes(count, transposed):
    """Lane l holds row l // 4, columns 2 * (l % 4) and the next, of each 8x8 matrix; the address
    of row r of matrix m is taken from lane 8 * m + r. Two warps, each with its own matrices."""
    matrices = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float16)
    rows = np.random.default_rng(2).permutation(64).astype(np.uint32)     # where each row is put
    y = np.zeros((2, count, 32, 2), np.float16)
    registers = [f"%r{10 + i}" for i in range(count)]
    launch(f"""
        mad.wide.u32 %d1, tid, 4, place;
        ld.global.u32 %r1, [%d1];
        mad.lo.u32 %r1, %r1, 16, shared;
        mad.wide.u32 %d2, tid, 16, x;
        ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d2];
        st.shared.v4.u32 [%r1], {{%r2, %r3, %r4, %r5}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16
            {{{", ".join(registers)}}}, [%r1];
        shr.u32 %r6, tid, 5;
        and.b32 %r7, tid, 31;
        mad.lo.u32 %r6, %r6, {32 * count}, %r7;
        mad.wide.u32 %d3, %r6, 4, y;
        """ + "\n".join(f"st.global.u32 [%d3+{128 * i}], {r};" for i, r in enumerate(registers)),
           threads=64, shared_bytes=1024, x=matrices, place=rows, y=y)
    for lane in range(32):
        for column in range(2):
            index = (lane // 4, 2 * (lane % 4) + column)
            expected = matrices[:, :count][:, :, *(index[::-1] if transposed else index)]
            np.testing.assert_array_equal(y[:, :, lane, column], expected)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_is_collected_from_the_lanes(count, transposed):
    """The way back: what ldmatrix has loaded, stmatrix puts where it was."""
    matrices = np.random.default_rng(1).standard_normal((count, 8, 8)).astype(np.float16)
    fragments = np.zeros((32, count, 2), np.float16)
    for lane in range(32):
        for column in range(2):
            index = (lane // 4, 2 * (lane % 4) + column)
            fragments[lane, :, column] = matrices[:, *(index[::-1] if transposed else index)]
    y = np.zeros_like(matrices)
    registers = [f"%r{10 + i}" for i in range(count)]
    launch(f"""
        mad.wide.u32 %d1, tid, {4 * count}, x;
        {"".join(f"ld.global.u32 {r}, [%d1+{4 * i}];" for i, r in enumerate(registers))}
        mad.lo.u32 %r1, tid, 16, shared;
        stmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 [%r1],
            {{{", ".join(registers)}}};
        bar.sync 0;
        setp.lt.u32 p, tid, {8 * count};
        mad.wide.u32 %d2, tid, 16, y;
        @p ld.shared.v4.u32 {{%r2, %r3, %r4, %r5}}, [%r1];
        @p st.global.v4.u32 [%d2], {{%r2, %r3, %r4, %r5}};""", shared_bytes=512, x=fragments, y=y)
    np.testing.assert_array_equal(y, matrices)


# ---------------------------------------------------------------------------------------- mma.sync

def encode(kind, values):
    """Whole numbers as the elements of an operand."""
    return {"f16": np.float16, "bf16": bfloat16, "tf32": np.float32, "s8": np.int8,
            "u8": np.uint8}[kind](values)


PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}
SHAPES = [("f16", 16), ("f16", 8), ("bf16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4), ("s8", 32),
          ("s8", 16), ("u8", 32)]


def fragments(kind, a, b):
    """The registers of each lane for A (16, k) and B (k, 8): arrays (lane, register)."""
    per, k = PER_REGISTER[kind], len(b)
    a, b = encode(kind, a), encode(kind, b)
    registers_a, registers_b = 16 * k // 32 // per, 8 * k // 32 // per
    found_a = np.zeros((32, registers_a, per), a.dtype)
    found_b = np.zeros((32, registers_b, per), b.dtype)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(per):
            for r in range(registers_a):
                found_a[lane, r, i] = a[group + 8 * (r % 2), member * per + i + 4 * per * (r // 2)]
            for r in range(registers_b):
                found_b[lane, r, i] = b[member * per + i + 4 * per * r, group]
    return found_a.view(np.uint32)[..., 0], found_b.view(np.uint32)[..., 0]


def gathered(registers):
    """The (16, 8) matrix whose accumulator fragments are in (lane, register)."""
    found = np.zeros((16, 8), registers.dtype)
    for lane in range(32):
        for r in range(4):
            found[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2] = registers[lane, r]
    return found


def group(name, count, first):
    return "{" + ", ".join(f"%{name}{first + i}" for i in range(count)) + "}"


def multiply(kind, a, b, accumulators):
    """D = A B + C by one instruction; `accumulators` are the fragments of C."""
    left, right = fragments(kind, a, b)
    result = np.zeros((32, 4), accumulators.dtype)
    name = "r" if kind in ("s8", "u8") else "f"
    types = f"s32.{kind}.{kind}.s32" if name == "r" else f"f32.{kind}.{kind}.f32"
    sources = [("a", left, "r", 10), ("b", right, "r", 20), ("c", accumulators, name, 30)]
    body = []
    for pointer, registers, prefix, first in sources:
        body.append(f"mad.wide.u32 %d1, tid, {4 * registers.shape[1]}, {pointer};")
        body += [f"ld.global.b32 %{prefix}{first + i}, [%d1+{4 * i}];"
                 for i in range(registers.shape[1])]
    launch("\n".join(body) + f"""
        mma.sync.aligned.m16n8k{len(b)}.row.col.{types}
            {group(name, 4, 40)}, {group("r", left.shape[1], 10)},
            {group("r", right.shape[1], 20)}, {group(name, 4, 30)};
        mad.wide.u32 %d1, tid, 16, d;
        st.global.v4.b32 [%d1], {group(name, 4, 40)};""",
           a=left, b=right, c=accumulators, d=result)
    return gathered(result)


@pytest.mark.parametrize(("kind", "k"), SHAPES)
def test_a_product_of_whole_numbers_is_exact(kind, k):
    rng = np.random.default_rng(1)
    low = 0 if kind == "u8" else -9
    a, b = rng.integers(low, 10, (16, k)), rng.integers(low, 10, (k, 8))
    if kind in ("s8", "u8"):
        a[0], b[:, 0] = (255, 255) if kind == "u8" else (-128, -128)
    c = rng.integers(-50, 50, (32, 4)).astype(np.int32 if kind in ("s8", "u8") else np.float32)
    np.testing.assert_array_equal(multiply(kind, a, b, c), a @ b + gathered(c))


@pytest.mark.parametrize(("kind", "k"), [s for s in SHAPES if s[0] in ("f16", "bf16", "tf32")])
def test_a_product_of_floats_is_near_the_exact_one(kind, k):
    """Products are exact, their sum is rounded to float32 in an order that nobody promises."""
    rng = np.random.default_rng(2)
    a, b = (encode(kind, rng.standard_normal(shape)) for shape in ((16, k), (k, 8)))
    c = rng.standard_normal((32, 4)).astype(np.float32)
    if kind == "tf32":
        a, b = truncated(a), truncated(b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    bound = 2.0 ** -23 * (k + 1) * (np.abs(a) @ np.abs(b) + np.abs(gathered(c)))
    assert (np.abs(multiply(kind, a, b, c) - (a @ b + gathered(c))) <= bound).all()


def test_tf32_operands_lose_their_lowest_bits():
    a, b = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    a[0, 0], b[0, 0] = 1 + 2.0 ** -12, 1
    assert multiply("tf32", a, b, np.zeros((32, 4), np.float32))[0, 0] == 1


def test_infinity_and_nan_travel():
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[0, 0], a[1, 0], a[2, 0], b[0, :] = np.inf, np.nan, 1, 1
    found = multiply("f16", a, b, np.zeros((32, 4), np.float32))
    assert (found[0] == np.inf).all()
    assert np.isnan(found[1]).all()
    assert (found[2] == 1).all()


def test_the_accumulator_may_be_the_result():
    """D and C in the same registers, two products in a row."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(-9, 10, (16, 16)), rng.integers(-9, 10, (16, 8))
    left, right = fragments("f16", a, b)
    result = np.zeros((32, 4), np.float32)
    step = f"""mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {group("f", 4, 1)},
        {group("r", 4, 1)}, {group("r", 2, 5)}, {group("f", 4, 1)};"""
    launch(f"""
        mad.wide.u32 %d1, tid, 16, a;
        ld.global.v4.b32 {group("r", 4, 1)}, [%d1];
        mad.wide.u32 %d1, tid, 8, b;
        ld.global.v2.b32 {group("r", 2, 5)}, [%d1];
        mov.b32 %f1, 0f00000000; mov.b32 %f2, %f1; mov.b32 %f3, %f1; mov.b32 %f4, %f1;
        {step}
        {step}
        mad.wide.u32 %d1, tid, 16, d;
        st.global.v4.b32 [%d1], {group("f", 4, 1)};""", a=left, b=right, d=result)
    np.testing.assert_array_equal(gathered(result), 2 * (a @ b))
