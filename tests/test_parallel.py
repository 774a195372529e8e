"""parallel_for: each unit once, by whom it may be, whoever comes, sleeps or is late."""
import threading
import time

import numpy as np
import pytest

from kernels.cpu import parallel, state, threads
from kernels.cpu.jit import njit
from kernels.cpu.parallel import parallel_for

MOST = threads.available_threads()
several = pytest.mark.skipif(MOST < 2, reason="needs two cores")


@njit()
def count(times, by, count_of_threads):
    """times[i] += 1 for each unit, and by[i] = the thread that did it."""
    parallel_for(count_units, len(times), count_of_threads, (times, by))


@njit()
def count_units(thread, first, end, times, by):
    for i in range(first, end):
        times[i] += 1
        by[i] = thread


@njit()
def meet(met, patience, count_of_threads):
    """Each thread writes its row of `met` and waits, some cycles at most, for all the others."""
    parallel_for(meet_units, len(met), count_of_threads, (met, patience))


@njit()
def meet_units(thread, first, end, met, patience):
    met[thread, 0] = 1
    since = parallel.cycles()
    while met[:, 0].sum() < len(met) and parallel.cycles() - since < patience:
        parallel.offer_core()


def counted(units: int, count_of_threads: int) -> np.ndarray:
    times, by = np.zeros(units, np.int64), np.full(units, -1)
    count(times, by, count_of_threads)
    np.testing.assert_array_equal(times, 1)
    return by


@pytest.mark.parametrize("count_of_threads", sorted({1, 2, 3, MOST}))
@pytest.mark.parametrize("units", [0, 1, 2, 3, 7, 16, 17, 1000, 100_003])
def test_each_unit_is_done_once(units, count_of_threads):
    with threads.team(min(count_of_threads, MOST)):
        for _ in range(20):
            by = counted(units, count_of_threads)
            assert ((by >= 0) & (by < count_of_threads)).all()


def test_without_workers_the_caller_does_all():
    end = time.monotonic() + 10
    while not all(worker._asleep for worker in threads._workers):     # those of the tests before
        assert time.monotonic() < end
        time.sleep(0.001)
    assert set(counted(1000, 2)) == {0}


def test_while_others_have_the_pool_the_caller_does_all():
    state.STATE[state.BUSY] = 1
    try:
        with threads.team(MOST):
            assert set(counted(1000, MOST)) == {0}
    finally:
        state.STATE[state.BUSY] = 0


def assert_two_meet():
    met = np.zeros((2, 16), np.int64)
    with threads.team(2):
        meet(met, 100_000_000_000, 2)       # on a first run the worker is compiled meanwhile
    np.testing.assert_array_equal(met[:, 0], 1)


@several
def test_workers_take_part():
    assert_two_meet()


def test_several_callers_at_once():
    errors = []

    def call():
        try:
            with threads.team(MOST):
                for units in range(300):
                    counted(units, MOST)
        except AssertionError as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert not errors


@several
def test_workers_sleep_between_calls_and_wake_for_the_next():
    assert_two_meet()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    assert_two_meet()


def test_the_gate_is_closed_and_empty_after_a_call():
    with threads.team(MOST):
        counted(1000, MOST)
    words = state.STATE
    assert words[state.GATE] & (state.OPEN | state.INSIDE) == 0
    assert words[state.BUSY] == words[state.CALLS] == 0
