"""Loads, stores and atomics of every width, in every state space."""
import numpy as np
import pytest
from emulator_checks import integers, launch, signed

from kernels.emulator import Emulator


def copy(space_in, space_out, vector, element, count, x):
    """What a kernel copies from x, `count` elements of 8 * `element` bits a thread."""
    registers = [f"%{ {1: 'h', 2: 'h', 4: 'r', 8: 'd'}[element]}{4 + i}" for i in range(count)]
    group = registers[0] if count == 1 else "{" + ", ".join(registers) + "}"
    kind = f"{vector}.b{8 * element}"
    y = np.zeros_like(x)
    size = element * count
    through = {
        "global": f"st.global{kind} [%d2], {group};",
        "shared": f"st.shared{kind} [%r1], {group};\nld.shared{kind} {group}, [%r1];\n"
                  f"st.global{kind} [%d2], {group};",
        "local": f"st.local{kind} [%d3], {group};\nld.local{kind} {group}, [%d3];\n"
                 f"st.global{kind} [%d2], {group};",
        "generic": f"cvta.to.global.u64 %d2, %d2;\ncvta.global.u64 %d2, %d2;\n"
                   f"st{kind} [%d2], {group};",
    }[space_out]
    launch(f"""
        .local .align 16 .b8 mine[64];
        mov.u64 %d3, mine;
        mad.lo.u32 %r1, tid, {size}, shared;
        mad.wide.u32 %d1, tid, {size}, x;
        mad.wide.u32 %d2, tid, {size}, y;
        ld{space_in}{kind} {group}, [%d1];
        {through}""", threads=len(x) // size, shared_bytes=x.nbytes, x=x, y=y)
    return y


@pytest.mark.parametrize(("element", "count"), [
    (element, count) for element in (1, 2, 4, 8) for count in (1, 2, 4) if element * count <= 16])
@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
def test_a_copy_is_the_original(space, count, element):
    x = integers(32, seed=1, count=element * count * 16).view(np.uint8)
    vector = {1: "", 2: ".v2", 4: ".v4"}[count]
    np.testing.assert_array_equal(copy(".global", space, vector, element, count, x), x)


@pytest.mark.parametrize("qualifiers", [
    ".global.nc", ".global.ca", ".global.cg", ".global.cs", ".global.nc.L1::no_allocate",
    ".global.L1::evict_last", ".volatile.global", ".relaxed.gpu.global", ".acquire.gpu.global",
    ".global.L2::128B", ""])
def test_cache_hints_and_memory_order_change_no_value(qualifiers):
    x = integers(32, seed=1, count=256).view(np.uint8)
    np.testing.assert_array_equal(copy(qualifiers, "global", "", 4, 1, x), x)


@pytest.mark.parametrize("qualifiers", [".global.wb", ".global.cs", ".global.cg", ".global.wt",
                                        ".volatile.global", ".relaxed.sys.global",
                                        ".release.gpu.global", ""])
def test_stores_have_hints_also(qualifiers):
    x, y = integers(32, seed=1, count=32), np.zeros(32, np.uint32)
    launch(f"""
        mad.wide.u32 %d1, tid, 4, x;
        mad.wide.u32 %d2, tid, 4, y;
        ld.global.u32 %r1, [%d1];
        st{qualifiers}.u32 [%d2], %r1;""", x=x, y=y)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32"])
@pytest.mark.parametrize("register", [32, 64])
def test_a_narrow_load_fills_the_register_by_its_sign(kind, register):
    size = int(kind[1:])
    x = integers(32, seed=1, count=64).view(np.uint8)[:32 * size // 8].view(f"u{size // 8}")
    y = np.zeros(32, f"u{register // 8}")
    name = {32: "%r5", 64: "%d5"}[register]
    launch(f"""
        mad.wide.u32 %d1, tid, {size // 8}, x;
        mad.wide.u32 %d2, tid, {register // 8}, y;
        ld.global.{kind} {name}, [%d1];
        st.global.b{register} [%d2], {name};""", x=x, y=y)
    assert y.tolist() == [(signed(v, size) if kind[0] == "s" else v) % 2 ** register
                          for v in x.tolist()]


def test_a_narrow_store_writes_the_low_bits_alone():
    x, y = integers(32, seed=1, count=32), np.full((32, 4), 0xEE, np.uint8)
    launch("""
        mad.wide.u32 %d1, tid, 4, x;
        mad.wide.u32 %d2, tid, 4, y;
        ld.global.u32 %r1, [%d1];
        st.global.u8 [%d2+1], %r1;""", x=x, y=y)
    np.testing.assert_array_equal(y[:, 1], x.astype(np.uint8))
    assert (np.delete(y, 1, axis=1) == 0xEE).all()


def test_vectors_may_discard_elements_and_offsets_may_be_negative():
    x, y = integers(32, seed=1, count=128), np.zeros(32, np.uint32)
    launch("""
        mad.wide.u32 %d1, tid, 16, x;
        mad.wide.u32 %d2, tid, 4, y;
        add.s64 %d1, %d1, 64;
        ld.global.v4.u32 {_, %r1, _, _}, [%d1+-64];
        st.global.u32 [%d2], %r1;""", x=x, y=y)
    np.testing.assert_array_equal(y, x[1::4])


def test_memory_is_little_endian():
    x, y = np.array([0x0102030405060708], np.uint64), np.zeros(8, np.uint8)
    launch("""
        ld.global.u64 %d1, [x];
        st.global.u32 [y], %d1;
        ld.global.u8 %h1, [x+7];
        st.global.u8 [y+7], %h1;""", threads=1, x=x, y=y)
    assert y.tolist() == [8, 7, 6, 5, 0, 0, 0, 1]


def test_constants_and_module_variables_have_their_initial_values():
    y = np.zeros(32, np.float32)
    launch("""
        mul.wide.u32 %d1, tid, 4;
        mov.u64 %d2, table;
        and.b64 %d3, %d1, 12;
        add.s64 %d2, %d2, %d3;
        ld.const.f32 %f1, [%d2];
        ld.global.f32 %f2, [offset];
        add.f32 %f1, %f1, %f2;
        add.s64 %d1, %d1, y;
        st.global.f32 [%d1], %f1;""",
           module=".const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, "
                  "0f40800000};\n.global .align 4 .f32 offset = 0f42C80000;", y=y)
    assert y.tolist() == [101, 102, 103, 104] * 8


def test_a_generic_address_reaches_shared_and_local_memory():
    y = np.zeros(64, np.uint32)
    launch("""
        .local .align 4 .b8 mine[4];
        mad.lo.u32 %r1, tid, 4, shared;
        cvt.u64.u32 %d1, %r1;
        cvta.shared.u64 %d1, %d1;
        mov.u64 %d2, mine;
        cvta.local.u64 %d2, %d2;
        st.u32 [%d1], tid;
        add.u32 %r2, tid, 100;
        st.u32 [%d2], %r2;
        setp.lt.u32 p, tid, 32;
        selp.b64 %d3, %d1, %d2, p;             // half of the threads here, half there
        ld.u32 %r3, [%d3];
        mad.wide.u32 %d4, tid, 4, y;
        st.u32 [%d4], %r3;""", threads=64, shared_bytes=256, y=y)
    assert y.tolist() == [*range(32), *range(132, 164)]


def test_each_block_has_its_own_shared_memory_and_each_thread_its_own_local_memory():
    y = np.zeros((3, 64), np.uint32)
    launch("""
        .shared .align 4 .b8 fixed[256];
        .local .align 4 .b8 mine[4];
        mov.u32 %r1, %ctaid.x;
        mad.lo.u32 %r2, %r1, 1000, tid;
        st.local.u32 [mine], %r2;
        mov.u32 %r3, fixed;
        mad.lo.u32 %r4, tid, 4, %r3;
        st.shared.u32 [%r4], %r2;
        bar.sync 0;
        xor.b32 %r5, tid, 63;
        mad.lo.u32 %r5, %r5, 4, %r3;
        ld.shared.u32 %r6, [%r5];
        ld.local.u32 %r7, [mine];
        sub.u32 %r6, %r6, %r7;
        mad.lo.u32 %r8, %r1, 64, tid;
        mad.wide.u32 %d1, %r8, 4, y;
        st.global.u32 [%d1], %r6;""", threads=64, blocks=3, y=y)
    assert (y.view(np.int32) == 63 - 2 * np.arange(64)).all()


def test_parameters_of_every_type():
    text = """.version 9.0
        .target sm_90a
        .address_size 64
        .visible .entry k(.param .u64 y, .param .u8 a, .param .s16 b, .param .u32 c, .param .f32 d,
                          .param .f64 e, .param .b64 f)
        {
        .reg .b16 %h<3>;
        .reg .b32 %r<4>;
        .reg .f32 %f1;
        .reg .f64 %e<5>;
        .reg .b64 %d<4>;
        ld.param.u64 %d0, [y];
        ld.param.u8 %h1, [a];
        ld.param.s16 %h2, [b];
        ld.param.u32 %r1, [c];
        ld.param.f32 %f1, [d];
        ld.param.f64 %e1, [e];
        ld.param.u64 %d1, [f];
        cvt.rn.f64.u16 %e2, %h1;
        st.global.f64 [%d0], %e2;
        cvt.rn.f64.s16 %e2, %h2;
        st.global.f64 [%d0+8], %e2;
        cvt.rn.f64.u32 %e2, %r1;
        st.global.f64 [%d0+16], %e2;
        cvt.f64.f32 %e2, %f1;
        st.global.f64 [%d0+24], %e2;
        st.global.f64 [%d0+32], %e1;
        cvt.rn.f64.s64 %e2, %d1;
        st.global.f64 [%d0+40], %e2;
        ret;
        }"""
    y = np.zeros(6)
    Emulator().launch(text, "k", 1, 1, [y, 200, -300, 2 ** 32 - 1, 1.5, 0.1, -(2 ** 40)])
    assert y.tolist() == [200, -300, 2 ** 32 - 1, 1.5, 0.1, -(2.0 ** 40)]


# ----------------------------------------------------------------------------------------- atomics

ATOMIC = {
    "add.u32": lambda old, x: old + x,
    "add.s32": lambda old, x: old + x,
    "add.u64": lambda old, x: old + x,
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda old, x: min(old, x, key=lambda v: signed(v, 32)),
    "max.s64": lambda old, x: max(old, x, key=lambda v: signed(v, 64)),
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "xor.b64": lambda old, x: old ^ x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
    "exch.b32": lambda old, x: x,
}


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize("name", ATOMIC)
def test_an_atomic_gives_the_old_value_and_leaves_the_new_one(name, space):
    """64 threads on 4 words: the old values of a word must be a chain from its first value."""
    size = int(name[-2:])
    x = integers(size, seed=1, count=64)
    words = integers(size, seed=2, count=64)[:4]
    before, old = words.copy(), np.zeros_like(x)
    register = {32: "%r", 64: "%d"}[size]
    address = {"global": "%d4", "shared": "%r6", "generic": "%d4"}[space]
    target = {"global": ".global", "shared": ".shared", "generic": ""}[space]
    launch(f"""
        and.b32 %r5, tid, 3;
        mad.lo.u32 %r6, %r5, {size // 8}, shared;
        mad.wide.u32 %d4, %r5, {size // 8}, words;
        ld.global.b{size} {register}8, [%d4];
        setp.lt.u32 p, tid, 4;
        @p st.shared.b{size} [%r6], {register}8;
        bar.sync 0;
        mad.wide.u32 %d5, tid, {size // 8}, x;
        mad.wide.u32 %d6, tid, {size // 8}, old;
        ld.global.b{size} {register}9, [%d5];
        atom{target}.{name} {register}10, [{address}], {register}9;
        st.global.b{size} [%d6], {register}10;
        bar.sync 0;
        {f"@p ld.shared.b{size} {register}8, [%r6];" if space == "shared" else ""}
        {f"@p st.global.b{size} [%d4], {register}8;" if space == "shared" else ""}""",
           threads=64, shared_bytes=64, x=x, words=words, old=old)
    for word in range(4):
        value = int(before[word])
        left = list(zip(old[word::4].tolist(), x[word::4].tolist(), strict=True))
        while left:
            step = next(pair for pair in left if pair[0] == value)
            left.remove(step)
            value = ATOMIC[name](*step) % 2 ** size
        assert value == words[word]


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("operation", ["atom", "red"])
def test_floats_are_added_atomically(operation, kind):
    dtype = {"f32": np.float32, "f64": np.float64}[kind]
    x = np.random.default_rng(1).integers(-100, 100, 64).astype(dtype)
    total = np.array([0.5], dtype)
    register = {"f32": "%f1", "f64": "%e1"}[kind]
    old = register[:-1] + "2, " if operation == "atom" else ""
    launch(f"""
        mad.wide.u32 %d1, tid, {x.itemsize}, x;
        ld.global.{kind} {register}, [%d1];
        {operation}.global.add.{kind} {old}[total], {register};""", threads=64, x=x, total=total)
    assert total[0] == 0.5 + x.sum()


@pytest.mark.parametrize("name", ["add.u32", "min.s32", "max.u32", "and.b32", "or.b32", "xor.b32",
                                  "inc.u32", "dec.u32", "add.u64"])
def test_a_reduction_gives_nothing_back(name):
    size = int(name[-2:])
    x = integers(size, seed=1, count=64)
    if name[:3] in ("inc", "dec"):
        x[:] = 40
    total = integers(size, seed=2, count=64)[:1]
    value = int(total[0])
    register = {32: "%r1", 64: "%d3"}[size]
    launch(f"""
        mad.wide.u32 %d1, tid, {size // 8}, x;
        ld.global.b{size} {register}, [%d1];
        red.global.{name} [total], {register};""", threads=64, x=x, total=total)
    for v in x.tolist():
        value = ATOMIC[name](value, v) % 2 ** size
    assert total[0] == value


@pytest.mark.parametrize("schedule", [{}, {"seed": 3}], ids=["lockstep", "random"])
def test_compare_and_swap_builds_a_lock_free_sum(schedule):
    x = np.arange(96, dtype=np.uint32)
    total = np.zeros(1, np.uint32)
    launch("""
        mad.wide.u32 %d1, tid, 4, x;
        ld.global.u32 %r1, [%d1];
        ld.volatile.global.u32 %r2, [total];
        AGAIN:
        add.u32 %r3, %r2, %r1;
        mov.b32 %r4, %r2;
        atom.global.cas.b32 %r2, [total], %r4, %r3;
        setp.ne.u32 p, %r2, %r4;
        @p bra AGAIN;""", threads=96, schedule=schedule, x=x, total=total)
    assert total[0] == x.sum()


def test_atomics_meet_across_blocks():
    count = np.zeros(1, np.uint32)
    launch("atom.global.add.u32 %r1, [count], 1;", blocks=(5, 2), threads=(8, 4, 3), count=count)
    assert count[0] == 960
