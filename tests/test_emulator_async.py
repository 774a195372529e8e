"""cp.async and mbarrier: copies that land when they are waited for, phases that complete."""
import numpy as np
import pytest
from emulator_checks import every_schedule, integers, kernel, launch, mutated

from kernels.emulator import AsyncNotWaited, Race

ADDRESSES = """
    mad.wide.u32 %d1, tid, {size}, x;          // this thread's source
    mad.lo.u32 %r1, tid, {size}, shared;       // ... and its place in shared memory
"""
DUMP = """
    xor.b32 %r2, tid, 63;                      // read what another thread has copied
    mad.lo.u32 %r3, %r2, {size}, shared;
    mad.wide.u32 %d2, %r2, {size}, y;
    ld.shared.{load} %r8, [%r3];
    st.global.{load} [%d2], %r8;
"""
LOADS = {4: "u32 %r8", 8: "v2.u32 {%r8, %r9}", 16: "v4.u32 {%r8, %r9, %r10, %r11}"}


def dump(size):
    kind, registers = LOADS[size].split(" ", 1)
    return DUMP.format(size=size, load=kind).replace("%r8", registers)


def copied(instructions, size, schedule):
    """x after its way through shared memory, `size` bytes by each of 64 threads."""
    x = integers(32, seed=1, count=16 * size)
    y = np.full_like(x, 0xEEEEEEEE)
    launch(ADDRESSES.format(size=size) + instructions + dump(size), threads=64,
           shared_bytes=64 * size, schedule=schedule, x=x, y=y)
    return x.view(np.uint8).reshape(64, size), y.view(np.uint8).reshape(64, size)


@every_schedule
@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("wait", ["cp.async.wait_all;",
                                  "cp.async.commit_group;\ncp.async.wait_group 0;"])
def test_a_copy_has_landed_after_the_wait(cache, size, wait, schedule):
    x, y = copied(f"cp.async.{cache}.shared.global [%r1], [%d1], {size};\n{wait}\nbar.sync 0;",
                  size, schedule)
    np.testing.assert_array_equal(y, x)


@every_schedule
@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_rest_of_a_short_copy_is_zero(size, schedule):
    """The source size may be anything from 0 to the size of the copy."""
    x, y = copied(f"rem.u32 %r4, tid, {size + 1};\n"
                  f"cp.async.ca.shared.global [%r1], [%d1], {size}, %r4;\n"
                  "cp.async.wait_all;\nbar.sync 0;", size, schedule)
    kept = np.arange(size) < (np.arange(64) % (size + 1))[:, None]
    np.testing.assert_array_equal(y, np.where(kept, x, 0))


def test_a_copy_of_nothing_may_point_anywhere():
    _, y = copied("mov.b64 %d1, 0;\nmov.u32 %r4, 0;\n"
                  "cp.async.cg.shared.global [%r1], [%d1], 16, %r4;\n"
                  "cp.async.wait_all;\nbar.sync 0;", 16, {})
    assert (y == 0).all()


def test_a_predicate_may_ignore_the_source():
    x, y = copied("and.b32 %r4, tid, 1;\nsetp.ne.s32 p, %r4, 0;\n"
                  "cp.async.ca.shared.global [%r1], [%d1], 8, p;\n"
                  "cp.async.wait_all;\nbar.sync 0;", 8, {})
    np.testing.assert_array_equal(y[::2], x[::2])
    assert (y[1::2] == 0).all()


@every_schedule
@pytest.mark.parametrize("tiles", [1, 2, 3, 8])
def test_a_ring_of_three_slots_keeps_two_groups_in_flight(tiles, schedule):
    """The loop of every pipelined kernel: wait for the oldest group, use it, load two ahead."""
    x = integers(32, seed=1, count=64 * tiles)
    y = np.zeros_like(x)
    load = """
        setp.lt.u32 q, {tile}, {tiles};
        rem.u32 %r5, {tile}, 3;
        mad.lo.u32 %r6, %r5, 64, tid;
        mad.lo.u32 %r6, %r6, 4, shared;
        mad.lo.u32 %r7, {tile}, 64, tid;
        mad.wide.u32 %d1, %r7, 4, x;
        @q cp.async.ca.shared.global [%r6], [%d1], 4;
        cp.async.commit_group;"""
    launch(f"""
        mov.u32 %r1, 0;
        mov.u32 %r2, 1;
        {load.format(tile="%r1", tiles=tiles)}
        {load.format(tile="%r2", tiles=tiles)}
        NEXT:
        cp.async.wait_group 1;
        bar.sync 0;
        add.u32 %r2, %r1, 2;
        {load.format(tile="%r2", tiles=tiles)}
        rem.u32 %r5, %r1, 3;
        xor.b32 %r8, tid, 63;
        mad.lo.u32 %r6, %r5, 64, %r8;
        mad.lo.u32 %r6, %r6, 4, shared;
        ld.shared.u32 %r9, [%r6];
        mad.lo.u32 %r7, %r1, 64, %r8;
        mad.wide.u32 %d2, %r7, 4, y;
        st.global.u32 [%d2], %r9;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 p, %r1, {tiles};
        @p bra NEXT;""", threads=64, shared_bytes=768, schedule=schedule, x=x, y=y)
    np.testing.assert_array_equal(y, x)


# ---------------------------------------------------------------------------------------- mbarrier

INIT = """
    add.u32 %r20, shared, 4096;                // the barrier
    setp.ne.u32 %p1, tid, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r20], {count};
    READY:
    bar.sync 0;
"""
WAIT = """
    {label}:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], {parity};
    @!%p2 bra {label};
"""


@every_schedule
@pytest.mark.parametrize("mode", ["", ".noinc"])
def test_copies_can_arrive_at_a_barrier(mode, schedule):
    """With .noinc the arrivals are part of the count, else each adds to it what it takes off."""
    arrive = "" if mode else "mbarrier.arrive.shared::cta.b64 _, [%r20];"
    x = integers(32, seed=1, count=256)
    y = np.zeros_like(x)
    launch(ADDRESSES.format(size=16) + INIT.format(count=64) + f"""
        cp.async.ca.shared.global [%r1], [%d1], 16;
        cp.async.mbarrier.arrive{mode}.shared.b64 [%r20];
        {arrive}""" + WAIT.format(label="WAIT", parity=0) + dump(16), threads=64,
           shared_bytes=4104, schedule=schedule, x=x, y=y)
    np.testing.assert_array_equal(y, x)


PUBLISH = "mad.lo.u32 %r1, tid, 4, shared;\nst.shared.u32 [%r1], tid;\n"
READ = """
    xor.b32 %r2, tid, 63;
    mad.lo.u32 %r3, %r2, 4, shared;
    ld.shared.u32 %r4, [%r3];
    mad.wide.u32 %d1, tid, 4, y;
    st.global.u32 [%d1], %r4;
"""


@every_schedule
@pytest.mark.parametrize(("count", "arrive"), [
    (64, "mbarrier.arrive.shared::cta.b64 _, [%r20];"),
    (64, "mbarrier.arrive.shared::cta.b64 %d9, [%r20];"),
    (192, "mbarrier.arrive.shared::cta.b64 _, [%r20], 3;"),
    (64, "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r20];"),
    (2, "bar.warp.sync 0xffffffff;\nelect.sync _|%p3, 0xffffffff;\n"
        "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r20];"),
])
def test_a_phase_completes_with_its_last_arrival(count, arrive, schedule):
    y = np.zeros(64, np.uint32)
    launch(INIT.format(count=count) + PUBLISH + arrive + WAIT.format(label="WAIT", parity=0) + READ,
           threads=64, shared_bytes=4104, schedule=schedule, y=y)
    np.testing.assert_array_equal(y, np.arange(64) ^ 63)


@every_schedule
def test_a_state_can_be_waited_for_by_its_token(schedule):
    y = np.zeros(64, np.uint32)
    launch(INIT.format(count=64) + PUBLISH + """
        mbarrier.arrive.shared::cta.b64 %d9, [%r20];
        POLL:
        mbarrier.test_wait.shared::cta.b64 %p2, [%r20], %d9;
        @!%p2 bra POLL;""" + READ, threads=64, shared_bytes=4104, schedule=schedule, y=y)
    np.testing.assert_array_equal(y, np.arange(64) ^ 63)


@every_schedule
def test_a_fresh_barrier_has_completed_the_phase_before_the_first(schedule):
    """Waiting for parity 1 passes at once: so a producer finds its ring empty."""
    y = np.zeros(64, np.uint32)
    launch(INIT.format(count=1) + WAIT.format(label="WAIT", parity=1) + """
        mad.wide.u32 %d1, tid, 4, y;
        st.global.u32 [%d1], 1;""", threads=64, shared_bytes=4104, schedule=schedule, y=y)
    assert (y == 1).all()


@every_schedule
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_two_barriers_hand_a_buffer_back_and_forth(rounds, schedule):
    """Warp 0 fills, warp 1 empties; both wait for the parity of their round."""
    y = np.zeros((rounds, 32), np.uint32)
    launch(f"""
        add.u32 %r20, shared, 128;             // full
        add.u32 %r21, shared, 136;             // empty
        setp.ne.u32 %p1, tid, 0;
        @%p1 bra READY;
        mbarrier.init.shared::cta.b64 [%r20], 32;
        mbarrier.init.shared::cta.b64 [%r21], 32;
        READY:
        bar.sync 0;
        and.b32 %r1, tid, 31;
        mad.lo.u32 %r2, %r1, 4, shared;
        mov.u32 %r3, 0;
        setp.ge.u32 p, tid, 32;
        @p bra CONSUMER;
        FILL:
        and.b32 %r4, %r3, 1;
        xor.b32 %r5, %r4, 1;
        EMPTY:
        mbarrier.try_wait.parity.shared::cta.b64 q, [%r21], %r5;
        @!q bra EMPTY;
        mad.lo.u32 %r6, %r3, 100, %r1;
        st.shared.u32 [%r2], %r6;
        mbarrier.arrive.shared::cta.b64 _, [%r20];
        add.u32 %r3, %r3, 1;
        setp.lt.u32 q, %r3, {rounds};
        @q bra FILL;
        bra END;
        CONSUMER:
        and.b32 %r4, %r3, 1;
        FULL:
        mbarrier.try_wait.parity.shared::cta.b64 q, [%r20], %r4;
        @!q bra FULL;
        ld.shared.u32 %r6, [%r2];
        mbarrier.arrive.shared::cta.b64 _, [%r21];
        mad.lo.u32 %r7, %r3, 32, %r1;
        mad.wide.u32 %d1, %r7, 4, y;
        st.global.u32 [%d1], %r6;
        add.u32 %r3, %r3, 1;
        setp.lt.u32 q, %r3, {rounds};
        @q bra CONSUMER;
        END:""", threads=64, shared_bytes=144, schedule=schedule, y=y)
    np.testing.assert_array_equal(y, 100 * np.arange(rounds)[:, None] + np.arange(32))


@every_schedule
def test_bytes_expected_and_completed_hold_a_phase_open(schedule):
    y = np.zeros(64, np.uint32)
    launch(INIT.format(count=64) + PUBLISH + """
        mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r20], 16;
        mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r20], 16;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 8;
        mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r20], 8;
        """ + WAIT.format(label="WAIT", parity=0) + READ, threads=64, shared_bytes=4104,
           schedule=schedule, y=y)
    np.testing.assert_array_equal(y, np.arange(64) ^ 63)


def test_a_barrier_can_be_made_anew_after_inval():
    y = np.zeros(64, np.uint32)
    launch(INIT.format(count=5) + """
        @%p1 bra AGAIN;
        mbarrier.inval.shared::cta.b64 [%r20];
        mbarrier.init.shared::cta.b64 [%r20], 64;
        AGAIN:
        bar.sync 0;""" + PUBLISH + "mbarrier.arrive.shared::cta.b64 _, [%r20];"
        + WAIT.format(label="WAIT", parity=0) + READ, threads=64, shared_bytes=4104, y=y)
    np.testing.assert_array_equal(y, np.arange(64) ^ 63)


# ----------------------------------------------------------------------------- cp.async, too early

PIPELINE = """
    mov.u32 %r1, 0;
    mad.lo.u32 %r2, tid, 4, shared;
    mad.wide.u32 %d1, tid, 4, x;
    mad.wide.u32 %d2, tid, 4, y;
    cp.async.ca.shared.global [%r2], [%d1], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r2+256], [%d1+256], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;  // first
    xor.b32 %r3, tid, 63;
    mad.lo.u32 %r3, %r3, 4, shared;
    ld.shared.u32 %r4, [%r3];
    cp.async.wait_group 0;
    bar.sync 0;  // second
    ld.shared.u32 %r5, [%r3+256];
    sub.u32 %r4, %r4, %r5;
    st.global.u32 [%d2], %r4;
"""


def pipeline(body, **schedule):
    x, y = integers(32, seed=1, count=128), np.zeros(64, np.uint32)
    launch(body, threads=64, shared_bytes=512, schedule=schedule, x=x, y=y)
    np.testing.assert_array_equal(y, (x[:64] - x[64:])[::-1])


@every_schedule
def test_the_pipeline_is_right(schedule):
    pipeline(PIPELINE, **schedule)


@pytest.mark.parametrize("schedule", [{}, {"race": False}], ids=["race", "lockstep"])
@pytest.mark.parametrize(("found", "new", "line"), [
    ("cp.async.wait_group 1;", "", "[%r3];"),
    ("cp.async.wait_group 1;", "cp.async.wait_group 2;", "[%r3];"),
    ("cp.async.wait_group 0;", "", "[%r3+256];"),
    ("cp.async.wait_group 0;", "cp.async.wait_group 1;", "[%r3+256];"),
    ("cp.async.wait_group 0;", "st.shared.u32 [%r2+256], 0;", "[%r2+256], 0;"),
], ids=["removed", "one-too-large", "last-removed", "last-too-large", "written-in-flight"])
def test_data_are_used_before_their_group_has_landed(found, new, line, schedule):
    broken = mutated(PIPELINE, found, new)
    with pytest.raises(AsyncNotWaited) as caught:
        pipeline(broken, **schedule)
    assert kernel(broken, "x", "y").splitlines()[caught.value.line - 1].endswith(line)
    assert caught.value.block == (0, 0, 0)
    assert caught.value.address is not None


@pytest.mark.parametrize("barrier", ["first", "second"])
def test_a_thread_has_waited_for_its_own_copies_only(barrier):
    with pytest.raises((Race, AsyncNotWaited)):
        pipeline(mutated(PIPELINE, f"bar.sync 0;  // {barrier}"))


def test_a_copy_without_commit_is_in_no_group():
    with pytest.raises(AsyncNotWaited):
        pipeline(PIPELINE.replace("cp.async.commit_group;\n    cp.async.wait", "cp.async.wait"))
