"""How many threads run a kernel, and the workers that help with it (see parallel.py)."""
from __future__ import annotations

import contextlib
import ctypes
import math
import os
import queue
import threading
from collections.abc import Iterator

from .launch import Kernel
from .quota import cpu_quota, usable_cores
from .state import CALLS, MOST_THREADS, STATE

SERVE = Kernel("parallel", "serve")
# Linux alone tells on which core a thread runs, and lets it be put on others.
current_core = getattr(ctypes.CDLL(None), "sched_getcpu", None)


class Worker(threading.Thread):
    """Helps with kernels while calls are answered, and sleeps between.

    Linux may put it on the very core that the caller keeps busy, when it wakes or later, and leave
    both there for many milliseconds. So it may run on all cores but the caller's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(name=f"kernels-{number}", daemon=True)
        self._serve, self._asleep = SERVE.bind(number), False
        self._avoided = -1          # the core where the caller was last
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            self._serve()
            self._asleep = True
            # A call that began before this was written has found nobody to wake.
            if STATE[CALLS] == 0:
                self._bell.get()
            self._asleep = False

    def wake(self) -> None:
        asleep = self._asleep
        if current_core is not None:
            self._avoid(current_core(), asleep)
        if asleep:
            self._bell.put(None)

    def _avoid(self, core: int, asleep: bool) -> None:
        if asleep or core != self._avoided:
            self._avoided = core
            allow(self.native_id or 0, os.sched_getaffinity(0) - {core})


def allow(thread: int, cores: set[int]) -> None:
    """Let a thread run on these cores, 0 being the one that calls; of none, or of cores that are
    gone, it stays where it is."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(thread, cores)


_lock = threading.Lock()            # guards what follows, and STATE[CALLS]
_workers: list[Worker] = []


def _in_child() -> None:
    """A forked child has the memory of its parent's workers, but not them."""
    global _lock
    _lock = threading.Lock()
    _workers.clear()
    STATE[:] = 0


os.register_at_fork(after_in_child=_in_child)


def available_threads() -> int:
    """Cores that this process may use."""
    return min(usable_cores(), MOST_THREADS)


def default_threads() -> int:
    """A thread for each core that this process may use, and whose time it may take."""
    most = available_threads()
    return most if cpu_quota() >= most else math.ceil(cpu_quota())


def check_threads(threads: int | None) -> int:
    """The thread count to use; None asks for the default. ValueError where that many can not be
    had."""
    most = available_threads()
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise ValueError(f"threads={threads!r}: this process may use 1 to {most} threads")
    return threads


@contextlib.contextmanager
def team(threads: int) -> Iterator[None]:
    """Have workers at hand inside the block, for kernels on this many threads."""
    with _lock:
        while len(_workers) < threads - 1:
            _workers.append(Worker(len(_workers) + 1))
            _workers[-1].start()
        STATE[CALLS] += 1
        for worker in _workers[:threads - 1]:
            worker.wake()
    try:
        yield
    finally:
        with _lock:
            STATE[CALLS] -= 1
