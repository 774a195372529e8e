"""The reference against an engine from outside: ONNX Runtime on models of one node."""
import itertools

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from kernels import ops, reference

RNG = np.random.default_rng(0)


def outside(operator, *arrays, opset=19, **attributes):
    """ONNX Runtime's result for NCHW arrays."""
    names = [f"i{k}" for k in range(len(arrays))]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **attributes)], "g",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
         for n, a in zip(names, arrays, strict=True)], [helper.make_empty_tensor_value_info("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


def whole(*shape):
    return RNG.integers(-4, 5, shape).astype(np.float32)


def nhwc(array):
    return array.transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("stride", "pads", "dilation", "groups"), [
    ((1, 1), (0, 0, 0, 0), (1, 1), 1), ((2, 1), (1, 0, 2, 1), (1, 1), 1),
    ((1, 2), (2, 2, 2, 2), (2, 1), 2), ((3, 3), (0, 1, 1, 0), (1, 2), 4)])
def test_conv(stride, pads, dilation, groups):
    x, w, b = whole(2, 4, 9, 10), whole(8, 4 // groups, 3, 2), whole(8)
    theirs = outside("Conv", x, w, b, strides=stride, pads=pads, dilations=dilation, group=groups)
    ours = reference.run(ops.Conv2d(stride, pads, dilation, groups), nhwc(x),
                         w.transpose(0, 2, 3, 1), b)
    np.testing.assert_array_equal(ours, nhwc(theirs))


GEOMETRIES = list(itertools.product([(2, 2), (3, 2)], [(1, 1), (2, 3)],
                                    [(0, 0, 0, 0), (1, 0, 1, 1)], [False, True]))


@pytest.mark.parametrize(("kernel", "stride", "pads", "ceil_mode"), GEOMETRIES)
def test_max_pool(kernel, stride, pads, ceil_mode):
    x = whole(1, 3, 9, 10) - 9
    theirs = outside("MaxPool", x, kernel_shape=kernel, strides=stride, pads=pads,
                     ceil_mode=int(ceil_mode))
    ours = reference.run(ops.MaxPool2d(kernel, stride, pads, (1, 1), ceil_mode), nhwc(x))
    np.testing.assert_array_equal(ours, nhwc(theirs))


@pytest.mark.parametrize(("kernel", "stride", "pads", "ceil_mode"), GEOMETRIES)
@pytest.mark.parametrize("include_pad", [False, True])
def test_avg_pool(kernel, stride, pads, ceil_mode, include_pad):
    x = whole(1, 3, 9, 10)
    theirs = outside("AveragePool", x, kernel_shape=kernel, strides=stride, pads=pads,
                     ceil_mode=int(ceil_mode), count_include_pad=int(include_pad))
    op = ops.AvgPool2d(kernel, stride, pads, (1, 1), ceil_mode, include_pad)
    np.testing.assert_allclose(reference.run(op, nhwc(x)), nhwc(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("operator", "op"), [
    ("Relu", ops.Relu()), ("Sigmoid", ops.Sigmoid()), ("Tanh", ops.Tanh()),
    ("HardSwish", ops.HardSwish()),
    ("Softmax", ops.Softmax(-1)), ("GlobalAveragePool", None)])
def test_the_others(operator, op):
    x = whole(2, 3, 4, 5)
    theirs = outside(operator, x)
    ours = (reference.run(ops.GlobalAvgPool2d(), nhwc(x)).transpose(0, 3, 1, 2) if op is None
            else reference.run(op, x))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_batch_norm():
    x, scale, bias, mean = whole(2, 3, 4, 5), whole(3), whole(3), whole(3)
    var = np.float32([0.5, 1, 2])
    theirs = outside("BatchNormalization", x, scale, bias, mean, var, epsilon=1e-3)
    ours = reference.run(ops.BatchNorm(1e-3), nhwc(x), scale, bias, mean, var)
    np.testing.assert_allclose(ours, nhwc(theirs), rtol=0, atol=1e-5)


def test_nan_and_infinity_are_values_like_others():
    x = np.array([np.nan, np.inf, -np.inf, 1])
    np.testing.assert_array_equal(reference.run(ops.Relu(), x), [np.nan, np.inf, 0, 1])
    np.testing.assert_array_equal(reference.run(ops.Clip(-1, 2), x), [np.nan, 2, -1, 1])
    np.testing.assert_array_equal(reference.run(ops.Sigmoid(), x)[:3], [np.nan, 1, 0])


@pytest.mark.parametrize(("operator", "op", "opset", "attributes"), [
    ("HardSigmoid", ops.HardSigmoid(0.25, 0.375), 19, {"alpha": 0.25, "beta": 0.375}),
    ("LeakyRelu", ops.LeakyRelu(0.25), 19, {"alpha": 0.25}),
    ("Elu", ops.Elu(1.5), 19, {"alpha": 1.5}), ("Erf", ops.Erf(), 19, {}),
    ("Gelu", ops.Gelu(), 20, {}), ("Gelu", ops.Gelu(tanh=True), 20, {"approximate": "tanh"}),
    ("LogSoftmax", ops.Softmax(-1, log=True), 19, {}), ("Sqrt", ops.Sqrt(), 19, {}),
    ("LogSoftmax", ops.Softmax(1, log=True), 19, {"axis": 1})])
def test_activations_with_numbers(operator, op, opset, attributes):
    x = RNG.normal(0, 3, (2, 3, 4, 5)).astype(np.float32)
    theirs = outside(operator, x, opset=opset, **attributes)
    np.testing.assert_allclose(reference.run(op, x), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 4, 5, 9])
def test_local_response_norm(size):
    x = whole(2, 7, 4, 5)
    numbers = {"alpha": 0.5, "beta": 0.75, "bias": 2.0}
    theirs = outside("LRN", x, size=size, **numbers) if size % 2 else None
    ours = reference.run(ops.LocalResponseNorm(size, **numbers), nhwc(x))
    if theirs is None:      # ONNX Runtime takes odd sizes alone: the specification's formula
        total = np.zeros(x.shape)
        for c in range(7):
            window = range(max(0, c - (size - 1) // 2), min(6, c + size // 2) + 1)
            total[:, c] = sum(x[:, i].astype(float) ** 2 for i in window)
        theirs = x / (2.0 + 0.5 / size * total) ** 0.75
    np.testing.assert_allclose(ours, nhwc(theirs), rtol=0, atol=1e-6)


def test_star_relu_and_quotients():
    x, y = whole(2, 3, 4), whole(2, 3, 4) * 2 + 1
    np.testing.assert_array_equal(reference.run(ops.StarRelu(0.5, -1.0), x),
                                  [[[0.5 * max(n, 0) ** 2 - 1 for n in row] for row in plane]
                                   for plane in x])
    np.testing.assert_allclose(reference.run(ops.Div(), x, y), outside("Div", x, y), rtol=1e-7)


@pytest.mark.parametrize(("dtype", "zero_point", "ours"), [
    (np.uint8, 0, 0), (np.uint8, 131, 131), (np.int8, 0, 128), (np.int8, -128, 0)])
def test_fake_quantize(dtype, zero_point, ours):
    x = np.linspace(-70, 70, 561, dtype=np.float32)
    scale, zero = np.array(0.25, np.float32), np.array(zero_point, dtype)
    codes = outside("QuantizeLinear", x, scale, zero)
    np.testing.assert_array_equal(reference.run(ops.FakeQuantize(0.25, ours), x),
                                  outside("DequantizeLinear", codes, scale, zero))


def test_layer_norm_global_max_slice_and_pad():
    x, scale, bias = whole(2, 3, 4, 5), whole(5), whole(5)
    theirs = outside("LayerNormalization", x, scale, bias, epsilon=0.25)
    np.testing.assert_allclose(reference.run(ops.LayerNorm(0.25), x, scale, bias), theirs,
                               rtol=0, atol=2e-6)
    np.testing.assert_array_equal(reference.run(ops.GlobalMaxPool2d(), nhwc(x)),
                                  nhwc(outside("GlobalMaxPool", x)))
    np.testing.assert_allclose(reference.run(ops.GlobalL2Pool2d(), nhwc(x)),
                               nhwc(outside("GlobalLpPool", x, p=2)), rtol=1e-6)
    np.testing.assert_array_equal(reference.run(ops.Slice(2, 1, 4, 2), x), x[:, :, 1:4:2])
    padded = np.full((2, 4, 4, 8), 7.0)
    padded[:, 1:, :, 2:7] = x
    np.testing.assert_array_equal(
        reference.run(ops.Pad((0, 1, 0, 2), (0, 0, 0, 1), 7.0), x), padded)
    for mode, expected in (("reflect", [3, 2, 1, 2, 3, 2]), ("edge", [1, 1, 1, 2, 3, 3])):
        np.testing.assert_array_equal(
            reference.run(ops.Pad((2,), (1,), mode=mode), np.array([1, 2, 3])), expected)
