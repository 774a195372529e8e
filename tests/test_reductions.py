"""Sums, means, maxima and norms along any axes, against ONNX Runtime on the same file."""
import numpy as np
import pytest
from onnx_models import build, compare, node, saved, whole

import cnn

X = whole(2, 8, 6, 4)
IMAGE = {"x": ["N", 8, 6, 4]}


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax", "ReduceL2", "ReduceSum"])
@pytest.mark.parametrize(("axes", "keepdims"), [
    ([2, 3], 1), ([-1, -2], 0), ([1], 1), ([1], 0), ([3], 0), ([2], 1), ([1, 3], 0), ([1, 2], 1),
    ([1, 2, 3], 1), ([3, 1, 2], 0)])
def test_along_any_axes_of_an_image(tmp_path, operator, axes, keepdims):
    nodes = [node("Relu", ["x"], ["r"]), node("Conv", ["r", "w"], ["c"]),
             node(operator, ["c", "axes"], ["y"], keepdims=keepdims)]
    constants = {"axes": np.int64(axes), "w": whole(8, 8, 1, 1)}
    compare(tmp_path, build(nodes, IMAGE, constants=constants, opset=18), x=X)


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax", "ReduceSum"])
@pytest.mark.parametrize(("shape", "axes"), [((2, 20, 7), [1]), ((2, 7, 20), [-1]), ((3, 19), [1]),
                                             ((2, 3, 2, 4, 5), [2, 4])])
def test_along_axes_of_what_is_no_image(tmp_path, operator, shape, axes):
    model = build([node(operator, ["x", "axes"], ["y"])], {"x": ["N", *shape[1:]]},
                  constants={"axes": np.int64(axes)}, opset=18)
    compare(tmp_path, model, x=whole(*shape))


def test_a_sum_of_few_slices_is_exact(tmp_path):
    nodes = [node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)]
    model = build(nodes, IMAGE, constants={"axes": np.int64([1])}, opset=18)
    found = cnn.load(saved(tmp_path, model)).run({"x": X})["y"]
    np.testing.assert_array_equal(found, X.sum(axis=1))


@pytest.mark.parametrize("last", ["context", "weights"])
def test_a_weighted_sum_of_pixels(tmp_path, last):
    """Global context (Cao et al. 2019, arXiv:1904.11492): the mean of all pixels, weighted by a
    softmax of what a convolution makes of each."""
    constants = {"w": whole(1, 8, 1, 1), "rows": np.int64([0, 1, 8, -1]),
                 "column": np.int64([0, 1, -1, 1]), "row": np.int64([0, 1, 1, -1]),
                 "gate": np.int64([0, 8, 1, 1]), "v": whole(8, 8, 1, 1)}
    turned = [] if last == "weights" else [node("Transpose", ["r"], ["t"], perm=[0, 1, 3, 2])]
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Reshape", ["x", "rows"], ["r"]), *turned,
             node("Reshape", ["c", "row"], ["flat"]), node("Softmax", ["flat"], ["s"]),
             node("Reshape", ["s", "column"], ["down"]),
             node("MatMul", ["r", "down"] if last == "weights" else ["s", "t"], ["m"]),
             node("Reshape", ["m", "gate"], ["g"]), node("Conv", ["g", "v"], ["h"]),
             node("Mul", ["x", "h"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


def response_norm():
    """Global response normalization (Woo et al. 2023, arXiv:2301.00808), as ConvNeXt V2 has it:
    NHWC in the middle, each channel's norm by the mean of all of them."""
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]),
             node("ReduceL2", ["t", "pixels"], ["norm"]),
             node("ReduceMean", ["norm", "last"], ["mean"]), node("Add", ["mean", "eps"], ["m"]),
             node("Div", ["norm", "m"], ["n"]), node("Mul", ["t", "n"], ["scaled"]),
             node("Mul", ["scaled", "gamma"], ["g"]), node("Add", ["g", "beta"], ["b"]),
             node("Add", ["t", "b"], ["r"]), node("Transpose", ["r"], ["back"], perm=[0, 3, 1, 2]),
             node("Conv", ["back", "v"], ["y"])]
    constants = {"w": whole(16, 8, 1, 1), "v": whole(8, 16, 1, 1), "pixels": np.int64([1, 2]),
                 "last": np.int64([-1]), "eps": np.float32(1e-6), "gamma": whole(16),
                 "beta": whole(16)}
    return build(nodes, IMAGE, constants=constants, opset=18)


def test_global_response_normalization(tmp_path):
    compare(tmp_path, response_norm(), x=X)
    kinds = [layer.op.kind for layer in cnn.load(tmp_path / "net.onnx")._graph.nodes]
    assert kinds.count("Transpose") == 1        # of the output


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_global_response_normalization_by_the_cuda_kernels(tmp_path, dtype):
    path, x = saved(tmp_path, response_norm()), {"x": X * 20}       # squares beyond float16
    expected = cnn.load(path, device="cpu").run(x)["y"]
    found = cnn.load(path, device="emulator", dtype=dtype).run(x)["y"]
    bound = 0.01 if dtype == "float16" else 1e-5
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize(("axes", "sentence"), [
    ([0], "not the batch"), ([0, 1], "not the batch"), (None, "must name axes whose sizes"),
    ([4], "axis 4 is out of range")])
def test_what_is_refused_is_named(tmp_path, axes, sentence):
    constants = {} if axes is None else {"axes": np.int64(axes)}
    nodes = [node("ReduceMean", ["x", *constants], ["y"], name="n")]
    with pytest.raises(cnn.ModelError, match=f"node 'n'.*{sentence}"):
        cnn.load(saved(tmp_path, build(nodes, IMAGE, constants=constants, opset=18)))
