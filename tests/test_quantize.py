"""Quantising a file with photos: what is written, how it agrees, and what is refused."""
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx_models import build, node, saved
from PIL import Image

import cnn
from cnn.quantize import Agreement, quantize

SIZE = (8, 6)
HOW = cnn.Preprocess(SIZE, mean=(100.0, 110.0, 120.0), std=(50.0, 50.0, 60.0))
NAMES = ["a cat", "a dog", "neither"]


@pytest.fixture
def photos(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).save(paths[-1])
    return paths


@pytest.fixture
def network(tmp_path):
    nodes = [node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["r"]),
             node("GlobalAveragePool", ["r"], ["g"]), node("Flatten", ["g"], ["f"]),
             node("Gemm", ["f", "v"], ["y"], transB=1)]
    rng = np.random.default_rng(1)
    constants = {name: rng.standard_normal(shape).astype(np.float32)
                 for name, shape in (("w", (8, 3, 3, 3)), ("b", (8,)), ("v", (3, 8)))}
    return saved(tmp_path, build(nodes, {"x": ["N", 3, *SIZE]}, constants=constants))


def test_a_file_of_8_bits_takes_photos_as_the_float_one_does(tmp_path, network, photos):
    target, told = tmp_path / "int8.onnx", []
    agreement = quantize(network, target, photos, preprocess=HOW, labels=NAMES,
                         progress=lambda what, done: told.append((what, done)))
    assert agreement.photos == agreement.same == 5
    assert 0 < agreement.difference < 0.1
    assert min(agreement.float_ms, agreement.int8_ms) > 0
    assert told == [(what, i) for what in ("measuring ranges", "comparing") for i in range(5)]
    model, before = cnn.load(target, device="cpu"), cnn.load(
        network, device="cpu", preprocess=HOW, labels=NAMES)
    assert model.preprocessing == HOW
    assert model.labels == NAMES
    for one, other in zip(model.classify(photos, top=1), before.classify(photos, top=1),
                          strict=True):
        assert one[0].label == other[0].label
        assert one[0].probability == pytest.approx(other[0].probability,
                                                   abs=agreement.difference + 1e-6)
    kinds = {each.op_type for each in onnx.load(target).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_weights_may_lie_beside_the_file(tmp_path, network, photos):
    """As PyTorch's exporter has it."""
    model = onnx.load(network)
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "apart.onnx.data")
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, size_threshold=0,
              location="apart.onnx.data")
    assert onnx.load(tmp_path / "apart.onnx", load_external_data=False
                     ).graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    agreement = quantize(tmp_path / "apart.onnx", tmp_path / "int8.onnx", photos, preprocess=HOW)
    assert agreement == replace(quantize(network, tmp_path / "other.onnx", photos, preprocess=HOW),
                                float_ms=agreement.float_ms, int8_ms=agreement.int8_ms)


def test_only_what_is_multiplied_by_weights_is_quantized(tmp_path, photos):
    """Neither the activation nor a product of computed matrices; nodes of a file need no names."""
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Sigmoid", ["c"], ["s"]),
             node("Mul", ["c", "s"], ["m"]), node("MatMul", ["m", "m"], ["p"]),
             node("MatMul", ["p", "v"], ["q"]), node("MatMul", ["l", "q"], ["y"])]
    rng = np.random.default_rng(1)
    constants = {name: rng.standard_normal(shape).astype(np.float32)
                 for name, shape in (("w", (3, 3, 1, 1)), ("v", (6, 5)), ("l", (2, 6)))}
    model = build(nodes, {"x": ["N", 3, 6, 6]}, constants=constants)
    for each in model.graph.node:
        each.name = ""
    how = replace(HOW, size=(6, 6))
    quantize(saved(tmp_path, model), tmp_path / "int8.onnx", photos, preprocess=how)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    made = {each.output[0]: each for each in graph.node}
    kinds = [each.op_type for each in graph.node]
    assert kinds.count("QuantizeLinear") == 2       # of the convolution's input, and of p

    def of_codes(each):
        return [name in made and made[name].op_type == "DequantizeLinear" for name in each.input]
    assert [of_codes(each) for each in graph.node if each.op_type == "Conv"] == [[True, True]]
    assert [of_codes(each) for each in graph.node if each.op_type == "MatMul"] == [
        [False, False], [True, True], [False, False]]
    assert not any(True in of_codes(each) for each in graph.node
                   if each.op_type in ("Sigmoid", "Mul"))


def test_a_network_without_weights_has_nothing_to_quantize(tmp_path, photos):
    model = build([node("Relu", ["x"], ["r"]), node("GlobalAveragePool", ["r"], ["g"]),
                   node("Flatten", ["g"], ["y"])], {"x": ["N", 3, *SIZE]})
    with pytest.raises(cnn.ModelError, match=r"nothing to quantize: it has no Conv, Gemm, MatMul"):
        quantize(saved(tmp_path, model), tmp_path / "int8.onnx", photos, preprocess=HOW)


def test_its_layers_are_multiplied_in_8_bits(monkeypatch, tmp_path, network, photos):
    monkeypatch.setenv("CNN_INT8", "vnni_emulated")
    quantize(network, tmp_path / "int8.onnx", photos, preprocess=HOW)
    summary = cnn.load(tmp_path / "int8.onnx", device="cpu").summary()
    kernels = [row[1] for row in summary.cells()]
    assert sum("_int8_vnni_emulated_" in kernel for kernel in kernels) == 2


def test_a_photo_has_the_bits_that_it_would_have_alone(tmp_path, network, photos):
    quantize(network, tmp_path / "int8.onnx", photos, preprocess=HOW)
    model = cnn.load(tmp_path / "int8.onnx", device="cpu")
    batch = model.preprocess(photos[:4])
    alone = [model.predict(image[None]) for image in batch]
    np.testing.assert_array_equal(model.predict(batch), np.concatenate(alone))


def test_the_embedded_network_knows_the_cat_in_8_bits(tmp_path):
    from test_bf16 import CAT
    agreement = quantize(None, tmp_path / "lite0.onnx", [CAT])
    assert agreement.same == 1
    model = cnn.load(tmp_path / "lite0.onnx", device="cpu")
    assert model.classify(CAT)[0].label == "tiger cat"
    assert model.preprocessing == cnn.load(device="cpu").preprocessing


@pytest.mark.parametrize(("target", "given", "sentence"), [
    ("net.onnx", 5, "the quantized network needs a file of its own"),
    ("int8.safetensors", 5, "makes an .onnx file of an .onnx file, not .*int8.safetensors of"),
    ("int8.onnx", 0, "needs photos, for the ranges"),
    ("nowhere/int8.onnx", 5, "nowhere/int8.onnx: there is no such folder")])
def test_what_is_refused_before_anything_is_done(tmp_path, network, photos, target, given,
                                                 sentence):
    assert network.name == "net.onnx"
    content = network.read_bytes()
    with pytest.raises(cnn.ModelError, match=sentence):
        quantize(network, tmp_path / target, photos[:given], preprocess=HOW)
    assert network.read_bytes() == content


def test_what_is_quantized_already_is_refused(tmp_path, network, photos):
    quantize(network, tmp_path / "int8.onnx", photos, preprocess=HOW)
    with pytest.raises(cnn.ModelError, match=r"int8.onnx: it is quantized already"):
        quantize(tmp_path / "int8.onnx", tmp_path / "again.onnx", photos)


def test_without_onnx_runtime_it_says_what_to_install(monkeypatch, tmp_path, network, photos):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(cnn.Error, match=r"pip install 'numba-cnn\[quantize\]'"):
        quantize(network, tmp_path / "int8.onnx", photos, preprocess=HOW)


def test_a_broken_photo_is_named_and_nothing_is_written(tmp_path, network, photos):
    photos[3].write_bytes(photos[3].read_bytes()[:100])
    with pytest.raises(cnn.ImageError, match=r"3\.png"):
        quantize(network, tmp_path / "int8.onnx", photos, preprocess=HOW)
    assert not (tmp_path / "int8.onnx").exists()


def test_a_file_that_can_not_be_written_is_one_sentence(tmp_path, network, photos):
    (tmp_path / "int8.onnx").mkdir()
    with pytest.raises(cnn.ModelError, match=r"int8.onnx: the network can not be written: "):
        quantize(network, tmp_path / "int8.onnx", photos, preprocess=HOW)


def test_one_photo_is_one():
    assert str(Agreement(1, 1, 0.5, 2.0, 1.0)) == (
        "1 of 1 photo is taken for the same, probabilities differ by up to 0.500; an image took "
        "2.00 ms and takes 1.00")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernels_of_a_gpu_round_to_the_same_numbers(tmp_path, network, photos, dtype):
    quantize(network, tmp_path / "int8.onnx", photos, preprocess=HOW, labels=NAMES)
    ours = cnn.load(tmp_path / "int8.onnx", device="cpu")
    theirs = cnn.load(tmp_path / "int8.onnx", device="emulator", dtype=dtype)
    assert any("fake_quantize" in row.kernel for row in theirs.summary().rows)
    batch = ours.preprocess(photos[:2])
    # A code more or less of a logit, of which there are some 200.
    np.testing.assert_allclose(theirs.predict(batch), ours.predict(batch), atol=0.03)
