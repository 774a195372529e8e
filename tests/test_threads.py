"""Thread counts, and what happens in a forked child."""
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels.cpu import threads
from kernels.cpu.quota import cpu_quota
from kernels.cpu.state import CALLS, STATE

ROOT = Path(__file__).parent.parent


def test_the_count_is_checked():
    most = threads.available_threads()
    assert threads.check_threads(None) == threads.default_threads() <= most
    assert threads.check_threads(1) == 1
    for wrong in (0, -1, most + 1, 1.0, True, "2"):
        with pytest.raises(ValueError, match=rf"threads={wrong!r}: .* 1 to {most} threads"):
            threads.check_threads(wrong)


GROUPS_2, GROUPS_1 = "0::/pods/one\n", "5:memory:/x\n3:cpu,cpuacct:/pods/one\n0::/\n"


@pytest.mark.parametrize(("groups", "files", "cores"), [
    (GROUPS_2, {}, math.inf),
    (GROUPS_2, {"pods/one/cpu.max": "max 100000"}, math.inf),
    (GROUPS_2, {"pods/one/cpu.max": "150000 100000"}, 1.5),
    (GROUPS_2, {"pods/one/cpu.max": "400000 100000", "pods/cpu.max": "50000 100000"}, 0.5),
    (GROUPS_2, {"pods/cpu.max": "max 100000", "pods/one/cpu.max": "torn"}, math.inf),
    ("0::/\n", {"cpu.max": "200000 100000"}, 2),       # as a container sees its own
    ("0::/../x\n", {"cpu.max": "200000 100000"}, 2),
    (GROUPS_1, {"cpu/pods/one/cpu.cfs_quota_us": "-1",
                "cpu/pods/one/cpu.cfs_period_us": "100000"}, math.inf),
    (GROUPS_1, {"cpu/pods/one/cpu.cfs_quota_us": "300000",
                "cpu/pods/one/cpu.cfs_period_us": "100000"}, 3),
    (GROUPS_1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2),
    (None, {"cpu.max": "200000 100000"}, math.inf),
])
def test_the_quota_of_a_container_is_found(tmp_path, groups, files, cores):
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    assert cpu_quota(tmp_path / "groups", tmp_path / "fs") == cores


@pytest.mark.parametrize(("cores", "quota", "count"), [
    (64, math.inf, 64), (64, 2.0, 2), (64, 2.5, 3), (64, 0.5, 1), (2, 8.0, 2)])
def test_by_default_there_are_no_more_threads_than_a_quota_has_time_for(monkeypatch, cores, quota,
                                                                        count):
    monkeypatch.setattr(threads, "available_threads", lambda: cores)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert threads.check_threads(None) == count
    assert threads.check_threads(cores) == cores        # who asks for more gets it


@pytest.mark.skipif(threads.available_threads() < 2, reason="there is one core")
def test_a_worker_is_never_where_the_caller_is(monkeypatch):
    """Nor when the caller has been moved since, while the worker was awake."""
    with threads.team(2):
        worker, cores = threads._workers[0], os.sched_getaffinity(0)
    until(lambda: worker._asleep)
    told, allow, core = [], threads.allow, [min(cores)]
    monkeypatch.setattr(threads, "allow", lambda *told_: told.append(told_) or allow(*told_))
    monkeypatch.setattr(threads, "current_core", lambda: core[0])
    with threads.team(2):
        assert told == [(worker.native_id, cores - {min(cores)})]
        until(lambda: not worker._asleep)
        with threads.team(2):       # all is as it was
            assert len(told) == 1
        core[0] = max(cores)
        with threads.team(2):
            assert told[1:] == [(worker.native_id, cores - {max(cores)})]
            assert os.sched_getaffinity(worker.native_id) == cores - {max(cores)}
    assert os.sched_getaffinity(0) == cores     # the caller may go anywhere
    threads.allow(worker.native_id, set())      # no core at all: it may go on where it is
    assert os.sched_getaffinity(worker.native_id) == cores - {max(cores)}


ELSEWHERE = """
import ctypes, os, types
load = ctypes.CDLL
ctypes.CDLL = lambda name, *args, **named: (load(name, *args, **named) if name
                                            else types.SimpleNamespace())
del os.sched_getaffinity, os.sched_setaffinity
import numpy as np
import kernels
from kernels.cpu import threads
x = np.arange(-99_999, 100_001, dtype=np.float32)
y = kernels.relu(x, threads=2)
print((y == np.maximum(x, 0)).all(), threads.available_threads() == os.cpu_count(),
      len(threads._workers))
import cnn
"""


@pytest.mark.skipif(threads.available_threads() < 2, reason="there is one core")
def test_a_system_that_tells_nothing_of_cores_runs_kernels_on_all():
    """As macOS does."""
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1"]


def test_windows_is_told_what_to_do():
    code = "import sys, numpy, onnx, PIL.Image; sys.platform = 'win32'; import cnn"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode != 0
    assert "on Windows install it within WSL 2" in done.stderr


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


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
    assert done.stdout.split() == ["65536.0", "workers", str(threads.default_threads() - 1)]
