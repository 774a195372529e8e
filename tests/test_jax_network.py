"""profiling/jax_network.py against PyTorch, where both are installed."""
import networks
import numpy as np
import onnx
import pytest
from measured_network import ZOO, logit_error
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
from jax_network import jax_network  # noqa: E402 (imports both)
from torch_network import TorchNetwork  # noqa: E402 (imports torch)

LITE0 = ZOO / "efficientnet_lite0.onnx"
TURNED = ["vit_s_16", "convnext_tiny"]      # their axes are moved, which it does not know


@pytest.mark.parametrize("name", [*(name for name in networks.NETWORKS if name not in TURNED),
                                  LITE0.stem])
def test_networks_agree_with_pytorch(name, tmp_path):
    path, size = LITE0, 224
    if name != LITE0.stem:
        path, size = tmp_path / "net.onnx", 64
        onnx.save(networks.build(name, size=size), path)
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    expected = TorchNetwork(path)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    terms = [terms for terms, _ in networks.dot_products(onnx.load(path))]
    weights, function = jax_network(path, "float32")
    found = jax.jit(function)(weights, images)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 2 * logit_error(terms, expected)   # both are off
    weights, function = jax_network(path, "float16")
    assert jax.eval_shape(function, weights, images.astype(np.float16)).dtype == np.float16


@pytest.mark.parametrize("size", range(5, 12))
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 2, 0), (3, 2, 1), (2, 3, 1), (3, 3, 0)])
def test_windows_that_are_not_whole(size, kernel, stride, pad, tmp_path):
    path = pooling("MaxPool", size, tmp_path, kernel_shape=[kernel] * 2, strides=[stride] * 2,
                   pads=[pad] * 4)
    x = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype(np.float32)
    expected = TorchNetwork(path)(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    weights, function = jax_network(path, "float32")
    found = np.asarray(function(weights, x))
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), expected)


@pytest.mark.parametrize("name", TURNED)
def test_networks_whose_axes_are_moved_are_refused(name, tmp_path):
    onnx.save(networks.build(name, size=64), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"(Reshape|Permute) has no counterpart in profiling/jax"):
        jax_network(tmp_path / "net.onnx", "float32")


def test_what_it_lacks_is_said(tmp_path):
    path = pooling("AveragePool", 5, tmp_path, kernel_shape=[2, 2])
    with pytest.raises(ValueError, match="rounds sizes up has no counterpart"):
        jax_network(path, "float32")


def pooling(operator, size, folder, **attributes):
    """The file of one pooling that rounds sizes up."""
    node = helper.make_node(operator, ["input"], ["y"], ceil_mode=1, **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
              (("input", [1, 3, size, size]), ("y", [1, 3, None, None]))]
    onnx.save(helper.make_model(helper.make_graph([node], "net", values[:1], values[1:])),
              folder / "net.onnx")
    return folder / "net.onnx"
