"""Files quantised to 8 bits: by ONNX Runtime's quantiser, and operator by operator.

Where scales are powers of two and all sums small, both engines are exact and must agree so, if zero
points are even: some of ONNX Runtime's kernels add them before they round half to even. Where scales
are not, a sum that lies between two codes may be rounded to either of them.
"""
import numpy as np
import onnx
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
        assert np.abs(ours - theirs).mean() <= 0.2 * step
        assert np.abs(ours - exact).max() <= np.abs(theirs - exact).max() + 2.01 * step
    found, twin = kinds(path), kinds(float_file)
    assert found.count("Transpose") == twin.count("Transpose") == 0
    assert kind == QuantType.QInt8 or not {"Relu", "Clip"} & {*found}


def test_a_network_that_is_quantised_dynamically_is_refused(tmp_path, float_file):
    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(float_file, path)
    with pytest.raises(ModelError, match="scales depend on all images of a batch.*statically"):
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
    if dtype == "int8" and not per_channel:
        constants["wz"] = np.int8(0)
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
    if operator == "QLinearLeakyRelu" or dtype == "uint8" or "pads" not in attributes:
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
