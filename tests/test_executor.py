"""Programs: where values lie, and what is left to run; results are the reference's."""
from concurrent.futures import ThreadPoolExecutor

import networks
import numpy as np
import onnx
import pytest
from checks import THREADS, integers
from measured_network import logit_error

import cnn
import kernels
from cnn import devices, executor, passes
from cnn.graph import Graph, Node
from cnn.onnx_import import load_onnx
from kernels import ops, reference
from kernels.cpu.launch import Exchange
from kernels.ops import Conv2d, TensorSpec

NOTHING: frozenset[str] = frozenset()
RELU = ops.Relu()


def program(graph, keep=NOTHING, threads=1):
    device = devices.CpuDevice(threads)
    return executor.Program(graph, device, device.options(), keep)


def expected(graph, inputs):
    """Every value by the reference, in float64."""
    values = {**graph.constants, **inputs}
    for node in graph.nodes:
        arrays = [values[name] for name in node.inputs]
        values[node.output] = reference.run(node.op, *arrays)
    return values


class Fire:
    """x -> a by a 3x3, b by a 1x1 and p by pooling -> y, their Concat; and what is added to it."""

    def __init__(self, activation=RELU):
        rng = np.random.default_rng(0)
        self.constants = {name: integers(rng, *shape) for name, shape in {
            "v": (5, 3, 3, 4), "w": (3, 1, 1, 4), "c": (5,), "d": (3,)}.items()}
        self.nodes = [
            Node(Conv2d(padding=(1, 1, 1, 1), activation=activation), ("x", "v", "c"), "a", "a"),
            Node(Conv2d(activation=activation), ("x", "w", "d"), "b", "b"),
            Node(ops.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), ("x",), "p", "p"),
            Node(ops.Concat(-1), ("p", "a", "b"), "y", "y")]
        self.outputs = ["y"]

    def graph(self):
        return Graph({"x": TensorSpec((2, 6, 7, 4))}, tuple(self.outputs), tuple(self.nodes),
                     self.constants)

    def add(self, op, inputs, name):
        self.nodes.append(Node(op, inputs, name, name))
        self.outputs.append(name)


def check(graph, in_place, keep=NOTHING):
    """The values that lie in another's memory are these, and all are right; the Concat's layer."""
    x = integers(np.random.default_rng(1), 2, 6, 7, 4)
    made = program(graph, keep)
    values = made.values
    assert {name for name in values.keys() & set("abp")
            if np.shares_memory(values[name], values["y"])} == set(in_place)
    wanted = expected(graph, {"x": x})
    for name, found in made.run({"x": x}, (*graph.outputs, *keep)).items():
        np.testing.assert_array_equal(found, wanted[name].astype(np.float32))
    return next(layer for layer in made.layers if layer.node.output == "y")


def test_convolutions_write_straight_into_the_concat():
    fire = Fire()
    layer = check(fire.graph(), "ab")
    assert [spec.shape for spec in layer.inputs] == [(2, 6, 7, 4)]     # the pooled one is copied
    assert layer.step.kernel == "concat_f32"


def test_a_concat_of_convolutions_alone_costs_nothing():
    fire = Fire()
    fire.nodes[2:] = [Node(ops.Concat(3), ("a", "b"), "y", "y")]
    graph = fire.graph()
    made = program(graph)
    assert [layer.step is None for layer in made.layers] == [False, False, True]
    x = integers(np.random.default_rng(1), 2, 6, 7, 4)
    np.testing.assert_array_equal(made.run({"x": x})["y"], expected(graph, {"x": x})["y"])


def test_what_is_read_elsewhere_is_copied():
    fire = Fire()
    fire.add(ops.Relu(), ("a",), "z")
    check(fire.graph(), "b")


def test_what_is_read_twice_is_copied():
    fire = Fire()
    fire.nodes[3] = Node(ops.Concat(-1), ("a", "b", "p", "a"), "y", "y")
    check(fire.graph(), "b")


def test_outputs_and_kept_values_are_copied():
    fire = Fire()
    fire.outputs.append("b")
    check(fire.graph(), "a")
    check(Fire().graph(), "a", keep=frozenset("b"))


def test_what_a_view_shares_is_copied():
    fire = Fire()
    fire.add(ops.Flatten(), ("a",), "z")
    check(fire.graph(), "b")


def test_along_other_axes_all_is_copied():
    fire = Fire()
    fire.constants |= {"v": fire.constants["v"][:4], "c": fire.constants["c"][:4]}
    fire.nodes[3] = Node(ops.Concat(1), ("p", "a"), "y", "y")
    del fire.nodes[1]
    check(fire.graph(), "")


def test_a_residual_is_added_and_copied():
    fire = Fire()
    fire.constants["w"] = fire.constants["w"].repeat(2, axis=0)[:4]
    fire.constants["d"] = fire.constants["d"].repeat(2)[:4]
    fire.nodes[1] = Node(Conv2d(), ("x", "w", "d", "x"), "b", "b")
    check(fire.graph(), "a")


def test_an_activation_that_sweeps_over_its_output_is_copied():
    fire = Fire(ops.Silu())
    made, x = program(fire.graph()), integers(np.random.default_rng(1), 2, 6, 7, 4)
    assert not np.shares_memory(made.values["a"], made.values["y"])
    y, weights = made.run({"x": x})["y"], fire.constants
    a = kernels.conv2d(x, weights["v"], weights["c"], padding=1, activation=ops.Silu(), threads=1)
    b = kernels.conv2d(x, weights["w"], weights["d"], activation=ops.Silu(), threads=1)
    assert np.array_equal(y[..., 4:], np.concatenate([a, b], axis=-1))


def small_squeezenet(net):
    """Two fire modules of Iandola et al. 2016, whose Concats join two convolutions each."""
    x = net.relu(net.conv("input", "features.0", 16, 3, stride=2))
    x = networks.fire(net, x, "features.1", 8, 1.0)
    x = networks.fire(net, net.max_pool(x, "features.2", 3, stride=2), "features.3", 16, 1.0)
    net.linear(net.global_pool(x), "head", 10)


def small_densenet(net):
    """One block of Huang et al. 2017: a layer's new channels join all those before it."""
    x = net.max_pool(net.conv("input", "conv0", 24, 5, stride=2), "pool0", 3, stride=2)
    for layer in range(3):
        y = net.relu(net.batch_norm(x, f"{layer}.norm1"))
        y = net.relu(net.batch_norm(net.conv(y, f"{layer}.conv1", 32, 1), f"{layer}.norm2"))
        x = net.concat([x, net.conv(y, f"{layer}.conv2", 20, 3)], f"{layer}.concat")
    net.linear(net.global_pool(net.relu(net.batch_norm(x, "norm3"))), "head", 10)


def write(build, folder):
    net = networks.Builder(0, 64)
    build(net)
    onnx.save(net.model("network"), folder / "network.onnx")
    return folder / "network.onnx"


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("build", [networks.squeezenet1_1, small_squeezenet, small_densenet])
def test_networks_of_concats_agree_with_the_reference(build, threads, tmp_path, monkeypatch):
    """No Concat copies all its inputs; where all are copied, bits are the same."""
    path = write(build, tmp_path)
    graph = executor.specialise(passes.optimise(load_onnx(path).graph), {"input": (2, 64, 64, 3)})
    x = np.random.default_rng(1).standard_normal((2, 64, 64, 3), dtype=np.float32)
    made = program(graph, threads=threads)
    concats = [layer for layer in made.layers if isinstance(layer.node.op, ops.Concat)]
    assert len(concats) >= 2
    assert any(layer.step and layer.step.kernel.startswith("winograd") for layer in made.layers)
    assert all(len(layer.inputs) < len(layer.node.inputs) for layer in concats)
    found, wanted = made.run({"input": x})["logits"], expected(graph, {"input": x})["logits"]
    terms = [terms for terms, _ in networks.dot_products(onnx.load(path))]
    assert np.abs(found - wanted).max() <= logit_error(terms, wanted)
    monkeypatch.setattr("cnn.plan.parts", lambda *arguments: {})
    copied = program(graph, threads=threads)
    assert all(len(layer.inputs) == len(layer.node.inputs) for layer in copied.layers)
    assert np.array_equal(copied.run({"input": x})["logits"], found)


def test_trace_has_every_layer_that_a_concat_joins(tmp_path):
    model = cnn.load(write(small_squeezenet, tmp_path), device="cpu")
    values = model.trace(np.random.default_rng(1).standard_normal((2, 64, 64, 3), dtype=np.float32))
    for module in ("features.1", "features.3"):
        joined = [values[f"{module}.expand{kernel}.relu"] for kernel in ("1x1", "3x3")]
        assert np.array_equal(values[f"{module}.concat"], np.concatenate(joined, axis=-1))


def test_summary_says_what_is_left_to_copy(tmp_path):
    rows = {row.layer: row for build in (small_squeezenet, small_densenet) for row in
            cnn.load(write(build, tmp_path), device="cpu").summary().rows}
    view, dense, copy = (rows[layer] for layer in ("features.3.concat", "2.concat", "0.concat"))
    assert (view.kernel, view.output_shape, view.bytes) == ("(view)", (1, 15, 15, 128), 0)
    assert (dense.kernel, dense.output_shape, dense.bytes) == ("(view)", (1, 15, 15, 84), 0)
    # Of 44 channels 20 are there already; the others are read and written.
    assert (copy.kernel, copy.output_shape) == ("concat_f32", (1, 15, 15, 44))
    assert copy.bytes == 2 * 4 * 15 * 15 * 24


# ---- inputs -----------------------------------------------------------------------------------

# What reads x, and whether x may be exchanged for the caller's own array.
READERS = {
    "a convolution": ([(Conv2d(), ("x", "w"), "y")], True),
    "two of them": ([(Conv2d(), ("x", "w"), "a"), (ops.Relu(), ("x",), "b"),
                     (ops.Add(), ("a", "b"), "y")], True),
    "a view": ([(ops.Reshape((2, 42, 4)), ("x",), "v"), (ops.Relu(), ("v",), "y")], True),
    "a part": ([(ops.Slice(1, 2, 6), ("x",), "a"), (ops.Relu(), ("a",), "y")], True),
    "what begins within it": ([(ops.Slice(2, 1, 7, 2), ("x",), "y")], False),
    "the caller": ([(ops.Relu(), ("x",), "y"), (ops.Reshape((2, 42, 4)), ("x",), "v")], False),
}


@pytest.mark.parametrize("name", READERS)
def test_an_input_is_read_where_it_lies(name, monkeypatch):
    taken, give = [], Exchange.give
    monkeypatch.setattr(Exchange, "give", lambda self, array: (taken.append(array),
                                                               give(self, array)))
    nodes, exchanged = READERS[name]
    outputs = ("y", "v") if name == "the caller" else ("y",)
    graph = Graph({"x": TensorSpec((2, 6, 7, 4))}, outputs,
                  tuple(Node(op, inputs, output, output) for op, inputs, output in nodes),
                  {"w": integers(np.random.default_rng(0), 4, 1, 1, 4)})
    made, rng = program(graph), np.random.default_rng(1)
    wide = integers(rng, 2, 6, 14, 4)
    words = np.zeros(4 * 2 * 6 * 7 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(2, 6, 7, 4)
    words[...] = integers(rng, 2, 6, 7, 4)
    given = [integers(rng, 2, 6, 7, 4), integers(rng, 2, 6, 7, 4), wide[:, :, ::2], words,
             integers(rng, 2, 4, 6, 7).transpose(0, 2, 3, 1)]
    for x in [*given, *given]:
        before = x.copy()
        found = made.run({"x": x})
        for output in outputs:
            assert np.array_equal(found[output], expected(graph, {"x": x})[output])
        assert np.array_equal(x, before)
        fits = x.flags.c_contiguous and x.flags.aligned
        assert [array is (x if fits else made.values["x"]) for array in taken] == [True] * exchanged
        taken.clear()


def test_threads_that_share_a_program_read_each_its_own_input():
    graph = Graph({"x": TensorSpec((1, 32, 32, 16))}, ("y",), (
        Node(Conv2d(), ("x", "w"), "a", "a"), Node(ops.Relu(), ("a",), "y", "y")),
        {"w": integers(np.random.default_rng(0), 16, 1, 1, 16)})
    made, rng = program(graph), np.random.default_rng(1)
    inputs = [integers(rng, 1, 32, 32, 16) for _ in range(4)]
    wanted = [made.run({"x": x})["y"] for x in inputs]

    def many(number):
        return all(np.array_equal(made.run({"x": inputs[number]})["y"], wanted[number])
                   for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))
