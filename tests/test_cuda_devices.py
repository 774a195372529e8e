"""Whole networks through the CUDA kernels: in the emulator, on a stand-in for CuPy, on a GPU."""
import dataclasses
import itertools
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
from fake_cupy import FakeCupy
from graph_reference import float64_logits
from measured_network import logit_error
from test_layers import error_bound, evaluate
from torch_networks import FILE, NETWORKS

import cnn
from cnn import layers
from cnn.graph import Node
from kernels import ops, reference

ROUNDOFF = {"float32": 2.0 ** -24, "tf32": 2.0 ** -10, "float16": 2.0 ** -11,
            "bfloat16": 2.0 ** -8}
DTYPES = list(ROUNDOFF)
# How an error passes layer norms and attention depends on all of an image: see measured_network.py.
NORMALISED = ["vit_s_16", "convnext_tiny"]
ARCHS = {"sm_80": "emulator", "sm_90a": "emulator:sm_90a"}     # the emulator as such a GPU
SLOPES = {ops.Silu: 1.1, ops.HardSwish: 1.5}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A file with each kind of block that ResNet and MobileNetV2 are made of, and with sums so long
    that they are split among blocks: of a GPU of sm_90a in clusters."""
    net = networks.Builder(0, 24)
    x = net.relu6(net.batch_norm(net.conv("input", "stem", 16, 3, stride=2), "stem.bn"))
    x = networks.inverted_residual(net, x, "mobile.0", 6, 16, 1)
    x = networks.inverted_residual(net, x, "mobile.1", 3, 24, 2)
    x = net.max_pool(x, "pool", 3, stride=2, padding=1)
    x = networks.bottleneck(net, x, "res", 8, 1)
    for name, channels, size in (("wide", 512, 1), ("narrow", 256, 1), ("deep", 32, 3)):
        x = net.relu(net.conv(x, name, channels, size))
    net.linear(net.global_pool(x), "head", 10)
    path = tmp_path_factory.mktemp("network") / "network.onnx"
    onnx.save(net.model("blocks"), path)
    return path


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)


def through(activation, z, variance):
    """The variance behind an activation of z; what is clipped for sure has none."""
    if activation is None or type(activation) in SLOPES:
        return variance * SLOPES.get(type(activation), 1.0) ** 2
    low, high = reference.run(activation, np.float64([-np.inf, np.inf]))
    margin = 8 * np.sqrt(variance)
    return np.where((z > low - margin) & (z < high + margin), variance, 0.0)


def apart(node):
    """The nodes of a norm and a convolution that are one: what is between them is rounded, too."""
    if not isinstance(node.op, ops.NormConv2d):
        return [node]
    between = f"{node.output} normalised"
    return [Node(node.op.norm, node.inputs[:5], between, between),
            Node(node.op.conv, (between, *node.inputs[5:]), node.output, node.name)]


def deviations(graph, inputs, u):
    """(reference values, standard deviations of their errors) in float64, each value's rounding
    to unit roundoff u taken as independent (Higham and Mary 2019, "A New Approach to
    Probabilistic Rounding Error Analysis"). SiLU and hard swish are no steeper than 1.1 and 1.5,
    other activations than 1."""
    values = {**graph.constants, **inputs}
    variance = {name: (u * values[name]) ** 2 for name in inputs}
    for node in itertools.chain.from_iterable(map(apart, graph.nodes)):
        given = [np.asarray(values[name], np.float64) for name in node.inputs]
        values[node.output] = y = reference.run(node.op, *given)
        before = [variance.get(name, np.zeros(1)) for name in node.inputs]
        if isinstance(node.op, (ops.Conv2d, ops.Linear)):
            plain = (ops.Conv2d(*(getattr(node.op, key) for key in (
                "stride", "padding", "dilation", "groups")))
                if isinstance(node.op, ops.Conv2d) else ops.Linear())
            squares = given[1] ** 2
            terms = given[1][0].size
            found = reference.run(plain, before[0] + (u ** 2 + terms * 2.0 ** -48) * given[0] ** 2,
                                  squares)
            found = found + (before[3] if len(before) > 3 else 0)
            z = reference.run(dataclasses.replace(node.op, activation=None), *given)
            found = through(node.op.activation, z, found)
        elif isinstance(node.op, ops.BatchNorm):
            _, scale, _, _, var = given
            found = before[0] * scale ** 2 / (var + node.op.epsilon)
        elif isinstance(node.op, ops.Concat):
            found = reference.run(node.op, *before)
        elif isinstance(node.op, ops.Binary):
            found = before[0] + before[1]
        else:                       # pools, shapes, clips: no error grows
            found = reference.run(node.op, before[0])
        variance[node.output] = found + (u * y) ** 2
    return values, {name: np.sqrt(found) for name, found in variance.items()}


def assert_near(model, image, u):
    """Each probability's logit within 8 deviations of the float64 reference."""
    graph = model._program({"input": image.shape}).graph
    values, deviation = deviations(graph, {"input": image.astype(np.float64)}, u)
    found = model.run({"input": image.transpose(0, 3, 1, 2)})["logits"]
    name, = graph.outputs
    excess = np.abs(found - values[name]) / np.maximum(deviation[name], 1e-30)
    assert excess.max() <= 8, excess.max()
    assert excess.max() >= 1e-3         # so small would mean that nothing ran in this dtype


def assert_of(arch, dtype, kernels):
    """Among kernels, by name, are those that only GPUs of this architecture get."""
    hopper = arch == "sm_90a"
    assert any("_cluster" in name for name in kernels) == hopper
    assert any("_wgmma_" in name for name in kernels) == (hopper and dtype in ("float16",
                                                                               "bfloat16"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "float16", *(
    pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("tf32", "bfloat16"))])
def test_a_network_of_every_kind_of_block_is_near_the_reference(network, image, dtype, arch):
    model = cnn.load(network, device=ARCHS[arch], dtype=dtype)
    assert (model.device, model.dtype, model.threads) == (ARCHS[arch], dtype, None)
    assert_near(model, image, ROUNDOFF[dtype])
    kernels = [row.kernel for row in model.summary(len(image)).rows if row.kernel != "(view)"]
    assert {name.split("_")[0] for name in kernels} == {"conv", "depthwise", "max", "global",
                                                        "gemv"}
    assert_of(arch, dtype, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in networks.NETWORKS
                                  if name not in ("vgg16", *NORMALISED)])
def test_benchmark_networks_on_small_images_are_near_the_reference(name, dtype, tmp_path):
    onnx.save(networks.build(name, size=32), tmp_path / "net.onnx")
    image = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    assert_near(cnn.load(tmp_path / "net.onnx", device="emulator", dtype=dtype), image,
                ROUNDOFF[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMALISED)
def test_benchmark_networks_that_normalise_are_near_the_reference(name, dtype, tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(networks.build(name, size=32), path)
    image = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    expected = float64_logits(path, image)
    model = cnn.load(path, device="emulator", dtype=dtype, activation="none")
    error = np.abs(model.run({"input": image.transpose(0, 3, 1, 2)})["logits"] - expected).max()
    terms = [terms for terms, _ in networks.dot_products(onnx.load(path))]
    allowed = logit_error(terms, expected, ROUNDOFF[dtype])
    assert allowed / 1000 < error <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_photo_is_what_the_cpu_says(arch):
    """The whole embedded network at its full size."""
    photo = Path(__file__).parent.parent / "examples" / "cat.jpg"
    model = cnn.load(device=ARCHS[arch], dtype="float16")
    assert_of(arch, "float16", [row.kernel for row in model.summary().rows])
    expected, found = cnn.load(device="cpu").classify(photo), model.classify(photo)
    assert [one.label for one in found[:4]] == [one.label for one in expected[:4]]
    for one, other in zip(found[:4], expected[:4], strict=True):
        assert abs(one.probability - other.probability) < 0.02


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=[pytest.mark.slow] * (
        dtype == "tf32" or name == "rarer_layers"))
    for name in NETWORKS for dtype in ("float32", "tf32", "float16")])
def test_torchs_networks_by_hand(name, dtype):
    with np.load(FILE) as file:
        stored = {key.removeprefix(f"{name}/"): file[key] for key in file
                  if key.startswith(f"{name}/")}
    net = NETWORKS[name](layers)
    net.load_state_dict({key.removeprefix("state/"): array for key, array in stored.items()
                         if key.startswith("state/")})
    x = np.ascontiguousarray(stored["input"].transpose(0, 2, 3, 1))
    model = cnn.Model(net, input_shape=x.shape[1:], device="emulator", dtype=dtype,
                      activation="none")
    graph = net.graph((None, *x.shape[1:]))
    bound = error_bound(graph, evaluate(graph, x), ROUNDOFF[dtype])
    assert np.abs(model.predict(x) - stored["output"]).max() <= bound


def whole_numbers(net, rng):
    """Weights of -1, 0, 1, mostly 0, so that every value is a small whole number."""
    net.load_state_dict({key: rng.choice([-1, 0, 0, 0, 0, 0, 1], array.shape).astype(np.float32)
                         for key, array in net.state_dict().items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_go_through_a_network_exactly(dtype):
    rng = np.random.default_rng(0)
    net = NETWORKS["exemplary"](layers)
    whole_numbers(net, rng)
    x = rng.integers(-2, 3, (3, 8, 8, 3)).astype(np.float32)
    expected = cnn.Model(net, input_shape=(8, 8, 3), device="cpu").trace(x)
    assert 0 < max(np.abs(value).max() for value in expected.values()) <= 256
    found = cnn.Model(net, input_shape=(8, 8, 3), device="emulator", dtype=dtype).trace(x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_constants_that_are_read_as_they_are_and_several_batches(tmp_path):
    constant = np.float32([1, -2, 3])
    graph = onnx.parser.parse_graph("g (float[N,3] x) => (float[N,3] y) {y = Mul (x, c)}")
    graph.initializer.append(onnx.numpy_helper.from_array(constant, "c"))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]),
              tmp_path / "mul.onnx")
    model = cnn.load(tmp_path / "mul.onnx", device="emulator", dtype="bfloat16")
    for rows in (1, 4, 0):
        x = np.arange(3.0 * rows, dtype=np.float32).reshape(rows, 3)
        np.testing.assert_array_equal(model.run({"x": x})["y"], x * constant)


@pytest.mark.parametrize(("arch", "capability", "multiprocessors"), [
    ("sm_80", (8, 0), 4), ("sm_90a", (9, 0), 132)])
def test_a_gpu_gets_the_same_launches(machine, network, image, arch, capability, multiprocessors):
    """CuPy is a stand-in here: memory, dtypes and arguments are what is tested."""
    cupy = machine(capabilities=(capability, capability), multiprocessors=multiprocessors)
    model = cnn.load(network, device="cuda:1", dtype="float16")
    emulated = cnn.load(network, device=ARCHS[arch], dtype="float16")
    given = {"input": image.transpose(0, 3, 1, 2)}
    np.testing.assert_array_equal(model.run(given)["logits"], emulated.run(given)["logits"])
    assert (model.device, {call.device for call in cupy.calls}) == ("cuda:1", {1})
    assert_of(arch, "float16", [call.name for call in cupy.calls])
    assert any(call.cluster > 1 for call in cupy.calls) == (arch == "sm_90a")
    assert [row.kernel for row in model.summary(len(image)).rows] == [
        row.kernel for row in emulated.summary(len(image)).rows]
    launched = len(cupy.calls)
    model.run(given)
    assert len(cupy.calls) == 2 * launched


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_on_a_gpu(network, image, dtype):
    assert_near(cnn.load(network, device="cuda", dtype=dtype), image, ROUNDOFF[dtype])


def test_a_gpu_with_a_number_of_three_digits_is_not_an_old_one(machine):
    machine(capabilities=((12, 0),))
    assert cnn.load(device="cuda", dtype="float16").device == "cuda:0"


@pytest.mark.parametrize(("arguments", "message"), [
    ({"device": "cuda", "dtype": "int8"}, "dtype='int8' is not supported on CUDA; it can be one"),
    ({"device": "emulator", "threads": 2}, "threads=2 is for the CPU"),
    ({"device": "cuda:x"}, "device='cuda:x' is unknown; write 'cuda' or 'cuda:N'"),
    ({"device": "cpu:0"}, "device='cpu:0' is unknown; it can be 'auto', 'cpu', 'cuda', 'cuda:N',"),
    ({"device": "emulator:sm_70"}, "device='emulator:sm_70' is unknown; the emulator executes what "
                                   "GPUs of sm_80 and sm_90a get"),
    ({"device": "emulator:"}, "device='emulator:' is unknown; the emulator executes"),
    ({"device": None}, "device=None is unknown"),
    ({"device": "cuda:2"}, "there is no GPU 2: this machine has 1"),
    ({"device": "cuda", "dtype": "float16"},
     "dtype='float16' needs a GPU of sm_80 or newer, and cuda:0, Fake GPU, is sm_75"),
])
def test_devices_that_can_not_be_had(machine, arguments, message):
    machine(capabilities=((7, 5),))
    with pytest.raises(cnn.DeviceError, match=message):
        cnn.load(**arguments)


def test_a_fault_of_the_driver_is_a_device_error(machine, network, image):
    cupy: FakeCupy = machine()
    model = cnn.load(network, device="cuda", dtype="float16")
    cupy.launch_error = "CUDA_ERROR_LAUNCH_FAILED"
    with pytest.raises(cnn.DeviceError, match="could not be launched on GPU 0"):
        model.predict(image)
