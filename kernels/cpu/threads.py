"""How many threads run a kernel, and the guards around them."""
from __future__ import annotations

import ctypes.util
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numba

_serial = threading.Lock()      # the workqueue layer must not be entered by two threads at once
_forked_after_use = False
_used = False


def _choose_layer() -> bool:
    """Ask numba for OpenMP (1.4 us a fork-join; workqueue takes 70 to 400) where libgomp is."""
    if ctypes.util.find_library("gomp") is None:
        warnings.warn("libgomp was not found: kernels run on numba's slower 'workqueue' threads, "
                      "one call at a time. Install it (Debian: apt-get install libgomp1).",
                      RuntimeWarning, stacklevel=2)
        return False
    numba.config.THREADING_LAYER = "omp"
    return True


OPENMP = _choose_layer()


def _mark_child() -> None:
    global _forked_after_use
    _forked_after_use = _used


os.register_at_fork(after_in_child=_mark_child)


def available_threads() -> int:
    """Cores that this process may use, at most those that numba was started with."""
    return min(len(os.sched_getaffinity(0)), numba.config.NUMBA_NUM_THREADS)


def check_threads(threads: int | None) -> int:
    """The thread count to use; None asks for all. ValueError where that many can not be had."""
    most = available_threads()
    if threads is None:
        return most
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise ValueError(f"threads={threads!r}: this process may use 1 to {most} threads")
    return threads


@contextmanager
def team(threads: int) -> Iterator[None]:
    """Run kernels on this many threads inside the block, then set numba's count back."""
    global _used
    if _forked_after_use:
        raise RuntimeError("this process was forked after kernels had run in its parent, and "
                           "OpenMP does not survive that: load the model in the child, or use "
                           "multiprocessing's 'spawn' start method")
    _used = True
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        if OPENMP:
            yield
        else:
            with _serial:
                yield
    finally:
        numba.set_num_threads(before)
