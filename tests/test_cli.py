"""The command line, run in this process so that kernels are loaded once."""
import csv
import importlib.metadata
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from onnx_models import build, node, saved, whole
from PIL import Image

from cnn import cli, doctor

ROOT = Path(__file__).parent.parent
CAT = ROOT / "examples" / "cat.jpg"


def test_classify_prints_a_table_with_bars_and_says_what_ran(cnn):
    status, out, _ = cnn("classify", CAT)
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith("tiger cat")
    assert "█" in lines[0]
    assert "%" in lines[0]
    assert len(lines) == 6
    assert "on cpu (" in lines[5]
    assert "float32) with efficientnet_lite0.onnx" in lines[5]


def test_json_and_csv_carry_the_same_predictions(cnn):
    _, as_json, _ = cnn("classify", CAT, "--json", "--top", 2)
    _, as_csv, _ = cnn("classify", CAT, "--csv", "--top", 2)
    (result,) = json.loads(as_json)
    rows = list(csv.DictReader(io.StringIO(as_csv)))
    assert [row["label"] for row in rows] == [p["label"] for p in result["predictions"]]
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        [p["probability"] for p in result["predictions"]], abs=1e-6)
    assert result["predictions"][0]["index"] == 282


def test_a_bad_file_among_many_is_reported_and_the_others_go_on(cnn, tmp_path):
    for name in ("a", "c"):
        Image.open(CAT).save(tmp_path / f"{name}.png")
    (tmp_path / "b.jpg").write_bytes(CAT.read_bytes()[:5000])
    (tmp_path / "notes.txt").write_text("no picture")
    status, out, err = cnn("classify", tmp_path, "--json", "--batch", 2)
    results = json.loads(out)
    assert status == 1
    assert [Path(result["file"]).name for result in results] == ["a.png", "b.jpg", "c.png"]
    assert results[0]["predictions"] == results[2]["predictions"]
    assert "b.jpg" in results[1]["error"]
    assert "b.jpg" in err


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["classify", "missing.jpg"], "missing.jpg"),
    (["classify", CAT, "--model", "resnet"], "'resnet' is no model of the zoo; it has "
                                             "['efficientnet_lite0']"),
    (["classify", CAT, "--model", "missing.onnx"], "missing.onnx: there is no such file"),
    (["classify", CAT, "--device", "tpu"], "device='tpu' is unknown"),
    (["classify", CAT, "--device", "cuda"], "device='cuda'"),
    (["classify", CAT, "--dtype", "int4"], "dtype='int4' is not supported"),
    (["classify", CAT, "--threads", "999"], "threads=999"),
    (["classify", CAT, "--preprocess", "torch"], "--preprocess torch: neither one of imagenet,"),
    (["classify", CAT, "--labels", "missing.txt"], "--labels missing.txt: can not be read"),
    (["classify", CAT, "--labels", CAT], "it is not UTF-8 text"),
    (["classify", CAT, "--labels", ROOT / "LICENSE"], "labels for 1000 classes"),
    (["summary", "setup.py"], "setup.py: a model file ends in .onnx or .safetensors"),
])
def test_bad_input_is_one_sentence_without_a_traceback(cnn, arguments, sentence):
    status, out, err = cnn(*arguments)
    assert status != 0
    assert sentence in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert out == ""


def test_debug_shows_the_traceback():
    done = subprocess.run([sys.executable, "-m", "cnn", "classify", "missing.jpg", "--debug"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "missing.jpg" in done.stderr


@pytest.mark.parametrize(("arguments", "status", "out", "err"), [
    (["classify", CAT, "--top", "1", "--csv"], 0, "tiger cat", ""),
    (["classify", CAT, "missing.jpg", "--json"], 1, "Egyptian cat", "missing.jpg"),
    (["classify", "missing.jpg"], 1, "", "missing.jpg: there is no such file"),
    (["bogus"], 2, "", "No such command 'bogus'"), (["--version"], 0, "cnn, version", "")])
def test_the_process_ends_with_its_status_once_all_is_said(arguments, status, out, err):
    done = subprocess.run([sys.executable, "-m", "cnn", *arguments], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == status
    assert out in done.stdout
    assert err in done.stderr


def test_usage_errors_and_help(cnn):
    status, _, err = cnn("classify")
    assert status == 2
    assert "IMAGE_OR_FOLDER" in err
    for command in ([], ["classify"], ["summary"]):
        status, out, _ = cnn(*command, "--help")
        assert status == 0
        assert "Examples:" in out
    status, out, _ = cnn("--version")
    assert status == 0
    assert "version 0." in out


def test_an_empty_folder_is_said(cnn, tmp_path):
    status, _, err = cnn("classify", tmp_path)
    assert status == 1
    assert f"{tmp_path}: the folder holds no picture" in err


def test_summary_lists_every_layer_and_the_totals(cnn):
    status, out, _ = cnn("summary")
    assert status == 0
    assert "4,652,008 parameters" in out
    assert "depthwise_3x3_f32" in out
    assert "1x1000" in out
    assert "activation of the output: softmax" in out


def test_summary_shows_the_kernels_of_a_compute_type(cnn, small_model):
    status, out, _ = cnn("summary", small_model, "--device", "emulator:sm_90a", "--dtype",
                         "float16")
    assert status == 0
    assert "conv_image_f16x3" in out
    row, = (line.split() for line in out.splitlines() if line.startswith("conv "))
    assert int(row[-1].replace(",", "")) == 2 * (16 * 16 * 3 + 8 * 3 * 3 * 3 + 8 * 8 * 8)
    status, _, err = cnn("summary", small_model, "--device", "emulator", "--dtype", "int4")
    assert status == 1
    assert "dtype='int4' is not supported on CUDA" in err


def test_sizes_that_a_file_leaves_open_can_be_given(cnn, tmp_path):
    path = saved(tmp_path, build([
        node("Conv", ["x", "w"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]),
        node("GlobalAveragePool", ["c"], ["g"]), node("Flatten", ["g"], ["y"])],
        {"x": ["N", 3, "H", "W"]}, constants={"w": whole(4, 3, 3, 3)}))
    status, _, err = cnn("summary", path)
    assert status == 1
    assert "on the command line --input-shape HxWxC" in err
    status, out, _ = cnn("summary", path, "--input-shape", "30x40x3")
    assert status == 0
    assert "1x15x20x4" in out
    status, out, _ = cnn("classify", CAT, "--model", path, "--input-shape", "30X40x3",
                         "--preprocess", "imagenet", "--csv", "--batch", "2")
    assert status == 0
    assert len(out.splitlines()) == 1 + 4
    for text in ("30x40", "30,40,3", "x30x40x3", "-1x40x3", "30x40x3.5"):
        status, _, err = cnn("summary", path, "--input-shape", text)
        assert status == 2
        assert f"'{text}' is not HxWxC" in err


def test_doctor_names_versions_cpu_threads_settings_and_cache(cnn, monkeypatch):
    monkeypatch.setenv("CNN_WINOGRAD", "0")
    status, out, _ = cnn("doctor")
    assert status == 0
    for word in ("cnn", "python", "numba", "cpu features", "threads", "gpu", "CNN_WINOGRAD=0",
                 "cache", "zoo"):
        assert word in out


def test_doctor_shows_every_gpu_and_the_driver(cnn, machine, monkeypatch, tmp_path):
    machine(driver=13020, capabilities=((9, 0), (7, 0), (12, 0)))
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.20  "
                       "Release Build  (root@host)\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(doctor, "DRIVER", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions",
                        lambda: {"cupy": ["cupy-cuda12x"], "click": ["click"]})
    status, out, _ = cnn("doctor")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert status == 0
    assert lines["gpu driver"] == "580.126.20, which supports CUDA 13.2"
    for name, arch in (("gpu 0", "sm_90a"), ("gpu 2", "sm_120")):
        assert lines[name] == f"Fake GPU ({arch}, 4 multiprocessors), 8.59 GB of 17.18 GB free"
    assert lines["gpu 1"].startswith("can not be used: GPU 1, Fake GPU, is of sm_70; the kernels")
    assert "cupy-cuda12x missing" in lines["cuda libraries"]
    assert "cupy-cuda13x" not in out
    version.unlink()
    assert "gpu driver      of an unknown version, which supports CUDA 13.2" in cnn("doctor")[1]


@pytest.mark.parametrize("broken", ["memGetInfo", "getDeviceProperties"])
def test_doctor_goes_on_where_a_gpu_does_not_answer(cnn, machine, broken):
    cupy = machine()

    def fail(*_):
        raise fake_cupy.Error("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or "
                              "unavailable", 46)
    setattr(cupy.cuda.runtime, broken, fail)
    status, out, _ = cnn("doctor")
    assert status == 0
    assert ("gpu 0           can not be used: GPU 0 does not answer: cudaErrorDevicesUnavailable: "
            "CUDA-capable device(s) is/are busy or unavailable; nvidia-smi shows") in out
    assert "zoo" in out


@pytest.mark.parametrize(("device", "threads", "fixed", "images", "batch"), [
    ("cpu", 2, None, 1, 1), ("cpu", 2, None, 5, 5), ("cpu", 2, None, 100, 8),
    ("cpu", 32, None, 100, 32), ("cuda:0", None, None, 100, 64), ("cuda:0", None, None, 3, 3),
    ("emulator", None, None, 100, 1), ("emulator:sm_90a", None, None, 100, 1),
    ("cpu", 2, 4, 100, 4), ("cpu", 2, 1, 100, 1)])
def test_how_many_run_at_once_where_nobody_says(device, threads, fixed, images, batch):
    model = SimpleNamespace(device=device, threads=threads, input_shape=(fixed, 224, 224, 3))
    assert cli._batch_for(model, images) == batch


def test_batches_of_any_size_agree(cnn, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    answers = [cnn("classify", tmp_path, "--json", "--batch", size)[1] for size in (1, 2, 5, 8)]
    answers.append(cnn("classify", tmp_path, "--json")[1])
    assert len(set(answers)) == 1


def test_labels_and_preprocessing_can_be_given(cnn, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(1000)), encoding="utf-8")
    settings = '{"size": [224, 224], "interpolation": "bicubic", "mean": [127], "std": [128]}'
    status, _, err = cnn("classify", CAT, "--preprocess", settings)
    assert status == 1      # a network of three channels can not look at grey pictures
    assert "(1, 224, 224, 1)" in err
    settings = settings.replace("[127]", "[127, 127, 127]").replace("[128]", "[128, 128, 128]")
    status, out, _ = cnn("classify", CAT, "--preprocess", settings, "--labels", names, "--csv")
    assert status == 0
    assert "kind 282" in out


def test_quantize_writes_a_file_and_says_how_it_agrees(cnn, tmp_path):
    target = tmp_path / "lite0_int8.onnx"
    status, out, _ = cnn("quantize", "efficientnet_lite0", CAT, "--output", target)
    assert status == 0
    assert f"{target}: 1 of 1 photo is taken for the same, probabilities differ by" in out
    status, out, _ = cnn("classify", CAT, "--model", target, "--top", 1)
    assert status == 0
    assert out.startswith("tiger cat")
    status, _, err = cnn("quantize", target, CAT, "-o", tmp_path / "again.onnx")
    assert (status, "it is quantized already" in err) == (1, True)
