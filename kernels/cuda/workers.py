"""Compiles kernels in other processes, in the order in which they will be needed.

Each kernel has a process of its own, which leaves the cubin in the disk cache. Processes of
`multiprocessing` would do, but they import the caller's script once more, and end when they like.
"""
from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType

from . import compiler, store
from .compiler import Kernel
from .errors import CudaError

COMMAND = [sys.executable, "-c", "from kernels.cuda.workers import main; main()"]
POLL = 0.02     # seconds between looks at the processes


class Workers:
    """Starts compiling at once; `with` stops what still runs in the end."""

    def __init__(self, kernels: Iterable[Kernel], arch: str, jobs: int) -> None:
        self._arch, self._jobs = arch, jobs
        self._waiting = deque(kernel for kernel in dict.fromkeys(kernels)
                              if not self._there(kernel))
        self._running: dict[Kernel, subprocess.Popen] = {}
        self._start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

    def wait(self, kernels: Iterable[Kernel], until: Callable[[], bool]) -> bool:
        """Whether these kernels are compiled; False where `until()` was true before.

        CudaError for a kernel that can not be compiled.
        """
        while not all(self._there(kernel) for kernel in kernels):
            if until():
                return False
            self._collect()
            self._start()
            time.sleep(POLL)
        return True

    def _there(self, kernel: Kernel) -> bool:
        return store.get(compiler.file_name(kernel, f"{self._arch}.cubin")) is not None

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._jobs:
            kernel = self._waiting.popleft()
            # An interrupt from the keyboard is for the parent, which ends its processes.
            process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
            assert process.stdin is not None
            process.stdin.write(pickle.dumps((kernel, self._arch)))
            process.stdin.close()
            self._running[kernel] = process

    def _collect(self) -> None:
        for kernel, process in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[kernel]
            assert process.stderr is not None
            complaint = process.stderr.read().decode(errors="replace").strip()
            process.stderr.close()
            if process.returncode:
                raise CudaError(f"{kernel.name} can not be compiled for {self._arch}: "
                                f"{complaint.rpartition(chr(10))[2]}")
            if not self._there(kernel):
                raise CudaError(f"{kernel.name} was compiled and is not in {store.folder()}; set "
                                f"CNN_CACHE_DIR to a folder that can be written")


def main() -> None:
    """What a process does: one kernel, from standard input."""
    kernel, arch = pickle.loads(sys.stdin.buffer.read())    # from the parent alone
    try:
        compiler.cubin(kernel, arch)
    except CudaError as error:
        raise SystemExit(str(error)) from None
