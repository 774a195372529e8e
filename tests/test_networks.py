import networks
import numpy as np
import onnx
import pytest

# torchvision's parameter counts; multiply-accumulates of convolutions and Linear at 224x224.
SIZES = {"resnet50": (25_557_032, 4_089_184_256), "mobilenet_v2": (3_504_872, 300_774_272)}


@pytest.fixture(scope="module", params=networks.NETWORKS)
def model(request) -> onnx.ModelProto:
    return networks.build(request.param)


def test_same_seed_gives_the_same_bytes(model):
    assert networks.build(model.graph.name).SerializeToString() == model.SerializeToString()


def test_another_seed_gives_other_weights_of_the_same_shapes():
    one, other = (networks.build("mobilenet_v2", seed).graph for seed in (0, 1))
    assert one.node == other.node
    for a, b in zip(one.initializer, other.initializer, strict=True):
        assert (a.name, a.dims) == (b.name, b.dims)
        assert a.raw_data != b.raw_data


def test_sizes_are_torchvisions(model):
    assert (networks.parameters(model), networks.macs(model)) == SIZES[model.graph.name]


def test_file_is_valid_and_has_the_promised_ends(model):
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    ends = [(value.name, value.type.tensor_type.elem_type,
             [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
            for value in [*model.graph.input, *model.graph.output]]
    assert ends == [("input", onnx.TensorProto.FLOAT, ["N", 3, 224, 224]),
                    ("logits", onnx.TensorProto.FLOAT, ["N", 1000])]


def test_every_convolution_is_followed_by_an_unfolded_batch_norm(model):
    normalised = [node.input[0] for node in model.graph.node
                  if node.op_type == "BatchNormalization"]
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert normalised == [node.output[0] for node in convolutions]
    assert all(len(node.input) == 2 for node in convolutions)


def test_weights_carry_torchvisions_names():
    names = {weight.name for weight in networks.build("mobilenet_v2").graph.initializer}
    assert {"features.0.0.weight", "features.0.1.running_var", "features.1.conv.0.0.weight",
            "features.1.conv.1.weight", "features.17.conv.3.bias", "features.18.1.weight",
            "classifier.1.weight", "classifier.1.bias"} <= names
    names = {weight.name for weight in networks.build("resnet50").graph.initializer}
    assert {"conv1.weight", "layer1.0.downsample.1.running_mean", "layer4.2.bn3.bias",
            "fc.weight"} <= names


def test_onnx_runtime_gives_sane_logits(model):
    onnxruntime = pytest.importorskip("onnxruntime")
    values = [node.output[0] for node in model.graph.node if node.op_type == "Add"]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    session = onnxruntime.InferenceSession(probe.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).standard_normal((2, 3, 224, 224), dtype=np.float32)
    logits, *sums = session.run(None, {"input": images})
    assert logits.shape == (2, 1000)
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.5).all()                     # classes differ ...
    assert np.abs(logits[0] - logits[1]).max() > 0.1            # ... and so do images
    for value in sums:                                          # neither vanishing nor exploding
        assert 0.1 < np.sqrt(np.square(value).mean()) < 10


def test_unknown_name_lists_those_that_exist():
    with pytest.raises(ValueError, match="'resnet5'; there are resnet50, mobilenet_v2"):
        networks.build("resnet5")
