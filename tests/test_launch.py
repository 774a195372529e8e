"""Kernels on the CPU: what they can be given, and the cache of their machine code, which hits in a
second process and misses after an edit."""
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from kernels.cpu import store
from kernels.cpu.launch import Constant, Kernel, describe, together

ROOT = Path(__file__).parent.parent

# Runs one depthwise convolution, whose kernel calls an intrinsic of another file, and reports.
PROGRAM = """
import json, sys
import numpy as np
import kernels
from kernels.cpu import store
cold = store.is_cold()
x = np.arange(2 * 9 * 9 * 3, dtype=np.float32).reshape(2, 9, 9, 3)
y = kernels.conv2d(x, np.ones((3, 3, 3, 1), np.float32), groups=3, padding=1)
print(json.dumps({"sum": float(y.sum()), "cold": cold, "folder": str(store.folder()),
                  "compiled": "numba" in sys.modules}))
"""


def run(folder: Path, cache: Path, **variables: str) -> dict:
    environment = {**os.environ, "CNN_CACHE_DIR": str(cache), **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, env=environment,
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_second_process_compiles_nothing_and_an_edited_callee_compiles_afresh(tmp_path):
    package, cache = tmp_path / "source", tmp_path / "cache"
    shutil.copytree(ROOT / "kernels", package / "kernels",
                    ignore=shutil.ignore_patterns("__pycache__"))
    first, second = run(package, cache), run(package, cache)
    assert first["cold"]
    assert first["compiled"]
    assert not second["cold"]
    assert not second["compiled"]
    assert first["sum"] == second["sum"] > 0

    callee = package / "kernels" / "cpu" / "simd.py"
    text = callee.read_text()
    assert text.count('"fmuladd", x, y, z') == 1
    callee.write_text(text.replace('"fmuladd", x, y, z', '"fmuladd", x, y, y'))
    third = run(package, cache)
    assert third["folder"] != second["folder"]
    assert third["compiled"]
    assert third["sum"] != second["sum"]


def test_a_torn_file_counts_as_none(tmp_path):
    first = run(ROOT, tmp_path)
    for path in Path(first["folder"]).glob("*.o"):
        path.write_bytes(path.read_bytes()[:-100])
    second = run(ROOT, tmp_path)
    assert second["compiled"]
    assert second["sum"] == first["sum"]
    assert not run(ROOT, tmp_path)["compiled"]


def test_a_full_disk_is_said_and_kernels_still_run(monkeypatch):
    def full(path, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    with pytest.warns(RuntimeWarning, match="can not be written .No space left on device.: kernels "
                                            "are compiled anew in each process"):
        store.put("kernel.o", b"code")


@pytest.mark.parametrize(("argument", "code", "words"), [
    (7, "int64", [7]), (True, "int64", [1]), (np.int64(-3), "int64", [-3]),
    (np.float32(-0.5), "float32", [np.float32(-0.5).view(np.int32)]),
    ((1, 2, 3), "int64*3", [1, 2, 3]), (Constant("dot_units", "AMX"), "dot_units.AMX", [])])
def test_arguments_become_words(argument, code, words):
    found, numbers = describe(argument)
    assert (found, list(numbers)) == (code, words)


def test_an_array_becomes_its_address_and_shape():
    array = np.zeros((2, 3), np.uint16)
    assert describe(array) == ("uint16[2]", (array.ctypes.data, 2, 3))
    for strided in (array[:, :2], array.T):
        with pytest.raises(TypeError, match="kernels take C-contiguous arrays, not one of shape"):
            describe(strided)


@pytest.mark.parametrize("argument", ["text", 1.5, None, [1], np.float64(1)])
def test_what_no_kernel_takes_is_refused(argument):
    with pytest.raises(TypeError, match=f"kernels take no {type(argument).__name__}"):
        Kernel("elementwise", "clip").bind(argument)


def test_launches_run_in_order_alone_or_together():
    relu = np.float32(0), np.float32(np.inf)
    x, y, z = np.float32([-1, 2]), np.zeros(2, np.float32), np.zeros(2, np.float32)
    add = Kernel("elementwise", "add")
    one, step = np.ones(2, np.float32), np.array([1])
    launches = [Kernel("elementwise", "clip").bind(*relu, x, y, False, 1),
                add.bind(y, one, z, np.array([2]), step, step, 1)]
    for launch in launches:
        launch()
    np.testing.assert_array_equal(z, [1, 3])
    y[:] = z[:] = 0
    together(launches)()
    np.testing.assert_array_equal(z, [1, 3])
    together([])()


def test_a_kernel_that_needs_python_is_refused_when_it_is_compiled(monkeypatch):
    import numba

    from kernels.cpu import compiler
    module = types.ModuleType("kernels.cpu.chatty")
    module.chatty = numba.njit(lambda x: print(x[0]))
    monkeypatch.setitem(sys.modules, "kernels.cpu.chatty", module)
    with pytest.raises(RuntimeError, match=r"chatty.chatty calls \['Py.*without Numba"):
        compiler.compile_kernel(Kernel("chatty", "chatty"), "float32[1]", "chatty")


def test_python_may_call_a_kernel_itself():
    """As one does to print within it. What is compiled for launches has no entry for Python."""
    from kernels.cpu import compiler, elementwise
    x, y = np.float32([-3, 0.5, 9]), np.zeros(3, np.float32)
    arguments = np.float32(-1), np.float32(1), x, y, 0, 1
    signature = " ".join(code for code, _ in map(describe, arguments))
    compiler.compile_kernel(Kernel("elementwise", "clip"), signature, "clip")
    elementwise.clip(*arguments)
    np.testing.assert_array_equal(y, [-1, 0.5, 1])


def test_the_users_own_numba_cache_folder_is_left_alone():
    import numba

    from kernels.cpu import conv, store
    assert str(store.folder()) != numba.config.CACHE_DIR
    assert str(store.folder()) in conv.conv_units._cache.cache_path


@pytest.mark.parametrize(("variable", "choices"), [
    ("CNN_SIMD_LANES", "4, 8 or 16"), ("CNN_SIMD_REGISTERS", "16 or 32")])
def test_vectors_can_be_chosen_and_are_checked(variable, choices):
    environment = {**os.environ, variable: "5"}
    done = subprocess.run([sys.executable, "-c", "import kernels.cpu.sizes"], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{variable} is '5'; it must be {choices}" in done.stderr


def test_an_unwritable_cache_is_said_and_kernels_still_run(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    environment = {**os.environ, "CNN_CACHE_DIR": str(blocked)}
    code = ("import numpy as np, kernels\n"
            "print(kernels.relu(np.array([-1, 2], np.float32)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0. 2.]"
    assert str(blocked) in done.stderr
    assert "can not be written" in done.stderr


@pytest.mark.parametrize(("lanes", "registers"), [("4", "16"), ("4", "32"), ("8", "16")])
def test_other_vectors_give_the_same_integers(lanes, registers, tmp_path):
    """Exact for integers, whatever the width, so the widths can be compared bit for bit."""
    x = np.arange(2 * 9 * 9 * 3, dtype=np.float32).reshape(2, 9, 9, 3)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i:i + 9, j:j + 9].sum() for i in range(3) for j in range(3))
    vectors = {"CNN_SIMD_LANES": lanes, "CNN_SIMD_REGISTERS": registers}
    assert run(ROOT, tmp_path, **vectors)["sum"] == expected


IMPORTED = """
import sys
import cnn
assert not {"numba", "llvmlite", "onnx", "rich", "cupy"} & set(sys.modules)
model = cnn.load(device="cpu")
model.classify("examples/cat.jpg")
print("numba" in sys.modules)
"""


def test_no_compiler_is_imported_once_kernels_are_compiled():
    """Nor what only loading a model needs, by `import cnn`."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


FORK = """
import os, signal
import numpy as np
import kernels
from kernels.cpu import launch
launch._lock.acquire()          # as a thread has it that loads a kernel
child = os.fork()
if child == 0:
    signal.alarm(60)            # ends a child that waits for ever
    kernels.relu(np.ones(4, np.float32))
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_child_loads_kernels_though_its_parent_was_loading_one():
    done = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "0\n"
