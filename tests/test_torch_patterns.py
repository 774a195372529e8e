"""What profiling/torch_patterns.py joins, against ONNX Runtime on the same file."""
import math

import numpy as np
import pytest
from onnx_models import RNG, build, node, saved

torch = pytest.importorskip("torch")
runtime = pytest.importorskip("onnxruntime")
from torch_network import TorchNetwork  # noqa: E402 (imports torch)

CONSTANTS = {"root": np.float32(math.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5),
             "three": np.float32(3), "low": np.float32(0.25), "high": np.float32(4),
             **{f"i{i}": np.int64(i) for i in range(3)}}
ERF = [node("Div", ["x", "root"], ["d"]), node("Erf", ["d"], ["e"]),
       node("Add", ["e", "one"], ["gate"])]


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def layers(tmp_path, nodes, x, constants=CONSTANTS, fold=False):
    """The names of PyTorch's layers, which must give what ONNX Runtime gives."""
    path = saved(tmp_path, build(nodes, {"x": ["N", *x.shape[1:]]}, constants=constants))
    network = TorchNetwork(path, fold)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]
    found = network(torch.from_numpy(x.copy())).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert all(weight.is_contiguous() for weight in network.parameters())
    return [type(layer).__name__ for layer in network.layers]


@pytest.mark.parametrize("order", [("x gate", "p half"), ("half gate", "p x"), ("x half", "gate p"),
                                   ("gate x", "half p")])
def test_gelu_of_any_order(tmp_path, order):
    nodes = [*ERF, *(node("Mul", factors.split(), [y])
                     for factors, y in zip(order, "py", strict=True))]
    assert layers(tmp_path, nodes, random(3, 9)) == ["GELU"]


def attention(*scores):
    """Of x (N, 3, heads, tokens, depth); `scores` makes s of q and kt."""
    return [*(node("Gather", ["x", f"i{i}"], [name], axis=1) for i, name in enumerate("qkv")),
            node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]), *scores,
            node("Softmax", ["s"], ["p"], axis=-1), node("MatMul", ["p", "v"], ["y"])]


@pytest.mark.parametrize("scores", [
    [node("MatMul", ["q", "kt"], ["s"])],
    [node("Mul", ["low", "q"], ["qs"]), node("MatMul", ["qs", "kt"], ["s"])],
    [node("MatMul", ["q", "kt"], ["r"]), node("Div", ["r", "high"], ["s"])],
    [node("Mul", ["q", "half"], ["qs"]), node("Mul", ["kt", "half"], ["ks"]),
     node("MatMul", ["qs", "ks"], ["s"])]])
def test_attention_is_one_layer_however_it_is_scaled(tmp_path, scores):
    found = layers(tmp_path, attention(*scores), random(2, 3, 4, 7, 8))
    assert found == ["Select"] * 3 + ["Attention"]


def test_a_matrix_and_a_vector_are_a_linear(tmp_path):
    """What others read of it, too, stays."""
    constants = {"w": random(5, 6), "b": random(6), "w2": random(6, 3)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["b", "p"], ["l"]),
             node("Add", ["p", "l"], ["s"]), node("MatMul", ["s", "w2"], ["y"])]
    assert layers(tmp_path, nodes, random(2, 4, 5), constants) == [
        "Linear", "Linear", "Add", "Linear"]
    assert layers(tmp_path, [*nodes[:2], node("MatMul", ["l", "w2"], ["y"])], random(2, 4, 5),
                  constants) == ["Linear", "Linear"]


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1, 1, 1), (4,), (6, 4, 1)])
def test_a_layer_scale_is_folded_if_that_is_asked_for(tmp_path, shape):
    constants = {"w": random(5, 6), "b": random(6), "scale": random(*shape)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["l"]),
             node("Transpose", ["l"], ["t"], perm=[0, 3, 1, 2]), node("Mul", ["scale", "t"], ["y"])]
    x = random(2, 4, 4, 5)
    assert layers(tmp_path, nodes, x, constants) == ["Linear", "Permute", "Scale"]
    of_channels = shape[-2:] == (1, 1)
    assert layers(tmp_path, nodes, x, constants, fold=True) == [
        "Linear", "Permute", *["Scale"] * (not of_channels)]


def test_a_token_for_each_image(tmp_path):
    constants = {"token": random(1, 1, 5), "tail": np.int64([1, 5])}
    nodes = [node("Shape", ["x"], ["n"], start=0, end=1),
             node("Concat", ["n", "tail"], ["shape"], axis=0),
             node("Expand", ["token", "shape"], ["tokens"]),
             node("Concat", ["tokens", "x"], ["y"], axis=1)]
    for batch in (1, 3):
        assert layers(tmp_path, nodes, random(batch, 2, 5), constants) == [
            "ExpandToBatch", "Concat"]


@pytest.mark.parametrize(("nodes", "operator"), [
    ([*ERF, node("Mul", ["x", "gate"], ["p"]), node("Mul", ["p", "three"], ["y"])], "Div"),
    ([*ERF, node("Mul", ["gate", "half"], ["y"])], "Div"),
    (attention(node("MatMul", ["q", "kt"], ["r"]), node("Add", ["r", "low"], ["s"])), "MatMul"),
    (attention(node("MatMul", ["q", "kt"], ["r"]), node("Div", ["high", "r"], ["s"])), "MatMul"),
    ([node("Shape", ["x"], ["n"], start=1, end=2), node("Expand", ["one", "n"], ["y"])], "Shape")])
def test_what_means_something_else_is_refused(tmp_path, nodes, operator):
    """A rival of several layers in the place of one would be slow, and nobody would know."""
    path = saved(tmp_path, build(nodes, {"x": ["N", 3, 4, 7, 7]}, constants=CONSTANTS))
    with pytest.raises(ValueError, match=f"operator {operator} is none of"):
        TorchNetwork(path)
