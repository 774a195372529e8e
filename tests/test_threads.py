"""Thread counts, and what happens in a forked child."""
import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from kernels.cpu import threads

ROOT = Path(__file__).parent.parent


def test_the_count_is_checked():
    most = threads.available_threads()
    assert threads.check_threads(None) == most
    assert threads.check_threads(1) == 1
    for wrong in (0, -1, most + 1, 1.0, True, "2"):
        with pytest.raises(ValueError, match=rf"threads={wrong!r}: .* 1 to {most} threads"):
            threads.check_threads(wrong)


def test_numbas_own_count_is_set_back_also_after_an_error():
    before = numba.get_num_threads()
    with threads.team(1):
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before

    def fail():
        with threads.team(1):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert numba.get_num_threads() == before


FORK = """
import os, sys
import numpy as np
import kernels
x = np.ones((1, 4, 4, 2), np.float32)
if sys.argv[1] == "used":
    kernels.relu(x)
child = os.fork()
if child == 0:
    try:
        print(kernels.relu(x).sum(), flush=True)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not threads.OPENMP, reason="only OpenMP does not survive a fork")
@pytest.mark.parametrize(("parent", "expected"), [
    ("used", "load the model in the child, or use multiprocessing's 'spawn'"),
    ("unused", "32.0"),
])
def test_a_forked_child_gets_an_error_instead_of_being_killed(parent, expected):
    done = subprocess.run([sys.executable, "-c", FORK, parent], cwd=ROOT, env=dict(os.environ),
                          capture_output=True, text=True, check=True)
    assert expected in done.stdout
