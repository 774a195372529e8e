"""Clusters: their special registers, their barrier, and the launches that have them."""
import numpy as np
import pytest
from emulator_checks import BLOCK_NUMBER, every_schedule, kernel, launch

from kernels.emulator import (
    Deadlock,
    Emulator,
    EmulatorError,
    ParseError,
    UnknownInstruction,
)

BOTH = pytest.mark.parametrize("schedule", [{}, {"seed": 3}], ids=["lockstep", "random"])

# ---------------------------------------------------------------------------------------- registers

REGISTERS = ["%cluster_ctarank", "%cluster_nctarank",
             *(f"%{name}.{axis}" for name in ("clusterid", "nclusterid", "cluster_ctaid",
                                              "cluster_nctaid") for axis in "xyz")]
# y[block, thread of one warp, register]
READ_REGISTERS = BLOCK_NUMBER + f"""
    mad.lo.u32 %r1, %r1, 32, tid;
    mad.wide.u32 %d1, %r1, {4 * len(REGISTERS) + 4}, y;
    mov.pred p, %is_explicit_cluster;
    selp.u32 %r6, 1, 0, p;
    st.global.u32 [%d1], %r6;
""" + "".join(f"mov.u32 %r6, {name};\nst.global.u32 [%d1+{4 * i + 4}], %r6;\n"
              for i, name in enumerate(REGISTERS))


@every_schedule
@pytest.mark.parametrize(("grid", "cluster"), [
    ((4, 6, 2), (2, 3, 1)), ((4, 6, 2), (1, 2, 2)), ((2, 4, 6), (2, 2, 2)), ((6, 4), 2), (5, 1)])
def test_special_registers(grid, cluster, schedule):
    width, height, depth = (*np.atleast_1d(grid), 1, 1)[:3]
    sizes = np.array((*np.atleast_1d(cluster), 1, 1)[:3])
    y = np.full((depth, height, width, 32, 1 + len(REGISTERS)), 99, np.uint32)
    launch(READ_REGISTERS, blocks=grid, cluster=cluster, schedule=schedule, y=y)
    for z, y_, x in np.ndindex(depth, height, width):
        block = np.array((x, y_, z))
        inside = block % sizes
        rank = inside[0] + sizes[0] * (inside[1] + sizes[1] * inside[2])
        expected = [sizes.prod() > 1, rank, sizes.prod(), *(block // sizes),
                    *((width, height, depth) // sizes), *inside, *sizes]
        assert (y[z, y_, x] == np.array(expected)).all(), (x, y_, z)


# ---------------------------------------------------------------------------------------- addresses

@BOTH
def test_what_addresses_mean(schedule):
    """Plain ones are the block's own; those of mapa tell their rank, and are generic with cvta."""
    body = """
        .reg .b32 rank, next;
        mov.u32 rank, %cluster_ctarank;
        st.shared.u32 [shared], rank;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        add.u32 next, rank, 1;
        and.b32 next, next, 3;
        mad.wide.u32 %d8, rank, 44, y;
        ld.shared::cluster.u32 %r1, [shared];
        st.global.u32 [%d8], %r1;
        getctarank.shared::cluster.u32 %r1, shared;
        st.global.u32 [%d8+4], %r1;
        mapa.shared::cluster.u32 %r2, memory, next;
        getctarank.shared::cluster.u32 %r1, %r2;
        st.global.u32 [%d8+8], %r1;
        mapa.shared::cluster.u32 %r3, %r2, rank;        // back again
        ld.shared::cluster.u32 %r1, [%r3];
        st.global.u32 [%d8+12], %r1;
        cvt.u64.u32 %d1, shared;
        mapa.shared::cluster.u64 %d1, %d1, next;
        ld.shared::cluster.u32 %r1, [%d1];
        st.global.u32 [%d8+16], %r1;
        cvta.shared::cluster.u64 %d2, %d1;
        ld.u32 %r1, [%d2];
        st.global.u32 [%d8+20], %r1;
        cvt.u64.u32 %d3, shared;
        cvta.shared.u64 %d3, %d3;
        mapa.u64 %d4, %d3, next;
        ld.u32 %r1, [%d4];
        st.global.u32 [%d8+24], %r1;
        getctarank.u64 %r1, %d4;
        st.global.u32 [%d8+28], %r1;
        isspacep.shared::cluster p, %d4;
        selp.u32 %r1, 1, 0, p;
        isspacep.shared::cta p, %d4;
        selp.u32 %r2, 10, 0, p;
        add.u32 %r1, %r1, %r2;
        isspacep.shared p, %d3;
        selp.u32 %r2, 100, 0, p;
        add.u32 %r1, %r1, %r2;
        mapa.u64 %d5, %d3, rank;
        isspacep.shared::cta p, %d5;
        selp.u32 %r2, 1000, 0, p;
        add.u32 %r1, %r1, %r2;
        st.global.u32 [%d8+32], %r1;
        getctarank.u64 %r1, %d3;
        st.global.u32 [%d8+36], %r1;
        mapa.shared::cluster.u32 %r3, shared, rank;
        ld.shared::cluster.u32 %r1, [%r3];
        st.global.u32 [%d8+40], %r1;
        barrier.cluster.arrive;
        barrier.cluster.wait;"""
    y = np.full((4, 11), 99, np.uint32)
    launch(body, blocks=4, cluster=4, threads=1, shared_bytes=4, schedule=schedule, y=y)
    for rank in range(4):
        after = (rank + 1) % 4
        assert y[rank].tolist() == [rank, rank, after, rank, after, after, after, after, 1101, rank,
                                    rank]


def test_a_launch_without_clusters_is_clusters_of_one_block():
    body = """
        mov.u32 %r1, %ctaid.x;
        st.shared.u32 [shared], %r1;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        mapa.shared::cluster.u32 %r2, shared, {};
        ld.shared::cluster.u32 %r3, [%r2];
        getctarank.shared::cluster.u32 %r4, %r2;
        add.u32 %r3, %r3, %r4;
        mad.wide.u32 %d1, %r1, 4, y;
        st.global.u32 [%d1], %r3;"""
    y = np.full(3, 99, np.uint32)
    launch(body.format(0), blocks=3, threads=1, shared_bytes=4, y=y)
    assert y.tolist() == [0, 1, 2]
    with pytest.raises(EmulatorError, match="block 1 of its cluster, which has 1"):
        launch(body.format(1), blocks=3, threads=1, shared_bytes=4, y=y)


# -------------------------------------------------------------------------------------- the barrier

@BOTH
@pytest.mark.parametrize(("wrong", "message"), [
    ("barrier.cluster.wait;", "has not arrived"),
    ("barrier.cluster.arrive;\nbarrier.cluster.arrive;\nbarrier.cluster.wait;", "with no wait"),
    ("barrier.cluster.arrive;\nbarrier.cluster.wait;\nbarrier.cluster.wait;", "has not arrived"),
])
def test_a_wait_belongs_to_an_arrival(wrong, message, schedule):
    options = {"blocks": 2, "cluster": 2, "threads": 64, "schedule": schedule}
    launch("barrier.cluster.arrive;\nbarrier.cluster.wait;\n" * 3, **options)
    with pytest.raises(EmulatorError, match=message):
        launch(wrong, **options)


@BOTH
def test_what_has_ended_is_not_waited_for(schedule):
    """Half of block 1 ends at once; block 3 arrives, and ends with no wait; block 2 never arrives,
    and in lock-step ends when all others wait."""
    body = """
        mov.u32 %r1, %cluster_ctarank;
        setp.eq.u32 p, %r1, 1;
        setp.gt.and.u32 p, tid, 40, p;
        @p ret;
        setp.eq.u32 p, %r1, 0;
        @p bra LATE;
        setp.eq.u32 p, %r1, 2;
        @p bra LAST;
        barrier.cluster.arrive;
        setp.eq.u32 p, %r1, 3;
        @p ret;
        barrier.cluster.wait;
        bra.uni END;
        LATE:
        barrier.cluster.arrive;
        barrier.cluster.wait;
        END:
        barrier.cluster.arrive;
        barrier.cluster.wait;
        mad.lo.u32 %r1, %r1, 64, tid;
        mad.wide.u32 %d1, %r1, 4, y;
        st.global.u32 [%d1], 1;
        ret;
        LAST:"""
    y = np.zeros((4, 64), np.uint32)
    launch(body, blocks=4, cluster=4, threads=64, schedule=schedule, y=y)
    assert y.sum(1).tolist() == [64, 41, 0, 0]


@BOTH
def test_a_barrier_that_one_block_never_reaches(schedule):
    body = """
        mov.u32 %r1, %cluster_ctarank;
        setp.eq.u32 p, %r1, 1;
        @p bar.sync 1, {};
        barrier.cluster.arrive;
        barrier.cluster.wait;"""
    options = {"blocks": 2, "cluster": 2, "threads": 32, "schedule": schedule}
    launch(body.format(32), **options)
    with pytest.raises(Deadlock, match="barrier of the cluster, at which 32 of 64 live threads"):
        launch(body.format(64), **options)


def test_threads_of_a_warp_come_one_by_one_unless_aligned():
    body = """
        setp.lt.u32 p, tid, 5;
        @p bra FEW;
        barrier.cluster.arrive{0};
        barrier.cluster.wait{1};
        bra.uni END;
        FEW:
        barrier.cluster.arrive{0};
        barrier.cluster.wait{1};
        END:"""
    options = {"blocks": 2, "cluster": 2, "threads": 32}
    launch(body.format("", ""), **options)
    for aligned in ((".aligned", ""), ("", ".aligned")):
        with pytest.raises(EmulatorError, match="diverge"):
            launch(body.format(*aligned), **options)


# ----------------------------------------------------------------------------------------- launches

def test_with_a_seed_clusters_run_in_any_order():
    """One cluster of two blocks is a wave; thread 0 of each block draws a number."""
    body = """
        mov.u32 %r1, %ctaid.x;
        setp.eq.u32 p, tid, 0;
        @!p bra END;
        atom.global.add.u32 %r2, [counter], 1;
        mad.wide.u32 %d1, %r1, 4, y;
        st.global.u32 [%d1], %r2;
        END:"""
    orders = set()
    for seed in (None, 1, 2, 3):
        y = np.zeros((4, 2), np.uint32)
        launch(body, blocks=8, cluster=2, threads=1024, schedule={"seed": seed},
               counter=np.zeros(1, np.uint32), y=y)
        order = (y // 2).tolist()
        assert sorted(order) == [[i, i] for i in range(4)]
        assert seed is not None or order == sorted(order)
        orders.add(str(order))
    assert len(orders) > 2


@pytest.mark.parametrize(("grid", "cluster", "message"), [
    ((4, 6), (1, 4), r"grid \(4, 6, 1\) cannot be cut into clusters of \(1, 4, 1\)"),
    (7, 2, "cannot be cut"), ((2, 1, 3), (1, 1, 2), "cannot be cut"),
    (16, 16, "at most 8 blocks, not 16"), ((3, 3), (3, 3), "at most 8 blocks, not 9"),
    (8, 0, "cluster must be"), (8, (1, 1, 1, 2), "cluster must be")])
def test_clusters_that_do_not_fit(grid, cluster, message):
    with pytest.raises(ParseError, match=message):
        launch("", blocks=grid, cluster=cluster)


@pytest.mark.parametrize(("directive", "fits", "does_not"), [
    (".explicitcluster\n.reqnctapercluster 2, 1, 1", 2, 4),
    (".reqnctapercluster 1, 2", (1, 2), (2, 1)), (".reqnctapercluster 1, 2, 2", (1, 2, 2), 1)])
def test_a_kernel_may_say_what_its_clusters_are(directive, fits, does_not):
    text = kernel("st.global.u32 [y], 1;", "y").replace("p_y)\n", f"p_y)\n{directive}\n")
    y = np.zeros(1, np.uint32)
    Emulator().launch(text, "k", (4, 4, 4), 32, [y], cluster=fits)
    assert y[0] == 1
    with pytest.raises(ParseError, match="compiled for clusters of") as caught:
        Emulator().launch(text, "k", (4, 4, 4), 32, [y], cluster=does_not)
    assert caught.value.kernel == "k"


@pytest.mark.parametrize("instruction", [
    "barrier.cluster.arrive.acquire;", "barrier.cluster.sync;", "barrier.cluster.wait.relaxed;",
    "mapa.shared::cta.u32 %r1, shared, 0;", "mov.u64 %d1, %clusterid.x;",
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r2], %r1, [%r2];",
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r2], [shared], 16, "
    "[%r2];",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [x], 16, [shared];",
    "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];"])
def test_what_is_not_covered_says_so(instruction):
    body = "mapa.shared::cluster.u32 %r2, shared, 1;\n" + instruction
    with pytest.raises(UnknownInstruction) as caught:
        launch(body, blocks=2, cluster=2, threads=1, shared_bytes=64, x=np.zeros(4, np.uint32))
    assert caught.value.instruction == instruction.rstrip(";")
