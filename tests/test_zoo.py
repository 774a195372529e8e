"""The embedded model: whole, licensed, and what ONNX Runtime makes of it."""
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cnn import ModelError, zoo
from cnn.image import Preprocess, photos

FILE = zoo.FOLDER / "efficientnet_lite0.onnx"
PHOTOS = Path(__file__).parent / "data"


def test_the_file_is_the_one_that_its_readme_names():
    data = FILE.read_bytes()
    assert len(data) <= 10_000_000
    assert hashlib.sha256(data).hexdigest() in (zoo.FOLDER / "README.md").read_text()


def test_it_is_valid_onnx_with_its_own_metadata():
    model = onnx.load(FILE)
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["license"] == "Apache-2.0"
    assert metadata["cnn.labels"] == "imagenet-1k"
    assert Preprocess.from_json(metadata["cnn.preprocess"]) == Preprocess(
        (224, 224), 0.875, "bicubic", (127.0,) * 3, (128.0,) * 3)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("BatchNormalization") == 49
    assert kinds.count("Cast") == 50
    trainable = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer
                    if "running" not in tensor.name and tensor.dims)
    assert trainable == 4_652_008


@pytest.mark.parametrize(("photo", "known"), [
    ("chelsea.png", {282: 0.385, 285: 0.363, 281: 0.167}), ("coffee.png", {967: 0.951}),
    ("rocket.jpg", {657: 0.320, 744: 0.211})])
def test_onnx_runtime_gives_the_known_probabilities(photo, known):
    session = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
    settings = Preprocess((224, 224), 0.875, "bicubic", (127.0,) * 3, (128.0,) * 3)
    x = photos([PHOTOS / photo], settings).normalised().transpose(0, 3, 1, 2)
    (logits,) = session.run(None, {"input": x})
    exponent = np.exp(logits[0] - logits.max())
    for index, probability in known.items():
        assert exponent[index] / exponent.sum() == pytest.approx(probability, abs=0.01)


def test_labels_are_a_thousand_different_names():
    labels = zoo.imagenet_labels()
    assert len(labels) == len(set(labels)) == 1000
    assert all(label.strip() == label != "" for label in labels)
    assert (labels[0], labels[285], labels[967]) == ("tench", "Egyptian cat", "espresso")


def test_licences_lie_beside():
    assert "Apache License" in (zoo.FOLDER / "LICENSE-efficientnet_lite0.txt").read_text()
    assert "MIT License" in (zoo.FOLDER / "LICENSE-imagenet_labels.txt").read_text()


@pytest.mark.parametrize(("source", "sentence"), [
    ("resnet", r"'resnet' is no model of the zoo; it has \['efficientnet_lite0'\]"),
    ("missing.onnx", "missing.onnx: there is no such file"),
    ("folder/net", "folder/net: a model file ends in .onnx or .safetensors"),
    ("net.pt", "net.pt: a model file ends in"),
])
def test_find_says_what_there_is(source, sentence):
    with pytest.raises(ModelError, match=sentence):
        zoo.find(source)


def test_find_knows_names_and_paths(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"x")
    assert zoo.find(None) == zoo.find("efficientnet_lite0") == FILE
    assert zoo.find(tmp_path / "net.onnx") == tmp_path / "net.onnx"
