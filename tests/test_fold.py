"""Glue is worked out in the tensors' own dtypes, and what is left is said."""
import numpy as np
import pytest

from cnn import ModelError, fold
from cnn.graph import Glue, Graph, Node
from kernels import ops
from kernels.ops import TensorSpec

INT64_MAX = np.iinfo(np.int64).max


def i64(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(("start", "end", "step", "expected"), [
    (0, INT64_MAX, 1, slice(None)), (-2, INT64_MAX, 1, slice(-2, None)),
    (1, -1, 2, slice(1, -1, 2)), (INT64_MAX, -INT64_MAX - 1, -1, slice(None, None, -1)),
    (3, 0, -1, slice(3, 0, -1)), (5, 2, 1, slice(5, 2))])
def test_slice_survives_the_ends_that_onnx_writes(start, end, step, expected):
    data = np.arange(7)
    found = fold.Slice(data, i64(start), i64(end), i64(0), i64(step))
    np.testing.assert_array_equal(found, data[expected])


def test_div_of_whole_numbers_goes_towards_zero():
    np.testing.assert_array_equal(fold.Div(i64(7, -7, 7, -7), i64(2, 2, -2, -2)), [3, -3, -3, 3])
    assert fold.Div(np.float32([1]), np.float32([4]))[0] == 0.25


def test_dtypes_are_kept():
    huge = i64(INT64_MAX - 1)
    assert fold.Add(huge, i64(1))[0] == INT64_MAX
    assert fold.Cast(np.float16([1.5]), to=np.dtype(np.float32)).dtype == np.float32
    assert fold.Constant(value_ints=[1, 2]).dtype == np.int64
    assert fold.Constant(value_float=1.5).dtype == np.float32
    assert fold.Constant(value=np.int32([3])).dtype == np.int32
    assert fold.ConstantOfShape(i64(2, 3)).tolist() == [[0, 0, 0]] * 2


def test_shapes():
    assert fold.Unsqueeze(np.ones(3), i64(0, 2)).shape == (1, 3, 1)
    assert fold.Unsqueeze(np.ones(3), axes=(0,)).shape == (1, 3)
    assert fold.Squeeze(np.ones((1, 3, 1))).shape == (3,)
    assert fold.Squeeze(np.ones((1, 3, 1)), i64(0)).shape == (3, 1)
    assert fold.Gather(i64(5, 6, 7), np.array(1)).tolist() == 6
    assert fold.Reshape(np.ones((2, 6)), i64(0, -1, 3)).shape == (2, 2, 3)
    assert fold.Shape(np.ones((4, 5, 6)), start=1).tolist() == [5, 6]


def flatten_graph(batch):
    """What torch's exporter makes of x.reshape(x.shape[0], -1) with a dynamic batch."""
    nodes = (
        Node(Glue("Shape"), ("x",), "shape", "shape"),
        Node(Glue("Gather"), ("shape", "zero"), "n", "gather"),
        Node(Glue("Unsqueeze"), ("n", "axes"), "n1", "unsqueeze"),
        Node(Glue("Concat", (("axis", 0),)), ("n1", "rest"), "target", "concat"),
        Node(Glue("Reshape"), ("x", "target"), "flat", "reshape"),
        Node(ops.Relu(), ("flat",), "y", "relu"))
    constants = {"zero": np.array(0), "axes": i64(0), "rest": i64(-1)}
    return Graph({"x": TensorSpec((batch, 2, 3, 4))}, ("y",), nodes, constants)


def test_a_shape_folds_as_soon_as_it_is_known():
    unknown = flatten_graph(None)
    assert fold.fold(unknown) is unknown
    with pytest.raises(ModelError, match="node 'shape': the operator Shape is supported only"):
        fold.require_folded(unknown)
    known = fold.fold(flatten_graph(5))
    fold.require_folded(known)
    assert [node.op for node in known.nodes] == [ops.Reshape((5, -1)), ops.Relu()]
    assert known.infer()["y"].shape == (5, 24)


def test_what_does_not_fit_names_the_node():
    graph = Graph({}, ("y",), (Node(Glue("Gather"), ("d", "i"), "y", "bad"),),
                  {"d": i64(1, 2), "i": i64(7)})
    with pytest.raises(ModelError, match="node 'bad': Gather can not be worked out"):
        fold.fold(graph)
    with pytest.raises(ModelError, match="too large to fold"):
        fold.evaluate(Glue("ConstantOfShape"), "big", i64(1 << 20, 1 << 20))


def test_what_exporters_compute_shapes_with():
    assert fold.Range(*map(np.int64, (2, 9, 3))).tolist() == [2, 5, 8]
    assert fold.Clip(i64(-3, 4), i64(0)).tolist() == [0, 4]
    assert fold.Clip(np.float32([-3, 4]), max=1.0).tolist() == [-3, 1]
    assert fold.Expand(i64(7), i64(2, 3)).tolist() == [[7] * 3] * 2
    assert fold.Where(np.array([True, False]), i64(1), i64(2)).tolist() == [1, 2]
    assert fold.Mod(i64(-7), i64(4)).tolist() == [1]
    assert fold.Mod(i64(-7), i64(4), fmod=1).tolist() == [-3]
    assert fold.Max(i64(1), i64(3), i64(2)).tolist() == [3]
    assert fold.Min(i64(1), i64(3), i64(2)).tolist() == [1]
    assert fold.Slice(i64(5, 6, 7), (1,), (3,), (0,)).tolist() == [6, 7]      # before opset 10


def test_what_exporters_compute_masks_and_positions_with():
    table = np.arange(6).reshape(3, 2)
    assert fold.GatherND(table, i64([2], [0])).tolist() == [[4, 5], [0, 1]]
    assert fold.GatherND(table, i64([2, 0], [0, 1])).tolist() == [4, 1]
    found = fold.ScatterND(table, i64([1], [0]), i64([7, 8], [9, 9]))
    assert found.tolist() == [[9, 9], [7, 8], [4, 5]]
    assert table[1].tolist() == [2, 3]
    assert fold.Tile(i64(1, 2), i64(3)).tolist() == [1, 2] * 3
    assert fold.CumSum(i64(1, 2, 3), np.int64(0)).tolist() == [1, 3, 6]
    assert fold.Not(np.array([True, False])).tolist() == [False, True]
    assert fold.MatMul(np.float32([[1, 2]]), np.float32([[3], [4]])).tolist() == [[11]]
    x = np.float32([-1, 0, 1])
    for function, right in ((fold.Exp, np.exp), (fold.Sin, np.sin), (fold.Cos, np.cos),
                            (fold.Relu, lambda x: np.maximum(x, 0)),
                            (fold.Sigmoid, lambda x: 1 / (1 + np.exp(-x)))):
        assert function(x).dtype == np.float32
        np.testing.assert_allclose(function(x), right(x.astype(float)), rtol=1e-6)


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: fold.GatherND(i64(1), i64([0]), batch_dims=1), "batch_dims is 1"),
    (lambda: fold.ScatterND(i64(1), i64([0]), i64(2), reduction="add"), "reduction is 'add'"),
    (lambda: fold.CumSum(i64(1), np.int64(0), reverse=1), "reverse are not supported")])
def test_what_is_not_worked_out_is_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_no_broadcast_makes_a_constant_that_no_network_means():
    line = np.zeros(1 << 13, np.float32)
    for operator in ("Add", "Mul", "Equal"):
        with pytest.raises(ModelError, match="too large to fold"):
            fold.evaluate(Glue(operator), "big", line[:, None], line[None])
    large = np.zeros((5000, 4000), np.float32)          # no larger than what is given
    assert fold.evaluate(Glue("Mul"), "scaled", large, np.float32(2)).shape == large.shape


@pytest.mark.parametrize("make", [
    lambda: fold.MatMul(np.zeros((1 << 13, 1)), np.zeros((1, 1 << 13))),
    lambda: fold.GatherND(np.zeros((2, 1 << 13)), np.zeros((1 << 13, 1))),
    lambda: fold.Tile(i64(1), i64(1 << 30)),
    lambda: fold.ConstantOfShape(i64(1 << 13, 1 << 13)), lambda: fold.Expand(i64(1), i64(1 << 30)),
    lambda: fold.Range(np.int64(0), np.int64(1 << 40), np.int64(1))])
def test_constants_that_no_network_means_are_not_made(make):
    with pytest.raises(ValueError, match="too large to fold"):
        make()
