"""profiling/torch_network.py against ONNX Runtime, where torch is installed."""
from collections import Counter

import networks
import numpy as np
import onnx
import pytest
from measured_network import ZOO, logit_error
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
from torch_network import TorchNetwork  # noqa: E402 (imports torch)

LITE0 = ZOO / "efficientnet_lite0.onnx"


@pytest.fixture(scope="module")
def path(request, tmp_path_factory):
    """The file of the network that is the test's parameter, for small images if it can be."""
    if request.param == LITE0.stem:
        return LITE0
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    onnx.save(networks.build(request.param, size=64), path)
    return path


@pytest.mark.parametrize("path", [*networks.NETWORKS, LITE0.stem], indirect=True)
def test_networks_agree_with_onnx_runtime(path):
    runtime = pytest.importorskip("onnxruntime")
    size = 224 if path == LITE0 else 64
    images = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"input": images})[0]
    terms = [terms for terms, _ in networks.dot_products(onnx.load(path))]
    allowed = 2 * logit_error(terms, expected)      # both are off
    for fold in False, True:
        layout = torch.channels_last if fold else torch.contiguous_format
        given = torch.from_numpy(images.copy()).to(memory_format=layout)
        network = TorchNetwork(path, fold).to(memory_format=layout)
        found = network(given)
        assert np.abs(found.numpy() - expected).max() <= allowed
        assert not found.requires_grad
        np.testing.assert_array_equal(given.numpy(), images)    # nothing was done in place there
        norms = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in network.layers)
        assert fold or norms == sum(
            node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)
        # DenseNet normalises what is concatenated, too.
        assert not fold or norms == (62 if "densenet" in onnx.load(path).graph.name else 0)


@pytest.mark.parametrize(("path", "expected"), [
    ("vit_s_16", {"Attention": 12, "GELU": 12, "LayerNorm": 25, "Linear": 4 * 12 + 1, "Add": 24,
                  "AddConstant": 1, "ExpandToBatch": 1, "Scale": 0}),
    ("convnext_tiny", {"Attention": 0, "GELU": 18, "LayerNorm": 23, "Linear": 2 * 18 + 1,
                       "Add": 18, "Scale": 18})], indirect=["path"])
def test_what_is_written_out_is_one_layer(path, expected):
    for fold in False, True:
        layers = Counter(type(layer).__name__ for layer in TorchNetwork(path, fold).layers)
        scales = 0 if fold else expected["Scale"]
        assert {name: layers[name] for name in expected} == {**expected, "Scale": scales}


@pytest.mark.parametrize("path", ["mobilenet_v2", "vit_s_16"], indirect=True)
def test_it_compiles_as_one_graph_and_takes_other_dtypes(path):
    network = TorchNetwork(path, fold=True).double()
    images = torch.ones(1, 3, 64, 64, dtype=torch.float64)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), network(images))
    assert compiled(images).dtype == torch.float64


@pytest.mark.parametrize(("operator", "attributes", "message"), [
    ("Softplus", {}, "operator Softplus is none of Conv, "),
    ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}, "auto_pad=SAME_UPPER"),
    ("AveragePool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, "uneven pads"),
    ("Flatten", {"axis": 2}, "Flatten with axis=2"),
    ("Transpose", {}, "a Transpose without perm")])
def test_what_it_lacks_is_a_sentence(operator, attributes, message, tmp_path):
    node = helper.make_node(operator, ["input"], ["y"], name="odd", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
              for name in ("input", "y")]
    onnx.save(helper.make_model(helper.make_graph([node], "odd", values[:1], values[1:])),
              tmp_path / "odd.onnx")
    with pytest.raises(ValueError, match=f"node 'odd': .*{message}"):
        TorchNetwork(tmp_path / "odd.onnx")


def test_what_is_read_through_a_view_is_not_overwritten(tmp_path):
    """A Relu in place of a transposed value would change what it is the transpose of."""
    nodes = [helper.make_node("GlobalAveragePool", ["input"], ["a"]),
             helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
             helper.make_node("Relu", ["t"], ["r"]),
             helper.make_node("Transpose", ["r"], ["b"], perm=[0, 3, 1, 2]),
             helper.make_node("Add", ["a", "b"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
              for name in ("input", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "net", values[:1], values[1:])),
              tmp_path / "net.onnx")
    x = torch.tensor([-2.0, 3.0]).reshape(1, 2, 1, 1)
    assert TorchNetwork(tmp_path / "net.onnx")(x).flatten().tolist() == [-2, 6]
