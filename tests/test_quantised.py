"""Files quantised to 8 bits: by ONNX Runtime's quantiser, and operator by operator.

Where scales are powers of two and all sums small, both engines are exact and must agree so, if
zero points are even: some of ONNX Runtime's kernels add them before they round half to even. Where
scales are not, a sum that lies between two codes may be rounded to either of them.
"""
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_models import build, compare, node, saved
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import cnn
from cnn import ModelError, fold
from cnn.onnx_import import load_onnx

RNG = np.random.default_rng(0)
IMAGE = {"x": ["N", 4, 8, 6]}
ZEROS = {"uint8": np.uint8(100), "int8": np.int8(-20)}
LEVELS = (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
          onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def whole(low, high, *shape, dtype=np.float32):
    return RNG.integers(low, high + 1, shape).astype(dtype)


X = whole(-40, 40, 2, 4, 8, 6) / 4
STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers():
    """Whatever tests ran before."""
    RNG.bit_generator.state = STATE


def with_microsoft(model):
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def run_theirs(path, level, **arrays):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


def kinds(path):
    return [layer.op.kind for layer in cnn.load(path, device="cpu")._graph.nodes]


# ---- whole networks ---------------------------------------------------------------------------

class Batches(CalibrationDataReader):
    def __init__(self, *arrays):
        self.left = [{"x": array} for array in arrays]

    def get_next(self):
        return self.left.pop() if self.left else None


def network():
    """What networks have: a stem, a pool, a depthwise block with its residual, branches, a head."""
    constants = {"w0": normal(8, 4, 3, 3) / 6, "b0": normal(8), "w1": normal(16, 8, 1, 1) / 3,
                 "b1": normal(16), "w2": normal(16, 1, 3, 3) / 3, "w3": normal(8, 16, 1, 1) / 4,
                 "w4": normal(8, 8, 1, 1) / 3, "fc": normal(10, 16) / 4, "fb": normal(10),
                 "low": np.float32(0), "high": np.float32(6)}
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]), node("Relu", ["c0"], ["r0"]),
        node("MaxPool", ["r0"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w1", "b1"], ["c1"]), node("Clip", ["c1", "low", "high"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], group=16),
        node("Relu", ["c2"], ["r2"]), node("Conv", ["r2", "w3"], ["c3"]),
        node("Add", ["c3", "p"], ["s"]), node("Conv", ["s", "w4"], ["c4"]),
        node("Sigmoid", ["c4"], ["g"]), node("Mul", ["c4", "g"], ["m"]),
        node("Concat", ["m", "s"], ["k"], axis=1),
        node("AveragePool", ["k"], ["a"], kernel_shape=[2, 2], strides=[1, 1]),
        node("GlobalAveragePool", ["a"], ["v"]), node("Flatten", ["v"], ["f"]),
        node("Gemm", ["f", "fc", "fb"], ["y"], transB=1)]
    return build(nodes, IMAGE, constants=constants)


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("float"), network())


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8])
@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_network_from_the_quantiser(tmp_path, float_file, form, kind, per_channel):
    path, images = tmp_path / "quantised.onnx", [normal(2, 4, 8, 6) for _ in range(4)]
    quantize_static(float_file, path, Batches(*images), quant_format=form, activation_type=kind,
                    weight_type=QuantType.QInt8, per_channel=per_channel,
                    extra_options={"ActivationSymmetric": kind == QuantType.QInt8})
    network, x = cnn.load(path, device="cpu"), normal(8, 4, 8, 6)
    ours = network.run({"x": x})["y"]
    step = float(np.diff(np.unique(ours)).min())
    exact = run_theirs(float_file, LEVELS[0], x=x)
    for level in LEVELS:
        theirs = run_theirs(path, level, x=x)
        assert np.abs(ours - theirs).max() <= 2.01 * step
        assert np.abs(ours - theirs).mean() <= 0.6 * step
        assert np.abs(ours - exact).max() <= np.abs(theirs - exact).max() + 2.01 * step
    found, twin = kinds(path), kinds(float_file)
    assert found.count("Transpose") == twin.count("Transpose") == 0
    assert kind == QuantType.QInt8 or not {"Relu", "Clip"} & {*found}


def test_a_network_that_is_quantised_dynamically_is_refused(tmp_path, float_file):
    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(float_file, path)
    with pytest.raises(ModelError, match=r"scales depend on all images of a batch.*statically"):
        load_onnx(path)


# ---- operators --------------------------------------------------------------------------------

def quantised(operator, more=(), constants=None, result="y_scale", dtype="uint8",
              domain="com.microsoft", inputs=None, **attributes):
    """x on a grid of quarters, an operator of codes, and what its codes stand for."""
    zero = ZEROS[dtype]
    constants = {"s": np.float32(0.25), "z": zero, "y_scale": np.float32(0.5),
                 "y_zero": zero.dtype.type(zero + 4), **(constants or {})}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             node(operator, inputs or ["q", "s", "z", *more, result, "y_zero"], ["r"],
                  domain=domain, **attributes),
             node("DequantizeLinear", ["r", result, "y_zero"], ["y"])]
    return with_microsoft(build(nodes, IMAGE, constants=constants))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_qlinearconv(tmp_path, dtype, per_channel, bias):
    scales = np.float32([0.25, 0.5, 1, 0.125, 2, 0.25]) if per_channel else np.float32(0.5)
    zeros = np.zeros(6, np.int8) if per_channel else np.int8(1)
    constants = {"w": whole(-3, 3, 6, 2, 3, 3, dtype=np.int8), "ws": scales, "wz": zeros,
                 "b": whole(-50, 50, 6, dtype=np.int32), "coarse": np.float32(2)}
    rest = ["b"] if bias else []
    inputs = ["q", "s", "z", "w", "ws", "wz", "coarse", "y_zero", *rest]
    compare(tmp_path, quantised("QLinearConv", constants=constants, dtype=dtype, domain="",
                                inputs=inputs, result="coarse", group=2, pads=[1, 1, 1, 1]), x=X)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("computed", [False, True])
def test_qlinearmatmul(tmp_path, dtype, computed):
    constants = {"w": whole(-3, 3, 6, 5, dtype=np.int8), "ws": np.float32(0.5), "wz": np.int8(0),
                 "coarse": np.float32(4)}
    second = ["q", "s", "z"] if computed else ["w", "ws", "wz"]
    inputs = ["q", "s", "z", *second, "coarse", "y_zero"]
    model = quantised("QLinearMatMul", constants=constants, dtype=dtype, domain="",
                      inputs=inputs, result="coarse")
    if computed:        # of 6 x 6
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 6
    compare(tmp_path, model, x=X[:, :, :6] if computed else X)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("operator", "attributes"), [
    ("QLinearAveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("QLinearAveragePool", {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0], "count_include_pad": 1}),
    ("QLinearAveragePool", {"kernel_shape": [2, 2], "channels_last": 1}),
    ("QLinearLeakyRelu", {"alpha": 0.25})])
def test_operators_of_one_value(tmp_path, operator, attributes, dtype):
    compare(tmp_path, quantised(operator, dtype=dtype, **attributes), x=X)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("operator", "attributes"), [
    ("QLinearGlobalAveragePool", {}), ("QLinearGlobalAveragePool", {"channels_last": 1}),
    ("QLinearSigmoid", {}), ("QLinearSoftmax", {"opset": 13, "axis": 1}),
    ("QLinearSoftmax", {"opset": 11, "axis": 1})])
def test_operators_that_round(tmp_path, operator, attributes, dtype):
    """A mean of 48 values, and exponentials: within one code of a 256th."""
    model = quantised(operator, dtype=dtype, constants={"fine": np.float32(1 / 256)},
                      result="fine", **attributes)
    path = saved(tmp_path, model)
    ours = cnn.load(path, device="cpu").run({"x": X / 4})["y"]
    theirs = run_theirs(path, LEVELS[0], x=X / 4)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1 / 256
    assert np.mean(ours != theirs) <= 0.02


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("second", ["itself", "another", "constant"])
def test_sums_and_products(tmp_path, operator, second, dtype):
    code = ZEROS[dtype].dtype.type
    constants = {"t": np.float32(0.5), "u": code(60), "c": whole(50, 70, 8, 6).astype(code),
                 "coarse": np.float32(2)}
    more = {"itself": ["q", "s", "z"], "another": ["p", "t", "u"], "constant": ["c", "t", "u"]}
    model = quantised(operator, more=more[second], constants=constants, dtype=dtype,
                      result="coarse")
    model.graph.node.insert(1, node("QuantizeLinear", ["x", "t", "u"], ["p"]))
    compare(tmp_path, model, x=X)


def test_concat_brings_all_to_one_scale(tmp_path):
    constants = {"t": np.float32(0.5), "u": np.uint8(60)}
    model = quantised("QLinearConcat", constants=constants, axis=1,
                      inputs=["y_scale", "y_zero", "q", "s", "z", "p", "t", "u"])
    model.graph.node.insert(1, node("QuantizeLinear", ["x", "t", "u"], ["p"]))
    compare(tmp_path, model, x=X)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("attributes", [{"transB": 1}, {"alpha": 0.5}])
@pytest.mark.parametrize("as_codes", [False, True])
def test_qgemm(tmp_path, per_channel, attributes, as_codes):
    scales = np.float32([0.25, 0.5, 1, 0.125, 2]) if per_channel else np.float32(0.5)
    zeros = np.zeros(5, np.int8) if per_channel else np.int8(0)
    weight = whole(-3, 3, 5, 192, dtype=np.int8)
    constants = {"s": np.float32(0.25), "z": np.uint8(100), "ws": scales, "wz": zeros,
                 "w": weight if attributes.get("transB") else np.ascontiguousarray(weight.T),
                 "b": whole(-500, 500, 5, dtype=np.int32), "ys": np.float32(8), "yz": np.uint8(128)}
    gemm = ["q", "s", "z", "w", "ws", "wz", "b"]
    ends = ([node("QGemm", [*gemm, "ys", "yz"], ["r"], domain="com.microsoft", **attributes),
             node("DequantizeLinear", ["r", "ys", "yz"], ["y"])] if as_codes else
            [node("QGemm", gemm, ["y"], domain="com.microsoft", **attributes)])
    model = build([node("QuantizeLinear", ["x", "s", "z"], ["p"]), node("Flatten", ["p"], ["q"]),
                   *ends], IMAGE, constants=constants)
    compare(tmp_path, with_microsoft(model), x=X)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("found", [{"t": np.float32(0.5)}, {"u": 3}, {"t": np.float32(2), "u": 9}])
def test_codes_that_are_read_with_another_scale(tmp_path, found, dtype):
    """What the file says, if oddly: the same codes stand for other numbers."""
    code = ZEROS[dtype].dtype.type
    constants = {"s": np.float32(0.25), "z": ZEROS[dtype], "t": np.float32(0.25), "u": 0,
                 "c": np.float32(3), **found}
    constants["u"] = code(ZEROS[dtype] + constants["u"])
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             node("DequantizeLinear", ["q", "t", "u"], ["r"]), node("Mul", ["r", "c"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


def test_microsofts_own_names(tmp_path):
    """Which the quantiser gives to all where a file's opset lacks a type that it needs."""
    constants = {"w": whole(-3, 3, 8, 4, 3, 3, dtype=np.int8), "s": np.float32(0.25),
                 "z": np.uint8(100), "ws": np.float32([0.5] * 8), "wz": np.zeros(8, np.int8)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"], domain="com.microsoft"),
             node("DequantizeLinear", ["q", "s", "z"], ["r"], domain="com.microsoft"),
             node("DequantizeLinear", ["w", "ws", "wz"], ["v"], domain="com.microsoft", axis=0),
             node("Conv", ["r", "v"], ["y"])]
    compare(tmp_path, with_microsoft(build(nodes, IMAGE, constants=constants)), x=X)


@pytest.mark.parametrize("attributes", [{}, {"output_dtype": TensorProto.INT8},
                                        {"output_dtype": TensorProto.UINT8}])
def test_a_zero_point_that_is_left_out(tmp_path, attributes):
    nodes = [node("QuantizeLinear", ["x", "s"], ["q"], **attributes),
             node("DequantizeLinear", ["q", "s"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants={"s": np.float32(0.25)}, opset=21), x=X)


@pytest.mark.parametrize("attributes", [{}, {"axis": 0}, {"axis": 1}, {"axis": -1},
                                        {"axis": 0, "block_size": 2}, {"axis": 1, "block_size": 3}])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32"])
def test_constants_are_dequantised(tmp_path, attributes, dtype):
    """By one scale, by one for each element of an axis, or of each block of it."""
    block, axis = attributes.get("block_size", 0), attributes.get("axis")
    shape = () if axis is None else (8, 6)[axis:][:1]
    if block:
        shape = tuple(-(-size // block) if i == axis else size for i, size in enumerate((8, 6)))
    zeros = whole(0, 9, *shape, dtype=dtype) * (dtype != "int32")
    constants = {"c": whole(0, 99, 8, 6, dtype=dtype), "s": np.abs(normal(*shape)) + 0.1,
                 "z": zeros.astype(dtype)}
    nodes = [node("DequantizeLinear", ["c", "s", "z"], ["w"], **attributes),
             node("Add", ["x", "w"], ["y"])]
    path = saved(tmp_path, build(nodes, IMAGE, constants=constants, opset=21))
    np.testing.assert_array_equal(cnn.load(path, device="cpu").run({"x": X})["y"],
                                  run_theirs(path, LEVELS[0], x=X))


@pytest.mark.parametrize("axis", [None, 0])
def test_float_weights_that_are_quantised_in_the_file(tmp_path, axis):
    """As quantisation-aware training exports them."""
    size = [] if axis is None else [8]
    constants = {"w": normal(8, 4, 3, 3), "s": np.abs(normal(*size)) / 50 + 0.01,
                 "z": np.zeros(size, np.int8)}
    more = {} if axis is None else {"axis": axis}
    nodes = [node("QuantizeLinear", ["w", "s", "z"], ["q"], **more),
             node("DequantizeLinear", ["q", "s", "z"], ["r"], **more),
             node("Conv", ["x", "r"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    (weight,) = load_onnx(tmp_path / "net.onnx").graph.constants.values()
    scale = constants["s"].reshape(-1, 1, 1, 1)
    codes = np.clip(np.rint(constants["w"] / scale), -128, 127).astype(np.float32)
    np.testing.assert_array_equal(weight, (codes * scale).transpose(0, 2, 3, 1))


def test_scales_that_do_not_fit_are_refused():
    codes, grown = np.zeros((1, 3), np.int8), np.ones((1 << 20, 3), np.float32)
    for array, attributes in ((grown, {}), (np.ones(2, np.float32), {}),
                              (np.ones((1, 1), np.float32).repeat(2, 1), {"block_size": 1})):
        for operator in (fold.DequantizeLinear, fold.QuantizeLinear):
            with pytest.raises((ValueError, IndexError)):
                operator(codes, array, **attributes)
    with pytest.raises(ValueError, match="axis 1 is out of range for rank 0"):
        fold.DequantizeLinear(np.int8(1), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="must have the zero point 0"):
        fold.DequantizeLinear(codes.astype(np.int32), np.float32([1]), np.int32([1]))


# ---- what only moves codes --------------------------------------------------------------------

@pytest.mark.parametrize(("operator", "inputs", "attributes", "quantised_once"), [
    ("MaxPool", ["q"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, True),
    ("Reshape", ["q", "shape"], {}, True), ("Flatten", ["q"], {}, True),
    ("Transpose", ["q"], {"perm": [0, 2, 1, 3]}, True), ("Identity", ["q"], {}, True),
    ("Unsqueeze", ["q", "one"], {}, True), ("Squeeze", ["u", "one"], {}, True),
    ("Slice", ["q", "two", "four", "two"], {}, True), ("Gather", ["q", "two"], {"axis": 1}, True),
    ("Concat", ["q", "q"], {"axis": 1}, True), ("Pad", ["q", "pads"], {}, False),
    ("Pad", ["q", "pads", "z"], {}, True), ("Pad", ["q", "pads"], {"mode": "edge"}, True),
    ("DepthToSpace", ["q"], {"blocksize": 2}, True), ("Expand", ["u", "wide"], {}, False),
    ("Resize", ["q", "", "scales"], {"nearest_mode": "floor"}, True),
    ("Clip", ["q", "low", "high"], {}, False), ("Clip", ["q", "", "high"], {}, False),
    ("Tile", ["q", "wide"], {}, True), ("ReduceMax", ["q"], {"axes": [2, 3]}, True)])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_operators_that_move_codes(tmp_path, operator, inputs, attributes, quantised_once, dtype):
    constants = {"s": np.float32(0.25), "z": ZEROS[dtype], "shape": np.int64([0, 8, -1]),
                 "low": ZEROS[dtype] - 9, "high": ZEROS[dtype] + 9,
                 "one": np.int64([1]), "two": np.int64([2]), "four": np.int64([4]),
                 "wide": np.int64([1, 2, 1, 1, 1][operator == "Tile":]),
                 "pads": np.int64([0, 0, 1, 2, 0, 0, 3, 0]), "scales": np.float32([1, 1, 2, 2])}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             node("Unsqueeze", ["q", "one"], ["u"]), node(operator, inputs, ["m"], **attributes),
             node("DequantizeLinear", ["m", "s", "z"], ["r"]),
             node("QuantizeLinear", ["r", "s", "z"], ["p"]),
             node("DequantizeLinear", ["p", "s", "z"], ["d"]), node("Relu", ["d"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    assert kinds(tmp_path / "net.onnx").count("FakeQuantize") == 2 - quantised_once


def test_split_moves_codes_to_each_part(tmp_path):
    constants = {"s": np.float32(0.25), "z": np.uint8(100)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             node("Split", ["q"], ["a", "b"], axis=1),
             *[node("DequantizeLinear", [part, "s", "z"], [f"{part}r"]) for part in "ab"],
             node("Sub", ["ar", "br"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


# ---- what is refused --------------------------------------------------------------------------

Q = node("QuantizeLinear", ["x", "s", "z"], ["q"], name="first")
P = node("QuantizeLinear", ["x", "t", "z"], ["p"])
D = node("DequantizeLinear", ["r", "s", "z"], ["y"])


@pytest.mark.parametrize(("nodes", "sentence"), [
    ([Q, node("Relu", ["q"], ["r"], name="n"), D],
     r"node 'n': Relu takes a value that the file quantised \(uint8, scale 0.25, zero point 100\); "
     r"a DequantizeLinear must come first"),
    ([Q, node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)], "Cast takes a value"),
    ([Q, node("QuantizeLinear", ["q", "s", "z"], ["r"]), D], "QuantizeLinear takes a value"),
    ([Q, node("Resize", ["q", "", "scales"], ["r"], mode="linear"), D], "Resize takes a value"),
    ([Q, P, node("Concat", ["q", "p"], ["r"], axis=1), D],
     r"Concat of values on different scales \(uint8, scale 0.25, .* and uint8, scale 0.5"),
    ([Q, node("Concat", ["q", "x"], ["r"], axis=1), D], "different scales .not quantised and"),
    ([node("DequantizeLinear", ["x", "s", "z"], ["y"])], "'x.*' must be quantised, and is not"),
    ([Q, node("DequantizeLinear", ["q", "s", "int8"], ["y"])],
     "'q' is quantised to uint8, and its zero point is int8"),
    ([Q, node("Relu", ["x"], ["r"]), node("Identity", ["q"], ["y"])],
     "output 'y' is quantised .*: end the file with a DequantizeLinear"),
    ([node("QuantizeLinear", ["x", "s", "wide"], ["r"]), D],
     r"quantised to int16 by a scale of shape \(\) is not supported, only to uint8 or int8 by one"),
    ([node("QuantizeLinear", ["x", "each", "zeros"], ["r"]), D], r"by a scale of shape \(4,\)"),
    ([node("QuantizeLinear", ["x", "nothing", "z"], ["r"]), D], "its scale is 0.0; it must be a"),
    ([node("QuantizeLinear", ["x", "s", "z"], ["r"], precision=TensorProto.FLOAT16), D],
     "precision 10 is not supported"),
    ([node("QuantizeLinear", ["x", "x", "z"], ["r"]), D], "its scale must be a constant"),
    ([Q, node("QLinearConcat", ["s", "z", "q", "", "z"], ["r"], domain="com.microsoft", axis=1), D],
     "must not be left out"),
    ([node("NhwcMaxPool", ["x"], ["y"], domain="com.microsoft")], "com.microsoft.NhwcMaxPool")])
def test_what_is_refused(tmp_path, nodes, sentence):
    constants = {"s": np.float32(0.25), "z": np.uint8(100), "t": np.float32(0.5),
                 "int8": np.int8(0), "wide": np.int16(0), "each": np.ones(4, np.float32),
                 "zeros": np.zeros(4, np.uint8), "nothing": np.float32(0),
                 "scales": np.float32([1, 1, 2, 2])}
    with pytest.raises(ModelError, match=sentence):
        load_onnx(saved(tmp_path, build(nodes, IMAGE, constants=constants, opset=23)))


# ---- what is left out -------------------------------------------------------------------------

def pair(name, scale="s", zero="z"):
    """name -> name + 'd', quantised and dequantised."""
    return [node("QuantizeLinear", [name, scale, zero], [f"{name}q"]),
            node("DequantizeLinear", [f"{name}q", scale, zero], [f"{name}d"])]


@pytest.mark.parametrize(("clip", "zero", "idle"), [
    (("Relu",), 0, True), (("Relu",), 1, True), (("Clip", "zero", "six"), 0, False),
    (("Clip", "zero", "most"), 0, True), (("Clip", "least", "most"), 1, True),
    (("Clip", "zero", "most"), 1, True), (("Clip", "above", "most"), 1, False)])
def test_a_clip_that_quantising_repeats(tmp_path, clip, zero, idle):
    """On quarters, 256 of them: to 63.75 from zero point 0; rounding takes what is beside them.
    From zero point 1 with its relu."""
    constants = {"w": whole(-3, 3, 8, 4, 3, 3), "s": np.float32(0.25), "z": np.uint8(zero),
                 "zero": np.float32(0.1), "least": np.float32(-0.3), "six": np.float32(6),
                 "most": np.float32(63.7), "above": np.float32(0.2)}
    operator, *bounds = clip
    nodes = [node("Conv", ["x", "w"], ["a"]), node(operator, ["a", *bounds], ["b"]), *pair("b"),
             node("Conv", ["bd", "v"], ["y"])]
    constants["v"] = whole(-3, 3, 2, 8, 1, 1)
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    path = tmp_path / "net.onnx"
    assert kinds(path)[:2] == ["Conv2d", "Conv2d" if idle else "FakeQuantize"]
    network = cnn.load(path, device="cpu")
    traced = network.trace(np.ascontiguousarray(X.transpose(0, 2, 3, 1)))
    assert any(name.startswith(operator) for name in traced)


def test_a_clip_that_others_read_stays(tmp_path):
    constants = {"w": whole(-3, 3, 8, 4, 3, 3), "s": np.float32(0.25), "z": np.uint8(0)}
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), *pair("b"),
             node("Sub", ["bd", "b"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), *pair("b"),
             node("Add", ["bd", "a"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, ("y", "b"), constants=constants), x=X)


def test_a_pad_between_two_equal_grids_is_the_convolutions(tmp_path):
    constants = {"w": whole(-3, 3, 8, 4, 3, 3), "s": np.float32(0.25), "z": np.uint8(9),
                 "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1])}
    nodes = [*pair("x"), node("Pad", ["xd", "pads"], ["p"]), *pair("p"),
             node("Conv", ["pd", "w"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    assert kinds(tmp_path / "net.onnx") == ["FakeQuantize", "Conv2d", "Transpose"]


def test_equal_grids_whose_values_are_outputs_stay(tmp_path):
    constants = {"s": np.float32(0.25), "z": np.uint8(9), "t": np.float32(0.5)}
    nodes = [*pair("x"), node("Relu", ["xd"], ["r"]), *pair("r"), *pair("rd", "t"),
             node("Mul", ["rdd", "s"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, ("y", "rd"), constants=constants), x=X)
