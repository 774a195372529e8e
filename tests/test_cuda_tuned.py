"""Measured choices on disk: kept, used, and left out of account where they do not fit."""
import json
import logging

import numpy as np
import pytest

from kernels.cuda import backend, tuned
from kernels.cuda.conv_gemm import WHOLE
from kernels.cuda.gpu import Gpu
from kernels.cuda.host import conv
from kernels.cuda.host.conv_choice import MMA_TILES, TILES
from kernels.cuda.host.conv_shape import Conv, problem
from kernels.cuda.launch import Choice, CudaOptions
from kernels.ops import Conv2d, Linear, TensorSpec

GPU = Gpu(0, "NVIDIA H100 80GB HBM3", "sm_90a", 132)
CONV = Conv(8, 14, 14, 256, 14, 14, 256, (3, 3), (1, 1), 1, 1, (1, 1), 1)
NAME = problem(CONV, "float16")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    return tmp_path


def kernel(choices, dtype="float16"):
    """Name of the kernel that a convolution of CONV's sizes gets."""
    shapes = (8, 14, 14, 256), (256, 3, 3, 256)
    options = CudaOptions(dtype=dtype, arch="sm_90a", multiprocessors=132, tuned=choices)
    step = backend.prepare(Conv2d(padding=(1, 1, 1, 1)), [TensorSpec(shape, dtype)
                                                          for shape in shapes],
                           TensorSpec(shapes[0], dtype), [None, np.zeros(shapes[1], np.float32)],
                           options)
    return step.kernel


def test_what_is_saved_is_loaded_and_comes_before_the_estimate(caplog):
    choices = {NAME: Choice(MMA_TILES[5], 2)}
    estimated = kernel({})
    with caplog.at_level(logging.DEBUG, "kernels"):
        assert tuned.save(GPU, choices).name == "nvidia-h100-80gb-hbm3-132.json"
        assert tuned.load(GPU) == choices
        assert kernel(tuned.load(GPU)) == "conv_mma_f16_128x32x64_s2_splitk" != estimated
    assert NAME in caplog.messages[-1]
    assert caplog.messages[-1].endswith("2 splits (tuned)")


def test_what_is_saved_later_is_added():
    first, second = Choice(TILES["float16"][1], 1), Choice(None)
    tuned.save(GPU, {"float16 a": first, "float16 b": first})
    tuned.save(GPU, {"float16 b": second})
    assert tuned.load(GPU) == {"float16 a": first, "float16 b": second}


@pytest.mark.parametrize("other", [Gpu(0, "NVIDIA H100 PCIe", "sm_90a", 132),
                                   Gpu(0, GPU.name, "sm_90a", 66),
                                   Gpu(0, "NVIDIA-H100 80GB HBM3", "sm_90a", 132)])
def test_gpus_of_other_names_or_sizes_have_their_own(other):
    tuned.save(GPU, {NAME: Choice(TILES["float16"][1], 1)})
    assert tuned.load(other) == {}


def test_choices_of_kernels_that_were_edited_are_stale(monkeypatch):
    tuned.save(GPU, {NAME: Choice(TILES["float16"][1], 1)})
    monkeypatch.setattr(tuned, "kernels_hash", lambda: "edited")
    assert tuned.load(GPU) == {}
    tuned.save(GPU, {"float16 new": Choice(None)})
    assert list(tuned.load(GPU)) == ["float16 new"]


@pytest.mark.parametrize(("tile", "splits", "cluster"), [
    ([128, 128, 64, 5, 64, 64, 2], 1, False), (list(TILES["float32"][0]), 1, False),
    (list(TILES["float16"][1]), 0, False), (list(TILES["float16"][1]), "2", False),
    (list(TILES["float16"][1]), 17, False), (None, 2, False), (None, 1, True),
    (list(TILES["float16"][1]), 9, True)])
def test_tiles_and_splits_that_there_are_not_are_left_out(tile, splits, cluster):
    good = Choice(TILES["float16"][1], 3)
    path = tuned.save(GPU, {NAME: good, "float16 other": good})
    stored = json.loads(path.read_text())
    stored["choices"][NAME] = {"tile": tile, "splits": splits, "cluster": cluster}
    path.write_text(json.dumps(stored))
    assert tuned.load(GPU) == {"float16 other": good}


def test_a_file_of_before_there_were_clusters_has_none():
    path = tuned.save(GPU, {NAME: Choice(TILES["float16"][1], 3)})
    stored = json.loads(path.read_text())
    del stored["choices"][NAME]["cluster"]
    path.write_text(json.dumps(stored))
    assert tuned.load(GPU) == {NAME: Choice(TILES["float16"][1], 3)}


def test_a_cluster_is_left_out_where_there_are_none():
    other, choice = Gpu(0, "NVIDIA A10", "sm_86", 72), Choice(TILES["float16"][-1], 4, True)
    for gpu in (GPU, other):
        tuned.save(gpu, {NAME: choice})
    assert tuned.load(other) == {}
    assert tuned.load(GPU) == {NAME: choice}


def test_a_tile_that_does_not_fit_the_gpu_is_left_out():
    small = Gpu(0, "NVIDIA A10", "sm_86", 72)
    tuned.save(small, {NAME: Choice(TILES["float16"][0], 1)})
    assert tuned.load(small) == {}


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'"text"',
                                      b'{"gpu": "x", "multiprocessors": 1, "kernels": ""}',
                                      b'{"gpu": "x", "multiprocessors": 1, "kernels": "",'
                                      b' "choices": {"a": {"tile": [1, 2], "splits": 1}}}'])
def test_a_damaged_file_is_named_and_left_out(contents, caplog):
    path = tuned.save(GPU, {NAME: Choice(None)})
    path.write_bytes(contents)
    assert tuned.load(GPU) == {}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()
    tuned.save(GPU, {NAME: Choice(None)})
    assert tuned.load(GPU) == {NAME: Choice(None)}


def test_a_choice_is_of_all_sizes_and_the_dtype():
    others = [CONV._replace(**{field: (5, 5) if isinstance(value, tuple) else value + 1})
              for field, value in CONV._asdict().items() if not field.startswith("fold")]
    names = {problem(one, "float16") for one in (CONV, *others)} | {problem(CONV, "bfloat16")}
    assert len(names) == len(others) + 2


def test_a_linear_layer_may_be_either_product():
    def kernel(samples, choice):
        shapes = (samples, 512), (64, 512)
        plain = Conv(1, 1, samples, 512, 1, samples, 64, (1, 1), (1, 1), 0, 0, (1, 1), 1)
        options = CudaOptions(multiprocessors=132,
                              tuned={problem(plain, "float32"): choice} if choice else {})
        return backend.prepare(Linear(), [TensorSpec(shape) for shape in shapes],
                               TensorSpec((samples, 64)),
                               [None, np.zeros(shapes[1], np.float32)], options).kernel
    tile = TILES["float32"][2]
    assert kernel(4, None).startswith("gemv_")
    assert kernel(4, Choice(None)).startswith("gemv_")
    assert kernel(4, Choice(tile, 1)) == conv.conv_kernel("float32", tile, "clip", WHOLE).name
    assert kernel(5, Choice(None)).startswith("conv_")      # five are too many for a vector product
