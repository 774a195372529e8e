"""The disk cache of compiled kernels: it hits in a second process, and an edit misses."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

# Runs one depthwise convolution, whose kernel calls an intrinsic of another file, and reports.
PROGRAM = """
import json, sys
import numpy as np
import kernels
from kernels.cpu import depthwise, jit
cold = jit.is_cold()
x = np.arange(2 * 9 * 9 * 3, dtype=np.float32).reshape(2, 9, 9, 3)
y = kernels.conv2d(x, np.ones((3, 3, 3, 1), np.float32), groups=3, padding=1)
stats = depthwise.depthwise2d.stats
print(json.dumps({"sum": float(y.sum()), "cold": cold, "folder": str(jit.CACHE_DIR),
                  "misses": sum(stats.cache_misses.values()),
                  "hits": sum(stats.cache_hits.values())}))
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
    assert first["misses"] == 1
    assert not second["cold"]
    assert (second["misses"], second["hits"]) == (0, 1)
    assert first["sum"] == second["sum"] > 0

    callee = package / "kernels" / "cpu" / "simd.py"
    text = callee.read_text()
    assert text.count('"fmuladd", x, y, z') == 1
    callee.write_text(text.replace('"fmuladd", x, y, z', '"fmuladd", x, y, y'))
    third = run(package, cache)
    assert third["folder"] != second["folder"]
    assert third["misses"] == 1
    assert third["sum"] != second["sum"]


def test_the_users_own_numba_cache_folder_is_left_alone():
    import numba

    from kernels.cpu import depthwise, jit
    assert str(jit.CACHE_DIR) != numba.config.CACHE_DIR
    assert str(jit.CACHE_DIR) in depthwise.depthwise2d._cache.cache_path


def test_vector_width_can_be_chosen_and_is_checked(tmp_path):
    environment = {**os.environ, "CNN_SIMD_LANES": "5"}
    done = subprocess.run([sys.executable, "-c", "import kernels.cpu.jit"], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "CNN_SIMD_LANES is '5'; it must be 4, 8 or 16" in done.stderr


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


@pytest.mark.parametrize("lanes", ["4", "8"])
def test_narrower_vectors_give_the_same_integers(lanes, tmp_path):
    """Exact for integers, whatever the width, so the widths can be compared bit for bit."""
    x = np.arange(2 * 9 * 9 * 3, dtype=np.float32).reshape(2, 9, 9, 3)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i:i + 9, j:j + 9].sum() for i in range(3) for j in range(3))
    assert run(ROOT, tmp_path, CNN_SIMD_LANES=lanes)["sum"] == expected
