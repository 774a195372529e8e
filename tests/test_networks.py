from collections import Counter

import networks
import numpy as np
import onnx
import pytest
from measured_network import logit_error

import cnn

# torchvision's and timm's parameter counts; multiply-accumulates of convolutions, Linear and
# attention at 224x224.
SIZES = {"resnet50": (25_557_032, 4_089_184_256), "mobilenet_v2": (3_504_872, 300_774_272),
         "resnet18": (11_689_512, 1_814_073_344), "vgg16": (138_357_544, 15_470_264_320),
         "squeezenet1_1": (1_235_496, 349_151_936), "densenet121": (7_978_856, 2_834_161_664),
         "vit_s_16": (22_050_664, 4_598_882_304), "convnext_tiny": (28_589_128, 4_455_531_264)}
NORMALISED = ["resnet50", "mobilenet_v2", "resnet18"]


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=pytest.mark.slow) if name == "vgg16" else name
    for name in networks.NETWORKS])
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


def test_sizes_are_known(model):
    assert (networks.parameters(model), networks.macs(model)) == SIZES[model.graph.name]


def test_file_is_valid_and_has_the_promised_ends(model):
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    ends = [(value.name, value.type.tensor_type.elem_type,
             [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
            for value in [*model.graph.input, *model.graph.output]]
    assert ends == [("input", onnx.TensorProto.FLOAT, ["N", 3, 224, 224]),
                    ("logits", onnx.TensorProto.FLOAT, ["N", 1000])]


@pytest.mark.parametrize("name", NORMALISED)
def test_every_convolution_is_followed_by_an_unfolded_batch_norm(name):
    graph = networks.build(name).graph
    normalised = [node.input[0] for node in graph.node if node.op_type == "BatchNormalization"]
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
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


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet18", {"layer1.1.bn2.bias", "layer2.0.downsample.0.weight", "fc.bias"}),
    pytest.param("vgg16", {"features.0.weight", "features.28.bias", "classifier.0.weight",
                           "classifier.6.bias"}, marks=pytest.mark.slow),
    ("squeezenet1_1", {"features.0.bias", "features.12.expand3x3.weight", "classifier.1.bias"}),
    ("densenet121", {"features.conv0.weight", "features.denseblock3.denselayer24.norm1.weight",
                     "features.transition3.conv.weight", "features.norm5.running_var",
                     "classifier.weight"}),
    ("vit_s_16", {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight",
                  "blocks.11.attn.qkv.bias", "blocks.3.mlp.fc2.weight", "norm.bias", "head.bias"}),
    ("convnext_tiny", {"features.0.1.weight", "features.1.2.layer_scale", "features.2.1.bias",
                       "features.5.8.block.5.weight", "features.7.0.block.0.weight",
                       "classifier.0.bias", "classifier.2.weight"})])
def test_weights_of_the_others_carry_known_names_too(name, expected):
    assert expected <= {weight.name for weight in networks.build(name).graph.initializer}


def test_onnx_runtime_gives_sane_logits(model):
    """And so do all layers: neither vanishing nor exploding."""
    onnxruntime = pytest.importorskip("onnxruntime")
    values = [node.output[0] for node in model.graph.node
              if node.op_type in ("Add", "Conv", "Concat", "MatMul", "MaxPool")]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    session = onnxruntime.InferenceSession(probe.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).standard_normal((2, 3, 224, 224), dtype=np.float32)
    logits, *between = session.run(None, {"input": images})
    assert logits.shape == (2, 1000)
    assert (logits.std(axis=1) > 0.4).all()                     # classes differ ...
    assert np.abs(logits[0] - logits[1]).max() > 0.1            # ... and so do images
    assert 1 < np.abs(logits).max() < 30
    for value in between:
        if value.dtype != np.float32:
            continue                                            # a shape
        assert 0.1 < np.sqrt(np.square(value).mean()) < 10
        assert np.abs(value).max() < 1000                       # float16 ends at 65504


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_our_engine_agrees_with_onnx_runtime_on_small_images(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / f"{name}.onnx"
    model = networks.build(name, size=64)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).standard_normal((2, 3, 64, 64), dtype=np.float32)
    expected, = session.run(None, {"input": images})
    found = cnn.load(path, device="cpu", activation="none").run({"input": images})["logits"]
    terms = [terms for terms, _ in networks.dot_products(model)]
    assert np.abs(found - expected).max() <= 2 * logit_error(terms, expected)   # both are off


@pytest.mark.parametrize(("name", "expected"), [
    ("vit_s_16", {"conv2d": 1, "attention": 12, "linear": 4 * 12 + 1, "layer": 2 * 12 + 1,
                  "concat": 1, "add": 1, "slice": 1}),
    ("convnext_tiny", {"conv2d": 4, "depthwise": 18, "linear": 2 * 18 + 1, "layer": 18 + 5,
                       "global": 1})])
def test_our_engine_joins_what_is_written_out(name, expected, tmp_path):
    """No softmax is left alone, no erf, no scale of a layer and no transpose."""
    path = tmp_path / f"{name}.onnx"
    onnx.save(networks.build(name, size=64), path)
    kernels = [row.kernel for row in cnn.load(path, device="cpu").summary(3).rows]
    assert Counter(kernel.split("_")[0] for kernel in kernels if kernel != "(view)") == expected


def test_unknown_name_lists_those_that_exist():
    with pytest.raises(ValueError, match="'resnet5'; there are resnet50, mobilenet_v2"):
        networks.build("resnet5")
