"""profiling/layers.py: what is in its rows; how long anything took is not tested."""
import json
import math
from itertools import pairwise

import gpu_timing
import gpu_watch
import layers as script
import networks
import onnx
import pytest


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(script.cpu_peak, "measure", lambda threads, dtype: (1e11, 1e10))


@pytest.fixture
def cupy(machine, monkeypatch):
    """A small GPU with a bandwidth that is known; ranges are written down."""
    monkeypatch.setattr(gpu_timing, "copy_bandwidth", lambda stream: 1e9)
    monkeypatch.setattr(gpu_timing, "clocks", lambda index: {})
    monkeypatch.setattr(gpu_watch, "SCRATCH_BYTES", 1 << 10)
    monkeypatch.setattr(gpu_watch, "FASTEST_WRITE", 1e6)
    fake = machine()
    fake.ranges = []
    fake.cuda.nvtx.RangePush = fake.ranges.append
    return fake


def profile(model, folder, *options):
    """(JSON, trace)"""
    script.main([str(model), "--batch", "2", "--runs", "3", "--json", str(folder / "layers.json"),
                 "--trace", str(folder / "trace.json"), "--plot", str(folder / "layers.svg"),
                 *options])
    assert (folder / "layers.svg").stat().st_size > 1000
    return tuple(json.loads((folder / name).read_text()) for name in ("layers.json", "trace.json"))


def test_each_layer_has_a_row_and_so_has_the_rest(small_model, tmp_path, cpu, capsys):
    result, trace = profile(small_model, tmp_path, "--threads", "1")
    rows = {row["layer"]: row for row in result["rows"]}
    assert list(rows) == ["conv", "avgpool", "logits", script.OUTSIDE]
    assert rows["conv"]["flops"] == 2 * 2 * 8 * 8 * 8 * 9 * 3
    assert rows["conv"]["kernel"].startswith("conv2d_3x3_f32")
    assert all(0 < row["min_ms"] <= row["median_ms"] for row in rows.values())
    assert result["kind"] == "measurement"
    assert result["provenance"]["command"]
    shown = capsys.readouterr().out
    assert "1 threads, at best 100.0 GFLOP/s (measured: products from registers) and 10.0 GB/s" \
        in shown
    assert script.OUTSIDE in shown
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [span["name"] for span in spans] == ["conv", "avgpool", "logits"]
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(spans))


def test_a_concat_has_the_bytes_that_are_left_to_copy(tmp_path, cpu):
    net = networks.Builder(0, 16)
    x = net.conv("input", "conv", 8, 3, stride=2)
    x = net.concat([net.conv(x, "branch", 4, 1), net.max_pool(x, "pool", 3, 1, padding=1)], "join")
    x = net.concat([net.conv(x, name, 4, 1) for name in ("left", "right")], "view")
    net.linear(net.global_pool(x), "head", 10)
    onnx.save(net.model("joined"), tmp_path / "joined.onnx")
    rows = {row["layer"]: row for row in profile(tmp_path / "joined.onnx", tmp_path)[0]["rows"]}
    assert rows["join"]["output_shape"] == [2, 8, 8, 12]
    assert rows["join"]["bytes"] == 2 * 4 * 2 * 8 * 8 * 8       # the pool's channels, in and out
    assert rows.keys() >= {"branch", "left", "right"}
    assert "view" not in rows


def test_the_roofline_is_the_longer_of_arithmetic_and_memory(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(script.cpu_peak, "measure", lambda threads, dtype: (1e10, 1e10))
    rows = {row["layer"]: row for row in profile(small_model, tmp_path)[0]["rows"]}
    conv, pool = rows["conv"], rows["avgpool"]
    assert conv["flops"] > conv["bytes"]
    assert (conv["limit"], conv["least_ms"]) == ("compute", pytest.approx(conv["flops"] / 1e7))
    assert (pool["limit"], pool["least_ms"]) == ("memory", pytest.approx(pool["bytes"] / 1e7))


def test_layers_on_a_gpu(small_model, tmp_path, cupy, capsys):
    result, trace = profile(small_model, tmp_path, "--device", "cuda", "--dtype", "float16",
                            "--peak", "100")
    rows = {row["layer"]: row for row in result["rows"]}
    assert list(rows) == ["conv", "avgpool", "logits", script.OUTPUT]
    assert rows[script.OUTPUT]["kernel"].startswith("copy_f16_f32")
    assert rows[script.OUTPUT]["bytes"] == (2 + 4) * math.prod(rows["logits"]["output_shape"])
    conv = rows["conv"]
    # Each launch takes a microsecond of the stand-in.
    launch, = conv["launches"]
    assert conv["min_ms"] == conv["median_ms"] == pytest.approx(0.001)
    assert launch["kernel"] == conv["kernel"]
    assert launch["kernel"].startswith("conv_image_f16")
    assert launch["registers"] == 40
    assert launch["occupancy"] == 2 * launch["threads"] / 2048
    assert conv["bytes"] == 2 * (2 * 16 * 16 * 3 + 8 * 9 * 3 + 2 * 8 * 8 * 8)
    assert conv["least_ms"] == pytest.approx(conv["bytes"] / 1e6)
    assert result["machine"]["peak_source"] == "as given by --peak"
    assert result["provenance"]["gpu"]["arch"] == "sm_90a"
    assert cupy.ranges == 5 * list(rows)
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [span["ts"] for span in spans] == pytest.approx([0, 1, 2, 3])
    assert [span["dur"] for span in spans] == pytest.approx([1, 1, 1, 1])
    assert "Fake GPU, at best 100.0 TFLOP/s (as given by --peak) and 1.0 GB/s" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("unit", [None, "amx_emulated", "avx512_emulated"])
def test_peaks_are_measured(unit, monkeypatch):
    for name, value in ("FMA_ROUNDS", 100), ("COPY_BYTES", 4096), ("REPEATS", 2):
        monkeypatch.setattr(script.cpu_peak, name, value)
    if unit:
        monkeypatch.setenv("CNN_BF16", unit)
    dtype = "bfloat16" if unit else "float32"
    assert all(value > 0 for value in script.cpu_peak.measure(1, dtype))


def test_bfloat16_on_the_cpu_counts_what_is_stored(tmp_path, cpu, monkeypatch):
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    net = networks.Builder(0, 16)
    x = net.conv(net.conv("input", "first", 32, 3, stride=2), "second", 32, 1)
    x = net.conv(x, "depthwise", 32, 3, padding=1, groups=32)
    net.linear(net.global_pool(x), "head", 10)
    onnx.save(net.model("narrow"), tmp_path / "narrow.onnx")
    result, _ = profile(tmp_path / "narrow.onnx", tmp_path, "--dtype", "bfloat16")
    rows = {row["layer"]: row for row in result["rows"]}
    # All is stored narrow, but what comes in and goes out; the weights of the depthwise convolution
    # are float32, in which it computes.
    image, between = 2 * 16 * 16 * 3, 2 * 8 * 8 * 32
    assert rows["first"]["bytes"] == 4 * image + 2 * 32 * 9 * 3 + 2 * between
    assert rows["second"]["bytes"] == 2 * between + 2 * 32 * 32 + 2 * between
    assert rows["depthwise"]["bytes"] == 2 * 2 * between + 4 * 32 * 9
    assert rows["second"]["kernel"].startswith("conv2d_1x1_bf16_avx512_emulated")


@pytest.mark.parametrize(("arguments", "message"), [
    (["missing"], "there is no network 'missing'"),
    (["missing.onnx"], "missing.onnx: there is no such file"),
    (["mobilenet_v2", "--threads", "999"], "threads=999"),
    (["mobilenet_v2", "--device", "cuda:3"], "there is no GPU 3"),
])
def test_what_can_not_be_profiled_is_a_sentence(arguments, message, cupy):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--dtype", "float16"], "--dtype float16 and --peak are for a GPU: add --device cuda"),
    (["--peak", "100", "--dtype", "bfloat16"], "--peak is for a GPU: add --device cuda"),
    (["--device", "cuda", "--threads", "2"], "--threads is for the CPU"),
    *((["--device", name], f"argument --device: '{name}' is no device that layers can be timed on: "
                           f"write cpu, cuda, or cuda:N with N the number of a GPU")
      for name in ("nonsense", "auto", "emulator", "cuda:", "cuda:x", "cuda:-1", "gpu:1", "cpu:0")),
])
def test_options_that_do_not_fit_the_device(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["mobilenet_v2", *arguments])
    assert message in capsys.readouterr().err


def test_a_peak_needs_torch_or_a_number(small_model, cupy, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setattr(gpu_watch, "PEAK_SIZE", 64)
    with pytest.raises(SystemExit, match="PyTorch can not be imported"):
        script.main([str(small_model), "--runs", "1", "--device", "cuda", "--dtype", "float16"])
