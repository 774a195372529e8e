"""Distributed shared memory: what the blocks of a cluster do in each other's."""
import numpy as np
import pytest
from emulator_checks import every_schedule, launch, mutated
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.emulator import (
    EmulatorError,
    Misaligned,
    OutOfBounds,
    Race,
    UninitialisedRead,
)

BOTH = pytest.mark.parametrize("schedule", [{}, {"seed": 3}], ids=["lockstep", "random"])

# ----------------------------------------------------------------------------------------- exchange

# Every block of 64 threads writes 64 floats of x to its shared memory. Then thread t of the first
# 16 of each block adds elements 4t .. 4t + 3 of all blocks of the cluster, in vectors of four.
EXCHANGE = """
    .reg .b32 rank, blocks, block, at, remote;
    mov.u32 rank, %cluster_ctarank;
    mov.u32 blocks, %cluster_nctarank;
    mov.u32 %r1, %ctaid.y;
    mov.u32 %r2, %nctaid.x;
    mov.u32 block, %ctaid.x;
    mad.lo.u32 block, %r1, %r2, block;
    mad.lo.u32 %r3, block, 64, tid;
    mad.wide.u32 %d1, %r3, 4, x;
    ld.global.f32 %f1, [%d1];
    mad.lo.u32 at, tid, 4, shared;
    st.shared.f32 [at], %f1;
    barrier.cluster.arrive.release.aligned;  // first
    barrier.cluster.wait.acquire.aligned;  // first
    setp.ge.u32 p, tid, 16;
    @p bra DONE;
    mad.lo.u32 at, tid, 16, shared;
    mov.f32 %f10, 0f00000000;
    mov.f32 %f11, 0f00000000;
    mov.f32 %f12, 0f00000000;
    mov.f32 %f13, 0f00000000;
    mov.u32 %r4, 0;
    NEXT:
    mapa.shared::cluster.u32 remote, at, %r4;
    ld.shared::cluster.v4.f32 {%f2, %f3, %f4, %f5}, [remote];
    add.f32 %f10, %f10, %f2;
    add.f32 %f11, %f11, %f3;
    add.f32 %f12, %f12, %f4;
    add.f32 %f13, %f13, %f5;
    add.u32 %r4, %r4, 1;
    setp.lt.u32 q, %r4, blocks;
    @q bra NEXT;
    mad.lo.u32 %r5, block, 16, tid;
    mad.wide.u32 %d2, %r5, 16, y;
    st.global.v4.f32 [%d2], {%f10, %f11, %f12, %f13};
    DONE:
    barrier.cluster.arrive.release.aligned;  // last
    barrier.cluster.wait.acquire.aligned;  // last
"""
FIRST = ["barrier.cluster.arrive.release.aligned;  // first",
         "barrier.cluster.wait.acquire.aligned;  // first"]
LAST = ["barrier.cluster.arrive.release.aligned;  // last",
        "barrier.cluster.wait.acquire.aligned;  // last"]


def without(body, lines):
    for line in lines:
        body = mutated(body, line)
    return body


def exchange(body, *, grid=(2, 4), cluster=(1, 4), schedule=None):
    """The sums over each cluster, which is along y, and what they must be."""
    width, height = grid
    x = np.random.default_rng(0).integers(-99, 99, (height, width, 64)).astype(np.float32)
    y = np.full_like(x, np.nan)
    stats = launch(body, blocks=grid, threads=64, cluster=cluster, shared_bytes=256,
                   schedule=schedule, x=x, y=y)
    sums = x.reshape(-1, cluster[1], width, 64).sum(1, keepdims=True)
    return y, np.broadcast_to(sums, (sums.shape[0], cluster[1], width, 64)).reshape(y.shape), stats


@every_schedule
@pytest.mark.parametrize(("grid", "cluster", "waves"), [
    ((2, 4), (1, 4), 1), ((1, 2), (1, 2), 1), ((3, 8), (1, 8), 1), ((2, 6), (1, 3), 1),
    ((3, 5), (1, 1), 1), ((5, 8), (1, 8), 2)])
def test_blocks_add_what_the_others_have_in_shared_memory(grid, cluster, waves, schedule):
    """Several clusters in a wave, and clusters in several waves, of which none is cut in two."""
    y, expected, stats = exchange(EXCHANGE, grid=grid, cluster=cluster, schedule=schedule)
    np.testing.assert_array_equal(y, expected)
    assert stats.waves == waves


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_warps_adds_the_same(seed):
    y, expected, _ = exchange(EXCHANGE, schedule={"seed": seed})
    np.testing.assert_array_equal(y, expected)


@BOTH
def test_waves_hold_whole_clusters(schedule):
    """32 blocks of 64 threads fit a wave, but only ten clusters of three."""
    y, expected, stats = exchange(EXCHANGE, grid=(3, 21), cluster=(1, 3), schedule=schedule)
    np.testing.assert_array_equal(y, expected)
    assert stats.waves == 3


def test_blocks_of_1024_threads_in_a_cluster_of_eight_are_one_wave():
    body = """
        mov.u32 %r1, %cluster_ctarank;
        mad.lo.u32 %r2, tid, 4, shared;
        st.shared.u32 [%r2], %r1;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        xor.b32 %r3, %r1, 7;
        mapa.shared::cluster.u32 %r4, %r2, %r3;
        ld.shared::cluster.u32 %r5, [%r4];
        mad.lo.u32 %r6, %r1, 1024, tid;
        mad.wide.u32 %d1, %r6, 4, y;
        st.global.u32 [%d1], %r5;
        barrier.cluster.arrive;
        barrier.cluster.wait;
    """
    y = np.full((8, 1024), 99, np.uint32)
    stats = launch(body, blocks=8, threads=1024, cluster=8, shared_bytes=4096, y=y)
    assert stats.waves == 1
    assert (y == np.arange(8)[::-1, None]).all()


# --------------------------------------------------------------------------------- missing barriers

@BOTH
def test_without_the_first_barrier_a_block_may_not_have_started(schedule):
    with pytest.raises(Race, match=r"of block \(\d, \d, 0\) of kernel 'k' uses shared address "
                       r"0x[4-5]\w\w of block \(\d, \d, 0\), which may not have started") as caught:
        exchange(without(EXCHANGE, FIRST), schedule=schedule)
    assert "ld.shared::cluster" in caught.value.instruction
    assert caught.value.block is not None


@pytest.mark.parametrize("schedule", [{"race": False}, {"race": False, "seed": 1}])
def test_the_start_is_checked_without_the_race_check_too(schedule):
    with pytest.raises(Race, match="may not have started"):
        exchange(without(EXCHANGE, FIRST), schedule=schedule)


@BOTH
def test_a_relaxed_arrival_orders_nothing(schedule):
    relaxed = FIRST[0].replace("release", "relaxed")
    with pytest.raises(Race, match=r"reads shared address 0x\w+( of block \(\d, \d, 0\))? in warp "
                       r"0: warp [01]( of block \(\d, \d, 0\))? has written it"):
        exchange(mutated(EXCHANGE, FIRST[0], relaxed), schedule=schedule)


def test_a_relaxed_barrier_before_the_writes_is_no_barrier_after_them():
    """It says that all have started, so that the race is what is left."""
    start = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n"
    body = without(EXCHANGE, FIRST).replace("mov.u32 rank", start + "mov.u32 rank", 1)
    with pytest.raises(Race, match="no barrier orders the two"):
        exchange(body)
    y, expected, _ = exchange(EXCHANGE.replace("mov.u32 rank", start + "mov.u32 rank", 1))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_without_the_last_barrier_a_block_may_end_before_others_have_read(seed):
    """In any order: lock-step, where the reads do come before the end, is told as well."""
    with pytest.raises(Race, match=r"which has ended|is of a block that ends: warp 0 of block "
                       r"\(\d, \d, 0\) has read its shared address") as caught:
        exchange(without(EXCHANGE, LAST), schedule={"seed": seed})
    assert caught.value.address is not None


def test_a_relaxed_last_barrier_comes_after_reads_whose_values_were_there():
    y, expected, _ = exchange(mutated(EXCHANGE, LAST[0], LAST[0].replace("release", "relaxed")))
    np.testing.assert_array_equal(y, expected)


def test_a_relaxed_last_barrier_does_not_order_writes_before_the_end():
    body = """
        mov.u32 %r1, %cluster_ctarank;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        xor.b32 %r2, %r1, 1;
        mapa.shared::cluster.u32 %r3, shared, %r2;
        st.shared::cluster.u32 [%r3], %r1;
        barrier.cluster.arrive{};
        barrier.cluster.wait;"""
    options = {"blocks": 2, "cluster": 2, "threads": 1, "shared_bytes": 4}
    launch(body.format(".release"), **options)
    with pytest.raises(Race, match="has written its shared address"):
        launch(body.format(".relaxed"), **options)


@pytest.mark.parametrize("schedule", [{"race": False}, {"race": False, "seed": 1}, {}, {"seed": 1}])
def test_a_block_that_has_ended_has_no_memory(schedule):
    body = """
        mov.u32 %r1, %cluster_ctarank;
        st.shared.u32 [shared], %r1;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        setp.eq.u32 p, %r1, 0;
        @p ret;
        mov.u32 %r4, 0;
        AGAIN:                                  // long enough for block 0 to end in any order
        add.u32 %r4, %r4, 1;
        setp.lt.u32 q, %r4, 500;
        @q bra AGAIN;
        mapa.shared::cluster.u32 %r2, shared, {};
        ld.shared::cluster.u32 %r3, [%r2];"""
    options = {"blocks": 2, "cluster": 2, "threads": 1, "shared_bytes": 4, "schedule": schedule}
    launch(body.format(1), **options)
    with pytest.raises(Race, match=r"\(1, 0, 0\) .* of block \(0, 0, 0\), which has end") as caught:
        launch(body.format(0), **options)
    assert "ld.shared::cluster" in caught.value.instruction


@pytest.mark.parametrize("access", ["st.shared::cluster.u32 [%r2], %r1;",
                                    "atom.shared::cluster.add.u32 %r3, [%r2], 1;"])
def test_a_block_may_end_before_others_have_changed_its_memory(access):
    body = """
        mov.u32 %r1, %cluster_ctarank;
        st.shared.u32 [shared], %r1;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        xor.b32 %r2, %r1, 1;
        mapa.shared::cluster.u32 %r2, shared, %r2;
        {}
        {}"""
    options = {"blocks": 2, "cluster": 2, "threads": 1, "shared_bytes": 4}
    launch(body.format(access, "barrier.cluster.arrive;\nbarrier.cluster.wait;"), **options)
    did = "written" if access.startswith("st") else "updated"
    with pytest.raises(Race, match=r"block \(0, 0, 0\) of kernel 'k' is of a block that ends: warp "
                       rf"0 of block \(1, 0, 0\) has {did} its shared address 0x400"):
        launch(body.format(access, ""), **options)


@pytest.mark.parametrize(("first", "second", "message"), [
    ("barrier.cluster.arrive;", "bra.uni READ;", "may not have started"),
    ("barrier.cluster.arrive.release;", "barrier.cluster.arrive.relaxed;\nbra.uni WAIT;",
     "no barrier orders the two")])
def test_a_wave_knows_nothing_of_the_one_before(first, second, message):
    """The second cluster lacks what the first one, which alone fills a wave, has."""
    body = f"""
        mov.u32 %r1, %cluster_ctarank;
        mov.u32 %r2, %clusterid.x;
        mad.lo.u32 %r3, tid, 4, shared;
        st.shared.u32 [%r3], %r1;
        setp.eq.u32 p, %r2, 0;
        @p bra FIRST;
        {second}
        FIRST:
        {first}
        WAIT:
        barrier.cluster.wait;
        READ:
        xor.b32 %r1, %r1, 1;
        mapa.shared::cluster.u32 %r3, %r3, %r1;
        ld.shared::cluster.u32 %r4, [%r3];
        barrier.cluster.arrive;
        barrier.cluster.wait;"""
    options = {"cluster": 2, "threads": 1024, "shared_bytes": 4096}
    assert launch(body, blocks=2, **options).waves == 1
    with pytest.raises(Race, match=message) as caught:
        launch(body, blocks=4, **options)
    assert caught.value.block[0] in (2, 3)


# Each block writes, all read the next block's, and all write again.
REWRITE = """
    mov.u32 %r1, %cluster_ctarank;
    mad.lo.u32 %r2, tid, 4, shared;
    add.u32 %r3, %r1, 1;
    and.b32 %r3, %r3, 3;
    mapa.shared::cluster.u32 %r4, %r2, %r3;
    st.shared.u32 [%r2], tid;
    barrier.cluster.arrive;  // filled
    barrier.cluster.wait;  // filled
    ld.shared::cluster.u32 %r5, [%r4];
    barrier.cluster.arrive;  // used
    barrier.cluster.wait;  // used
    st.shared.u32 [%r2], %r5;
    bar.sync 0;
    ld.shared.u32 %r6, [%r2];
"""


@BOTH
def test_a_block_writes_again_what_others_read(schedule):
    options = {"blocks": 8, "cluster": 4, "threads": 64, "shared_bytes": 256, "schedule": schedule}
    launch(REWRITE, **options)
    used = ["barrier.cluster.arrive;  // used", "barrier.cluster.wait;  // used"]
    with pytest.raises(Race, match=r"(writes shared address 0x\w+ in warp \d: warp \d of block "
                       r"\(\d, 0, 0\) has read it|reads shared address 0x\w+ of block .* has "
                       r"written it)"):
        launch(without(REWRITE, used), **options)
    for line in used:       # bar.sync is a barrier of the block alone
        with pytest.raises(EmulatorError):
            launch(mutated(REWRITE, line, "bar.sync 0;"), **options)


@BOTH
def test_stores_to_another_block(schedule):
    """Every block writes into the next one's memory, which that one reads."""
    body = """
        barrier.cluster.arrive;
        barrier.cluster.wait;
        mov.u32 %r1, %cluster_ctarank;
        add.u32 %r2, %r1, 1;
        and.b32 %r2, %r2, 3;
        mad.lo.u32 %r3, tid, 8, shared;
        mapa.shared::cluster.u32 %r4, %r3, %r2;
        st.shared::cluster.v2.u32 [%r4], {%r1, tid};
        barrier.cluster.arrive;  // written
        barrier.cluster.wait;  // written
        ld.shared.v2.u32 {%r5, %r6}, [%r3];
        mad.lo.u32 %r7, %r1, 64, tid;
        mad.wide.u32 %d1, %r7, 8, y;
        st.global.v2.u32 [%d1], {%r5, %r6};
    """
    options = {"blocks": 4, "cluster": 4, "threads": 64, "shared_bytes": 512, "schedule": schedule}
    y = np.full((4, 64, 2), 99, np.uint32)
    launch(body, y=y, **options)
    assert (y[..., 0] == np.array([3, 0, 1, 2])[:, None]).all()
    assert (y[..., 1] == np.arange(64)).all()
    with pytest.raises((Race, UninitialisedRead)):
        launch(without(body, ["barrier.cluster.arrive;  // written",
                              "barrier.cluster.wait;  // written"]), y=y, **options)


@BOTH
def test_two_blocks_write_one_word_of_a_third(schedule):
    body = """
        barrier.cluster.arrive;
        barrier.cluster.wait;
        mov.u32 %r1, %cluster_ctarank;
        mapa.shared::cluster.u32 %r2, shared, 0;
        setp.gt.u32 p, %r1, {};
        @p st.shared::cluster.u32 [%r2], %r1;
        barrier.cluster.arrive;
        barrier.cluster.wait;"""
    options = {"blocks": 3, "cluster": 3, "threads": 1, "shared_bytes": 4, "schedule": schedule}
    launch(body.format(1), **options)
    with pytest.raises(Race, match=r"writes shared address 0x400 of block \(0, 0, 0\)"):
        launch(body.format(0), **options)


@BOTH
def test_atomics_count_in_the_memory_of_block_0(schedule):
    body = """
        mov.u32 %r1, %cluster_ctarank;
        setp.eq.u32 p, tid, 0;
        @p st.shared.u32 [shared], %r1;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        mapa.shared::cluster.u32 %r2, shared, 0;
        atom.shared::cluster.add.u32 %r3, [%r2], 1;
        red.shared::cluster.add.u32 [%r2], 2;
        barrier.cluster.arrive;  // counted
        barrier.cluster.wait;  // counted
        ld.shared.u32 %r4, [shared];
        mad.wide.u32 %d1, %r1, 4, y;
        st.global.u32 [%d1], %r4;"""
    options = {"blocks": 4, "cluster": 4, "threads": 64, "shared_bytes": 4, "schedule": schedule}
    y = np.full(4, 99, np.uint32)
    launch(body, y=y, **options)
    assert y.tolist() == [3 * 4 * 64, 1, 2, 3]
    with pytest.raises(Race):
        launch(without(body, ["barrier.cluster.arrive;  // counted",
                              "barrier.cluster.wait;  // counted"]), y=y, **options)


# Three blocks of two warps: warp w of the cluster is warp w % 2 of block w // 2.
ACCESSES = st.tuples(st.sampled_from(["ld", "st", "atom"]), st.integers(0, 5), st.integers(0, 2))
BARRIERS = st.tuples(st.just("block"), st.integers(0, 2)) | st.tuples(
    st.just("cluster"), st.none() | st.integers(0, 5))
PROLOGUE = """
    mov.u32 %r1, %cluster_ctarank;
    mad.lo.u32 %r2, %r1, 64, tid;
    setp.eq.u32 p, tid, 0;
    @p st.shared.u32 [shared], 0;
    mapa.shared::cluster.u32 %r10, shared, 0;
    mapa.shared::cluster.u32 %r11, shared, 1;
    mapa.shared::cluster.u32 %r12, shared, 2;
    barrier.cluster.arrive;
    barrier.cluster.wait;
"""


def traced(steps):
    """The kernel that does these steps, and whether an access in it is unordered with another or
    with the end of its block. Every other "cluster" is a wait; one warp may arrive relaxed."""
    body, known, done, race = [PROLOGUE], [set() for _ in range(6)], [], False
    released, reached = None, set()             # what is known to the waits to come; of reads, that
    over = [set() for _ in range(6)]            # they are over
    if sum(name == "cluster" for name, *_ in steps) % 2:
        steps = [*steps, ("cluster", None)]
    for number, (name, *what) in enumerate(steps):
        if name == "block":
            first, second = 2 * what[0], 2 * what[0] + 1
            both = known[first] | known[second]
            known[first], known[second] = set(both), set(both)
            body.append(f"setp.ne.u32 p, %r1, {what[0]};\n@p bra L{number};\nbar.sync 0;\n"
                        f"L{number}:")
        elif name == "cluster" and released is None:
            released = set().union(*(known[w] for w in range(6) if w != what[0]))
            reached = {event for event in set().union(*known) if done[event][0] == "ld"}
            relaxed = 99 if what[0] is None else 32 * what[0]
            body.append(f"and.b32 %r3, %r2, -32;\nsetp.eq.u32 p, %r3, {relaxed};\n"
                        "@p barrier.cluster.arrive.relaxed;\n@!p barrier.cluster.arrive.release;")
        elif name == "cluster":
            known = [k | released for k in known]
            over = [o | reached for o in over]
            released = None
            body.append("barrier.cluster.wait;")
        else:
            warp, block = what
            body.append(f"setp.eq.u32 p, %r2, {32 * warp};")
            body.append({"ld": f"@p ld.shared::cluster.u32 %r4, [%r1{block}];",
                         "st": f"@p st.shared::cluster.u32 [%r1{block}], tid;",
                         "atom": f"@p atom.shared::cluster.add.u32 %r4, [%r1{block}], 1;"}[name])
            race |= any(event not in known[warp] for event, (kind, _, at) in enumerate(done)
                        if at == block and {kind, name} not in ({"ld"}, {"atom"}))
            known[warp].add(len(done))
            done.append((name, warp, block))
    race |= any(event not in known[2 * at] | known[2 * at + 1] | over[2 * at] | over[2 * at + 1]
                for event, (_, warp, at) in enumerate(done) if warp // 2 != at)
    return "\n".join(body), race


@given(st.lists(ACCESSES | BARRIERS, max_size=8), st.booleans(), st.none() | st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_race_is_found_exactly_where_nothing_orders_two_accesses(steps, last, seed):
    """Any order of accesses and barriers, against the happens-before relation."""
    body, race = traced(steps + [("cluster", None)] * 4 * last)
    options = {"blocks": 3, "cluster": 3, "threads": 64, "shared_bytes": 4,
               "schedule": {"seed": seed}}
    if race:
        with pytest.raises(Race):
            launch(body, **options)
    else:
        launch(body, **options)


# --------------------------------------------------------------------------- faults in other blocks

# A block writes 8 bytes of its 16, all meet, and the block after it does {access} at `remote`.
ACCESS = """
    mov.u32 %r1, %cluster_ctarank;
    st.shared.v2.u32 [shared], {{%r1, %r1}};
    barrier.cluster.arrive;
    barrier.cluster.wait;
    xor.b32 %r2, %r1, 1;
    mapa.shared::cluster.u32 %r3, shared, %r2;
    {access}
    barrier.cluster.arrive;
    barrier.cluster.wait;"""


@BOTH
@pytest.mark.parametrize(("error", "wrong", "right", "message"), [
    (UninitialisedRead, "ld.shared::cluster.u32 %r4, [%r3+8];",
     "ld.shared::cluster.u32 %r4, [%r3+4];",
     r"reads shared address 0x408 of block \([01], 0, 0\), which was never written"),
    (OutOfBounds, "ld.shared::cluster.u32 %r4, [%r3+16];", "ld.shared::cluster.u32 %r4, [%r3];",
     r"reads 4 bytes at shared address 0x410 of block \([01], 0, 0\), 0 bytes past the end of"),
    (OutOfBounds, "st.shared::cluster.u32 [%r3+-4], %r1;", "st.shared::cluster.u32 [%r3+8], %r1;",
     r"writes 4 bytes at shared address 0x3fc of block \([01], 0, 0\), 4 bytes before"),
    (Misaligned, "ld.shared::cluster.v2.u32 {%r4, %r5}, [%r3+4];",
     "ld.shared::cluster.v2.u32 {%r4, %r5}, [%r3];",
     r"reads 8 bytes at shared address 0x404 of block \([01], 0, 0\), which is not a multiple"),
    (UninitialisedRead, "atom.shared::cluster.add.u32 %r4, [%r3+8], 1;",
     "atom.shared::cluster.add.u32 %r4, [%r3+4], 1;", r"0x408 of block \([01], 0, 0\)"),
    (OutOfBounds, "ld.shared.u32 %r4, [%r3];", "ld.shared.u32 %r4, [shared];", "shared::cluster"),
    (EmulatorError, "mapa.shared::cluster.u32 %r4, shared, 2;",
     "mapa.shared::cluster.u32 %r4, shared, 1;", "block 2 of its cluster, which has 2"),
    (EmulatorError, "mapa.u64 %d1, 0x10000400, 1;", "cvta.shared.u64 %d1, 0x400;\n"
     "mapa.u64 %d1, %d1, 1;", "0x10000400, which is not in shared memory"),
], ids=["unwritten", "past", "before", "misaligned", "atomic", "own-only", "rank", "generic"])
def test_a_fault_in_the_memory_of_another_block(error, wrong, right, message, schedule):
    options = {"blocks": 2, "cluster": 2, "threads": 1, "shared_bytes": 16, "schedule": schedule}
    launch(ACCESS.format(access=right), **options)
    with pytest.raises(error, match=message) as caught:
        launch(ACCESS.format(access=wrong), **options)
    assert type(caught.value) is error
    assert caught.value.instruction == wrong.rstrip(";")
