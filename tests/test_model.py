"""Model: the embedded network against ONNX Runtime and known figures, and the whole API."""
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import cnn
from kernels import ops

ROOT = Path(__file__).parent.parent
ZOO_FILE = ROOT / "cnn" / "zoo" / "efficientnet_lite0.onnx"
PHOTOS = ROOT / "tests" / "data"

# What an independent float32 forward pass of the original weights gave.
KNOWN = {"chelsea.png": {282: 0.385, 285: 0.363, 281: 0.167},
         "coffee.png": {967: 0.951},
         "rocket.jpg": {657: 0.320, 744: 0.211}}


@pytest.fixture(scope="module")
def model():
    return cnn.load()


@pytest.fixture(scope="module")
def session():
    return onnxruntime.InferenceSession(ZOO_FILE, providers=["CPUExecutionProvider"])


def softmax(logits):
    exponent = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("photo", KNOWN)
def test_probabilities_are_those_of_onnx_runtime_and_of_the_original(model, session, photo):
    batch = model.preprocess(PHOTOS / photo)
    (logits,) = session.run(None, {"input": batch.transpose(0, 3, 1, 2)})
    probabilities = model.predict(batch)
    assert probabilities.dtype == np.float32
    assert np.abs(probabilities - softmax(logits)).max() <= 1e-5
    for index, probability in KNOWN[photo].items():
        assert probabilities[0, index] == pytest.approx(probability, abs=0.01)


def test_classify_takes_every_kind_of_image(model):
    path = PHOTOS / "coffee.png"
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    kinds = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    answers = model.classify(kinds, top=3)
    assert all(answer == answers[0] for answer in answers)
    best = answers[0][0]
    assert (best.label, best.index) == (model.labels[967], 967)
    assert best.probability == pytest.approx(0.951, abs=0.01)
    assert len(answers[0]) == 3
    assert model.classify(path, top=3) == answers[0]


def test_an_iterator_is_read_lazily(model):
    taken = []

    def camera():
        for i in itertools.count():
            taken.append(i)
            yield np.full((8, 8, 3), i, np.uint8)

    results = model.classify(camera(), batch_size=2)
    next(results)
    assert taken == [0, 1]
    next(results)
    assert taken == [0, 1]
    next(results)
    assert taken == [0, 1, 2, 3]


def test_any_batch_size_gives_the_same_bits(model):
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((5, 224, 224, 3)).astype(np.float32)
    together = model.predict(batch)
    alone = np.concatenate([model.predict(batch[i:i + 1]) for i in range(5)])
    assert np.array_equal(together, alone)
    assert model.predict(batch[:0]).shape == (0, 1000)
    assert model.classify([]) == []
    empty = model.run({"input": np.zeros((0, 3, 224, 224), np.float32)})
    assert empty["logits"].shape == (0, 1000)


def test_non_contiguous_arrays_work(model):
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((2, 224, 224, 3)).astype(np.float32)
    turned = np.ascontiguousarray(batch.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
    assert not turned.flags.c_contiguous
    assert np.array_equal(model.predict(turned), model.predict(batch))


def test_run_speaks_the_files_names_and_layouts(model, session):
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    result = model.run({"input": x})
    (expected,) = session.run(None, {"input": x})
    assert list(result) == ["logits"]
    assert np.abs(result["logits"] - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("batch", "sentence"), [
    (np.zeros((224, 224, 3), np.float32), r"shape \(224, 224, 3\)"),
    (np.zeros((1, 3, 224, 224), np.float32), r"shape \(1, 3, 224, 224\)"),
    (np.zeros((1, 224, 224, 4), np.float32), r"shape \(1, 224, 224, 4\)"),
    (np.zeros((1, 224, 224, 3), np.float64), "float32 NumPy array, it is float64"),
    ([[1.0]], "float32 NumPy array, it is list"),
])
def test_predict_refuses_what_does_not_fit(model, batch, sentence):
    with pytest.raises(cnn.ModelError, match=sentence):
        model.predict(batch)


def test_run_refuses_wrong_names(model):
    with pytest.raises(cnn.ModelError, match=r"inputs are \['input'\], not \['image'\]"):
        model.run({"image": np.zeros((1, 3, 224, 224), np.float32)})


@pytest.mark.parametrize(("arguments", "error", "sentence"), [
    ({"device": "tpu"}, cnn.DeviceError, "device='tpu' is unknown; it can be 'auto', 'cpu'"),
    ({"device": "cuda"}, cnn.DeviceError, "a GPU is used through CuPy|no NVIDIA"),
    ({"device": "emulator:1"}, cnn.DeviceError, "the emulator executes what GPUs of"),
    ({"dtype": "float16"}, cnn.DeviceError, "dtype='float16' is not supported on the CPU"),
    ({"threads": 0}, cnn.DeviceError, "threads=0"),
    ({"activation": "relu"}, cnn.ModelError, "activation='relu'"),
    ({"labels": ["cat"]}, cnn.ModelError, "1 labels for 1000 classes"),
])
def test_load_refuses_what_can_not_be_had(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        cnn.load(**arguments)


@pytest.mark.parametrize(("top", "batch_size"), [(0, 1), (True, 1), (1.5, 1), (1, 0), (1, "2")])
def test_classify_refuses_bad_numbers(model, top, batch_size):
    with pytest.raises(cnn.ModelError, match="whole number of at least 1"):
        model.classify(PHOTOS / "coffee.png", top, batch_size)


def test_auto_says_at_info_what_runs(caplog):
    with caplog.at_level(logging.INFO, logger="cnn"):
        assert cnn.load(device="auto").device == "cpu"
    assert "'auto' is the CPU" in caplog.text


def test_trace_has_every_layer_and_agrees_with_predict(model):
    batch = model.preprocess(PHOTOS / "chelsea.png")
    values = model.trace(PHOTOS / "chelsea.png")
    source = onnx.load(ZOO_FILE)
    by_name = {node.name: node for node in source.graph.node}
    norms = [name for name, node in by_name.items() if node.op_type == "BatchNormalization"]
    assert len(norms) == 49
    assert set(norms) <= set(values)
    # Every traced value against ONNX Runtime on the same file, all values made outputs.
    wanted = {name: by_name[name].output[0] for name in values if name in by_name}
    assert len(wanted) == 49 + 33 + 9 + 3    # norms, ReLU6, adds, head
    for value in wanted.values():
        if value != "logits":
            source.graph.output.append(helper.make_empty_tensor_value_info(value))
    session = onnxruntime.InferenceSession(source.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    expected = dict(zip([output.name for output in session.get_outputs()],
                        session.run(None, {"input": batch.transpose(0, 3, 1, 2)}), strict=True))
    for layer, value in wanted.items():
        theirs = expected[value]
        theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
        scale = np.abs(theirs).max()
        assert np.abs(values[layer].reshape(theirs.shape) - theirs).max() <= 1e-4 * scale, layer
    head = list(wanted)[-1]
    assert np.abs(softmax(values[head]) - model.predict(batch)).max() <= 1e-6


def test_trace_of_some_layers_and_of_an_unknown_one(model):
    name = "stem.norm" if "stem.norm" in model.trace(PHOTOS / "coffee.png") else None
    names = list(model.trace(PHOTOS / "coffee.png"))[:2]
    assert list(model.trace(PHOTOS / "coffee.png", names)) == names
    with pytest.raises(cnn.ModelError, match=r"no layer is named \['nonsense'\]"):
        model.trace(PHOTOS / "coffee.png", ["nonsense"])
    assert name is None or name in model.trace(PHOTOS / "coffee.png", [name])


def test_summary_counts_and_names_kernels(model):
    summary = model.summary()
    assert summary.parameters == 4_652_008
    assert summary.rows[-1].output_shape == (1, 1000)
    assert sum(row.kernel.startswith("depthwise") for row in summary.rows) == 16
    assert not any("batch" in row.kernel or "transpose" in row.kernel for row in summary.rows)
    assert 380e6 < summary.macs < 400e6
    assert str(summary).count("\n") > len(summary.rows)


def test_warmup_prepares_the_shapes(model):
    model.warmup([1, 3])
    assert {key[0][0] for key in model._programs} >= {1, 3}


AFTER_WARMUP = """
import cnn
from kernels.cpu import launch
model = cnn.load(device="cpu")
model.warmup([1, 4])
del launch._load
model.classify("examples/cat.jpg")
model.classify(["examples/cat.jpg"] * 4, batch_size=4)
"""


def test_after_warmup_a_photo_waits_for_no_kernel():
    done = subprocess.run([sys.executable, "-c", AFTER_WARMUP], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_threads_calling_predict_get_what_they_asked_for(model):
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((n, 224, 224, 3)).astype(np.float32) for n in (1, 2, 1, 2)]
    expected = [model.predict(batch) for batch in batches]
    results = [None] * len(batches)

    def work(i):
        for _ in range(3):
            results[i] = model.predict(batches[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_thread_count_does_not_change_bits():
    batch = np.random.default_rng(0).standard_normal((1, 224, 224, 3)).astype(np.float32)
    one, two = (cnn.load(threads=n).predict(batch) for n in (1, min(2, cnn.load().threads)))
    assert np.array_equal(one, two)


def test_runs_give_the_same_bits(model):
    batch = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    first = model.predict(batch)
    assert all(np.array_equal(model.predict(batch), first) for _ in range(5))


@pytest.mark.parametrize("size", [1, 2])
def test_ten_thousand_predictions_do_not_grow_memory(small_model, size):
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    model = cnn.load(small_model, device="cpu", threads=1)
    batch = np.zeros((size, 16, 16, 3), np.float32)
    for _ in range(500):
        model.predict(batch)
    before = resident()
    for _ in range(10_000):
        model.predict(batch)
    assert resident() - before < 1 << 20    # 100 bytes a prediction would be seen


def test_programs_are_bounded(model, monkeypatch):
    monkeypatch.setattr("cnn.model.MAX_PROGRAMS", 2)
    for n in (1, 2, 3, 4):
        model.predict(np.zeros((n, 224, 224, 3), np.float32))
    assert [key[0][0] for key in model._programs] == [3, 4]


# ---- models from files of one's own -----------------------------------------------------------

def write_model(path, nodes, inputs, outputs, initializers=(), metadata=None):
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(array, n) for n, array in dict(initializers).items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(made, metadata or {})
    onnx.save(made, path)
    return path


@pytest.mark.parametrize(("last", "expected"), [
    ("Softmax", "none"), ("Sigmoid", "none"), ("Relu", "softmax")])
def test_activation_auto_sees_what_the_network_ends_in(tmp_path, last, expected):
    path = write_model(tmp_path / "m.onnx", [helper.make_node(last, ["x"], ["y"], name="last")],
                       {"x": ["N", 4]}, {"y": ["N", 4]})
    assert cnn.load(path).activation == expected
    assert cnn.load(path, activation="sigmoid").activation == "sigmoid"


def test_labels_and_preprocessing_from_metadata_and_from_arguments(tmp_path):
    weight = np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
             helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
             helper.make_node("Flatten", ["p"], ["y"], name="flat")]
    settings = cnn.Preprocess(size=(8, 8), crop=None, interpolation="bilinear",
                              mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    metadata = {"cnn.labels": json.dumps(["red", "green", "blue"]),
                "cnn.preprocess": settings.to_json()}
    sizes = {"x": ["N", 3, "H", "W"]}, {"y": ["N", 3]}
    told = cnn.load(write_model(tmp_path / "told.onnx", nodes, *sizes, {"w": weight}, metadata))
    photo = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    assert {p.label for p in told.classify(photo)} == {"red", "green", "blue"}
    silent = write_model(tmp_path / "silent.onnx", nodes, *sizes, {"w": weight})
    with pytest.raises(cnn.ModelError, match="give preprocess="):
        cnn.load(silent).classify(photo)
    argued = cnn.load(silent, preprocess=settings)
    assert argued.classify(photo)[0].label.startswith("class ")
    assert [p.probability for p in argued.classify(photo)] == [
        p.probability for p in told.classify(photo)]


@pytest.mark.parametrize("metadata", [{"cnn.labels": "{"}, {"cnn.preprocess": "{}"}])
def test_broken_metadata_is_said(tmp_path, metadata):
    path = write_model(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"], name="r")],
                       {"x": ["N", 4]}, {"y": ["N", 4]}, metadata=metadata)
    with pytest.raises(cnn.ModelError, match=f"m.onnx: its metadata '{next(iter(metadata))}'"):
        cnn.load(path)


def test_a_network_that_asks_for_too_much_memory_is_refused(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="r")]
    model = cnn.load(write_model(tmp_path / "m.onnx", nodes, {"x": ["N", 1 << 20]},
                                 {"y": ["N", 1 << 20]}))
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1 << 14, 1 << 20), (0, 0))
    with pytest.raises(cnn.ModelError, match="use a smaller batch or image"):
        model.run({"x": huge})


def test_a_network_by_hand_is_a_model_too():
    net = cnn.Sequential(
        cnn.Conv2d(3, 8, 3, padding=1), cnn.ReLU(), cnn.Conv2d(8, 8, 3, padding=1), cnn.ReLU(),
        cnn.MaxPool2d(2), cnn.ReLU(), cnn.Conv2d(8, 16, 3, padding=1), cnn.ReLU(),
        cnn.MaxPool2d(2), cnn.Flatten(), cnn.Linear(16 * 4 * 4, 10))
    model = cnn.Model(net, input_shape=(16, 16, 3), labels=list("abcdefghij"))
    batch = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    logits = net(batch)
    assert logits.shape == (2, 10)
    assert np.array_equal(model.run({"input": batch})["output"], logits)
    assert np.abs(model.predict(batch) - softmax(logits)).max() <= 1e-6
    assert set(model.trace(batch)) >= {"0", "1", "4", "10"}
    kinds = {type(node.op) for node in model._graph.nodes}
    assert kinds <= {ops.Conv2d, ops.MaxPool2d, ops.Relu, ops.Flatten, ops.Linear}
    with pytest.raises(cnn.ModelError, match="input_shape"):
        cnn.Model(net)


def bare_network():
    """The embedded network as others would ship it: no word about labels and photos."""
    made = onnx.load(ZOO_FILE)
    del made.metadata_props[:]
    return made


def test_a_file_that_says_nothing_about_photos_can_be_told(tmp_path):
    path = tmp_path / "bare.onnx"
    onnx.save(bare_network(), path)
    with pytest.raises(cnn.ModelError, match="give preprocess='imagenet'"):
        cnn.load(path).classify(PHOTOS / "coffee.png")
    model = cnn.load(path, preprocess="imagenet", labels="imagenet")
    assert model.preprocessing == cnn.Preprocess((224, 224))
    assert model.classify(PHOTOS / "coffee.png", top=1)[0].label == "espresso"
    with pytest.raises(cnn.ModelError, match="preprocess='torch': 'torch' is none of imagenet, "):
        cnn.load(path, preprocess="torch")


def test_labels_are_any_sequence_of_names():
    net = cnn.Sequential(cnn.Flatten(), cnn.Linear(3, 2))
    assert cnn.Model(net, input_shape=(1, 1, 3), labels=np.array(["a", "b"])).labels == ["a", "b"]
    with pytest.raises(cnn.ModelError, match="labels='ab'; it can be 'imagenet' or a list"):
        cnn.Model(net, input_shape=(1, 1, 3), labels="ab")
