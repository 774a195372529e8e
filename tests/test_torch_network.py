"""profiling/torch_network.py against ONNX Runtime, where torch is installed."""
import networks
import numpy as np
import onnx
import pytest
from measured_network import ZOO, logit_error
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
from torch_network import TorchNetwork  # noqa: E402 (imports torch)

LITE0 = ZOO / "efficientnet_lite0.onnx"


@pytest.fixture
def path(request, tmp_path):
    """The file of the network that is the test's parameter, for small images if it can be."""
    if request.param == LITE0.stem:
        return LITE0
    net = networks.Builder(0)
    grid = {"grid": 2} if request.param == "vgg16" else {}
    networks.NETWORKS[request.param](net, **grid)
    onnx.save(net.model(request.param, 64), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.mark.parametrize("path", [*networks.NETWORKS, LITE0.stem], indirect=True)
def test_networks_agree_with_onnx_runtime(path):
    runtime = pytest.importorskip("onnxruntime")
    size = 224 if path == LITE0 else 64
    images = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"input": images})[0]
    terms = [terms for terms, _ in networks.dot_products(onnx.load(path))]
    allowed = 2 * logit_error(terms, expected)      # both are off
    given = torch.from_numpy(images)
    for fold in False, True:
        network = TorchNetwork(path, fold)
        found = network(given)
        assert np.abs(found.numpy() - expected).max() <= allowed
        assert not found.requires_grad
        np.testing.assert_array_equal(given.numpy(), images)    # nothing was done in place there
        norms = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in network.layers)
        assert fold or norms == sum(
            node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)
        # DenseNet normalises what is concatenated, too.
        assert not fold or norms == (62 if "densenet" in onnx.load(path).graph.name else 0)


@pytest.mark.parametrize("path", ["mobilenet_v2"], indirect=True)
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
    ("Flatten", {"axis": 2}, "Flatten with axis=2")])
def test_what_it_lacks_is_a_sentence(operator, attributes, message, tmp_path):
    node = helper.make_node(operator, ["input"], ["y"], name="odd", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
              for name in ("input", "y")]
    onnx.save(helper.make_model(helper.make_graph([node], "odd", values[:1], values[1:])),
              tmp_path / "odd.onnx")
    with pytest.raises(ValueError, match=f"node 'odd': .*{message}"):
        TorchNetwork(tmp_path / "odd.onnx")
