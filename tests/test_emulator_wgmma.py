"""wgmma: operands laid out byte by byte after the canonical layouts of the ISA, then multiplied."""
import numpy as np
import pytest
from emulator_checks import every_schedule, launch, mutated, truncated
from ml_dtypes import bfloat16

from kernels.emulator import (
    AsyncNotWaited,
    EmulatorError,
    OutOfBounds,
    Race,
    UninitialisedRead,
    UnknownInstruction,
)

DTYPE = {"f16": np.float16, "bf16": bfloat16, "tf32": np.float32, "s8": np.int8, "u8": np.uint8}
DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "s8": 32, "u8": 32}          # K of one instruction
MODE = {0: 0, 128: 1, 64: 2, 32: 3}                                     # bits 62-63 of a descriptor
SWIZZLES = [0, 32, 64, 128]

# Copies `image` to shared memory, {copies} times 16 bytes a thread; %d4 and %d5 are descriptors of
# its start and of the place of B.
START = """
    mad.wide.u32 %d1, tid, 16, image;
    mad.lo.u32 %r1, tid, 16, shared;
    mov.u32 %r2, 0;
    COPY:
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d1];
    st.shared.v4.u32 [%r1], {{%r4, %r5, %r6, %r7}};
    add.s64 %d1, %d1, {step};
    add.u32 %r1, %r1, {step};
    add.u32 %r2, %r2, 1;
    setp.lt.u32 p, %r2, {copies};
    @p bra COPY;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    and.b32 %r3, shared, 0x3ffff;
    shr.u32 %r3, %r3, 4;
    cvt.u64.u32 %d3, %r3;
    or.b64 %d4, %d3, {a};
    or.b64 %d5, %d3, {b};
    add.s64 %d5, %d5, {start_b};
    setp.eq.u32 p, 0, 1;                       // p: start from zero, q: add to the accumulators
    setp.eq.u32 q, 0, 0;
    wgmma.fence.sync.aligned;
"""


def descriptor(span, leading, stride):
    """All but the start address: leading and stride byte offsets in units of 16 bytes, swizzle."""
    return MODE[span] << 62 | stride >> 4 << 32 | leading >> 4 << 16


def place(image, matrix, start, span, transposed, leading, stride):
    """Writes a (rows, k) operand into the bytes of shared memory, from `start` on.

    K-major:    rows of `span` bytes (16 without swizzle) along k; 8 rows are an atom, the next 8
                are `stride` away; without swizzle the next 16 bytes of k are `leading` away.
    MN-major:   rows of `span` bytes along m or n; 8 of them (8 values of k) are an atom, the next
                8 are `stride` away and the next `span` bytes `leading` away; without swizzle the
                two offsets change places.
    A swizzle exchanges the 16-byte chunks of a 128-byte line l: chunk c is at c ^ (l modulo ...).
    """
    size = matrix.itemsize
    width = (span or 16) // size
    raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(*matrix.shape, size)
    for row, column in np.ndindex(matrix.shape):
        if transposed:
            along_k, along_row = (stride, leading) if span else (leading, stride)
            at = (row // width * along_row + column // 8 * along_k + column % 8 * width * size
                  + row % width * size)
        else:
            at = row // 8 * stride + row % 8 * width * size + column % width * size
            at += column // width * leading
        at += start
        if span:
            at ^= (at // 128 % (span // 16)) * 16
        image[at:at + size] = raw[row, column]


def offsets(span, transposed):
    """Leading and stride offsets that fit 64 rows by one instruction's depth of 16-bit operands."""
    if transposed:
        return (2048, 1024) if span else (1024, 128)
    return (16, 1024) if span else (128, 256)


def accumulators(kind, count, first=20):
    """Register list of a 64 x (2 * count) result: 32-bit floats, or integers for int8."""
    return [f"%{'r' if kind in ('s8', 'u8') else 'f'}{first + i}" for i in range(count)]


def braces(registers):
    return "{" + ", ".join(registers) + "}"


def dump(registers, pointer="y"):
    return f"mad.wide.u32 %d6, tid, {4 * len(registers)}, {pointer};\n" + "\n".join(
        f"st.global.b32 [%d6+{4 * i}], {register};" for i, register in enumerate(registers))


def gathered(registers):
    """The (64 * warpgroups, n) matrix whose fragments are in (thread, register)."""
    threads, count = registers.shape
    found = np.zeros((threads // 2, 2 * count), registers.dtype)
    for thread, j in np.ndindex(registers.shape):
        row = thread // 32 * 16 + j % 4 // 2 * 8 + thread % 32 // 4
        found[row, j // 4 * 8 + thread % 4 * 2 + j % 2] = registers[thread, j]
    return found


def instruction(kind, n, a="%d4", b="%d5", add="q", transposed=(0, 0), scale=(1, 1)):
    accumulated = "s32" if kind in ("s8", "u8") else "f32"
    extra = "" if accumulated == "s32" else f", {scale[0]}, {scale[1]}"
    if kind in ("f16", "bf16"):
        extra += "".join(f", {t}" for t in (transposed if a.startswith("%") else transposed[1:]))
    return (f"wgmma.mma_async.sync.aligned.m64n{n}k{DEPTH[kind]}.{accumulated}.{kind}.{kind} "
            f"{braces(accumulators(kind, n // 2))}, {a}, {b}, {add}{extra};")


COMMIT_AND_WAIT = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"


def multiply(kind, image, body, n, *, layout, start_b, threads=128, schedule=None,
             start=START, **arrays):
    """Runs `body` after START on this image of shared memory; the accumulators as a matrix."""
    y = np.zeros((threads, n // 2), np.int32 if kind in ("s8", "u8") else np.float32)
    copies = -(-len(image) // (16 * threads))
    image = np.resize(image, copies * 16 * threads)
    start = start.format(copies=copies, step=16 * threads, a=layout, b=layout,
                         start_b=start_b >> 4)
    launch(start + body + dump(accumulators(kind, n // 2)), threads=threads,
           shared_bytes=len(image), schedule=schedule, image=image, y=y, **arrays)
    return gathered(y)


def whole(kind, seed, *shape):
    low = 0 if kind == "u8" else -5
    return np.random.default_rng(seed).integers(low, 6, shape)


@every_schedule
@pytest.mark.parametrize("span", SWIZZLES)
@pytest.mark.parametrize(("kind", "transposed"), [
    *((kind, (0, 0)) for kind in DTYPE),                # only 16-bit operands can be MN-major
    *((kind, t) for kind in ("f16", "bf16") for t in ((0, 1), (1, 0), (1, 1)))])
def test_both_operands_in_shared_memory(kind, span, transposed, schedule):
    """D = A B^T twice, the second product added to the first."""
    a, b, image = whole(kind, 1, 64, DEPTH[kind]), whole(kind, 2, 16, DEPTH[kind]), empty()
    place(image, a.astype(DTYPE[kind]), 0, span, transposed[0], *offsets(span, transposed[0]))
    place(image, b.astype(DTYPE[kind]), 8192, span, transposed[1], *offsets(span, transposed[1]))
    layouts = [descriptor(span, *offsets(span, t)) for t in transposed]
    body = "".join(f"xor.b64 %d{4 + i}, %d{4 + i}, {layout};\n" for i, layout in enumerate(layouts))
    body += "\n".join(instruction(kind, 16, add=add, transposed=transposed) for add in "pq")
    found = multiply(kind, image, body + "\n" + COMMIT_AND_WAIT, 16, layout=0, start_b=8192,
                     schedule=schedule)
    np.testing.assert_array_equal(found, 2 * a @ b.T)


def empty(size=16384):
    return np.zeros(size, np.uint8)


@pytest.mark.parametrize("n", [8, 24, 64, 256])
def test_any_width_and_two_warpgroups_that_share_b(n):
    """Each warpgroup has its own 64 rows of A."""
    a, b, image = whole("f16", 1, 128, 16), whole("f16", 2, n, 16), empty(16384 + 128 * n)
    place(image, a.astype(np.float16), 0, 128, False, 16, 1024)
    place(image, b.astype(np.float16), 16384, 128, False, 16, 1024)
    body = """
        shr.u32 %r3, tid, 7;
        mul.wide.u32 %d7, %r3, 512;            // 8192 bytes, in units of 16
        add.s64 %d4, %d4, %d7;
        """ + instruction("f16", n, add="p") + "\n" + COMMIT_AND_WAIT
    found = multiply("f16", image, body, n, layout=descriptor(128, 16, 1024), start_b=16384,
                     threads=256)
    np.testing.assert_array_equal(found, a @ b.T)


@every_schedule
@pytest.mark.parametrize("kind", DTYPE)
def test_a_line_of_128_bytes_holds_four_steps_of_k(kind, schedule):
    """The usual inner loop: the descriptors advance by 32 bytes inside the swizzled line."""
    depth = 4 * DEPTH[kind]
    a, b, image = whole(kind, 1, 64, depth), whole(kind, 2, 16, depth), empty()
    place(image, a.astype(DTYPE[kind]), 0, 128, False, 16, 1024)
    place(image, b.astype(DTYPE[kind]), 8192, 128, False, 16, 1024)
    body = "".join(instruction(kind, 16, add="p" if step == 0 else "q")
                   + "\nadd.s64 %d4, %d4, 2;\nadd.s64 %d5, %d5, 2;\n" for step in range(4))
    found = multiply(kind, image, body + COMMIT_AND_WAIT, 16, layout=descriptor(128, 16, 1024),
                     start_b=8192, schedule=schedule)
    np.testing.assert_array_equal(found, a @ b.T)


@pytest.mark.parametrize("first", [1, 6, 8, 58])
def test_an_operand_may_begin_at_any_line(first):
    """As on an H200: chunks are exchanged by the address, whatever row of the operand is there."""
    rows, b, image = whole("f16", 1, first + 64, 64), whole("f16", 2, 16, 64), empty(32768)
    place(image, rows.astype(np.float16), 0, 128, False, 16, 1024)
    place(image, b.astype(np.float16), 16384 + 128 * first, 128, False, 16, 1024)
    body = f"add.s64 %d4, %d4, {8 * first};\n" + "".join(
        instruction("f16", 16, add="p" if step == 0 else "q")
        + "\nadd.s64 %d4, %d4, 2;\nadd.s64 %d5, %d5, 2;\n" for step in range(4))
    found = multiply("f16", image, body + COMMIT_AND_WAIT, 16, layout=descriptor(128, 16, 1024),
                     start_b=16384 + 128 * first)
    np.testing.assert_array_equal(found, rows[first:] @ b.T)


@every_schedule
@pytest.mark.parametrize("kind", DTYPE)
def test_a_may_come_from_registers(kind, schedule):
    """Each warp holds 16 rows, laid out as for mma.sync."""
    depth, per = DEPTH[kind], 4 // np.dtype(DTYPE[kind]).itemsize
    a, b, image = whole(kind, 1, 64, depth), whole(kind, 2, 16, depth), empty()
    place(image, b.astype(DTYPE[kind]), 8192, 128, False, 16, 1024)
    rows = np.zeros((128, 4, per), DTYPE[kind])
    for thread, r, i in np.ndindex(rows.shape):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (r % 2)
        rows[thread, r, i] = a[row, thread % 4 * per + i + 4 * per * (r // 2)]
    registers = "{%r10, %r11, %r12, %r13}"
    body = f"""
        mad.wide.u32 %d7, tid, 16, rows;
        ld.global.v4.u32 {registers}, [%d7];
        wgmma.fence.sync.aligned;
        """ + instruction(kind, 16, a=registers, add="p") + "\n" + COMMIT_AND_WAIT
    found = multiply(kind, image, body, 16, layout=descriptor(128, 16, 1024), start_b=8192,
                     schedule=schedule, rows=rows.view(np.uint32))
    np.testing.assert_array_equal(found, a @ b.T)


@every_schedule
def test_a_group_may_stay_in_flight_while_the_one_before_is_used(schedule):
    """wait_group 1 completes the first of two groups, whose registers can be read then."""
    a, b, image = whole("f16", 1, 64, 16), whole("f16", 2, 16, 16), empty()
    place(image, a.astype(np.float16), 0, 128, False, 16, 1024)
    place(image, b.astype(np.float16), 8192, 128, False, 16, 1024)
    first = np.zeros((128, 8), np.float32)
    other = accumulators("f16", 8, first=60)
    body = (instruction("f16", 16, add="p") + "\nwgmma.commit_group.sync.aligned;\n"
            + instruction("f16", 16, add="p").replace(braces(accumulators("f16", 8)), braces(other))
            + "\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;\n"
            + dump(accumulators("f16", 8), "first") + "\nwgmma.wait_group.sync.aligned 0;\n"
            + "\n".join(f"add.f32 {x}, {x}, {y};"
                        for x, y in zip(accumulators("f16", 8), other, strict=True)) + "\n")
    found = multiply("f16", image, body, 16, layout=descriptor(128, 16, 1024), start_b=8192,
                     schedule=schedule, first=first)
    np.testing.assert_array_equal(gathered(first), a @ b.T)
    np.testing.assert_array_equal(found, 2 * a @ b.T)


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_a_product_of_floats_is_near_the_exact_one(kind):
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((rows, DEPTH[kind])).astype(DTYPE[kind]) for rows in (64, 16))
    image = empty()
    place(image, a, 0, 128, False, 16, 1024)
    place(image, b, 8192, 128, False, 16, 1024)
    found = multiply(kind, image, instruction(kind, 16, add="p") + "\n" + COMMIT_AND_WAIT, 16,
                     layout=descriptor(128, 16, 1024), start_b=8192)
    if kind == "tf32":
        a, b = truncated(a), truncated(b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    bound = 2.0 ** -23 * (DEPTH[kind] + 1) * (np.abs(a) @ np.abs(b).T)
    assert (np.abs(found - a @ b.T) <= bound).all()


@pytest.mark.parametrize("scale", [(-1, 1), (1, -1), (-1, -1)])
def test_negated_operands_are_negated_or_refused(scale):
    a, b, image = whole("f16", 1, 64, 16), whole("f16", 2, 16, 16), empty()
    place(image, a.astype(np.float16), 0, 128, False, 16, 1024)
    place(image, b.astype(np.float16), 8192, 128, False, 16, 1024)
    body = instruction("f16", 16, add="p", scale=scale) + "\n" + COMMIT_AND_WAIT
    try:
        found = multiply("f16", image, body, 16, layout=descriptor(128, 16, 1024), start_b=8192)
    except UnknownInstruction:
        return
    np.testing.assert_array_equal(found, scale[0] * scale[1] * (a @ b.T))


# ------------------------------------------------------------------------------------------ faults

PRODUCT = (instruction("f16", 16, add="p") + "\nwgmma.commit_group.sync.aligned;\n"
           "BEFORE\nwgmma.wait_group.sync.aligned 0;\n")


def product(body, schedule=None, start=START):
    a, b, image = whole("f16", 1, 64, 16), whole("f16", 2, 16, 16), empty()
    place(image, a.astype(np.float16), 0, 128, False, 16, 1024)
    place(image, b.astype(np.float16), 8192, 128, False, 16, 1024)
    found = multiply("f16", image, body, 16, layout=descriptor(128, 16, 1024), start_b=8192,
                     schedule=schedule, start=start, first=np.zeros((128, 8), np.float32))
    np.testing.assert_array_equal(found, a @ b.T)


@pytest.mark.parametrize("schedule", [{}, {"race": False}, {"seed": 3}],
                         ids=["race", "lockstep", "random"])
@pytest.mark.parametrize("touch", [
    "add.f32 %f1, %f20, %f20;", "mov.b32 %f27, 0f00000000;", dump(accumulators("f16", 8), "first"),
], ids=["read", "write", "store"])
def test_an_accumulator_is_touched_before_the_wait(touch, schedule):
    product(PRODUCT.replace("BEFORE", "add.f32 %f1, %f2, %f3;") + touch.replace("%f27", "%f1"),
            schedule)
    with pytest.raises(AsyncNotWaited):
        product(PRODUCT.replace("BEFORE", touch), schedule)


@pytest.mark.parametrize("wait", ["", "wgmma.wait_group.sync.aligned 1;"])
def test_the_wait_is_missing_or_leaves_one_group_too_many(wait):
    body = PRODUCT.replace("BEFORE", "")
    product(body)
    with pytest.raises(AsyncNotWaited):
        product(mutated(body, "wgmma.wait_group.sync.aligned 0;", wait))


@pytest.mark.parametrize("address", ["shared", "shared+8192"])
def test_an_operand_is_overwritten_before_the_wait(address):
    store = f"setp.eq.u32 p, tid, 127;\n@p st.shared.u32 [{address}], 0;"
    after = "\nbar.sync 0;\n" + store
    product(PRODUCT.replace("BEFORE", "") + after)
    with pytest.raises((Race, AsyncNotWaited)):
        product(PRODUCT.replace("BEFORE", store))


def test_operands_need_the_fence_of_the_async_proxy():
    body = PRODUCT.replace("BEFORE", "")
    product(body)
    with pytest.raises(Race):
        product(body, start=mutated(START, "fence.proxy.async.shared::cta;"))


def test_an_operand_that_was_not_written_or_is_not_there():
    body = PRODUCT.replace("BEFORE", "")
    gap = mutated(START, "COPY:\n    ld", "COPY:\n    setp.eq.u32 q, tid, 0;\n    ld")
    product(body, start=gap)
    with pytest.raises(UninitialisedRead):
        product(body, start=mutated(gap, "st.shared.v4", "@!q st.shared.v4"))
    for operand in ("%d4", "%d5"):
        with pytest.raises(OutOfBounds):
            product(f"add.s64 {operand}, {operand}, 1024;\n" + body)


def test_a_descriptor_must_be_the_same_in_all_threads_of_a_warp():
    body = PRODUCT.replace("BEFORE", "")
    change = "setp.eq.u32 p, tid, {};\n@p add.s64 %d5, %d5, 2;\nsetp.eq.u32 p, 0, 1;\n"
    product(change.format(999) + body)
    with pytest.raises(EmulatorError):
        product(change.format(77) + body)
