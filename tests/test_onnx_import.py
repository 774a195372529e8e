"""Files become graphs that mean the same, or one sentence says why not."""
import os

import numpy as np
import onnx
import onnxruntime
import pytest
from graph_reference import float64_logits
from onnx import TensorProto, helper, numpy_helper
from onnx_models import build, compare, node, saved, whole

import cnn
from cnn import ModelError, onnx_file
from cnn.onnx_import import load_onnx

X = whole(2, 3, 9, 8)
IMAGE = {"x": ["N", 3, 9, 8]}


@pytest.mark.parametrize("attributes", [
    {}, {"pads": [1, 0, 2, 1], "strides": [2, 1]}, {"dilations": [2, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
    {"auto_pad": "VALID"}, {"kernel_shape": [3, 2]}])
def test_conv(tmp_path, attributes):
    constants = {"w": whole(4, 3, 3, 2), "b": whole(4)}
    compare(tmp_path, build([node("Conv", ["x", "w", "b"], ["y"], **attributes)], IMAGE,
                            constants=constants), x=X)


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("attributes", [
    {}, {"strides": [2, 2], "pads": [1, 1, 0, 1], "ceil_mode": 1}, {"auto_pad": "SAME_UPPER"}])
def test_pools(tmp_path, operator, attributes):
    compare(tmp_path, build([node(operator, ["x"], ["y"], kernel_shape=[3, 2], **attributes)],
                            IMAGE), x=X)


def test_every_other_operator_in_one_network(tmp_path):
    constants = {
        "w": whole(6, 3, 3, 3), "scale": whole(6), "shift": whole(6), "mean": whole(6),
        "var": np.abs(whole(6)) + 1, "low": np.float32(-1), "high": np.float32(4),
        "each": whole(6, 1, 1), "gw": whole(10, 6), "gb": whole(10), "mw": whole(10, 4),
        "mb": whole(4), "unused": whole(3)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"], epsilon=1e-3),
        node("Clip", ["b", "low", "high"], ["c"]), node("Sigmoid", ["c"], ["d"]),
        node("Tanh", ["b"], ["e"]), node("Mul", ["d", "each"], ["f"]),
        node("Sum", ["e", "f", "b"], ["g"]), node("Concat", ["g", "d"], ["h"], axis=1),
        node("Relu", ["h"], ["i"]), node("Conv", ["i", "w2"], ["j"]),
        node("ReduceMean", ["j"], ["k"], axes=[2, 3], keepdims=0),
        node("Gemm", ["k", "gw", "gb"], ["l"], transB=1, alpha=0.5, beta=2.0),
        node("MatMul", ["l", "mw"], ["m"]), node("Add", ["m", "mb"], ["n"]),
        node("Unsqueeze", ["n", "one"], ["o"]), node("Transpose", ["o"], ["p"], perm=[0, 2, 1]),
        node("Squeeze", ["p", "two"], ["q"]), node("Dropout", ["q"], ["r"]),
        node("Identity", ["r"], ["s"]), node("Softmax", ["s"], ["y"], axis=-1)]
    constants.update(w2=whole(6, 12, 1, 1), one=np.int64([1]), two=np.int64([2]))
    compare(tmp_path, build(nodes, IMAGE, ("y", "h", "n"), constants), x=X)


@pytest.mark.parametrize(("first", "sizes", "given"), [
    (True, ["N", 3, "H", "W"], (9, 8, 3)), (True, ["N", "C", "H", "W"], (2, 9, 8, 3)),
    (True, ["N", 3, "H", 8], (None, 9, None, 3)), (False, ["N", "H", "W", 3], (9, 8, 3))])
def test_sizes_that_a_file_leaves_open_can_be_given(tmp_path, first, sizes, given):
    """Padding that the size decides can then be known; NumPy's ints and lists do, too."""
    turn = [node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])]
    conv = node("Conv", ["x" if first else "t", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])
    path = saved(tmp_path, build([*([] if first else turn), conv], {"x": sizes},
                                 constants={"w": whole(4, 3, 3, 3)}))
    network = cnn.load(path, device="cpu", input_shape=[n and np.int64(n) for n in given])
    assert network.input_shape == (2 if len(given) == 4 and given[0] else None, 9, 8, 3)
    x = X if first else X.transpose(0, 2, 3, 1)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(network.run({"x": x})["y"], expected, rtol=0, atol=1e-3)
    with pytest.raises(ModelError, match="input_shape=\\(H, W, C\\), on the command line"):
        cnn.load(path, device="cpu")


@pytest.mark.parametrize("given", [(9, 8, 4), (9, 7, 3), (9, 8), (1, 2, 9, 8, 3), 9, "9x8x3"])
def test_sizes_that_do_not_fit_the_file_are_refused(tmp_path, given):
    path = saved(tmp_path, build([node("Relu", ["x"], ["y"])], IMAGE))
    with pytest.raises(ModelError, match="input_shape="):
        cnn.load(path, device="cpu", input_shape=given)


def test_sizes_are_of_the_one_image_of_a_file(tmp_path):
    two = saved(tmp_path, build([node("Add", ["x", "z"], ["y"])], {**IMAGE, "z": ["N", 3, 9, 8]}))
    with pytest.raises(ModelError, match=r"of one input, and the file has 2: \['x', 'z'\]"):
        load_onnx(two, (9, 8, 3))
    rows = saved(tmp_path, build([node("Relu", ["x"], ["y"])], {"x": ["N", 3]}))
    with pytest.raises(ModelError, match="does not fit input 'x'"):
        load_onnx(rows, (9, 8, 3))
    with pytest.raises(ModelError, match="for a Sequential"):
        cnn.Model(load_onnx(rows), input_shape=(9, 8, 3), device="cpu")


@pytest.mark.parametrize("size", ["H", 9])
def test_shapes_that_are_reshaped_themselves(tmp_path, size):
    """As PaddlePaddle writes them; of images of any size they are known when one comes."""
    constants = {"zero": np.int64([0]), "scalar": np.zeros(0, np.int64), "rest": np.int64([-1])}
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]),
             node("Reshape", ["n", "scalar"], ["r"]), node("Unsqueeze", ["r", "zero"], ["u"]),
             node("Concat", ["u", "rest"], ["t"], axis=0), node("Reshape", ["x", "t"], ["y"])]
    path = saved(tmp_path, build(nodes, {"x": ["N", 3, size, 8]}, constants=constants))
    np.testing.assert_array_equal(cnn.load(path).run({"x": X})["y"], X.reshape(2, -1))
    literal = float64_logits(path, np.ascontiguousarray(X.transpose(0, 2, 3, 1)))
    np.testing.assert_array_equal(literal, X.reshape(2, -1))


def test_flatten_reshape_and_dynamic_batch_as_torch_exports_them(tmp_path):
    constants = {"w": whole(4, 3, 3, 3), "zero": np.array(0), "axes": np.int64([0]),
                 "rest": np.int64([-1]), "fc": whole(5, 4 * 7 * 6)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Shape", ["a"], ["s"]),
             node("Gather", ["s", "zero"], ["n"], axis=0), node("Unsqueeze", ["n", "axes"], ["m"]),
             node("Concat", ["m", "rest"], ["t"], axis=0), node("Reshape", ["a", "t"], ["f"]),
             node("Gemm", ["f", "fc"], ["y"], transB=1)]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    path = saved(tmp_path, build(nodes, IMAGE, constants=constants))
    rows = cnn.load(path).run({"x": X})["y"]
    one_by_one = np.concatenate([cnn.load(path).run({"x": X[i:i + 1]})["y"] for i in range(2)])
    np.testing.assert_array_equal(rows, one_by_one)


def test_half_weights_behind_casts(tmp_path):
    nodes = [node("Cast", ["h"], ["w"], to=TensorProto.FLOAT), node("Conv", ["x", "w"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants={"h": whole(4, 3, 3, 3).astype(np.float16)}),
            x=X)


@pytest.mark.parametrize("axis", [1, 3])
def test_softmax_before_opset_13_takes_all_axes_from_its_own_on(tmp_path, axis):
    compare(tmp_path, build([node("Softmax", ["x"], ["y"], axis=axis)], IMAGE, opset=11), x=X)


def test_clip_with_attributes_of_opset_6(tmp_path):
    compare(tmp_path, build([node("Clip", ["x"], ["y"], min=-1.0, max=2.0)], IMAGE, opset=9), x=X)


def test_an_output_that_is_another_value(tmp_path):
    nodes = [node("Relu", ["x"], ["a"]), node("Identity", ["a"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, ("y", "a")), x=X)


def test_names_are_kept_or_made_and_never_doubled(tmp_path):
    nodes = [node("Relu", ["x"], ["a"], name="act"), node("Relu", ["a"], ["b"], name="act"),
             node("Relu", ["b"], ["y"])]
    graph = load_onnx(saved(tmp_path, build(nodes, {"x": ["N", 4]}))).graph
    names = [n.name for n in graph.nodes]
    assert names == ["act", "Relu_1", "Relu_2"]


def test_constants_among_the_inputs_of_old_files_are_no_inputs(tmp_path):
    model = build([node("Add", ["x", "c"], ["y"])], {"x": ["N", 4], "c": [4]},
                  constants={"c": whole(4)})
    assert set(load_onnx(saved(tmp_path, model)).graph.inputs) == {"x"}


# ---- what is refused --------------------------------------------------------------------------

@pytest.mark.parametrize(("model", "sentences"), [
    (build([node("Det", ["x"], ["a"], name="d1"),
            node("LSTM", ["a"], ["y"], name="l1")], {"x": [3, 4]}),
     ["Det (node 'd1')", "LSTM (node 'l1')", "Supported are", "Conv"]),
    (build([node("Relu", ["x"], ["y"], name="r", domain="com.acme")], {"x": [3]}),
     ["com.acme.Relu (node 'r')"]),
    (build([node("Conv", ["x", "w"], ["y"], name="c")], {"x": [1, 3, 4, 4], "w": [1, 3, 1, 1]}),
     ["node 'c': its weight must be a constant", "'w"]),
    (build([node("Conv", ["x", "w"], ["y"], name="c")], {"x": [1, 3, 4, 4, 4]},
           constants={"w": whole(2, 3, 1, 1, 1)}),
     ["node 'c': its weight is float32 of shape (2, 3, 1, 1, 1)"]),
    (build([node("Conv", ["x", "w"], ["y"], name="c")], {"x": [1, 3, 4, 4]},
           constants={"w": whole(2, 4, 1, 1)}), ["layer 'c'", "x has 3 channels"]),
    (build([node("MaxPool", ["x"], ["y", "i"], name="p", kernel_shape=[2, 2])],
           {"x": [1, 3, 4, 4]}), ["node 'p': MaxPool with 2 outputs"]),
    (build([node("Gemm", ["x", "w"], ["y"], name="g", transA=1)], {"x": [3, 4]},
           constants={"w": whole(3, 4)}), ["node 'g': Gemm with transA=1"]),
    (build([node("Mod", ["x", "x"], ["y"], name="s")], {"x": [3, 4]}),
     ["node 's': Mod is supported only on constants and shapes"]),
    (build([node("Shape", ["x"], ["s"]), node("Expand", ["k", "s"], ["e"], name="grow"),
            node("Concat", ["x", "e"], ["c"], axis=1), node("Relu", ["c"], ["r"]),
            node("LayerNormalization", ["r", "w"], ["y"], name="l")], {"x": ["N", "M", 4]},
           constants={"k": whole(1, 1, 4), "w": whole(4)}),
     ["node 'l': the shape of its input 'r' can not be known", "Expand at node 'grow', whose"]),
    (build([node("Pow", ["x", "x"], ["y"], name="p")], {"x": [3, 4]}),
     ["node 'p'", "its exponent must be a constant"]),
    (build([node("Conv", ["x", "w"], ["y"], name="c", auto_pad="SAME_UPPER")],
           {"x": [1, 3, "H", "W"]}, constants={"w": whole(2, 3, 3, 3)}),
     ["node 'c'", "needs the image's size", "input_shape=(H, W, C)"]),
    (build([node("Relu", ["x"], ["y"])], {"x": [3]}, kind=TensorProto.DOUBLE),
     ["input 'x' is of type DOUBLE; only float32"]),
    (build([node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="d"),
            node("DequantizeLinear", ["q", "s", "z"], ["y"])], {"x": [3]}),
     ["DynamicQuantizeLinear (node 'd')", "quantised dynamically", "quantize_static"]),
    (build([node("QLinearAdd", ["x"] * 8, ["y"], name="q")], {"x": [3]}),
     [": QLinearAdd (node 'q')", "of com.microsoft DequantizeLinear, QGemm"]),
    (build([node("Relu", ["x"], ["y"])], {"x": [3]}, opset=6), ["uses opset 6; supported are 7"]),
    (build([node("Relu", ["z"], ["y"], name="r")], {"x": [3]}), ["node 'r'", "'z'"]),
    (build([node("Relu", ["x"], ["y"]), node("Tanh", ["x"], ["y"], name="t")], {"x": [3]}),
     ["node 't'", "computed twice"]),
    (build([node("Relu", ["x"], ["y"])], {"x": [3]}, ("z",)), ["output 'z' is not computed"]),
    (build([node("Relu", ["x"], ["y"], name="r", slope=1.0)], {"x": [3]}), ["node 'r'", "slope"]),
])
def test_what_is_not_supported_is_named(tmp_path, model, sentences):
    path = saved(tmp_path, model)
    with pytest.raises(ModelError) as caught:
        load_onnx(path)
    for sentence in [str(path), *sentences]:
        assert sentence in str(caught.value)


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "the file has 0 bytes"), (b"\x00" * 100, "is no ONNX model"),
    (b"hello, this is no model", "is no ONNX model")])
def test_broken_files_are_refused(tmp_path, content, sentence):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"net.onnx: the file.*{sentence[9:]}"):
        cnn.load(path)


def test_a_truncated_model_is_refused(tmp_path):
    model = build([node("Conv", ["x", "w"], ["y"])], IMAGE, constants={"w": whole(4, 3, 3, 2)})
    data = model.SerializeToString()
    path = tmp_path / "net.onnx"
    for size in range(1, len(data) - 1, 7):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"net.onnx"):
            cnn.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(ModelError, match=r"there is no such file"):
            load_onnx(path)


def test_sizes_are_checked_before_they_are_believed(tmp_path):
    tensor = numpy_helper.from_array(whole(4), "c")
    tensor.dims[:] = [1 << 40]
    model = build([node("Add", ["x", "c"], ["y"])], {"x": [4]})
    model.graph.initializer.append(tensor)
    with pytest.raises(ModelError, match=r"tensor 'c' has shape \[1099511627776\]"):
        load_onnx(saved(tmp_path, model))
    model.graph.initializer[0].dims[:] = [1 << 20]
    with pytest.raises(ModelError, match=r"tensor 'c' has shape .* 4194304 are needed"):
        load_onnx(saved(tmp_path, model))


# ---- external data ----------------------------------------------------------------------------

def external(location, offset=0, length=16):
    model = build([node("Add", ["x", "c"], ["y"])], {"x": [4]})
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type = "c", TensorProto.FLOAT
    tensor.dims.append(4)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return model


def test_external_data_beside_the_model_is_read(tmp_path):
    values = whole(4)
    (tmp_path / "weights.bin").write_bytes(b"12345678" + values.tobytes())
    graph = load_onnx(saved(tmp_path, external("weights.bin", offset=8))).graph
    np.testing.assert_array_equal(graph.constants["c"], values)


@pytest.mark.parametrize(("location", "offset", "length", "sentence"), [
    ("../weights.bin", 0, 16, "only a plain file name"), ("/etc/passwd", 0, 16, "only a plain"),
    ("..", 0, 16, "only a plain"), ("", 0, 16, "only a plain"),
    ("sub\\weights.bin", 0, 16, "only a plain"), ("missing.bin", 0, 16, "can not be read"),
    ("folder", 0, 16, "no regular file"), ("link.bin", 0, 16, "no regular file"),
    ("weights.bin", 8, 16, "which has 16"), ("weights.bin", -4, 16, "which has 16"),
    ("weights.bin", 0, 12, "16 bytes are needed"), ("weights.bin", "x", 16, "can not be read"),
])
def test_other_external_data_is_refused(tmp_path, location, offset, length, sentence):
    folder = tmp_path / "models"
    (folder / "folder").mkdir(parents=True)
    for place in (folder, tmp_path):
        (place / "weights.bin").write_bytes(whole(4).tobytes())
    os.symlink(folder / "weights.bin", folder / "link.bin")
    with pytest.raises(ModelError, match=sentence):
        load_onnx(saved(folder, external(location, offset, length)))


def test_a_tensor_in_an_attribute_is_read_with_the_same_care(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    values = whole(4)
    for place in (folder, tmp_path):
        (place / "weights.bin").write_bytes(values.tobytes())
    monkeypatch.chdir(folder)
    for location, refused in (("weights.bin", False), ("../weights.bin", True)):
        tensor = external(location).graph.initializer[0]
        model = build([helper.make_node("Constant", [], ["c"], value=tensor),
                       node("Add", ["x", "c"], ["y"])], {"x": [4]})
        if refused:
            with pytest.raises(ModelError, match="only a plain file name"):
                load_onnx(saved(folder, model))
        else:
            constants = load_onnx(saved(folder, model)).graph.constants
            np.testing.assert_array_equal(*constants.values(), values)


def test_a_cast_to_no_data_type_is_refused(tmp_path):
    model = build([node("Cast", ["x"], ["y"], to=99)], {"x": [4]})
    with pytest.raises(ModelError, match="data type 99"):
        load_onnx(saved(tmp_path, model))


def test_the_range_of_opsets_is_that_of_the_installed_onnx():
    assert onnx_file.OPSETS[0] == 7
    assert onnx.defs.onnx_opset_version() in onnx_file.OPSETS
