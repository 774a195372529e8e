"""Missing barriers and waits, one a kernel, and what would never end; the right kernel beside each.

Every kernel is a template whose synchronisation is left out, or changed, at one place at a time.
"""
import re

import numpy as np
import pytest
from emulator_checks import every_schedule, integers, kernel, launch, mutated, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.emulator import Deadlock, EmulatorError, Race, UninitialisedRead

# -------------------------------------------------------------------------------- removed barriers

# 64 x 4 transposition in three rounds through one buffer: a barrier after filling, one after use
TRANSPOSE = """
    mov.u32 %r1, 0;
    and.b32 %r2, tid, 3;
    shr.u32 %r3, tid, 2;
    mad.lo.u32 %r4, %r2, 16, %r3;              // column tid % 4, row tid / 4
    mad.lo.u32 %r4, %r4, 4, shared;
    mad.lo.u32 %r5, tid, 4, shared;
    ROUND:
    mad.lo.u32 %r6, %r1, 64, tid;
    mad.wide.u32 %d1, %r6, 4, x;
    ld.global.u32 %r7, [%d1];
    st.shared.u32 [%r5], %r7;
    bar.sync 0;  // filled
    ld.shared.u32 %r8, [%r4];
    mad.wide.u32 %d2, %r6, 4, y;
    st.global.u32 [%d2], %r8;
    bar.sync 0;  // used
    add.u32 %r1, %r1, 1;
    setp.lt.u32 p, %r1, 3;
    @p bra ROUND;
"""

# sum of 128 numbers: a barrier after every step down to one warp
REDUCE = """
    mad.wide.u32 %d1, tid, 4, x;
    ld.global.u32 %r1, [%d1];
    mad.lo.u32 %r2, tid, 4, shared;
    st.shared.u32 [%r2], %r1;
    bar.sync 0;  // loaded
    setp.lt.u32 p, tid, 64;
    @p ld.shared.u32 %r3, [%r2+256];
    @p add.u32 %r1, %r1, %r3;
    @p st.shared.u32 [%r2], %r1;
    bar.sync 0;  // halved
    setp.lt.u32 p, tid, 32;
    @p ld.shared.u32 %r3, [%r2+128];
    @p add.u32 %r1, %r1, %r3;
    @p st.shared.u32 [%r2], %r1;
    bar.sync 0;  // quartered
    ld.shared.u32 %r4, [shared];
    ld.shared.u32 %r5, [shared+4];
    add.u32 %r4, %r4, %r5;
    mad.wide.u32 %d2, tid, 4, y;
    st.global.u32 [%d2], %r4;
"""


@every_schedule
def test_transposition_and_reduction_are_right(schedule):
    x = integers(32, seed=1, count=192)
    y = np.zeros_like(x)
    launch(TRANSPOSE, threads=64, shared_bytes=256, schedule=schedule, x=x, y=y)
    np.testing.assert_array_equal(y.reshape(3, 16, 4), x.reshape(3, 4, 16).swapaxes(1, 2))
    y = np.zeros(128, np.uint32)
    launch(REDUCE, threads=128, shared_bytes=512, schedule=schedule, x=x[:128], y=y)
    assert (y == x[:128].reshape(2, 2, 32)[..., :2].sum(dtype=np.uint32)).all()


@given(st.integers(0, 2 ** 32 - 1), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_random_order_gives_the_result_of_lockstep(seed, race):
    x = integers(32, seed=1, count=192)
    for body, threads in ((TRANSPOSE, 64), (REDUCE, 128)):
        expected, found = np.zeros(192, np.uint32), np.zeros(192, np.uint32)
        launch(body, threads=threads, shared_bytes=512, x=x, y=expected)
        launch(body, threads=threads, shared_bytes=512, schedule={"seed": seed, "race": race}, x=x,
               y=found)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(("body", "threads", "removed"), [
    (TRANSPOSE, 64, "filled"), (TRANSPOSE, 64, "used"), (REDUCE, 128, "loaded"),
    (REDUCE, 128, "halved"), (REDUCE, 128, "quartered")],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else None)
def test_a_removed_barrier_is_a_race_in_any_order(body, threads, removed, seed):
    """Not only when the threads happen to run in an order that shows it. In a random order the
    bytes may also be read before anything is there at all."""
    broken = mutated(body, f"bar.sync 0;  // {removed}")
    with pytest.raises((Race, UninitialisedRead)) as caught:
        launch(broken, threads=threads, shared_bytes=512, schedule={"seed": seed},
               x=integers(32, seed=1, count=192), y=np.zeros(192, np.uint32))
    assert caught.type is Race or seed is not None
    line = kernel(broken, "x", "y").splitlines()[caught.value.line - 1]
    assert ".shared" in line
    assert caught.value.block == (0, 0, 0)
    assert caught.value.address is not None


def test_without_the_race_check_lockstep_hides_a_missing_barrier():
    x = integers(32, seed=1, count=192)
    y = np.zeros_like(x)
    launch(mutated(TRANSPOSE, "bar.sync 0;  // filled"), threads=64, shared_bytes=256,
           schedule={"race": False}, x=x, y=y)
    np.testing.assert_array_equal(y.reshape(3, 16, 4), x.reshape(3, 4, 16).swapaxes(1, 2))


WARPS = 3
ACCESSES = st.tuples(st.sampled_from(["ld", "st", "atom"]), st.integers(0, WARPS - 1),
                     st.integers(0, 1))
BARRIERS = st.tuples(st.sampled_from(["all", "pair", "arrive", "mbarrier"]),
                     st.permutations(range(WARPS)))


def step_of(name, number, wait):
    """What one warp does to wait for another, or to let it go on."""
    if name != "mbarrier":
        return f"bar.{'sync' if wait else 'arrive'} {number}, 64;"
    if not wait:
        return (f"elect.sync _|q, -1;\n"
                f"@q mbarrier.arrive.shared::cta.b64 _, [shared+{8 * number}];")
    return (f"W{number}:\nmbarrier.try_wait.parity.shared::cta.b64 q, [shared+{8 * number}], 0;\n"
            f"@!q bra W{number};")


def traced(steps):
    """The kernel that does these steps, and whether two accesses in it are unordered."""
    body = ["setp.eq.u32 p, tid, 0;", "@p st.shared.v2.u32 [shared], {tid, tid};"]
    body += [f"@p mbarrier.init.shared::cta.b64 [shared+{8 * i}], 1;" for i in range(1, 13)]
    body.append("bar.sync 0;")
    known, done, race = [set() for _ in range(WARPS)], [], False
    for number, (name, *what) in enumerate(steps):
        if name in ("ld", "st", "atom"):
            warp, word = what
            body.append(f"setp.eq.u32 p, tid, {32 * warp};")
            body.append({"ld": f"@p ld.shared.u32 %r1, [shared+{4 * word}];",
                         "st": f"@p st.shared.u32 [shared+{4 * word}], tid;",
                         "atom": f"@p atom.shared.add.u32 %r1, [shared+{4 * word}], 1;"}[name])
            race |= any(event not in known[warp] for event, (kind, at) in enumerate(done)
                        if at == word and {kind, name} not in ({"ld"}, {"atom"}))
            known[warp].add(len(done))
            done.append((name, word))
            continue
        first, second, _ = what[0]
        before = range(WARPS) if name == "all" else (first, second)
        after = before if name in ("all", "pair") else (second,)
        together = set.union(*(known[warp] for warp in before))
        for warp in after:
            known[warp] |= together
        if name == "all":
            body.append("bar.sync 0;")
        else:
            for warp in (first, second):
                wait, label = warp in after, f"L{number}_{warp}"
                body += [f"setp.lt.u32 p, tid, {32 * warp};",
                         f"setp.ge.or.u32 p, tid, {32 * warp + 32}, p;", f"@p bra {label};",
                         step_of(name, number + 1, wait), f"{label}:"]
    return "\n".join(body), race


@given(st.lists(ACCESSES | BARRIERS, min_size=2, max_size=12), st.none() | st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_race_is_found_exactly_where_nothing_orders_two_accesses(steps, seed):
    """Any order of accesses and barriers of three warps, against the happens-before relation."""
    body, race = traced(steps)
    options = {"threads": 32 * WARPS, "shared_bytes": 104, "schedule": {"seed": seed}}
    if race:
        with pytest.raises(Race):
            launch(body, **options)
    else:
        launch(body, **options)


def test_two_warps_that_write_one_word():
    launch("setp.lt.u32 p, tid, 32;\n@p st.shared.u32 [shared], 1;", threads=64, shared_bytes=64)
    refused(Race, "st.shared.u32 [shared], tid;      // <-", shared_bytes=64, base="shared",
            offset=0, block=(0, 0, 0))


def test_atomics_on_one_word_are_no_race_but_a_plain_read_beside_them_is():
    start = "setp.eq.u32 p, tid, 0;\n@p st.shared.u32 [shared], 0;\nbar.sync 0;\n"
    add = "atom.shared.add.u32 %r1, [shared], 1;\n"
    launch(start + add + "bar.sync 0;\nld.shared.u32 %r2, [shared];", threads=64, shared_bytes=64)
    with pytest.raises(Race):
        launch(start + add + "ld.shared.u32 %r2, [shared];", threads=64, shared_bytes=64)


def test_a_barrier_of_other_warps_orders_nothing():
    """Warps 0 and 1 meet at barrier 1; warp 2 reads without having been there."""
    body = """
        setp.lt.u32 p, tid, 64;
        mad.lo.u32 %r1, tid, 4, shared;
        st.shared.u32 [%r1], tid;
        @!p bra READ;
        bar.sync 1, 64;
        bra.uni END;
        READ:
        {}
        ld.shared.u32 %r2, [%r1+-128];{}
        END:"""
    with pytest.raises(Race):
        launch(body.format("", ""), threads=96, shared_bytes=384)
    launch(body.format("bar.sync 0;", "").replace("bra.uni END", "bar.sync 0;\nbra.uni END"),
           threads=96, shared_bytes=384)


# ---------------------------------------------------------------------------------------- deadlock

COUNT = "bar.sync 1, {};"
TWO_BARRIERS = """
    setp.lt.u32 p, tid, 32;
    @p bra OTHER;
    bar.sync 1;
    bar.sync {};
    bra.uni END;
    OTHER:
    bar.sync 1;
    bar.sync 3;
    END:"""
ARRIVALS = """
    setp.ne.u32 p, tid, 0;
    @p bra READY;
    mbarrier.init.shared::cta.b64 [shared], {};
    READY:
    bar.sync 0;
    mbarrier.arrive.shared::cta.b64 _, [shared];
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 q, [shared], 0;
    @!q bra WAIT;"""
HALF_OF_THE_WARPS = """
    setp.lt.u32 p, tid, {};
    @p bra OTHER;
    bar.sync 0;
    OTHER:
    bar.sync 1;"""
NEVER = {"threads-of-a-barrier": (COUNT, 96, 64), "two-barriers": (TWO_BARRIERS, 2, 3),
         "arrivals": (ARRIVALS, 65, 64), "half-of-the-warps": (HALF_OF_THE_WARPS, 32, 64)}


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("name", NEVER)
def test_what_some_threads_wait_for_never_happens(name, seed):
    body, wrong, right = NEVER[name]
    options = {"threads": 64, "shared_bytes": 64}
    launch(body.format(right), schedule={"seed": seed}, **options)
    with pytest.raises(Deadlock) as caught:
        launch(body.format(wrong), schedule={"seed": seed, "max_steps": 100_000}, **options)
    message = str(caught.value)
    assert caught.value.kernel == "k"
    assert re.search(r"barrier", message)
    waiting = [i + 1 for i, line in enumerate(kernel(body.format(wrong)).splitlines())
               if line.strip().startswith(("bar.sync", "mbarrier.try_wait"))]
    assert any(re.search(rf"\b{line}\b", message) for line in waiting), message


def test_more_arrivals_than_the_barrier_counts():
    body = "setp.ne.u32 p, tid, 0;\n@p bra END;\nmbarrier.init.shared::cta.b64 [shared], 2;\n" \
           "mbarrier.arrive.shared::cta.b64 _, [shared], {};\nEND:"
    launch(body.format(2), threads=64, shared_bytes=64)
    with pytest.raises(EmulatorError, match="arriv"):
        launch(body.format(3), threads=64, shared_bytes=64)
