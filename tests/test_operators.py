"""Operators of networks from elsewhere, against ONNX Runtime on the same file."""
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import build, compare, node, saved, whole

import cnn
from cnn import passes

X = whole(2, 8, 6, 4)
IMAGE = {"x": ["N", 8, 6, 4]}


@pytest.mark.parametrize(("operator", "attributes", "opset"), [
    ("HardSigmoid", {"alpha": 0.25}, 17), ("LeakyRelu", {"alpha": 0.25}, 17),
    ("Elu", {"alpha": 1.5}, 17), ("Erf", {}, 17), ("Neg", {}, 17), ("Gelu", {}, 20),
    ("Gelu", {"approximate": "tanh"}, 20), ("GlobalMaxPool", {}, 17), ("LRN", {"size": 3}, 17),
    ("LogSoftmax", {"axis": 1}, 17), ("LogSoftmax", {}, 11), ("Softmax", {"axis": 2}, 11),
    ("DepthToSpace", {"blocksize": 2}, 17), ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, 17),
    ("SpaceToDepth", {"blocksize": 2}, 17)])
def test_one_input(tmp_path, operator, attributes, opset):
    compare(tmp_path, build([node("Relu", ["x"], ["r"]),
                             node(operator, ["r"], ["y"], **attributes)], IMAGE, opset=opset), x=X)


@pytest.mark.parametrize("slope", [whole(1), whole(8, 1, 1), whole(1, 8, 1, 1)])
def test_prelu(tmp_path, slope):
    compare(tmp_path, build([node("PRelu", ["x", "s"], ["y"])], IMAGE, constants={"s": slope}), x=X)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_sub_and_div(tmp_path, order):
    constants = {"mean": whole(8, 1, 1), "std": np.float32([3.0])}
    nodes = [node("Sub", ["x", "mean"], ["a"]), node("Div", ["a", "std"], ["d"]),
             node("Tanh", ["d"], ["b"]), node("Sub", list(order), ["c"]),
             node("Sub", ["std", "c"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


@pytest.mark.parametrize("form", ["by batch norm in training mode", "written out"])
def test_weights_that_are_standardised_in_the_file(tmp_path, form):
    """As the networks without batch norm have them: all that computes a weight is constants."""
    constants = {"w": whole(5, 8, 3, 3), "row": np.int64([1, 5, -1]),
                 "back": np.int64([5, 8, 3, 3]), "ones": np.ones(5, np.float32), "gain": whole(5),
                 "zeros": np.zeros(5, np.float32), "eps": np.float32([1e-5]),
                 "two": np.float32(2), "axes": np.int64([2]), "g": whole(1, 5, 1)}
    nodes = [node("Reshape", ["w", "row"], ["r"])]
    if form == "written out":
        nodes += [node("ReduceMean", ["r", "axes"], ["mean"]), node("Sub", ["r", "mean"], ["c"]),
                  node("Pow", ["c", "two"], ["square"]),
                  node("ReduceSum", ["square", "axes"], ["v"]),
                  node("Add", ["v", "eps"], ["ve"]), node("Sqrt", ["ve"], ["std"]),
                  node("Reciprocal", ["std"], ["scale"]), node("Mul", ["c", "scale"], ["n"]),
                  node("Mul", ["n", "g"], ["s"])]
    else:
        nodes += [node("BatchNormalization", ["r", "gain", "zeros", "zeros", "ones"],
                       ["s", "mean", "var"], epsilon=1e-5, momentum=1.0, training_mode=1)]
    nodes += [node("Reshape", ["s", "back"], ["k"]), node("Conv", ["x", "k"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants, opset=18), x=X)
    kinds = [layer.op.kind for layer in cnn.load(tmp_path / "net.onnx")._graph.nodes]
    assert kinds == ["Conv2d", "Transpose"]


@pytest.mark.parametrize(("axis", "shape"), [(-1, (4,)), (2, (6, 4)), (1, (8, 6, 4))])
def test_layer_normalization(tmp_path, axis, shape):
    constants = {"scale": whole(*shape), "bias": whole(*shape)}
    for inputs in (["x", "scale", "bias"], ["x", "scale"]):
        compare(tmp_path, build([node("LayerNormalization", inputs, ["y"], axis=axis,
                                      epsilon=0.25)], IMAGE, constants=constants), x=X)


@pytest.mark.parametrize("trivial", [False, True])
def test_instance_and_group_normalization(tmp_path, trivial):
    """Of an image, of groups as torch exports them, and by ONNX's own operator."""
    def pair(size):
        return ((np.ones(size, np.float32), np.zeros(size, np.float32)) if trivial
                else (whole(size), whole(size)))
    (scale, bias), (group_scale, group_bias) = pair(8), pair(2)
    constants = {"scale": scale, "bias": bias, "gs": group_scale, "gb": group_bias,
                 "three": np.int64([0, 2, -1]), "four": np.int64([0, 8, 6, 4])}
    for nodes, opset in (
            ([node("InstanceNormalization", ["x", "scale", "bias"], ["y"], epsilon=0.25)], 17),
            ([node("Reshape", ["x", "three"], ["r"]),
              node("InstanceNormalization", ["r", "gs", "gb"], ["n"]),
              node("Reshape", ["n", "four"], ["y"])], 17),
            ([node("GroupNormalization", ["x", "gs", "gb"], ["y"], num_groups=2)], 18),
            ([node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)], 21)):
        compare(tmp_path, build(nodes, IMAGE, constants=constants, opset=opset), x=X)


def test_a_norm_of_whole_samples_turns_nothing(tmp_path):
    """As PoolFormer has it: the order of its elements is no matter to it."""
    constants = {"w": whole(8, 8, 1, 1), "one": np.ones(1, np.float32),
                 "zero": np.zeros(1, np.float32), "row": np.int64([0, 1, -1]),
                 "image": np.int64([0, 8, 6, 4]), "scale": whole(8, 1, 1), "shift": whole(8, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Reshape", ["c", "row"], ["r"]),
             node("InstanceNormalization", ["r", "one", "zero"], ["n"]),
             node("Reshape", ["n", "image"], ["i"]), node("Mul", ["i", "scale"], ["s"]),
             node("Add", ["s", "shift"], ["a"]), node("Conv", ["a", "w"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    kinds = [layer.op.kind for layer in cnn.load(tmp_path / "net.onnx")._graph.nodes]
    assert kinds.count("Transpose") == 1        # of the output


def test_of_two_orders_that_meet_one_is_turned(tmp_path):
    """Pixels in columns, added to what a convolution makes of pixels in rows, and convolved."""
    constants = {"w": whole(8, 8, 1, 1), "v": whole(8, 8, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Transpose", ["c"], ["t"], perm=[0, 1, 3, 2]),
             node("Relu", ["t"], ["r"]), node("Conv", ["z", "v"], ["d"]),
             node("Add", ["r", "d"], ["a"]), node("Conv", ["a", "w"], ["y"])]
    model = build(nodes, IMAGE | {"z": ["N", 8, 4, 6]}, constants=constants)
    compare(tmp_path, model, x=X, z=whole(2, 8, 4, 6))
    kinds = [layer.op.kind for layer in cnn.load(tmp_path / "net.onnx")._graph.nodes]
    assert kinds.count("Transpose") == 2        # of the one, and of the output


@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), [
    ([1], [5], [1], None), ([0, -3], [2 ** 63 - 1, -1], [0, 1], None),
    ([1, 0], [9, 3], [2, 3], None), ([1], [8], [1], [3]), ([-1], [-100], [1], [-1]),
    ([6, 1, 9], [0, 3, -2 ** 63], [1, 2, 3], [-2, 1, -3])])
def test_slice(tmp_path, starts, ends, axes, steps):
    constants = {name: np.int64(values) for name, values in (
        ("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps)) if values}
    compare(tmp_path, build([node("Slice", ["x", *constants], ["s"]), node("Relu", ["s"], ["y"])],
                            IMAGE, constants=constants), x=X)
    if steps is None:       # as opset 9 has it
        compare(tmp_path, build([node("Slice", ["x"], ["y"], starts=starts, ends=ends, axes=axes)],
                                IMAGE, opset=9), x=X)


@pytest.mark.parametrize(("attributes", "parts", "opset"), [
    ({}, [2, 6], 17), ({"num_outputs": 2}, None, 18), ({}, None, 17),
    ({"split": [5, 3]}, None, 11)])
def test_split(tmp_path, attributes, parts, opset):
    inputs = ["x", "parts"] if parts else ["x"]
    nodes = [node("Split", inputs, ["a", "b"], axis=1, **attributes), node("Relu", ["b"], ["c"]),
             node("Concat", ["c", "a"], ["y"], axis=1)]
    constants = {"parts": np.int64(parts)} if parts else {}
    compare(tmp_path, build(nodes, IMAGE, ("y", "a"), constants, opset), x=X)
    photo = np.ascontiguousarray(X.transpose(0, 2, 3, 1))
    trace = cnn.load(tmp_path / "net.onnx").trace(photo)
    ends = parts or attributes.get("split") or [4, 4]
    np.testing.assert_array_equal(trace["Split_0:0"], photo[..., :ends[0]])
    np.testing.assert_array_equal(trace["Split_0:1"], photo[..., ends[0]:])


@pytest.mark.parametrize("follower", ["Conv", "MaxPool", "AveragePool", "Relu"])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_pad(tmp_path, follower, value):
    constants = {"pads": np.int64([0, 0, 1, 2, 0, 0, 1, 0]), "value": np.float32(value),
                 "w": whole(3, 8, 3, 3)}
    follow = {"Conv": node("Conv", ["p", "w"], ["y"]), "Relu": node("Relu", ["p"], ["y"])}.get(
        follower, node(follower, ["p"], ["y"], kernel_shape=[3, 3]))
    compare(tmp_path, build([node("Pad", ["x", "pads", "value"], ["p"]), follow], IMAGE,
                            constants=constants), x=X)


def test_shapes_that_the_batch_does_not_change_are_worked_out_at_once(tmp_path):
    """The shuffle of channels as torch exports it: shapes are computed from x's, with its batch."""
    constants = {"zero": np.array(0), "three": np.array(3), "axes": np.int64([0]),
                 "two": np.int64([2]), "four": np.int64([4]), "six": np.int64([6]),
                 "w": whole(8, 1, 3, 3)}
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"], axis=0),
             node("Gather", ["s", "three"], ["wide"], axis=0),
             node("Unsqueeze", ["n", "axes"], ["n1"]), node("Unsqueeze", ["wide", "axes"], ["w1"]),
             node("Concat", ["n1", "two", "four", "six", "w1"], ["split"], axis=0),
             node("Reshape", ["x", "split"], ["five"]),
             node("Transpose", ["five"], ["moved"], perm=[0, 2, 1, 3, 4]),
             node("Mul", ["four", "two"], ["eight"]),
             node("Concat", ["n1", "eight", "six", "w1"], ["joined"], axis=0),
             node("Reshape", ["moved", "joined"], ["shuffled"]),
             node("Conv", ["shuffled", "w"], ["y"], group=8)]
    model = build(nodes, IMAGE, constants=constants)
    compare(tmp_path, model, x=X)
    graph = cnn.load(tmp_path / "net.onnx")._graph
    kinds = [layer.op.kind for layer in graph.nodes]
    assert not {"Gather", "Concat"} & set(kinds)
    assert kinds.count("Transpose") == 2        # of the shuffle, and of the output


def mobile_network():
    """What MobileNetV3, ShuffleNetV2 and TensorFlow's networks do, on images of 16x12."""
    constants = {
        "pads": np.int64([0, 0, 0, 0, 0, 0, 1, 1]), "w1": whole(8, 3, 3, 3) / 8, "b1": whole(8),
        "wd": whole(4, 1, 3, 3), "squeeze": whole(4, 4, 1, 1) / 4, "excite": whole(4, 4, 1, 1) / 4,
        "five": np.int64([-1, 2, 4, 8, 6]), "four": np.int64([-1, 8, 8, 6]),
        "wl": whole(8, 8, 1, 1) / 8, "scale": whole(6), "shift": whole(6), "fc": whole(8, 5) / 8}
    nodes = [
        node("Pad", ["x", "pads"], ["p"]), node("Conv", ["p", "w1", "b1"], ["c"], strides=[2, 2]),
        node("HardSwish", ["c"], ["h"]),
        node("Split", ["h"], ["left", "right"], axis=1, num_outputs=2),
        node("Conv", ["right", "wd"], ["d"], group=4, pads=[1, 1, 1, 1]),
        node("LeakyRelu", ["d"], ["e"], alpha=0.25), node("GlobalAveragePool", ["e"], ["m"]),
        node("Conv", ["m", "squeeze"], ["q"]), node("Relu", ["q"], ["r"]),
        node("Conv", ["r", "excite"], ["s"]), node("HardSigmoid", ["s"], ["g"], alpha=0.25),
        node("Mul", ["e", "g"], ["gated"]), node("Concat", ["left", "gated"], ["both"], axis=1),
        node("Reshape", ["both", "five"], ["split"]),
        node("Transpose", ["split"], ["t"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["t", "four"], ["shuffled"]), node("Conv", ["shuffled", "wl"], ["l"]),
        node("Gelu", ["l"], ["a"]), node("LayerNormalization", ["a", "scale", "shift"], ["n"]),
        node("LRN", ["n"], ["o"], size=3, alpha=0.5), node("GlobalMaxPool", ["o"], ["top"]),
        node("Flatten", ["top"], ["f"]), node("MatMul", ["f", "fc"], ["z"]),
        node("LogSoftmax", ["z"], ["y"], axis=-1)]
    return build(nodes, {"x": ["N", 3, 16, 12]}, constants=constants, opset=20)


def test_they_work_together(tmp_path):
    compare(tmp_path, mobile_network(), x=whole(2, 3, 16, 12))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.02), ("float32", 1e-5)])
def test_they_work_together_by_the_cuda_kernels(tmp_path, dtype, bound):
    path, x = saved(tmp_path, mobile_network()), {"x": whole(2, 3, 16, 12)}
    expected = cnn.load(path, device="cpu").run(x)["y"]
    found = cnn.load(path, device="emulator", dtype=dtype).run(x)["y"]
    assert np.abs(found - expected).max() <= bound * (np.abs(expected).max() + 1)


def test_a_file_of_float16(tmp_path):
    weight, bias = whole(3, 8, 3, 3), whole(3)
    half = [numpy_helper.from_array(a.astype(np.float16), n) for a, n in ((weight, "w"),
                                                                         (bias, "b"))]
    graph = helper.make_graph(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
         node("Cast", ["f"], ["h"], to=TensorProto.FLOAT16), node("Relu", ["h"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 8, 6, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)], half)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    ours = cnn.load(saved(tmp_path, model)).run({"x": X})["y"]
    single = build([node("Conv", ["x", "w", "b"], ["c"]), node("Relu", ["c"], ["y"])], IMAGE,
                   constants={"w": weight, "b": bias})
    theirs = cnn.load(saved(tmp_path, single)).run({"x": X})["y"]
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_pad_with_what_x_has_at_its_edges(tmp_path, mode):
    """As anti-aliased pooling has it: a depthwise convolution with a stride follows."""
    constants = {"pads": np.int64([0, 0, 1, 2, 0, 0, 1, 0]), "w": whole(8, 1, 3, 3)}
    nodes = [node("Relu", ["x"], ["r"]), node("Pad", ["r", "pads"], ["p"], mode=mode),
             node("Conv", ["p", "w"], ["y"], group=8, strides=[2, 2])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


@pytest.mark.parametrize("pads", [[-1, 0, 0, -2], [-1, -1, 1, 1], [0, -1, 2, 0]])
def test_pads_below_zero_cut_off(tmp_path, pads):
    """NASNet shifts images so; rows and columns before, then after."""
    constants = {"pads": np.int64([0, 0, *pads[:2], 0, 0, *pads[2:]]), "w": whole(3, 8, 1, 1)}
    nodes = [node("Pad", ["x", "pads"], ["p"]), node("Conv", ["p", "w"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


@pytest.mark.parametrize("exponent", [0.5, 1, 2, 3, [2.0]])
def test_powers_quotients_and_roots(tmp_path, exponent):
    constants = {"p": np.float32(exponent), "one": np.float32(1)}
    nodes = [node("Relu", ["x"], ["above"]), node("Pow", ["above", "p"], ["power"]),
             node("Add", ["above", "one"], ["divisor"]), node("Div", ["power", "divisor"], ["q"]),
             node("Sqrt", ["divisor"], ["root"]), node("Reciprocal", ["root"], ["inverse"]),
             node("Mul", ["q", "inverse"], ["m"]), node("Div", ["one", "divisor"], ["d"]),
             node("Sub", ["m", "d"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


@pytest.mark.parametrize(("axis", "indices"), [
    (1, 3), (1, -1), (2, [1, 2, 3]), (3, [0, 2]), (2, [5]), (1, [0, 1, 2, 3, 4, 5, 6, 7]),
    (1, [2, 1, 0]), (3, [3, 3, -4, 1]), (2, [[0, 2], [5, 4], [1, 1]]), (3, [[1]]),
    (1, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7])])
def test_gather(tmp_path, axis, indices):
    nodes = [node("Relu", ["x"], ["r"]), node("Gather", ["r", "i"], ["y"], axis=axis)]
    compare(tmp_path, build(nodes, IMAGE, constants={"i": np.int64(indices)}), x=X)


def as_strided(step):
    """A view of all elements as PyTorch exports it: x flat, and gathered by numbers that the file
    works out from the batch."""
    constants = {"flat": np.int64([-1]), "zero": np.int64(0), "one": np.int64(1),
                 "size": np.int64(8), "columns": step * np.arange(8).reshape(1, 8, 1, 1),
                 "axes": np.int64([1, 2, 3]), "pixels": np.int64([2, 3]), "w": whole(3, 8, 1, 1)}
    return [node("ReduceMean", ["x"], ["m"], axes=[2, 3]), node("Reshape", ["m", "flat"], ["f"]),
            node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]),
            node("Range", ["zero", "n", "one"], ["i"]), node("Mul", ["i", "size"], ["rows"]),
            node("Unsqueeze", ["rows", "axes"], ["r"]), node("Add", ["r", "columns"], ["all"]),
            node("Gather", ["f", "all"], ["g"], name="n"),
            node("Conv", ["g", "w"], ["y"])], constants


def test_gathering_all_elements_in_their_order_is_a_reshape(tmp_path):
    nodes, constants = as_strided(step=1)
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    kinds = [layer.op.kind for layer in cnn.load(tmp_path / "net.onnx")._graph.nodes]
    assert not {"Gather", "Slice"} & set(kinds)
    nodes, constants = as_strided(step=0)
    with pytest.raises(cnn.ModelError, match=r"node 'n'.*they must be constants"):
        cnn.load(saved(tmp_path, build(nodes, IMAGE, constants=constants)))


@pytest.mark.parametrize("attributes", [
    {}, {"pads": [2, 1], "strides": [2]}, {"dilations": [2], "kernel_shape": [3]}])
def test_convolution_along_one_axis(tmp_path, attributes):
    constants = {"w": whole(6, 4, 3), "b": whole(6)}
    nodes = [node("Conv", ["x", "w", "b"], ["c"], group=2, **attributes),
             node("Relu", ["c"], ["y"])]
    compare(tmp_path, build(nodes, {"x": ["N", 8, 7]}, constants=constants), x=whole(2, 8, 7))


def test_expand(tmp_path):
    """A gate is made as large as its image, as efficient channel attention has it."""
    nodes = [node("GlobalAveragePool", ["x"], ["m"]), node("Sigmoid", ["m"], ["g"]),
             node("Shape", ["x"], ["s"]), node("Expand", ["g", "s"], ["e"]),
             node("Mul", ["x", "e"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE), x=X)


def test_a_gate_need_not_be_expanded_for_what_broadcasts(tmp_path):
    """As the newer of PyTorch's exporters writes it: the image's own size, as a constant."""
    nodes = [node("Conv", ["x", "w"], ["c"]), node("GlobalAveragePool", ["c"], ["m"]),
             node("Sigmoid", ["m"], ["g"]), node("Shape", ["x"], ["s"]),
             node("Slice", ["s", "zero", "one"], ["n"]),
             node("Concat", ["n", "rest"], ["shape"], axis=0),
             node("Expand", ["g", "shape"], ["e"]), node("Mul", ["c", "e"], ["y"])]
    constants = {"w": whole(8, 8, 1, 1), "zero": np.int64([0]), "one": np.int64([1]),
                 "rest": np.int64([8, 6, 4])}
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    done = passes.optimise(cnn.load(tmp_path / "net.onnx")._graph)
    kinds = [layer.op.kind for layer in done.nodes]
    assert (kinds.count("Mul"), kinds.count("Transpose")) == (1, 1)     # the latter of the output


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_file_with_channels_last_as_tensorflow_has_them(tmp_path, keepdims):
    photo = whole(2, 6, 5, 3)
    nodes = [node("Sub", ["x", "mean"], ["s"]), node("Transpose", ["s"], ["t"], perm=[0, 3, 1, 2]),
             node("Conv", ["t", "w"], ["c"]), node("Transpose", ["c"], ["n"], perm=[0, 2, 3, 1]),
             node("ReduceMean", ["n"], ["y"], axes=[1, 2], keepdims=keepdims)]
    constants = {"w": whole(4, 3, 3, 3), "mean": np.float32([1, 2, 3])}
    model = build(nodes, {"x": ["N", 6, 5, 3]}, constants=constants)
    path = saved(tmp_path, model)
    theirs, = onnxruntime.InferenceSession(path).run(None, {"x": photo})
    network = cnn.load(path)
    assert network.input_shape == (None, 6, 5, 3)
    np.testing.assert_allclose(network.run({"x": photo})["y"], theirs, rtol=1e-6, atol=1e-6)
    assert "Transpose" not in [layer.op.kind for layer in network._graph.nodes]


def test_log_softmax_at_the_end_gives_probabilities(tmp_path):
    nodes = [node("GlobalAveragePool", ["x"], ["g"]), node("Flatten", ["g"], ["f"]),
             node("LogSoftmax", ["f"], ["y"], axis=1)]
    model = cnn.load(saved(tmp_path, build(nodes, IMAGE)))
    found = model.predict(np.ascontiguousarray(X.transpose(0, 2, 3, 1)))
    logits = X.mean(axis=(2, 3))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_size_that_no_memory_holds_is_refused_at_once(tmp_path):
    constants = {"s": np.int64([-1]), "e": np.int64([-2 ** 62]), "a": np.int64([1]),
                 "t": np.int64([-1])}
    flip = node("Slice", ["x", *constants], ["y"], name="n")
    with pytest.raises(cnn.ModelError, match=r"node 'n'.*must be 1 to 64 slices"):
        cnn.load(saved(tmp_path, build([flip], {"x": ["N", 2 ** 30]}, constants=constants)))


@pytest.mark.parametrize(("last", "constants", "sentence"), [
    (node("Pad", ["x", "p"], ["y"], name="n", mode="wrap"), {"p": np.int64([0] * 8)},
     "mode 'wrap' is not supported, only 'constant', 'edge' and 'reflect'"),
    (node("Pad", ["x", "p"], ["y"], name="n", mode="reflect"),
     {"p": np.int64([0, 0, 6, 0, 0, 0, 0, 0])}, "reflect more elements than"),
    (node("Pow", ["x", "p"], ["y"], name="n"), {"p": np.float32(2.5)}, "only to 1/2, 1, 2 or 3"),
    (node("Gather", ["x", "i"], ["y"], name="n", axis=1), {"i": np.arange(80) * 7 % 8},
     "80 elements of the 8 along axis 1 .* must be 1 to 64 slices"),
    (node("Gather", ["x", "i"], ["y"], name="n", axis=1), {"i": np.zeros(0, np.int64)},
     "0 elements .* must be 1 to 64 slices"),
    (node("Gather", ["x", "i"], ["y"], name="n"), {"i": np.int64(0)}, "Gather along axis 0"),
    (node("Gather", ["x", "i"], ["y"], name="n", axis=1), {"i": np.int64([7, 8])},
     "indices go from 7 to 8, and axis 1"),
    (node("Slice", ["x", "s", "e", "a"], ["y"], name="n"),
     {"s": np.int64([1]), "e": np.int64([2]), "a": np.int64([0])}, "its size must be known"),
    (node("Split", ["x", "p"], ["y", "z"], name="n", axis=1), {"p": np.int64([1, 2])},
     "do not make up the 8 elements"),
    (node("SpaceToDepth", ["x"], ["y"], name="n", blocksize=5), {}, "do not divide into blocks"),
    (node("LayerNormalization", ["x", "s"], ["y"], name="n", axis=1), {"s": whole(8)},
     r"shapes \(8,\)"),
    (node("Gelu", ["x"], ["y"], name="n", approximate="fast"), {}, "'none' or 'tanh'"),
    (node("Expand", ["x", "s"], ["y"], name="n"), {"s": np.int64([3, 5, 6, 4])},
     "do not broadcast")])
def test_what_is_refused_is_named(tmp_path, last, constants, sentence):
    with pytest.raises(cnn.ModelError, match=f"(node|layer) 'n'.*{sentence}"):
        cnn.load(saved(tmp_path, build([last], IMAGE, constants=constants, opset=20)))
