"""FLOPs, bytes and least times against figures worked out by hand; nothing here is measured."""
import json
import sys
from pathlib import Path

import networks
import onnx
import pytest
import roofline
from roofline import Layer, Roof, cost, record, roofs

from cnn.ahead import Recorder
from cnn.executor import Program, specialise
from kernels import ops
from kernels.cuda.launch import CudaOptions


def layer(op, *shapes, itemsize=2) -> Layer:
    return cost("name", op, shapes, itemsize)


@pytest.fixture(scope="module")
def resnet50() -> dict:
    return record("resnet50", 1, "float16", roofs("float16"))


@pytest.fixture
def tiny(tmp_path) -> str:
    """Convolution, batch norm, ReLU, mean and Linear on (N, 3, 8, 8)."""
    net = networks.Builder(seed=0, size=8)
    x = net.relu(net.batch_norm(net.conv("input", "conv", 4, 3), "bn"))
    net.linear(net.global_pool(x), "fc", 5)
    onnx.save(net.model("tiny"), tmp_path / "tiny.onnx")
    return str(tmp_path / "tiny.onnx")


@pytest.fixture
def run(monkeypatch):
    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["roofline.py", *arguments])
        roofline.main()
    return command


# ---- FLOPs and bytes --------------------------------------------------------------------------

@pytest.mark.parametrize(("itemsize", "size"), [
    (2, 2 * (224 * 224 * 3 + 64 * 7 * 7 * 3 + 112 * 112 * 64) + 4 * 64),
    (4, 4 * (224 * 224 * 3 + 64 * 7 * 7 * 3 + 112 * 112 * 64) + 4 * 64)])
def test_first_convolution_of_resnet50(itemsize, size):
    conv1 = layer(ops.Conv2d((2, 2), (3, 3, 3, 3)), (1, 224, 224, 3), (64, 7, 7, 3), (64,),
                  itemsize=itemsize)
    assert conv1 == Layer("name", "conv 7x7", (1, 112, 112, 64), 2 * 118_013_952, size, True)


def test_residual_is_read_too():
    op, shapes = ops.Conv2d(), ((2, 4, 4, 8), (16, 1, 1, 8), (16,))
    plain, fused = layer(op, *shapes), layer(op, *shapes, (2, 4, 4, 16))
    assert fused.bytes - plain.bytes == 2 * 2 * 4 * 4 * 16
    assert fused.flops == plain.flops
    assert (plain.kind, fused.kind) == ("conv 1x1", "conv 1x1 + residual")


def test_depthwise_convolution_runs_on_the_cuda_cores():
    op = ops.Conv2d((1, 1), (1, 1, 1, 1), groups=32)
    assert layer(op, (1, 8, 8, 32), (32, 3, 3, 1), (32,)) == Layer(
        "name", "depthwise 3x3", (1, 8, 8, 32), 2 * 8 * 8 * 32 * 9,
        2 * (2 * 8 * 8 * 32 + 32 * 9) + 4 * 32, False)


def test_convolution_in_groups_runs_on_the_tensor_cores():
    grouped = layer(ops.Conv2d(groups=2), (1, 8, 8, 32), (64, 1, 1, 16))
    assert (grouped.kind, grouped.tensor_cores) == ("conv 1x1", True)
    assert grouped.flops == 2 * 8 * 8 * 64 * 16


def test_a_convolution_that_normalises_what_it_reads():
    op = ops.NormConv2d(ops.BatchNorm(1e-5, ops.Relu()), ops.Conv2d())
    assert layer(op, (1, 8, 8, 32), *[(32,)] * 4, (64, 1, 1, 32)) == Layer(
        "name", "NormConv2d", (1, 8, 8, 64), 2 * 8 * 8 * (64 * 32 + 32),
        2 * (8 * 8 * (32 + 64) + 64 * 32 + 4 * 32), True)


@pytest.mark.parametrize(("op", "kernel", "pixels"), [
    (ops.Conv2d((2, 2)), 1, 4 * 4),                             # three pixels of four are skipped
    (ops.Conv2d((3, 2)), 2, (2 + 2 + 2) * 8),                   # rows 0 1, 3 4, 6 7
    (ops.Conv2d((2, 2), (1, 1, 1, 1)), 3, 8 * 8),               # windows overlap
    (ops.Conv2d(dilation=(5, 5)), 2, 6 * 6)])                   # rows 0 1 2 and 5 6 7
def test_pixels_between_the_windows_are_not_read(op, kernel, pixels):
    shapes = (1, 8, 8, 4), (4, kernel, kernel, 4)
    written = ops.count(op.output_shape(*shapes)) + ops.count(shapes[1])
    assert layer(op, *shapes).bytes == 2 * (4 * pixels + written)


def test_linear_and_pooling():
    linear = layer(ops.Linear(), (8, 2048), (1000, 2048), (1000,))
    assert linear == Layer("name", "Linear", (8, 1000), 2 * 8 * 1000 * 2048,
                           2 * (8 * 2048 + 1000 * 2048 + 8 * 1000) + 4 * 1000, True)
    pool = layer(ops.GlobalAvgPool2d(), (8, 7, 7, 2048))
    assert (pool.flops, pool.bytes, pool.tensor_cores) == (
        8 * 49 * 2048, 2 * (8 * 49 * 2048 + 8 * 2048), False)


def test_resnet50_after_the_passes(resnet50):
    layers = {layer["name"]: layer for layer in resnet50["layers"]}
    assert resnet50["launches"] == len(layers) == 53 + 1 + 1 + 1    # convolutions, pools, Linear
    matrix = [layer["flops"] for layer in layers.values() if layer["tensor_cores"]]
    assert sum(matrix) == 2 * 4_089_184_256
    assert sum(layer["kind"].endswith("residual") for layer in layers.values()) == 16
    assert layers["conv1"]["shape"] == [1, 112, 112, 64]
    assert layers["conv1"]["bytes"] == 1_925_760
    for total in ("flops", "bytes"):
        assert resnet50[total] == sum(layer[total] for layer in layers.values())


def test_batch_multiplies_flops_but_not_weights(tiny):
    one, four = (record(tiny, batch, "float16", roofs("float16")) for batch in (1, 4))
    weights = 2 * (4 * 27 + 5 * 4) + 4 * (4 + 5)
    assert four["flops"] == 4 * one["flops"]
    assert four["bytes"] - weights == 4 * (one["bytes"] - weights)


# ---- least times ------------------------------------------------------------------------------

def test_roofs_of_each_dtype():
    assert roofs("float16") == [Roof("wgmma", 790), Roof("mma.sync", 790 * 0.629)]
    assert roofs("bfloat16", "mma") == [Roof("mma.sync", 790 * 0.629)]
    assert roofs("tf32", "wgmma") == [Roof("wgmma", pytest.approx(394.8, abs=0.1))]
    assert roofs("float32") == [Roof("CUDA cores", 67)]


def test_the_longer_of_arithmetic_and_bytes_is_the_least_time():
    # 4.3 TB/s move 4.3e9 bytes in a ms; in which 790 TFLOP/s do 790e9 FLOPs, 67 TFLOP/s 67e9.
    busy = Layer("", "", (), 1_580_000_000_000, 4_300_000_000, True)
    idle = Layer("", "", (), 79_000_000_000, 4_300_000_000, True)
    off_tensor_cores = Layer("", "", (), 134_000_000_000, 4_300_000_000, False)
    wgmma, mma = roofs("float16")
    assert wgmma.bound(busy) == (pytest.approx(2), "compute")
    assert mma.bound(busy) == (pytest.approx(2 / 0.629), "compute")
    assert wgmma.bound(idle) == mma.bound(idle) == (pytest.approx(1), "memory")
    assert wgmma.bound(off_tensor_cores) == (pytest.approx(2), "compute")


def test_totals_add_up_the_layers(resnet50):
    for instruction, total in resnet50["totals"].items():
        layers = [(layer["least_ms"][instruction], layer["limit"][instruction])
                  for layer in resnet50["layers"]]
        assert total["least_ms"] == pytest.approx(sum(ms for ms, _ in layers))
        assert total["images_per_s"] == pytest.approx(1000 / total["least_ms"])
        assert total["memory_share_of_time"] * total["least_ms"] == pytest.approx(
            sum(ms for ms, limit in layers if limit == "memory"))
    assert list(resnet50["totals"]) == ["wgmma", "mma.sync"]


# ---- end to end -------------------------------------------------------------------------------

def test_command_line_writes_table_and_json(tiny, tmp_path, run, capsys):
    run(tiny, "--batch", "2", "--json", str(tmp_path / "model.json"))
    shown = capsys.readouterr().out
    for words in ("tiny, batch 2, float16, H200: a model, not a measurement", "3 launches",
                  "(wgmma)", "(mma.sync)", "A model, not a measurement.", "1 of 1 conv 3x3"):
        assert words in shown
    written = json.loads((tmp_path / "model.json").read_text())
    assert written["kind"] == "model"
    assert written["networks"] == [record(tiny, 2, "float16", roofs("float16"))]
    assert written["provenance"]["assumptions"] == roofline.ASSUMPTIONS
    assert "not measured here" in written["provenance"]["H200"]["mma.sync"]["source"]


def test_one_instruction_can_be_asked_for(tiny, run, capsys):
    run(tiny, "--instruction", "mma")
    shown = capsys.readouterr().out
    assert "(mma.sync)" in shown
    assert "wgmma" not in shown


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(tiny, tmp_path, run, suffix, start):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"roofline.{suffix}"
    run(tiny, "--plot", str(path))
    assert path.read_bytes().startswith(start)


def test_without_matplotlib_a_sentence_says_what_to_install(tiny, run, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"needs matplotlib.* `pip install 'numba-cnn\[profiling"):
        run(tiny, "--plot", "roofline.svg")


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["resnet5"], "there is no network 'resnet5'; there are resnet50"),
    (["--dtype", "float32", "--instruction", "mma"], "float32 runs on the CUDA cores")])
def test_failure_is_one_sentence(run, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(*arguments)


# ---- the page of notes --------------------------------------------------------------------------

NOTES = (Path(roofline.__file__).parent / "NOTES.md").read_text()
NAMES = {"ResNet-50": "resnet50", "VGG-16": "vgg16", "MobileNetV2": "mobilenet_v2",
         "EfficientNet-Lite0": "efficientnet_lite0", "SqueezeNet 1.1": "squeezenet1_1",
         "DenseNet-121": "densenet121"}


def rows_of_notes(heading: str) -> list[list[str]]:
    """Cells of the table under a heading."""
    table = NOTES.partition(heading)[2].partition("\n##")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", [
    pytest.param(row, id=f"{row[0]}, batch {row[1]}", marks=[pytest.mark.slow] * (
        row[0] == "VGG-16"))        # which has half a gigabyte of weights
    for row in rows_of_notes("### Whole networks")])
def test_the_notes_say_what_the_model_says(row):
    name, batch, gflop, gigabytes, intensity, launches, *milliseconds = row[:8]
    result = record(NAMES[name], int(batch), "float16", roofs("float16"))
    totals = [result["totals"][instruction] for instruction in ("wgmma", "mma.sync")]
    written = [gflop, gigabytes, intensity, launches, *milliseconds, *row[8:10],
               row[10].rstrip("%")]
    found = [result["flops"] / 1e9, result["bytes"] / 1e9, result["flops"] / result["bytes"],
             result["launches"], *(total["least_ms"] for total in totals),
             *(total["images_per_s"] for total in totals),
             100 * totals[0]["memory_share_of_time"]]
    for text, value in zip(written, found, strict=True):
        decimals = len(text.partition(".")[2])
        assert float(text.replace(",", "")) == pytest.approx(value, abs=0.5001 * 10 ** -decimals)


@pytest.mark.parametrize("row", rows_of_notes("## Known without a GPU"), ids=lambda row: row[0])
def test_the_notes_say_how_much_memory_is_planned(row):
    recorder = Recorder(CudaOptions(dtype="float16", arch="sm_90a", multiprocessors=132))
    graph = roofline.read_network(NAMES[row[0]])
    shapes = {name: (256, *image.shape[1:]) for name, image in graph.inputs.items()}
    options = recorder.options()
    program = Program(specialise(graph, shapes), recorder, options)
    weights = sum(packed.nbytes for _, packed in options.packed.values())
    assert [float(cell) for cell in row[1:]] == pytest.approx(
        [program.bytes / 1e6, weights / 1e6], abs=0.5001)
