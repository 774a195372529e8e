"""What is asynchronous in launches with clusters: copies, mbarriers and wgmma of each block."""
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

from kernels.emulator import AsyncNotWaited, Race

BOTH = pytest.mark.parametrize("schedule", [{}, {"seed": 3}], ids=["lockstep", "random"])


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
    body = mutated(mutated(BULK, "barrier.cluster.arrive;  // landed"),
                   "barrier.cluster.wait;  // landed")
    with pytest.raises((Race, AsyncNotWaited)) as caught:
        launch(body, blocks=2, cluster=2, threads=64, shared_bytes=1032, schedule=schedule,
               x=np.arange(256, dtype=np.uint32), y=np.zeros(256, np.uint32))
    if not schedule:                    # block 0's copy lands first
        assert caught.type is Race
        assert "of block (0, 0, 0) in warp 0: an asynchronous copy has written it" in str(
            caught.value)


# Block 0 has met itself more often than block 1 has, so that their warps count differently.
UNLIKE = """
    mov.u32 %r1, %cluster_ctarank;
    setp.ne.u32 p, %r1, 0;
    @p bra MEET;
    bar.sync 0;
    bar.sync 0;
    bar.sync 0;
    bar.sync 0;
    bar.sync 0;
    bar.sync 0;
    MEET:
    barrier.cluster.arrive;
    barrier.cluster.wait;
"""


@every_schedule
def test_copies_that_an_mbarrier_waits_for(schedule):
    body = UNLIKE + """
        setp.eq.u32 p, tid, 0;
        @p mbarrier.init.shared::cta.b64 [shared+1024], 64;
        bar.sync 0;
        mad.lo.u32 %r2, tid, 16, shared;
        mad.wide.u32 %d1, tid, 16, x;
        cp.async.cg.shared.global [%r2], [%d1], 16;
        cp.async.mbarrier.arrive.noinc.shared.b64 [shared+1024];
        WAIT:
        mbarrier.try_wait.parity.shared::cta.b64 q, [shared+1024], 0;
        @!q bra WAIT;
        xor.b32 %r2, tid, 63;
        mad.lo.u32 %r2, %r2, 16, shared;
        ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2];
        mad.lo.u32 %r1, %r1, 64, tid;
        mad.wide.u32 %d2, %r1, 16, y;
        st.global.v4.u32 [%d2], {%r4, %r5, %r6, %r7};"""
    x, y = np.arange(256, dtype=np.uint32).reshape(64, 4), np.zeros((2, 64, 4), np.uint32)
    launch(body, blocks=2, cluster=2, threads=64, shared_bytes=1032, schedule=schedule, x=x, y=y)
    assert (y == x[::-1]).all()


@every_schedule
def test_wgmma_multiplies_what_its_own_block_has(schedule):
    """Two clusters of two blocks; other warps write again what a warp's product has read."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-3, 4, (4, rows, 16)).astype(np.float16) for rows in (64, 16))
    image = np.zeros((4, 4096), np.uint8)
    for block in range(4):
        place(image[block], a[block], 0, 0, False, 128, 256)
        place(image[block], b[block], 2048, 0, False, 128, 256)
    layout = descriptor(0, 128, 256)
    y = np.zeros((4, 128, 8), np.float32)
    body = UNLIKE + "mov.u32 %r1, %ctaid.x;\nmad.wide.u32 image, %r1, 4096, image;\n" \
        "mad.wide.u32 y, %r1, 4096, y;\n" \
        + START.format(copies=2, step=2048, a=layout, b=layout, start_b=2048 >> 4) \
        + instruction("f16", 16, add="p") + COMMIT_AND_WAIT + dump(accumulators("f16", 8)) \
        + "bar.sync 0;\nxor.b32 %r1, tid, 64;\nmad.lo.u32 %r1, %r1, 16, shared;\n" \
        "st.shared.u32 [%r1], %r1;\nst.shared.u32 [%r1+2048], %r1;"
    launch(body, blocks=4, cluster=2, threads=128, shared_bytes=4096, schedule=schedule,
           image=image, y=y)
    for block in range(4):
        np.testing.assert_array_equal(gathered(y[block]), a[block].astype(np.float32)
                                      @ b[block].T.astype(np.float32))
