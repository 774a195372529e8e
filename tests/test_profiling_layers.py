"""profiling/layers.py: what is in its rows; how long anything took is not tested."""
import json

import layers as script
import pytest


def test_each_layer_has_a_row_and_so_has_the_rest(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.cpu_peak, "measure", lambda threads: (1e11, 1e10))
    script.main([str(small_model), "--threads", "1", "--batch", "2", "--runs", "3",
                 "--json", str(tmp_path / "layers.json")])
    result = json.loads((tmp_path / "layers.json").read_text())
    rows = {row["layer"]: row for row in result["rows"]}
    assert list(rows) == ["conv", "avgpool", "logits", script.OUTSIDE]
    assert rows["conv"]["flops"] == 2 * 2 * 8 * 8 * 8 * 9 * 3
    assert rows["conv"]["kernel"].startswith("conv2d_3x3_f32")
    assert all(0 < row["min_ms"] <= row["median_ms"] for row in rows.values())
    assert result["kind"] == "measurement"
    assert result["provenance"]["command"]
    shown = capsys.readouterr().out
    assert "100.0 GFLOP/s, 10.0 GB/s at best" in shown
    assert script.OUTSIDE in shown


def test_peaks_are_measured(monkeypatch):
    for name, value in ("FMA_ROUNDS", 100), ("COPY_BYTES", 4096), ("REPEATS", 2):
        monkeypatch.setattr(script.cpu_peak, name, value)
    assert all(value > 0 for value in script.cpu_peak.measure(1))


@pytest.mark.parametrize(("arguments", "message"), [
    (["missing"], "there is no network 'missing'"),
    (["missing.onnx"], "missing.onnx: there is no such file"),
    (["mobilenet_v2", "--threads", "999"], "threads=999"),
])
def test_what_can_not_be_profiled_is_a_sentence(arguments, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)
