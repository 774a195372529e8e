"""Networks of 8 bits: what all their layers, in codes and beside them, compute together."""
from dataclasses import replace

import numpy as np
import pytest
from checks import THREADS, normal
from code_checks import ABOVE, EVEN, ODD, SMALL, Net, chain, in_codes, of_norm
from graph_reference import evaluate
from int8_checks import every_int8_unit, int8_unit_of_each_kind, quantise, weights

from cnn import devices, executor, passes
from cnn.graph import Node
from kernels import ops
from kernels.cpu.host import dot_matmul
from kernels.ops import Grid, Linear


@pytest.fixture(autouse=True)
def vectors(monkeypatch):
    """There is a unit on any CPU."""
    monkeypatch.setenv("CNN_INT8", "vnni_emulated")


def network(odd=ODD, **others):
    """All that reads or writes codes, exactly where grids are as they are and factors left out."""
    net = Net()
    net.conv("q", "a", ABOVE, k=3, **others)
    net.conv("a", "d", EVEN, k=3, groups=8, **others)
    net.conv("d", "p", odd, outputs=16, **others)
    net.conv("a", "h", odd, outputs=16, **others)
    net.add(ops.AddFakeQuantize(*EVEN), "ph", "s")
    net.add(ops.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), "s", "m")
    norm = [net.constant(array) for array in of_norm(16, 1)[1:]]
    net.add(ops.BatchNorm(0.25, quantise(EVEN)), ("s", *norm), "n")
    net.conv("m", "r", EVEN, k=3, inputs=16, outputs=16, groups=2, **others)
    net.add(ops.Concat(-1), "mnr", "k")
    net.conv("k", "l", odd, inputs=48, residual=("a",), **others)
    net.add(ops.Reshape((2, 240)), "l", "v")
    weight, bias = weights(net.rng, 10, 240) / 512, net.rng.integers(-9, 10, 10)
    net.add(Linear(quantise(EVEN)), ("v", net.constant(weight), net.constant(bias)), "y")
    return net


def images(net):
    """Such as make the input's codes, and numbers between and beside them."""
    return net.rng.integers(-9, 600, SMALL).astype(np.float32) * np.float32(0.25)


def run_threads(graph, dtype, inputs, keep=frozenset()):
    """(values of a run, program), which are the same with 1 and 2 threads."""
    names, found = (*graph.outputs, *sorted(keep)), []
    for threads in THREADS:
        device = devices.CpuDevice(threads, dtype)
        program = executor.Program(graph, device, device.options(), keep)
        found.append(program.run(inputs, names))
    for name in names:
        assert found[0][name].dtype == np.float32
        assert found[0][name].tobytes() == found[-1][name].tobytes()
    return found[0], program


@every_int8_unit
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_computes_what_its_layers_mean(monkeypatch, unit, dtype):
    monkeypatch.setenv("CNN_INT8", unit.name)
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    net = network()
    graph, x = net.graph("y"), images(net)
    found, program = run_threads(graph, dtype, {"x": x})
    assert {value for value, array in program.values.items() if array.dtype == np.uint8} == (
        {node.output for node in graph.nodes} - {"y"})
    expected = evaluate(graph, {"x": x})
    np.testing.assert_array_equal(found["y"], expected["y"])
    assert len(np.unique(found["y"])) > 9
    kernels = [layer.step.kernel for layer in program.layers if layer.step]
    assert sum(f"_int8_{unit.name}_" in kernel for kernel in kernels if "conv2d" in kernel) == 5
    few = dot_matmul.VECTORS.get(type(unit), unit)      # of two samples
    assert any(f"linear_int8_{few.name}_" in kernel for kernel in kernels)
    assert "add_quantize_u8_u8_to_u8" in kernels
    assert np.shares_memory(program.values["r"], program.values["k"])       # not copied


def unfused(graph):
    """As a file has it: FakeQuantize after each layer."""
    nodes = []
    for node in graph.nodes:
        op, last = node.op, getattr(node.op, "activation", None)
        if isinstance(op, ops.AddFakeQuantize):
            op, last = ops.Add(), quantise(op.grid)
        elif last is not None:
            op = replace(op, activation=None)
        nodes.append(replace(node, op=op, output=f"{node.output}_" if last else node.output))
        nodes += [Node(last, (f"{node.output}_",), node.output, f"{node.name}_")] if last else []
    return replace(graph, nodes=tuple(nodes))


def test_a_files_layers_become_these():
    net = network()
    graph = passes.optimise(unfused(net.graph("y")))
    assert {*graph.nodes} == {*net.graph("y").nodes}
    assert passes.optimise(graph).nodes == graph.nodes
    assert in_codes(graph, devices.CpuDevice(1)) == {node.output for node in graph.nodes} - {"y"}


@int8_unit_of_each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_kept_are_those_numbers(monkeypatch, unit, dtype):
    monkeypatch.setenv("CNN_INT8", unit.name)
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    net = network()
    graph, x = net.graph("y", "s"), images(net)
    expected = evaluate(graph, {"x": x})
    for keep in ("qdr", "am", "phnk", "lv"):
        found, _ = run_threads(graph, dtype, {"x": x}, frozenset(keep))
        for value, array in found.items():
            np.testing.assert_array_equal(array, expected[value], err_msg=value)


@pytest.mark.parametrize("name", ["none", "vnni_emulated", "amx_emulated"])
@pytest.mark.parametrize("scale", [2.9, 4.1, 5.3])
def test_a_network_on_any_scales_is_within_a_step(monkeypatch, name, scale):
    """A sum beside a tie, which float32 may take for another, moves those behind it by little."""
    monkeypatch.setenv("CNN_INT8", name)
    net = network(Grid(scale, 101), factors=(1.1, 0.7, 0.3))
    graph, x = net.graph("y"), images(net)
    found, _ = run_threads(graph, "float32", {"x": x})
    expected = evaluate(graph, {"x": x})["y"]
    assert len(np.unique(expected)) > 9
    assert np.abs(found["y"] - expected).max() <= 1.001 * EVEN.scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_codes_are_refused_for_is_right_in_float32(monkeypatch, dtype):
    """An odd zero point out of a depthwise layer and a batch norm, weights that are no codes, a
    sigmoid between, a Concat of two grids, a value that others read. What a depthwise layer reads
    is refused for nothing."""
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    net = Net()
    net.conv("q", "a", ODD, k=3)
    net.conv("a", "d", ODD, k=3, groups=8)
    norm = of_norm(8, 1)[1:]
    net.add(ops.BatchNorm(0.25, quantise(ODD)), ("d", *map(net.constant, norm)), "n")
    net.conv("n", "e")
    net.add(ops.Concat(-1), "eq", "k")
    net.conv("k", "l", inputs=16)
    net.add(ops.Relu(), "l", "r")
    net.conv("l", "s", None, activation=ops.HardSigmoid(0.25, 0.5))
    net.conv("r", "y", None)
    graph, x = net.graph("y", "s", "k"), images(net)
    found, program = run_threads(graph, dtype, {"x": x})
    expected = evaluate(graph, {"x": x})
    for value, array in found.items():
        np.testing.assert_array_equal(array, expected[value], err_msg=value)
    assert {name for name, array in program.values.items() if array.dtype != np.float32} == {"a"}
    kernels = [layer.step.kernel for layer in program.layers if layer.step]
    assert sum("_int8_vnni_emulated_" in kernel for kernel in kernels) == 3


@int8_unit_of_each_kind
@pytest.mark.parametrize("scale", [0.5, 0.7, 0.123, 1.9])
def test_codes_and_bfloat16_in_one_network(monkeypatch, unit, scale):
    """b is read by a layer of codes and by one of bfloat16, so it stays float32, in which both have
    what they need. What a layer of codes writes, and its residual, may be bfloat16."""
    monkeypatch.setenv("CNN_INT8", unit.name)
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    net, grid = Net(), Grid(scale, 0)
    net.conv("q", "b", grid)
    net.conv("b", "y", residual=("q",))
    net.conv("b", "f", None, activation=ops.Relu())
    net.constants["w4"] = np.rint(normal(net.rng, 8, 1, 1, 8) * 8) / 8 + np.float32(2.0 ** -9)
    net.conv("f", "g", None, activation=ops.Relu())
    net.add(quantise(ABOVE), "q", "i")
    net.conv("i", "j", None, activation=ops.Relu())         # of codes, to bfloat16
    net.conv("j", "o", None)
    net.conv("i", "r", residual=("j",))
    graph, x = net.graph("y", "g", "o", "r"), images(net)
    found, program = run_threads(graph, "bfloat16", {"x": x})
    stored_in = {value: array.dtype.name for value, array in program.values.items()}
    assert stored_in["q"] == stored_in["i"] == "uint8"
    assert stored_in["f"] == stored_in["j"] == "bfloat16"
    assert stored_in["b"] == "float32"
    expected = evaluate(graph, {"x": x})
    np.testing.assert_array_equal(found["y"], expected["y"])
    assert np.abs(found["r"] - expected["r"]).max() <= ODD.scale
    for value in "go":
        scale = np.abs(expected[value]).max()
        assert np.abs(found[value] - expected[value]).max() <= 0.02 * scale


def test_a_quarter_of_the_bytes_are_held():
    device, graph = devices.CpuDevice(1), chain().graph("c")
    wide, narrowed = (executor.Program(graph, device, device.options(), keep)
                      for keep in (frozenset("ab"), frozenset()))
    assert wide.values["a"].nbytes == 4 * narrowed.values["a"].nbytes
    assert narrowed.values["b"].dtype == np.uint8
