"""Warp-wide instructions, barriers and divergence."""
import numpy as np
import pytest
from emulator_checks import every_schedule, integers, launch

LANES = np.arange(32)
X = integers(32, seed=1, count=96)
STORE = "mad.wide.u32 %d2, tid, 4, y;\nst.global.u32 [%d2], {};"
LOAD = "mad.wide.u32 %d1, tid, 4, x;\nld.global.u32 %r1, [%d1];\n"


def through(body, result="%r2", x=X, threads=96, **options):
    """Loads x into %r1, one element a thread, and stores what `body` leaves in `result`."""
    y = np.zeros(threads, np.uint32)
    launch(LOAD + body + "\n" + STORE.format(result), threads=threads, x=x, y=y, **options)
    return y


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("amount", [0, 1, 3, 7, 31])
def test_shuffle_inside_segments(mode, width, amount):
    """As the ISA's pseudo-code has it: c holds the segment mask and the clamp."""
    clamp = 0 if mode == "up" else 31
    expected, valid = X.reshape(-1, 32).copy(), np.zeros(32, bool)
    for lane in range(32):
        first, last = lane // width * width, lane // width * width + width - 1
        source = {"up": lane - amount, "down": lane + amount, "bfly": lane ^ amount,
                  "idx": first + amount % width}[mode]
        valid[lane] = source >= first if mode == "up" else source <= last
        if valid[lane]:
            expected[:, lane] = X.reshape(-1, 32)[:, source]
    body = f"shfl.sync.{mode}.b32 %r2|p, %r1, {amount}, {(32 - width) << 8 | clamp}, 0xffffffff;\n"
    np.testing.assert_array_equal(through(body), expected.ravel())
    np.testing.assert_array_equal(through(body + "selp.u32 %r3, 1, 0, p;", "%r3"),
                                  np.tile(valid, 3))


def test_a_shuffle_takes_its_lane_from_a_register():
    body = "and.b32 %r3, %r1, 31;\nshfl.sync.idx.b32 %r2, %r1, %r3, 31, -1;"
    expected = np.take_along_axis(X.reshape(3, 32), X.reshape(3, 32).astype(int) % 32, 1)
    np.testing.assert_array_equal(through(body), expected.ravel())


def test_a_butterfly_of_shuffles_adds_up_a_warp():
    body = "\n".join(f"shfl.sync.bfly.b32 %r3, %r1, {step}, 31, -1;\nadd.u32 %r1, %r1, %r3;"
                     for step in (16, 8, 4, 2, 1))
    sums = X.reshape(3, 32).sum(1, dtype=np.uint32)
    np.testing.assert_array_equal(through(body, "%r1"), np.repeat(sums, 32))


def test_votes():
    odd = (X % 2 == 1).reshape(3, 32)
    ballots = (odd.astype(np.uint64) << LANES.astype(np.uint64)).sum(1).astype(np.uint32)
    setp = "and.b32 %r3, %r1, 1;\nsetp.ne.s32 p, %r3, 0;\n"
    np.testing.assert_array_equal(through(setp + "vote.sync.ballot.b32 %r2, p, -1;"),
                                  np.repeat(ballots, 32))
    np.testing.assert_array_equal(through(setp + "vote.sync.ballot.b32 %r2, !p, -1;"),
                                  np.repeat(~ballots, 32))


@pytest.mark.parametrize(("mode", "answers"), [
    ("all", [True, False, False]), ("any", [True, False, True]), ("uni", [True, True, False])])
def test_votes_of_unanimous_and_divided_warps(mode, answers):
    x = np.concatenate([np.ones(32), np.zeros(32), LANES == 5]).astype(np.uint32)
    body = (f"setp.ne.s32 p, %r1, 0;\nvote.sync.{mode}.pred q, p, 0xffffffff;\n"
            "selp.u32 %r2, 1, 0, q;")
    np.testing.assert_array_equal(through(body, x=x), np.repeat(answers, 32))


@pytest.mark.parametrize(("name", "function"), [
    ("add.u32", np.add), ("add.s32", np.add), ("min.u32", np.minimum), ("max.u32", np.maximum),
    ("min.s32", np.minimum), ("max.s32", np.maximum), ("and.b32", np.bitwise_and),
    ("or.b32", np.bitwise_or), ("xor.b32", np.bitwise_xor)])
def test_warp_reductions(name, function):
    x = X.view(np.int32) if name.endswith("s32") else X
    np.testing.assert_array_equal(
        through(f"redux.sync.{name} %r2, %r1, 0xffffffff;").view(x.dtype),
        np.repeat(function.reduce(x.reshape(3, 32), axis=1, dtype=x.dtype), 32))


@pytest.mark.parametrize("bits", [32, 64])
def test_lanes_of_equal_value_find_each_other(bits):
    x = np.concatenate([X[:32] % 5, np.full(32, 9), LANES % 2]).astype(np.uint32)
    equal = x.reshape(3, 32)[:, :, None] == x.reshape(3, 32)[:, None, :]
    masks = (equal << LANES.astype(np.uint64)).sum(2).astype(np.uint32)
    value = {32: "%r1", 64: "%d3"}[bits]
    body = "cvt.u64.u32 %d3, %r1;\nshl.b64 %d3, %d3, 32;\n"
    np.testing.assert_array_equal(
        through(body + f"match.any.sync.b{bits} %r2, {value}, -1;", x=x), masks.ravel())
    everybody = through(body + f"match.all.sync.b{bits} %r2|p, {value}, -1;\n@!p xor.b32 %r2, %r2, "
                        "7;", x=x)
    np.testing.assert_array_equal(everybody, np.repeat([7, 2 ** 32 - 1, 7], 32))


def test_one_lane_is_elected():
    chosen = through("elect.sync %r3|p, 0xffffffff;\nselp.u32 %r2, 1, 0, p;").reshape(3, 32)
    assert (chosen.sum(1) == 1).all()
    leader = through("elect.sync %r2|p, 0xffffffff;").reshape(3, 32)
    assert (leader == chosen.argmax(1)[:, None]).all()


def test_active_lanes_are_those_of_the_branch():
    y = through("""
        and.b32 %r3, tid, 3;
        setp.ne.s32 p, %r3, 1;
        mov.u32 %r2, 0;
        @p bra END;
        activemask.b32 %r2;
        END:""")
    assert (y[1::4] == 0x22222222).all()
    assert (np.delete(y.reshape(-1, 4), 1, axis=1) == 0).all()


def test_special_registers_number_the_threads():
    y = np.zeros((3, 2, 2, 5, 4, 12), np.uint32)
    names = ["tid.x", "tid.y", "tid.z", "ctaid.x", "ctaid.y", "ctaid.z", "ntid.x", "ntid.y",
             "ntid.z", "nctaid.x", "nctaid.y", "laneid"]
    launch("""
        mov.u32 %r1, %ctaid.z;
        mov.u32 %r2, %ctaid.y;
        mad.lo.u32 %r1, %r1, 2, %r2;
        mov.u32 %r2, %ctaid.x;
        mad.lo.u32 %r1, %r1, 2, %r2;
        mov.u32 %r2, %tid.y;
        mad.lo.u32 %r1, %r1, 5, %r2;
        mov.u32 %r2, %tid.x;
        mad.lo.u32 %r1, %r1, 4, %r2;
        mad.wide.u32 %d1, %r1, 48, y;
        """ + "\n".join(f"mov.u32 %r3, %{name};\nst.global.u32 [%d1+{4 * i}], %r3;"
                        for i, name in enumerate(names)),
           blocks=(2, 2, 3), threads=(4, 5), y=y)
    z, block_y, block_x, tid_y, tid_x = np.indices(y.shape[:-1])
    expected = [tid_x, tid_y, 0, block_x, block_y, z, 4, 5, 1, 2, 2, tid_y * 4 + tid_x]
    for i, value in enumerate(expected):
        assert (y[..., i] == value).all(), names[i]


@pytest.mark.parametrize("name", ["eq", "lt", "le", "gt", "ge"])
def test_lane_masks(name):
    masks = {"eq": 1 << LANES, "lt": (1 << LANES) - 1, "le": (2 << LANES) - 1}
    masks |= {"gt": 2 ** 32 - 1 - masks["le"], "ge": 2 ** 32 - 1 - masks["lt"]}
    np.testing.assert_array_equal(through(f"mov.u32 %r2, %lanemask_{name};"),
                                  np.tile(masks[name], 3))


# ---------------------------------------------------------------------------------------- barriers

EXCHANGE = """
    mad.lo.u32 %r4, tid, 4, shared;
    st.shared.u32 [%r4], %r1;
    {barrier}
    sub.u32 %r5, 95, tid;
    mad.lo.u32 %r5, %r5, 4, shared;
    ld.shared.u32 %r2, [%r5];
"""


@every_schedule
@pytest.mark.parametrize("barrier", [
    "bar.sync 0;", "bar.sync 0, 96;", "bar.cta.sync 3;", "barrier.sync.aligned 0;",
    "barrier.cta.sync.aligned 5, 96;", "mov.u32 %r9, 4;\nbar.sync %r9;"])
def test_a_barrier_makes_the_stores_of_all_warps_visible(barrier, schedule):
    y = through(EXCHANGE.format(barrier=barrier), shared_bytes=384, schedule=schedule)
    np.testing.assert_array_equal(y, X[::-1])


@every_schedule
@pytest.mark.parametrize("name", ["popc.u32", "and.pred", "or.pred"])
def test_a_barrier_can_count_and_vote(name, schedule):
    for odd in (X % 2 == 1, X >= 0, X < 0):
        result = "%r2" if name == "popc.u32" else "q"
        y = through(f"""
            setp.ne.u32 p, %r1, 0;
            barrier.cta.red.{name.replace(".", ".aligned.")} {result}, 0, p;
            {"" if result == "%r2" else "selp.u32 %r2, 1, 0, q;"}""", x=odd.astype(np.uint32),
                    schedule=schedule)
        expected = {"popc.u32": odd.sum(), "and.pred": odd.all(), "or.pred": odd.any()}[name]
        assert (y == expected).all()


@every_schedule
def test_producers_arrive_and_consumers_wait(schedule):
    """Warps 0 and 1 fill a buffer that warp 2 reads; warp 2 frees it for the next round."""
    y = np.zeros((4, 32), np.uint32)
    launch("""
        setp.ge.u32 p, tid, 64;
        mov.u32 %r1, 0;
        @p bra CONSUMER;
        mad.lo.u32 %r2, tid, 4, shared;
        PRODUCER:
        bar.sync 2, 96;
        mad.lo.u32 %r3, %r1, 1000, tid;
        st.shared.u32 [%r2], %r3;
        bar.arrive 1, 96;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 q, %r1, 4;
        @q bra PRODUCER;
        bra END;
        CONSUMER:
        sub.u32 %r2, tid, 64;
        mad.lo.u32 %r3, %r2, 8, shared;
        ROUND:
        bar.arrive 2, 96;
        bar.sync 1, 96;
        ld.shared.v2.u32 {%r4, %r5}, [%r3];
        add.u32 %r4, %r4, %r5;
        mad.lo.u32 %r6, %r1, 32, %r2;
        mad.wide.u32 %d1, %r6, 4, y;
        st.global.u32 [%d1], %r4;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 q, %r1, 4;
        @q bra ROUND;
        END:""", threads=96, shared_bytes=256, schedule=schedule, y=y)
    np.testing.assert_array_equal(y, 2000 * np.arange(4)[:, None] + 4 * LANES + 1)


@every_schedule
def test_each_pair_of_warps_has_a_barrier_of_its_own(schedule):
    """The number of the barrier is in a register and differs between the warps."""
    x = np.resize(X, 128)
    y = through("""
        mad.lo.u32 %r4, tid, 4, shared;
        st.shared.u32 [%r4], %r1;
        shr.u32 %r5, tid, 6;
        add.u32 %r5, %r5, 1;
        bar.sync %r5, 64;
        xor.b32 %r6, tid, 63;
        mad.lo.u32 %r6, %r6, 4, shared;
        ld.shared.u32 %r2, [%r6];""", x=x, threads=128, shared_bytes=512, schedule=schedule)
    np.testing.assert_array_equal(y, x[np.arange(128) ^ 63])


@every_schedule
@pytest.mark.parametrize("instruction", [
    "bar.sync 1, 64;", "barrier.sync 2, 64;", "shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;",
    "vote.sync.ballot.b32 %r2, p, -1;", "redux.sync.min.u32 %r2, %r1, -1;"])
def test_a_predicate_may_choose_whole_warps(instruction, schedule):
    y = through(f"setp.ge.u32 p, tid, 32;\nmov.u32 %r2, 7;\n@p {instruction}",
                schedule=schedule).reshape(3, 32)
    warps = X.reshape(3, 32)[1:]
    expected = {"shfl": warps[:, 3:4], "vote": 2 ** 32 - 1,
                "redu": warps.min(1, keepdims=True)}.get(instruction[:4], 7)
    assert (y[0] == 7).all()
    assert (y[1:] == expected).all()


@every_schedule
def test_threads_of_a_warp_may_come_to_a_barrier_one_by_one(schedule):
    """`barrier` without .aligned, from two places."""
    y = through(EXCHANGE.format(barrier="""
        and.b32 %r6, tid, 1;
        setp.eq.u32 p, %r6, 0;
        @p barrier.sync 1, 96;
        @!p barrier.sync 1, 96;"""), shared_bytes=384, schedule=schedule)
    np.testing.assert_array_equal(y, X[::-1])


@every_schedule
def test_a_warp_synchronises_itself(schedule):
    y = through("""
        mad.lo.u32 %r4, tid, 4, shared;
        st.shared.u32 [%r4], %r1;
        bar.warp.sync 0xffffffff;
        xor.b32 %r5, tid, 9;
        mad.lo.u32 %r5, %r5, 4, shared;
        ld.shared.u32 %r2, [%r5];""", shared_bytes=384, schedule=schedule)
    np.testing.assert_array_equal(y, X[np.arange(96) ^ 9])


@every_schedule
def test_threads_that_have_left_do_not_hold_up_a_barrier(schedule):
    y = np.zeros(96, np.uint32)
    launch("""
        setp.ge.u32 p, tid, 40;
        @p ret;
        mad.lo.u32 %r4, tid, 4, shared;
        st.shared.u32 [%r4], tid;
        bar.sync 0;
        sub.u32 %r5, 39, tid;
        mad.lo.u32 %r5, %r5, 4, shared;
        ld.shared.u32 %r2, [%r5];
        """ + STORE.format("%r2"), threads=96, shared_bytes=384, schedule=schedule, y=y)
    assert y.tolist() == [*range(39, -1, -1), *[0] * 56]


# -------------------------------------------------------------------------------------- divergence

@pytest.mark.parametrize("schedule", [{}, {"seed": 3}], ids=["lockstep", "random"])
def test_a_loop_runs_as_often_as_each_thread_needs(schedule):
    """Collatz: the threads of a warp leave the loop one after the other and meet again."""
    y = np.zeros(96, np.uint32)
    launch("""
        add.u32 %r1, tid, 1;
        mov.u32 %r2, 0;
        NEXT:
        setp.eq.u32 p, %r1, 1;
        @p bra DONE;
        add.u32 %r2, %r2, 1;
        and.b32 %r3, %r1, 1;
        setp.eq.u32 q, %r3, 0;
        @q bra EVEN;
        mad.lo.u32 %r1, %r1, 3, 1;
        bra NEXT;
        EVEN:
        shr.u32 %r1, %r1, 1;
        bra.uni NEXT;
        DONE:
        shfl.sync.idx.b32 %r4, %r2, 26, 31, -1;      // 27 takes 111 steps
        add.u32 %r2, %r2, %r4;
        """ + STORE.format("%r2"), threads=96, schedule=schedule, y=y)

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    count = np.array([steps(n) for n in range(1, 97)])
    np.testing.assert_array_equal(y, count + np.repeat(count[26::32], 32))


def test_a_branch_by_table():
    y = through("""
        and.b32 %r3, %r1, 3;
        TABLE: .branchtargets ZERO, ONE, TWO, ONE;
        brx.idx %r3, TABLE;
        ZERO:
        mov.u32 %r2, 10;
        bra END;
        ONE:
        mov.u32 %r2, 11;
        bra END;
        TWO:
        mov.u32 %r2, 12;
        END:
        vote.sync.ballot.b32 %r4, p, -1;""")
    np.testing.assert_array_equal(y, np.array([10, 11, 12, 11])[X % 4])


def test_both_sides_of_a_branch_run_with_their_own_registers():
    y = through("""
        setp.lt.u32 p, %r1, 0x80000000;
        @p bra LOW;
        { .reg .b32 %r2; mov.u32 %r2, 7; }          // another %r2, of this scope alone
        not.b32 %r2, %r1;
        bra JOIN;
        LOW:
        mov.u32 %r2, %r1;
        JOIN:""")
    np.testing.assert_array_equal(y, np.minimum(X, ~X))
