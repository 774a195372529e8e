"""Where figures come from, as each result file says it."""
import sys

from common import provenance


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
