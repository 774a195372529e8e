"""Distributed shared memory: what the blocks of a cluster do in each other's."""
import numpy as np
import pytest
from emulator_checks import every_schedule, launch, mutated
from test_emulator_wgmma import (
    COMMIT_AND_WAIT,
    START,
    accumulators,
    descriptor,
    dump,
    gathered,
    instruction,
    place,
)

from kernels.emulator import (
    AsyncNotWaited,
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


def test_a_relaxed_last_barrier_does_not_order_the_reads_before_the_end():
    with pytest.raises(Race, match="is of a block that ends"):
        exchange(mutated(EXCHANGE, LAST[0], LAST[0].replace("release", "relaxed")))


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


@BOTH
def test_bytes_that_are_on_their_way_to_another_block(schedule):
    body = """
        mov.u32 %r1, %cluster_ctarank;
        mad.lo.u32 %r2, tid, 16, shared;
        mad.wide.u32 %d1, tid, 16, x;
        cp.async.cg.shared.global [%r2], [%d1], 16;
        cp.async.wait_all;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        xor.b32 %r3, %r1, 1;
        mapa.shared::cluster.u32 %r4, %r2, %r3;
        ld.shared::cluster.v4.u32 {%r5, %r6, %r7, %r8}, [%r4];
        barrier.cluster.arrive;
        barrier.cluster.wait;
        mad.lo.u32 %r1, %r1, 64, tid;
        mad.wide.u32 %d2, %r1, 16, y;
        st.global.v4.u32 [%d2], {%r5, %r6, %r7, %r8};"""
    x, y = np.arange(256, dtype=np.uint32), np.zeros((2, 256), np.uint32)
    options = {"blocks": 2, "cluster": 2, "threads": 64, "shared_bytes": 1024, "x": x, "y": y,
               "schedule": schedule}
    launch(body, **options)
    assert (y == x).all()
    with pytest.raises(AsyncNotWaited, match=r"of block \([01], 0, 0\): bytes of a cp.async"):
        launch(mutated(body, "cp.async.wait_all;"), **options)


# Each block copies 1 KiB in bulk to its own shared memory and waits at its own mbarrier; then the
# odd blocks read what the even ones have.
BULK = """
    mov.u32 %r1, %cluster_ctarank;
    setp.ne.u32 p, tid, 0;
    @p bra READY;
    mbarrier.init.shared::cta.b64 [shared+1024], 1;
    fence.mbarrier_init.release.cluster;
    READY:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    @p bra WAIT;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [shared+1024], 1024;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [shared], [x], 1024,
        [shared+1024];
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 q, [shared+1024], 0;
    @!q bra WAIT;
    barrier.cluster.arrive;  // landed
    barrier.cluster.wait;  // landed
    mad.lo.u32 %r2, tid, 16, shared;
    and.b32 %r3, %r1, 1;
    setp.ne.u32 p, %r3, 1;
    @p bra END;
    sub.u32 %r3, %r1, 1;
    mapa.shared::cluster.u32 %r2, %r2, %r3;
    ld.shared::cluster.v4.u32 {%r5, %r6, %r7, %r8}, [%r2];
    mad.wide.u32 %d2, tid, 16, y;
    st.global.v4.u32 [%d2], {%r5, %r6, %r7, %r8};
    END:
    barrier.cluster.arrive;
    barrier.cluster.wait;"""


@every_schedule
def test_bulk_copies_and_mbarriers_are_of_each_block(schedule):
    x, y = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    launch(BULK, blocks=4, cluster=4, threads=64, shared_bytes=1032, schedule=schedule, x=x, y=y)
    assert (y == x).all()


@BOTH
def test_the_mbarrier_of_one_block_orders_no_copies_of_another(schedule):
    body = without(BULK, ["barrier.cluster.arrive;  // landed", "barrier.cluster.wait;  // landed"])
    with pytest.raises((Race, AsyncNotWaited)) as caught:
        launch(body, blocks=2, cluster=2, threads=64, shared_bytes=1032, schedule=schedule,
               x=np.arange(256, dtype=np.uint32), y=np.zeros(256, np.uint32))
    if not schedule:                    # block 0's copy lands first
        assert caught.type is Race
        assert "of block (0, 0, 0) in warp 0: an asynchronous copy has written it" in str(
            caught.value)


@every_schedule
def test_wgmma_multiplies_what_its_own_block_has(schedule):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-3, 4, (2, rows, 16)).astype(np.float16) for rows in (64, 16))
    image = np.zeros((2, 4096), np.uint8)
    for block in range(2):
        place(image[block], a[block], 0, 0, False, 128, 256)
        place(image[block], b[block], 2048, 0, False, 128, 256)
    layout = descriptor(0, 128, 256)
    y = np.zeros((2, 128, 8), np.float32)
    body = "mov.u32 %r1, %cluster_ctarank;\nmad.wide.u32 image, %r1, 4096, image;\n" \
           "mad.wide.u32 y, %r1, 4096, y;\n" \
        + START.format(copies=2, step=2048, a=layout, b=layout, start_b=2048 >> 4) \
        + instruction("f16", 16, add="p") + COMMIT_AND_WAIT + dump(accumulators("f16", 8))
    launch(body, blocks=2, cluster=2, threads=128, shared_bytes=4096, schedule=schedule,
           image=image, y=y)
    for block in range(2):
        np.testing.assert_array_equal(gathered(y[block]), a[block].astype(np.float32)
                                      @ b[block].T.astype(np.float32))
