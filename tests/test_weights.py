"""Networks in .safetensors files: bit for bit there and back, and files that nobody vouches for."""
import inspect
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as to_bytes
from torch_networks import NETWORKS, SIZES, exemplary

import cnn
from cnn import layers, weights
from cnn.weights import load_layers

PREPROCESS = cnn.Preprocess(size=(8, 8), crop=0.5, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- there and back ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_bit_for_bit(path, name):
    net, rng = NETWORKS[name](layers), np.random.default_rng(3)
    state = {key: np.abs(rng.standard_normal(array.shape, np.float32))
             for key, array in net.state_dict().items()}
    state[next(iter(state))].flat[:3] = [np.nan, -0.0, 1e-45]
    net.load_state_dict(state)
    net.save(path)
    again, extras = load_layers(path)
    assert repr(again) == repr(net)
    assert list(again.state_dict()) == list(state)
    assert all(same_bits(array, state[key]) for key, array in again.state_dict().items())
    assert extras == {"input_shape": (None, None, None)}


def test_what_was_saved_with_the_layers_comes_back(path):
    exemplary(layers).save(path, labels=list("abcde"), preprocess=PREPROCESS,
                           input_shape=(None, 8, 8, 3))
    _, extras = load_layers(str(path))
    assert extras == {"labels": list("abcde"), "preprocess": PREPROCESS, "input_shape": (8, 8, 3)}


def test_cnn_load_makes_a_model_that_gives_the_same_bits(path):
    net = exemplary(layers)
    net.save(path, labels=list("abcde"), preprocess=PREPROCESS, input_shape=(8, 8, 3))
    model = cnn.load(path)
    n, c, h, w = SIZES["exemplary"]
    batch = np.random.default_rng(0).standard_normal((n, h, w, c)).astype(np.float32)
    assert same_bits(model.run({"input": batch})["output"], net(batch))
    photo = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    assert {prediction.label for prediction in model.classify(photo)} == set("abcde")


def test_cnn_load_takes_any_image_where_no_size_was_saved(path):
    net = layers.Sequential(layers.Conv2d(3, 4, 3), layers.ReLU(), layers.AdaptiveAvgPool2d(1),
                            layers.Flatten(), layers.Linear(4, 2))
    net.save(path)
    model = cnn.load(path)
    for height, width in [(5, 7), (3, 3)]:
        batch = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
        assert same_bits(model.run({"input": batch})["output"], net(batch))


def test_the_same_network_gives_the_same_bytes_and_ordinary_permissions(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (first, second):
        NETWORKS["every_layer"](layers).save(path, labels=list("abcd"), preprocess=PREPROCESS)
    assert first.read_bytes() == second.read_bytes()
    other = tmp_path / "other"
    other.touch()
    assert first.stat().st_mode == other.stat().st_mode


def test_every_layer_can_be_saved():
    kinds = {kind for _, kind in inspect.getmembers(layers, inspect.isclass)
             if issubclass(kind, layers.Layer)} - {layers.Layer, layers.Norm, layers.Pool}
    assert set(weights.KINDS.values()) == kinds
    assert {kind.__name__ for kind in kinds} | {"Sequential"} <= set(cnn.__all__)


# ---- writing ----------------------------------------------------------------------------------

def full_disk(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["os.replace", "pathlib.Path.write_bytes"])
def test_a_write_that_fails_leaves_nothing_and_what_was_there(path, monkeypatch, step):
    net = exemplary(layers)
    for before in (None, b"what was there"):
        if before is not None:
            path.write_bytes(before)
        with monkeypatch.context() as patch:
            patch.setattr(step, full_disk)
            with pytest.raises(cnn.ModelError, match=r"net\.safetensors: can not be written: No"):
                net.save(path)
        assert os.listdir(path.parent) == ([] if before is None else [path.name])
        assert before is None or path.read_bytes() == before


def test_a_folder_that_is_missing_or_in_the_way_is_said(tmp_path):
    net = exemplary(layers)
    with pytest.raises(cnn.ModelError, match=r"x\.safetensors: can not be written: No such file"):
        net.save(tmp_path / "missing" / "x.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(cnn.ModelError, match=r"x\.safetensors: can not .* Not a directory"):
        net.save(tmp_path / "file" / "x.safetensors")
    (tmp_path / "y.safetensors").mkdir()
    with pytest.raises(cnn.ModelError, match=r"y\.safetensors: can not be written: Is a directory"):
        net.save(tmp_path / "y.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["file", "y.safetensors"]


class Mine(layers.Layer):
    """A layer that no file knows."""


@pytest.mark.parametrize(("net", "name", "arguments", "sentence"), [
    (exemplary(layers), "net.onnx", {}, "net.onnx: the file's name must end in .safetensors"),
    (exemplary(layers), "net.safetensors", {"labels": "abc"}, "labels='abc' must be a list"),
    (exemplary(layers), "net.safetensors", {"labels": [1]}, r"labels=\[1\] must be a list"),
    (exemplary(layers), "net.safetensors", {"preprocess": {}}, r"preprocess={} must be a cnn.Prep"),
    (exemplary(layers), "net.safetensors", {"input_shape": (9, 3, 8)}, "layer '0': .* 8 channels"),
    (exemplary(layers), "net.safetensors", {"input_shape": 8}, "input_shape=8 must be a shape"),
    (layers.Sequential(Mine()), "net.safetensors", {}, "layer '0' is a Mine, which a file can not"),
])
def test_what_can_not_be_saved_is_said_before_anything_is_written(tmp_path, net, name, arguments,
                                                                  sentence):
    with pytest.raises(cnn.ModelError, match=sentence):
        net.save(tmp_path / name, **arguments)
    assert os.listdir(tmp_path) == []


# ---- reading ----------------------------------------------------------------------------------

def described(given=(), /, **changes):
    """Bytes of a file with one Linear layer, its arguments and its description changed."""
    linear = ["0", "Linear", {"in_features": 2, "out_features": 1, **dict(given)}]
    content = {"version": 1, "layers": [linear], **changes}
    return to_bytes({"0.weight": np.ones((1, 2), np.float32), "0.bias": np.ones(1, np.float32)},
                    {"cnn": json.dumps(content)})


def header(description, body=b""):
    """Bytes of a file with this header, as it is."""
    text = json.dumps(description).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_the_description_that_the_next_test_spoils_is_good(path):
    path.write_bytes(described())
    assert np.array_equal(load_layers(path)[0](np.ones((1, 2), np.float32)), [[3]])


@pytest.mark.parametrize(("data", "sentence"), [
    (b"", "no safetensors file, or is damaged"),
    (b"\xff" * 100, "no safetensors file, or is damaged"),
    (described()[:-1], "no safetensors file, or is damaged"),
    (to_bytes({"0.weight": np.ones(1)}), "holds weights but no layers; .* load_state_dict"),
    (to_bytes({}, {"cnn": "{"}), "can not be rebuilt: Expecting"),
    (to_bytes({}, {"cnn": "[]"}), r"version 1 .* is understood, not '\[\]'"),
    (to_bytes({}, {"cnn": '{"version": 1, "layers": ' + "[" * 100_000}), "nested too deeply"),
    (described(version=2), "version 1 of the description is understood, not"),
    (described(layers=None), "None is no list of layers"),
    (described(layers=[["0", "ReLU"]]), r"is not \[name, kind, arguments\]"),
    (described(layers=[[0, "ReLU", {}]]), r"is not \[name, kind, arguments\]"),
    (described(layers=[["0", "system", {}]]), "layer '0' is of the unknown kind 'system'"),
    (described(layers=[["0", "Sequential", {}]]), "{} is no list of layers"),
    (described(layers=[["0", "ReLU", []]]), r"layer '0' has the arguments \[\]"),
    (described(layers=[["a.b", "ReLU", {}]]), "'a.b' can not be a layer's name"),
    (described({"scale": 1}), "layer '0': .* unexpected keyword argument 'scale'"),
    (described({"in_features": "2"}), "Linear: in_features='2' must be"),
    (described({"in_features": 1e400}), "Linear: in_features=inf must be"),
    (described({"bias": False}), "unexpected: '0.bias'"),
    (described({"in_features": 1 << 30, "out_features": 1 << 30}),
     r"misshapen: '0.weight' is \(1, 2\), \(1073741824, 1073741824\) is needed"),
    (described(layers=[["1", "Linear", {"in_features": 2, "out_features": 1}]]),
     r"missing: '1.weight' \(1, 2\), '1.bias' \(1,\); unexpected: '0"),
    (described(labels="abc"), "labels='abc' must be a list of strings"),
    (described(labels={}), "labels={} must be a list of strings"),
    (described(preprocess="{}"), "can not be rebuilt: .*'size'"),
    (described(preprocess={}), "preprocess {} is no text"),
    (described(input_shape=[-1, 2, 3]), r"input_shape=\[-1, 2, 3\] must be a shape"),
    (header({"__metadata__": {"cnn": "{}"},
             "w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"0"),
     "holds a tensor that NumPy can not"),
    (header({"__metadata__": {"cnn": "{}"},
             "w": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}),
     "holds a tensor that NumPy can not"),
])
def test_a_file_that_does_not_make_sense_is_refused(path, data, sentence):
    path.write_bytes(data)
    with pytest.raises(cnn.ModelError, match=sentence) as error:
        load_layers(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_missing_or_too_large_is_refused(path, monkeypatch):
    with pytest.raises(cnn.ModelError, match=r"net\.safetensors: there is no such file"):
        load_layers(path)
    path.write_bytes(described())
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 10)
    with pytest.raises(cnn.ModelError, match=r"bytes; the limit is 10"):
        load_layers(path)


def test_layers_nested_too_deeply_are_refused(path):
    for depth in (weights.MAX_DEPTH + 1, 5000):
        text = '[["0", "Sequential", ' * depth + "[]" + "]]" * depth
        path.write_bytes(to_bytes({}, {"cnn": f'{{"version": 1, "layers": {text}}}'}))
        with pytest.raises(cnn.ModelError, match="nested too deeply"):
            load_layers(path)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_a_network_or_a_sentence(tmp_path_factory, data):
    content = bytearray(described(labels=["a"], preprocess=PREPROCESS.to_json()))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "net.safetensors"
    path.write_bytes(content)
    try:
        net, _ = load_layers(path)
    except cnn.ModelError as error:
        assert str(error).startswith(str(path))     # noqa: PT017
    else:
        assert isinstance(net, layers.Sequential)
