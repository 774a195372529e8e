"""The kernels on plain arrays: arguments as torch.nn.functional has them, and their errors."""
import numpy as np
import pytest
from checks import integers

import kernels
from kernels import ops, reference

RNG = np.random.default_rng(0)
X = integers(RNG, 2, 9, 11, 6)
W, B = integers(RNG, 8, 3, 3, 6), integers(RNG, 8)


@pytest.mark.parametrize(("arguments", "op"), [
    ({}, ops.Conv2d()),
    ({"stride": 2, "padding": 1}, ops.Conv2d((2, 2), (1, 1, 1, 1))),
    ({"stride": (2, 1), "padding": (1, 2)}, ops.Conv2d((2, 1), (1, 2, 1, 2))),
    ({"padding": (0, 1, 2, 1), "dilation": 2}, ops.Conv2d((1, 1), (0, 1, 2, 1), (2, 2))),
    ({"activation": ops.Relu()}, ops.Conv2d(activation=ops.Relu())),
])
def test_conv2d_takes_torchs_arguments(arguments, op):
    expected = reference.run(op, X, W, B)
    np.testing.assert_array_equal(kernels.conv2d(X, W, B, **arguments), expected)


def test_conv2d_without_bias_with_groups_and_with_residual():
    np.testing.assert_array_equal(kernels.conv2d(X, W), reference.run(ops.Conv2d(), X, W))
    grouped = integers(RNG, 4, 3, 3, 3)
    np.testing.assert_array_equal(kernels.conv2d(X, grouped, groups=2),
                                  reference.run(ops.Conv2d(groups=2), X, grouped))
    residual = integers(RNG, 2, 7, 9, 8)
    np.testing.assert_array_equal(kernels.conv2d(X, W, residual=residual),
                                  reference.run(ops.Conv2d(), X, W) + residual)


def test_products_and_attention():
    a, b = integers(RNG, 2, 3, 5, 4), integers(RNG, 2, 1, 4, 7)
    np.testing.assert_array_equal(kernels.matmul(a, b), a @ b)
    q, k, v, bias = (integers(RNG, *shape) for shape in (
        (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (5, 7)))
    for given, op in (({}, ops.Attention(scale=0.5)), ({"scale": 0.1}, ops.Attention(scale=0.1))):
        np.testing.assert_allclose(kernels.attention(q, k, v, bias, **given),
                                   reference.run(op, q, k, v, bias), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(kernels.linear(a, B[None, :4], residual=a[..., :1]),
                                  a @ B[None, :4].T + a[..., :1])


def test_the_others():
    flat = X.reshape(2, -1)
    weight = integers(RNG, 5, flat.shape[1])
    np.testing.assert_array_equal(kernels.linear(flat, weight), flat @ weight.T)
    np.testing.assert_array_equal(kernels.relu(X), np.maximum(X, 0))
    np.testing.assert_array_equal(kernels.clip(X, -1, 2), np.clip(X, -1, 2))
    np.testing.assert_array_equal(kernels.add(X, B[:6]), X + B[:6])
    np.testing.assert_array_equal(kernels.mul(X, B[:6]), X * B[:6])
    np.testing.assert_array_equal(kernels.concat([X, X], 1), np.concatenate([X, X], 1))
    np.testing.assert_array_equal(
        kernels.max_pool2d(X, 3, 2, 1),
        reference.run(ops.MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)), X))
    np.testing.assert_array_equal(
        kernels.avg_pool2d(X * 4, 2),
        reference.run(ops.AvgPool2d(count_include_pad=True), X * 4))
    one = np.ones(6, np.float32)
    np.testing.assert_array_equal(
        kernels.batch_norm(X, mean=one, var=one * 4, weight=one * 2, bias=one, eps=0.0), X)
    np.testing.assert_allclose(kernels.global_avg_pool2d(X), X.mean((1, 2), keepdims=True),
                               rtol=0, atol=1e-6)
    np.testing.assert_allclose(kernels.softmax(X).sum(-1), 1, rtol=0, atol=1e-6)
    for function in (kernels.sigmoid, kernels.tanh):
        assert function(X).shape == X.shape
    np.testing.assert_array_equal(kernels.global_max_pool2d(X), X.max((1, 2), keepdims=True))


@pytest.mark.parametrize(("function", "arguments", "op"), [
    (kernels.hard_sigmoid, (), ops.HardSigmoid()),
    (kernels.hard_sigmoid, (0.2, 0.4), ops.HardSigmoid(0.2, 0.4)),
    (kernels.leaky_relu, (0.25,), ops.LeakyRelu(0.25)), (kernels.elu, (0.5,), ops.Elu(0.5)),
    (kernels.gelu, (), ops.Gelu()), (kernels.gelu, ("tanh",), ops.Gelu(tanh=True)),
    (kernels.fake_quantize, (0.5, 3), ops.FakeQuantize(0.5, 3)),
    (kernels.fake_quantize, (0.5, 3, True), ops.FakeQuantize(0.5, 3, relu=True)),
    (kernels.star_relu, (0.5, -2), ops.StarRelu(0.5, -2.0)),
    (kernels.global_l2_pool2d, (), ops.GlobalL2Pool2d()),
    (kernels.erf, (), ops.Erf()), (kernels.log_softmax, (1,), ops.Softmax(1, log=True)),
    (kernels.local_response_norm, (3, 0.5, 0.75, 2), ops.LocalResponseNorm(3, 0.5, bias=2.0)),
])
def test_their_arguments_are_those_of_the_op(function, arguments, op):
    np.testing.assert_allclose(function(X, *arguments), reference.run(op, X), rtol=1e-5, atol=1e-6)


def test_layer_norm_takes_weight_and_bias():
    weight, bias = integers(RNG, 6), integers(RNG, 6)
    np.testing.assert_allclose(kernels.layer_norm(X, weight, bias, eps=0.5),
                               reference.run(ops.LayerNorm(0.5), X, weight, bias),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [2, (1, 2), ((1, 2),), ((0, 0), (1, 0), (2, 3), (0, 4))])
def test_pad_takes_what_numpy_takes(width):
    np.testing.assert_array_equal(kernels.pad(X, width), np.pad(X, width))
    np.testing.assert_array_equal(kernels.pad(X, width, -2), np.pad(X, width, constant_values=-2))
    np.testing.assert_array_equal(kernels.pad(X, width, mode="edge"), np.pad(X, width, "edge"))


def test_roots_and_quotients():
    np.testing.assert_array_equal(kernels.sqrt(X * X), abs(X))
    np.testing.assert_array_equal(kernels.div(X, np.float32([4])), X / 4)
    np.testing.assert_array_equal(kernels.pad(X, ((0, 0), (2, 1), (1, 2), (0, 0)), mode="reflect"),
                                  np.pad(X, ((0, 0), (2, 1), (1, 2), (0, 0)), "reflect"))


def test_non_contiguous_arrays_and_empty_batches_work():
    turned = X.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(kernels.conv2d(turned, W, B),
                                  reference.run(ops.Conv2d(), turned, W, B))
    assert kernels.conv2d(X[:0], W, B).shape == (0, 7, 9, 8)


@pytest.mark.parametrize(("call", "error", "sentence"), [
    (lambda: kernels.relu(X.astype(np.float64)), TypeError, "not float64"),
    (lambda: kernels.relu([1.0]), TypeError, "not list"),
    (lambda: kernels.pad([1.0], 1), TypeError, "not list"),
    (lambda: kernels.conv2d(X[0], W), ValueError, r"x \(N, H, W, C\)"),
    (lambda: kernels.conv2d(X, W[..., :5]), ValueError, "x has 6 channels"),
    (lambda: kernels.conv2d(X, W, B[:3]), ValueError, r"bias has shape \(3,\)"),
    (lambda: kernels.conv2d(X, W, stride=0), ValueError, "stride=0"),
    (lambda: kernels.conv2d(X, W, padding=-1), ValueError, "padding=-1"),
    (lambda: kernels.conv2d(X, W, padding=(1, 2, 3)), ValueError, r"padding=\(1, 2, 3\)"),
    (lambda: kernels.conv2d(X, W, residual=X), ValueError, "residual has shape"),
    (lambda: kernels.conv2d(X[:, :2], W), ValueError, "a window of 3 does not fit 2"),
    (lambda: kernels.linear(X, W[0, 0, 0]), ValueError, "Linear"),
    (lambda: kernels.add(X, B), ValueError, "do not broadcast"),
    (lambda: kernels.softmax(X, 4), ValueError, "axis 4 is out of range"),
    (lambda: kernels.relu(X, threads=0), ValueError, "threads=0"),
    (lambda: kernels.gelu(X, "erf"), ValueError, "approximate='erf' can be 'none' or 'tanh'"),
    (lambda: kernels.pad(X, ((1, 1), (2, 2))), ValueError, r"pad_width=\(\(1, 1\), \(2, 2\)\)"),
    (lambda: kernels.pad(X, 0.5), ValueError, "pad_width=0.5 must be a whole number"),
    (lambda: kernels.pad(X, 1, mode="wrap"), ValueError, "mode='wrap' can be 'constant', 'edge'"),
    (lambda: kernels.pad(X, -1), ValueError, r"not a number of at least 0 for each axis"),
    (lambda: kernels.layer_norm(X, B, B), ValueError, "LayerNorm along the last axis"),
    (lambda: kernels.local_response_norm(X, 0), ValueError, "size=0 must be a whole number"),
])
def test_errors_are_sentences(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
