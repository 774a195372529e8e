"""Where figures come from, as each result file says it, and how such a file is written."""
import json
import sys
from pathlib import Path

import pytest
from common import provenance, write_json


def test_the_command_names_no_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/profiling/compare_cpu.py", "--networks",
                                      "/home/me/net.onnx", "--json", "my cpu.json"])
    assert provenance()["command"] == (
        "python profiling/compare_cpu.py --networks net.onnx --json 'my cpu.json'")


def test_variables_that_choose_kernels_are_named_and_no_folder_is(monkeypatch):
    for name, value in (("CNN_INT8", "none"), ("ONEDNN_MAX_CPU_ISA", "AVX2"),
                        ("NUMBA_CPU_NAME", "haswell"), ("CNN_CACHE_DIR", "/home/me/cache")):
        monkeypatch.setenv(name, value)
    found = provenance()["environment"]
    assert found.items() >= {"CNN_INT8": "none", "ONEDNN_MAX_CPU_ISA": "AVX2",
                             "NUMBA_CPU_NAME": "haswell"}.items()
    assert "CNN_CACHE_DIR" not in found


def test_a_result_file_stays_whole_where_writing_it_anew_is_cut_off(monkeypatch, tmp_path):
    path = tmp_path / "cpu.json"
    write_json(path, {"rows": [1]})
    write = Path.write_text

    def half(self, text):
        write(self, text[:len(text) // 2])
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    monkeypatch.undo()
    write_json(path, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"rows": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]
