"""Kernels with one fault each, refused with its place; beside each the right kernel, which runs."""
import numpy as np
import pytest
from emulator_checks import kernel, launch, refused

from kernels.emulator import (
    Divergence,
    Empty,
    Emulator,
    EmulatorError,
    Late,
    Misaligned,
    OutOfBounds,
    ParseError,
    TooEarly,
    UninitialisedRead,
    UnknownInstruction,
)

# p is true in one thread alone: (5, 1, 0) of block (1, 0, 0)
ONE = """
    .local .align 16 .b8 mine[16];
    mov.u32 %r1, %tid.y;
    mov.u32 %r2, %ctaid.x;
    setp.eq.u32 p, tid, 5;
    setp.eq.and.u32 p, %r1, 1, p;
    setp.eq.and.u32 p, %r2, 1, p;
    mov.u32 %r4, 7;
"""
PLACE = {"block": (1, 0, 0), "thread": (5, 1, 0), "threads": (32, 2), "blocks": 2,
         "shared_bytes": 256}


def check_access(error, body, wrong, right, base, **arguments):
    """`body` with the wrong offset is refused at its address, with the right one it runs."""
    arguments.setdefault("x", np.zeros(30, np.uint32))
    refused(error, ONE + body.format(wrong) + "      // <-", offset=wrong, base=base, **PLACE,
            **arguments)
    launch(ONE + body.format(right), threads=(32, 2), blocks=2, shared_bytes=256, **arguments)


@pytest.mark.parametrize(("body", "wrong", "right", "base"), [
    ("@p ld.global.u32 %r3, [x+{}];", 120, 116, "x"),
    ("@p ld.global.u32 %r3, [x+{}];", -4, 0, "x"),
    ("@p ld.u32 %r3, [x+{}];", 120, 116, "x"),
    ("@p st.global.u32 [x+{}], 1;", 120, 116, "x"),
    ("@p st.u32 [x+{}], 1;", -4, 0, "x"),
    ("@p ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [x+{}];", 112, 96, "x"),
    ("@p st.global.u8 [x+{}], 1;", 120, 119, "x"),
    ("@p atom.global.add.u32 %r3, [x+{}], 1;", 120, 116, "x"),
    ("@p red.global.add.u32 [x+{}], 1;", -4, 0, "x"),
    ("@p st.shared.u32 [shared+{}], 1;", 256, 252, "shared"),
    ("@p st.shared.u32 [shared+{}], 1;", -4, 0, "shared"),
    ("@p ld.shared.u32 %r3, [shared+{}];", 256, None, "shared"),
    ("@p st.local.u32 [mine+{}], 1;", 16, 12, "local"),
    ("@p ld.local.u32 %r3, [mine+{}];", 16, None, "local"),
    ("@p cp.async.ca.shared.global [shared], [x+{}], 4;", 120, 116, "x"),
    ("@p cp.async.ca.shared.global [shared+{}], [x], 4;", 256, 252, "shared"),
], ids=lambda value: value if isinstance(value, str) and value.startswith("@") else None)
def test_an_access_out_of_bounds(body, wrong, right, base):
    if right is None:       # the right load must have something to read
        right, store = 4, body.replace("ld", "st").replace(" %r3,", "").replace(";", ", 1;")
        body = store.format(4) + "\n" + body
    check_access(OutOfBounds, body, wrong, right, base)


@pytest.mark.parametrize(("body", "wrong", "right", "base"), [
    ("@p ld.global.u32 %r3, [x+{}];", 2, 4, "x"),
    ("@p ld.global.u16 %h1, [x+{}];", 1, 2, "x"),
    ("@p ld.global.v2.u32 {{%r3, %r5}}, [x+{}];", 4, 8, "x"),
    ("@p ld.global.v4.u32 {{%r3, %r5, %r6, %r7}}, [x+{}];", 8, 16, "x"),
    ("@p st.global.u64 [x+{}], %d1;", 4, 8, "x"),
    ("@p st.shared.v4.u32 [shared+{}], {{%r4, %r4, %r4, %r4}};", 8, 16, "shared"),
    ("@p st.local.u64 [mine+{}], %d1;", 4, 8, "local"),
    ("@p atom.global.add.u32 %r3, [x+{}], 1;", 2, 4, "x"),
    ("@p cp.async.cg.shared.global [shared], [x+{}], 16;", 8, 16, "x"),
    ("@p cp.async.ca.shared.global [shared+{}], [x], 8;", 4, 8, "shared"),
], ids=lambda value: value if isinstance(value, str) and value.startswith("@") else None)
def test_a_misaligned_access(body, wrong, right, base):
    check_access(Misaligned, body, wrong, right, base)


@pytest.mark.parametrize(("offset", "said"), [
    (-4, "4 bytes before"), (120, "0 bytes past the end"), (160, "40 bytes past the end")])
def test_the_distance_to_the_nearest_array_is_told(offset, said):
    found = refused(OutOfBounds, f"st.global.u32 [x+{offset}], 1;      // <-", threads=1,
                    x=np.zeros(30, np.uint32))
    assert said in str(found)
    assert "120 bytes" in str(found)


@pytest.mark.parametrize("where", ["0", "-16", "x+0x100000", "probe+-0x10000"])
def test_a_wild_pointer(where):
    pointer = where if where[0] in "xp" else "%d1"
    refused(OutOfBounds, ONE + f"mov.b64 %d1, {where if pointer == '%d1' else 0};\n"
            f"@p st.global.u32 [{pointer}], 1;      // <-", x=np.zeros(4, np.uint32), **PLACE)


def test_a_store_to_a_read_only_array():
    x = np.zeros(32, np.uint32)
    body = "mad.wide.u32 %d1, tid, 4, x;\nld.global.u32 %r1, [%d1];\n"
    store = "st.global.u32 [%d1], %r1;"
    launch(body + store, x=x)
    x.flags.writeable = False
    launch(body, x=x)
    refused(OutOfBounds, body + store + "    // <-", threads=32, x=x)


def test_matrix_loads_are_checked_row_by_row():
    fill = "mad.lo.u32 %r1, tid, 16, shared;\nmov.u32 %r2, 1;\n" \
           "st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r2};\nbar.sync 0;\n{move}\n" \
           "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r1];"
    launch(fill.replace("{move}", ""), shared_bytes=512)
    options = {"threads": 32, "shared_bytes": 512, "block": (0, 0, 0)}
    only = "setp.eq.u32 p, tid, 9;\n@p add.u32 %r1, %r1, {};"
    refused(Misaligned, fill.replace("{move}", only.format(8)) + "    // <-", thread=(9, 0, 0),
            offset=9 * 16 + 8, base="shared", **options)
    refused(OutOfBounds, fill.replace("{move}", only.format(512)) + "    // <-", thread=(9, 0, 0),
            offset=9 * 16 + 512, base="shared", **options)


# ----------------------------------------------------------------------------------- never written

@pytest.mark.parametrize(("wrong", "right"), [
    ("ld.shared.u32 %r3, [shared];      // <-",
     "st.shared.u32 [shared], 1;\nld.shared.u32 %r3, [shared];"),
    ("st.shared.u16 [shared], %h1;\nld.shared.u32 %r3, [shared];      // <-",
     "st.shared.u16 [shared], %h1;\nld.shared.u16 %h2, [shared];"),
    ("st.shared.u32 [shared], 1;\nld.shared.v2.u32 {%r3, %r4}, [shared];      // <-",
     "st.shared.v2.u32 [shared], {%r4, %r4};\nld.shared.v2.u32 {%r3, %r4}, [shared];"),
    ("atom.shared.add.u32 %r3, [shared], 1;      // <-",
     "st.shared.u32 [shared], 1;\natom.shared.add.u32 %r3, [shared], 1;"),
], ids=["load", "half", "vector", "atomic"])
def test_shared_memory_that_nothing_has_written(wrong, right):
    refused(UninitialisedRead, wrong, threads=1, shared_bytes=64, block=(0, 0, 0))
    launch(right, threads=1, shared_bytes=64)


def test_shared_memory_of_one_block_is_not_written_by_another():
    body = """
        mov.u32 %r1, %ctaid.x;
        setp.eq.u32 p, %r1, 0;
        {}st.shared.u32 [shared], %r1;
        ld.shared.u32 %r2, [shared];"""
    launch(body.format(""), threads=1, blocks=2, shared_bytes=4)
    refused(UninitialisedRead, body.format("@p ") + "    // <-", threads=1, blocks=2,
            shared_bytes=4, block=(1, 0, 0), thread=(0, 0, 0))


def test_an_empty_array_must_be_written_before_it_is_read():
    read = "mad.wide.u32 %d1, tid, 4, x;\nld.global.u32 %r1, [%d1];"
    write = "mad.wide.u32 %d1, tid, 4, x;\n@p st.global.u32 [%d1], tid;\n"
    launch(read, threads=64, x=np.zeros(64, np.uint32))
    launch("setp.ge.u32 p, tid, 0;\n" + write + read, threads=64, x=Empty(np.zeros(64, np.uint32)))
    refused(UninitialisedRead, "setp.ne.u32 p, tid, 43;\n" + write + read + "    // <-",
            x=Empty(np.zeros(64, np.uint32)), thread=(43, 0, 0), block=(0, 0, 0), offset=4 * 43)


@pytest.mark.parametrize("operation", [
    "atom.global.add.u32 %r3, [x], 1;", "red.global.add.u32 [x], 1;", "ld.u32 %r3, [x];",
    "cp.async.ca.shared.global [shared], [x], 4;", "ld.global.v2.u32 {%r3, %r4}, [x];"])
def test_every_way_to_read_an_empty_array(operation):
    launch("st.global.v2.u32 [x], {%r1, %r1};\n" + operation, threads=1, shared_bytes=64,
           x=Empty(np.zeros(4, np.uint32)))
    refused(UninitialisedRead, operation + "    // <-", threads=1, shared_bytes=64,
            x=Empty(np.zeros(4, np.uint32)))


# ------------------------------------------------------------------------------ dependent launches

@pytest.mark.parametrize("operation", [
    "ld.global.u32 %r3, [x];", "st.global.u32 [x], 1;", "red.global.add.u32 [x], 1;",
    "ld.u32 %r3, [x];", "cp.async.ca.shared.global [shared], [x], 4;"])
def test_what_the_kernel_before_may_use_must_be_waited_for(operation):
    late = {"x": Late(np.zeros(4, np.uint32))}
    launch("griddepcontrol.wait;\n" + operation, threads=1, blocks=3, shared_bytes=4, **late)
    launch(operation, threads=1, shared_bytes=4, x=np.zeros(4, np.uint32))
    refused(TooEarly, operation + "    // <-\ngriddepcontrol.wait;", threads=1, shared_bytes=4,
            block=(0, 0, 0), thread=(0, 0, 0), **late)
    refused(TooEarly, "griddepcontrol.launch_dependents;\n" + operation + "    // <-", threads=1,
            shared_bytes=4, **late)


def test_each_thread_waits_for_itself():
    body = "setp.ne.u32 p, tid, 9;\n@p griddepcontrol.wait;\nbar.sync 0;\nst.global.u32 [x], 1;"
    refused(TooEarly, body + "    // <-", x=Late(np.zeros(1, np.uint32)), thread=(9, 0, 0))


def test_other_arrays_need_no_waiting():
    y = np.zeros(1, np.uint32)
    launch("ld.global.u32 %r1, [x];\ngriddepcontrol.wait;\nst.global.u32 [y], %r1;",
           x=np.full(1, 7, np.uint32), y=Late(y))
    assert y == 7


# -------------------------------------------------------------------------------------- divergence

MMA = ("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3}, "
       "{%f1, %f2, %f3, %f4};")
DIVIDED = """
    mov.u32 %r1, 0;
    setp.ge.u32 q, tid, 0;
    st.shared.v4.u32 [shared], {{%r1, %r1, %r1, %r1}};
    bar.sync 0;
    setp.lt.u32 p, tid, {lanes};
    @p bra OTHER;
    {instruction}      // <-
    bra.uni END;
    OTHER:
    bar.sync 1;
    END:"""


@pytest.mark.parametrize("instruction", [
    "bar.sync 0;", "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;",
    "vote.sync.ballot.b32 %r2, q, 0xffffffff;", "redux.sync.add.u32 %r2, %r1, 0xffffffff;",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [shared];", MMA,
], ids=lambda text: text.split()[0])
def test_an_instruction_of_the_whole_warp_in_a_divided_warp(instruction):
    for lanes in (0, 32):
        launch(DIVIDED.format(instruction=instruction, lanes=lanes), shared_bytes=64)
    refused(Divergence, DIVIDED.format(instruction=instruction, lanes=7), threads=32,
            shared_bytes=64)


def test_a_predicate_of_a_few_lanes_on_an_instruction_of_the_whole_warp():
    body = "mov.u32 %r1, 0;\nsetp.lt.u32 p, tid, 7;\n@p " + MMA
    launch(body.replace("tid, 7", "tid, 32"))
    refused(Divergence, body + "      // <-", threads=32)


# ------------------------------------------------------------------------------------ instructions

@pytest.mark.parametrize("instruction", [
    "frobnicate.b32 %r1, %r2;", "add.u32.fancy %r1, %r1, %r2;",
    "tcgen05.wait::ld.sync.aligned;", "mov.u32 %r1, %envreg3;",
    "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%f1, %f2, %f3, %f4}, %d1, %d2, %r1, 0, "
    "p, 1, 1, 0, 0;",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [x], [shared], 16;",
    "ld.global.v3.u32 {%r1, %r2, %r3}, [x];"])
def test_an_unknown_instruction_is_refused_when_it_would_run(instruction):
    x = np.zeros(4, np.uint32)
    launch(f"setp.gt.u32 p, tid, 99;\n@!p bra END;\n{instruction}\nEND:", x=x)
    refused(UnknownInstruction, f"{instruction}    // <-", threads=32, x=x)


def test_a_trap():
    launch("setp.gt.u32 p, tid, 99;\n@p trap;")
    found = refused(EmulatorError, "setp.eq.u32 p, tid, 9;\n@p trap;    // <-", thread=(9, 0, 0))
    assert "trap" in str(found)


@pytest.mark.parametrize("schedule", [{}, {"seed": 1}], ids=["lockstep", "random"])
@pytest.mark.parametrize("loop", [
    "LOOP:\nbra LOOP;", "LOOP:\nadd.u32 %r1, %r1, 1;\nsetp.ge.u32 p, %r1, 0;\n@p bra LOOP;",
    "LOOP:\nld.volatile.global.u32 %r1, [x];\nsetp.eq.u32 p, %r1, 0;\n@p bra LOOP;"],
    ids=["empty", "always", "flag"])
def test_an_endless_loop_ends_at_max_steps(loop, schedule):
    x = np.zeros(1, np.uint32)
    found = refused(EmulatorError, loop, x=x, schedule={"max_steps": 20_000, **schedule})
    assert "max_steps" in str(found)
    launch("LOOP:\nadd.u32 %r1, %r1, 1;\nsetp.lt.u32 p, %r1, 99;\n@p bra LOOP;",
           schedule={"max_steps": 20_000, **schedule})


# ------------------------------------------------------------------------------ text and arguments

TEXT = kernel("ld.global.u32 %r1, [x];\nst.global.u32 [x], %r1;", "x")


@pytest.mark.parametrize("text", [
    "", "nonsense", TEXT.replace("ret;\n}", "ret;\n"), TEXT.replace("[x], %r1;", "[x], %r1"),
    TEXT.replace("ret;", "bra NOWHERE;"), TEXT.replace("[x], %r1", "[x, %r1"),
    TEXT.replace(".reg .f32 %f<160>;", ".reg %f<160>;"),
    TEXT.replace("st.global.u32 [x], %r1;", "st.global.u32 [x], %z1;")],
    ids=["empty", "nonsense", "brace", "semicolon", "label", "bracket", "register", "undeclared"])
def test_text_that_is_no_ptx(text):
    Emulator().launch(TEXT, "k", 1, 1, [np.zeros(1, np.uint32)])
    with pytest.raises(ParseError) as caught:
        Emulator().launch(text, "k", 1, 1, [np.zeros(1, np.uint32)])
    assert len(str(caught.value)) > 20


X = np.zeros(8, np.uint32)
SCALAR = TEXT.replace("(.param .u64 p_x)", "(.param .u64 p_x, .param .u32 n, .param .f32 f)")


@pytest.mark.parametrize(("text", "entry", "grid", "block", "args", "shared_bytes"), [
    (TEXT, "other", 1, 1, [X], 0),
    (TEXT, "k", 1, 1, [], 0),
    (TEXT, "k", 1, 1, [X, X], 0),
    (TEXT, "k", 1, 1, [1.5], 0),
    (TEXT, "k", 1, 1, ["x"], 0),
    (TEXT, "k", 1, 1, [None], 0),
    (TEXT, "k", 1, 1, [X[::2]], 0),
    (SCALAR, "k", 1, 1, [X, X, 1.0], 0),
    (SCALAR, "k", 1, 1, [X, 1.5, 1.0], 0),
    (SCALAR, "k", 1, 1, [X, 1, "x"], 0),
    (SCALAR, "k", 1, 1, [X, 2 ** 32, 1.0], 0),
    (SCALAR, "k", 1, 1, [X, -2 ** 31 - 1, 1.0], 0),
    (TEXT, "k", 1, 0, [X], 0),
    (TEXT, "k", 1, 1025, [X], 0),
    (TEXT, "k", 0, 1, [X], 0),
    (TEXT, "k", (1, 1, 1, 1), 1, [X], 0),
    (TEXT, "k", 1, (8, -1), [X], 0),
    (TEXT, "k", 1, 1, [X], 1 << 20),
    (TEXT, "k", 1, 1, [X], -1),
], ids=["entry", "few", "many", "float-for-pointer", "string", "none", "strided",
        "array-for-scalar", "float-for-int", "string-for-float", "too-large", "too-small",
        "no-threads", "threads", "no-blocks", "grid-rank", "negative", "shared", "shared-negative"])
def test_arguments_that_do_not_fit(text, entry, grid, block, args, shared_bytes):
    Emulator().launch(text, "k", 1, 1, [X, 1, 1.0][:text.count(".param .")], 0)
    with pytest.raises(ParseError) as caught:
        Emulator().launch(text, entry, grid, block, args, shared_bytes)
    assert len(str(caught.value)) > 20
