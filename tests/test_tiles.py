"""profiling/tiles.py on a stand-in for CuPy, its kernels in the emulator and its time planned."""
import json

import gpu_timing
import numpy as np
import pytest
import tiles as script
from test_cuda_tune import Clock


@pytest.fixture
def measured(machine, monkeypatch, small_model, tmp_path, capsys):
    """Function () -> (JSON, what was printed) of a network's only convolution in float32."""
    machine()
    monkeypatch.setattr(gpu_timing, "clocks", lambda index: {})
    # Two tiles are enough for the emulator.
    monkeypatch.setattr(script, "one_of_each_tile", lambda choices, all_of=script.one_of_each_tile:
                        all_of(choices)[:2])

    def measure():
        path = tmp_path / "tiles.json"
        try:
            script.main([f"{small_model}:1", "--dtype", "float32", "--json", str(path)],
                        Clock(lambda names: 100.0 if "128x32" in names else 50.0))
        finally:
            printed = capsys.readouterr().out
        return json.loads(path.read_text()), printed
    return measure


def test_each_tile_has_its_time_the_fastest_first(measured):
    result, printed = measured()
    rows = {row["layer"]: row["choices"] for row in result["rows"]}
    conv = rows["conv 3x3 /2, 1x16x16x3 -> 8, relu"]
    assert [one["microseconds"] for one in conv] == sorted(one["microseconds"] for one in conv)
    assert len({tuple(one["kernels"]) for one in conv}) == 2
    assert sum(one["present"] for one in conv) == 1
    assert not any(one["wrong"] for one in conv)
    assert "50.0 us" in printed
    assert "(present)" in printed


def test_a_kernel_that_is_wrong_fails(measured, monkeypatch):
    result = script.result
    monkeypatch.setattr(script, "result", lambda problem, choice, data: (
        result(problem, choice, data) + np.uint8(choice != problem.present)))
    with pytest.raises(SystemExit, match="a kernel gives other results"):
        measured()


def test_what_can_not_be_measured_is_said(machine):
    machine()
    with pytest.raises(ValueError, match="'resnet50' is nothing to measure"):
        script.main(["resnet50"])
