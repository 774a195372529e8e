"""Thread counts, and what happens in a forked child."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import threads
from kernels.cpu.state import CALLS, STATE

ROOT = Path(__file__).parent.parent


def test_the_count_is_checked():
    most = threads.available_threads()
    assert threads.check_threads(None) == most
    assert threads.check_threads(1) == 1
    for wrong in (0, -1, most + 1, 1.0, True, "2"):
        with pytest.raises(ValueError, match=rf"threads={wrong!r}: .* 1 to {most} threads"):
            threads.check_threads(wrong)


def test_calls_are_counted_also_where_one_fails():
    def fail():
        with threads.team(1):
            assert STATE[CALLS] == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert STATE[CALLS] == 0


FORK = """
import os, sys
import numpy as np
import kernels
x = np.ones((1, 64, 64, 16), np.float32)
if sys.argv[1] == "used":
    kernels.relu(x)
child = os.fork()
if child == 0:
    print(kernels.relu(x).sum(), flush=True)
    from kernels.cpu import threads
    print("workers", sum(worker.is_alive() for worker in threads._workers), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("parent", ["used", "unused"])
def test_kernels_run_in_a_forked_child_which_gets_workers_of_its_own(parent):
    done = subprocess.run([sys.executable, "-c", FORK, parent], cwd=ROOT, env=dict(os.environ),
                          capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["65536.0", "workers", str(threads.available_threads() - 1)]
