"""Passes keep what a network computes, and leave of it what they promise."""
from dataclasses import replace

import numpy as np
import pytest
from checks import integers
from graph_reference import evaluate, outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn import passes
from cnn.graph import Graph, Node
from kernels import ops
from kernels.ops import TensorSpec

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


class Net:
    """A graph as the importer makes them: image ops between transposes."""

    def __init__(self, *shape):
        self.rng, self.nodes, self.constants = np.random.default_rng(0), [], {}
        self.inputs = {"input": TensorSpec((None, *shape))}
        self.x = self.add(ops.Transpose(TO_NCHW), "input", name="input:nchw")

    def add(self, op, *inputs, name=None):
        name = name or f"n{len(self.nodes)}"
        self.nodes.append(Node(op, inputs, f"v{len(self.nodes)}", name))
        return self.nodes[-1].output

    def weight(self, *shape):
        name = f"w{len(self.constants)}"
        self.constants[name] = integers(self.rng, *shape, low=-2, high=3)
        return name

    def image(self, op, x, *rest, name=None):
        inside = self.add(op, self.add(ops.Transpose(TO_NHWC), x), *rest, name=name)
        return self.add(ops.Transpose(TO_NCHW), inside)

    def conv(self, x, c, o, k=3, **attributes):
        p = k // 2
        op = ops.Conv2d(padding=(p, p, p, p), **attributes)
        return self.image(op, x, self.weight(o, k, k, c // op.groups))

    def norm(self, x, c):
        names = [self.weight(c) for _ in range(4)]
        self.constants[names[3]] = np.abs(self.constants[names[3]]) + np.float32(1)
        return self.image(ops.BatchNorm(1e-3), x, *names)

    def graph(self, *outputs):
        return Graph(self.inputs, outputs, tuple(self.nodes), self.constants)


def check(graph, exact=True):
    """Optimise, compare with the original on a batch of 2, and return the result."""
    optimised = passes.optimise(graph)
    again = passes.optimise(optimised)
    assert again.nodes == optimised.nodes, "optimising twice must change nothing"
    assert {n for node in optimised.nodes for n in node.inputs} >= set(optimised.constants)
    shape = (2, *graph.inputs["input"].shape[1:])
    x = integers(np.random.default_rng(1), *shape)
    for ours, theirs in zip(outputs(optimised, {"input": x}), outputs(graph, {"input": x}),
                            strict=True):
        if exact:
            np.testing.assert_array_equal(ours, theirs)
        else:       # folded weights are rounded to float32 once
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    return optimised


def kinds(graph):
    return [type(node.op).__name__ for node in graph.nodes]


def test_a_residual_block_becomes_two_convolutions():
    net = Net(6, 7, 4)
    a = net.add(ops.Relu(), net.norm(net.conv(net.x, 4, 4), 4))
    b = net.norm(net.conv(a, 4, 4), 4)
    y = net.add(ops.Relu(), net.add(ops.Add(), b, net.x))
    y = net.image(ops.GlobalAvgPool2d(), y)
    done = check(net.graph(net.add(ops.Flatten(1), y)), exact=False)
    assert kinds(done) == ["Conv2d", "Conv2d", "GlobalAvgPool2d", "Flatten"] or (
        kinds(done) == ["Conv2d", "Conv2d", "GlobalAvgPool2d", "Reshape"])
    first, second = done.nodes[:2]
    assert first.op.activation == second.op.activation == ops.Relu()
    assert len(first.inputs) == 3
    assert second.inputs[3] == "input"


def test_a_shortcut_with_a_convolution_is_added_by_the_later_one():
    net = Net(6, 6, 4)
    shortcut = net.norm(net.conv(net.x, 4, 8, 1), 8)
    main = net.norm(net.conv(net.x, 4, 8), 8)
    for pair in ((main, shortcut), (shortcut, main)):
        inner = Net(6, 6, 4)
        inner.nodes, inner.constants = list(net.nodes), dict(net.constants)
        y = inner.add(ops.Relu(), inner.add(ops.Add(), *pair))
        done = check(inner.graph(inner.add(ops.Transpose(TO_NHWC), y)), exact=False)
        assert kinds(done)[:2] == ["Conv2d", "Conv2d"]
        assert len(done.nodes[0].inputs) == 3
        assert len(done.nodes[1].inputs) == 4


def test_an_inverted_bottleneck_has_no_residual_in_its_depthwise_layer():
    net = Net(5, 6, 4)
    y = net.add(ops.Clip(0.0, 6.0), net.norm(net.conv(net.x, 4, 12, 1), 12))
    y = net.add(ops.Clip(0.0, 6.0), net.norm(net.conv(y, 12, 12, 3, groups=12), 12))
    y = net.add(ops.Add(), net.norm(net.conv(y, 12, 4, 1), 4), net.x)
    done = check(net.graph(net.add(ops.Transpose(TO_NHWC), y)), exact=False)
    assert kinds(done)[:3] == ["Conv2d"] * 3
    assert "Transpose" not in kinds(done)
    direct = Net(5, 6, 4)
    y = direct.add(ops.Add(), direct.conv(direct.x, 4, 4, 3, groups=4), direct.x)
    assert "Add" in kinds(check(direct.graph(y)))


def test_flatten_and_linear_take_the_transpose_in():
    net = Net(3, 5, 4)
    y = net.add(ops.Relu(), net.add(ops.Flatten(1), net.add(ops.Relu(), net.conv(net.x, 4, 6))))
    y = net.add(ops.Linear(), y, net.weight(7, 6 * 3 * 5), net.weight(7))
    done = check(net.graph(y))
    assert kinds(done) == ["Conv2d", "Flatten", "Relu", "Linear"]
    reshaped = Net(3, 5, 4)
    y = reshaped.add(ops.Reshape((-1, 60)), reshaped.image(ops.MaxPool2d((1, 1), (1, 1)),
                                                           reshaped.x))
    y = reshaped.add(ops.Linear(), y, reshaped.weight(7, 60))
    assert "Transpose" not in kinds(check(reshaped.graph(y)))


def test_flatten_that_is_an_output_keeps_its_literal_order():
    net = Net(3, 5, 4)
    flat = net.add(ops.Flatten(1), net.conv(net.x, 4, 6))
    y = net.add(ops.Linear(), flat, net.weight(7, 6 * 3 * 5))
    done = check(net.graph(flat, y))
    assert "Transpose" in kinds(done)


def test_concat_softmax_and_constants_follow_the_layout():
    net = Net(4, 6, 3)
    branches = [net.add(ops.Relu(), net.conv(net.x, 3, c, k)) for c, k in ((2, 1), (5, 3))]
    branches.append(net.image(ops.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), net.x))
    y = net.add(ops.Concat(1), *branches)
    y = net.add(ops.Add(), net.add(ops.Mul(), y, net.weight(10, 1, 1)), net.weight(1, 10, 4, 6))
    y = net.conv(y, 10, 3)
    done = check(net.graph(net.add(ops.Flatten(1), net.image(ops.GlobalAvgPool2d(), y))))
    assert "Transpose" not in kinds(done)
    soft = Net(4, 6, 3)
    y = soft.conv(soft.add(ops.Softmax(1), soft.conv(soft.x, 3, 4)), 4, 2)
    done = check(soft.graph(soft.add(ops.Transpose(TO_NHWC), y)), exact=False)
    assert "Transpose" not in kinds(done)


def test_what_can_not_be_cancelled_stays_right():
    net = Net(4, 6, 3)
    turned = net.add(ops.Transpose((0, 1, 3, 2)), net.conv(net.x, 3, 4))
    done = check(net.graph(net.add(ops.Add(), turned, net.add(ops.Transpose((0, 1, 3, 2)),
                                                              net.conv(net.x, 3, 4)))))
    assert "Transpose" in kinds(done)
    mixed = Net(4, 4, 4)
    y = mixed.add(ops.Add(), mixed.x, mixed.add(ops.Transpose((0, 2, 3, 1)), mixed.x))
    check(mixed.graph(y))


def test_a_batch_norm_stays_where_it_can_not_be_folded():
    before = Net(4, 4, 3)
    y = before.conv(before.norm(before.x, 3), 3, 4)
    assert "BatchNorm" in kinds(check(before.graph(y), exact=False))
    shared = Net(4, 4, 3)
    conv = shared.conv(shared.x, 3, 4)
    y = shared.add(ops.Mul(), shared.norm(conv, 4), conv)
    assert "BatchNorm" in kinds(check(shared.graph(y), exact=False))
    active = Net(4, 4, 3)
    y = active.norm(active.add(ops.Relu(), active.conv(active.x, 3, 4)), 4)
    assert "BatchNorm" in kinds(check(active.graph(y), exact=False))


def test_a_bias_added_later_becomes_the_layers_own():
    net = Net(1, 1, 6)
    y = net.add(ops.Linear(), net.add(ops.Flatten(1), net.x), net.weight(4, 6))
    y = net.add(ops.Add(), net.weight(4), y)
    done = check(net.graph(y))
    assert kinds(done)[-1] == "Linear"
    assert len(done.nodes[-1].inputs) == 3


def test_kept_values_stay_values():
    net = Net(5, 5, 4)
    conv = net.conv(net.x, 4, 4)
    y = net.add(ops.Relu(), net.add(ops.Add(), net.norm(conv, 4), net.x))
    graph = net.graph(net.add(ops.Transpose(TO_NHWC), y))
    arranged = passes.arrange(graph)
    kept = [node.output for node in arranged.nodes if not isinstance(node.op, ops.Conv2d)]
    done = passes.combine(arranged, frozenset(kept))
    assert {node.output for node in done.nodes} >= set(kept)
    assert kinds(done)[:3] == ["Conv2d", "Add", "Relu"]     # the norm's value is the convolution's
    x = integers(np.random.default_rng(1), 2, 5, 5, 4)
    ours, theirs = evaluate(done, {"input": x}), evaluate(arranged, {"input": x})
    for name in kept:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-4)


def test_prune_drops_what_nobody_reads_and_doubled_transposes():
    net = Net(4, 4, 3)
    net.add(ops.Relu(), net.conv(net.x, 3, 4))
    twice = [net.add(ops.Transpose(TO_NHWC), net.x) for _ in range(2)]
    y = net.add(ops.Add(), *twice)
    graph = passes.prune.prune(net.graph(y))
    assert kinds(graph) == ["Transpose", "Transpose", "Add"]
    assert graph.constants == {}


@st.composite
def random_nets(draw):
    """Chains and branches of image ops, any transposes, elementwise ops, concats."""
    net = Net(3, 3, 3)
    values = [net.x]
    for _ in range(draw(st.integers(1, 12))):
        x, other = (draw(st.sampled_from(values)) for _ in range(2))
        kind = draw(st.sampled_from(["conv", "norm", "relu", "transpose", "add", "mul", "concat",
                                     "constant", "pool"]))
        graph = net.graph(x)
        shape = graph.with_input_shapes({"input": (2, 3, 3, 3)}).infer()[x].shape
        if kind == "conv" and shape[0] == 2:
            values.append(net.conv(x, shape[1], draw(st.integers(1, 3))))
        elif kind == "norm":
            values.append(net.norm(x, shape[1]))
        elif kind == "transpose":
            values.append(net.add(ops.Transpose(tuple(draw(st.permutations(range(4))))), x))
        elif kind in ("add", "mul", "concat"):
            other_shape = graph.with_input_shapes({"input": (2, 3, 3, 3)}).infer()[other].shape
            if shape == other_shape:
                op = {"add": ops.Add(), "mul": ops.Mul(),
                      "concat": ops.Concat(draw(st.integers(0, 3)))}[kind]
                values.append(net.add(op, x, other))
        elif kind == "constant":
            values.append(net.add(ops.Add(), net.weight(*shape[draw(st.integers(0, 3)):]), x))
        elif kind == "pool" and shape[2] > 1 < shape[3]:
            values.append(net.image(ops.MaxPool2d((2, 2), (1, 1)), x))
        else:
            values.append(net.add(ops.Relu(), x))
    graph = net.graph(*dict.fromkeys([values[-1], draw(st.sampled_from(values))]))
    return replace(graph, inputs={"input": TensorSpec((2, 3, 3, 3))})


@given(random_nets())
@settings(max_examples=150, deadline=None)
def test_random_networks_keep_their_values(graph):
    x = integers(np.random.default_rng(1), 2, 3, 3, 3)
    optimised = passes.optimise(graph)
    for ours, theirs in zip(outputs(optimised, {"input": x}), outputs(graph, {"input": x}),
                            strict=True):
        scale = np.abs(theirs).max() + 1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)
    assert len(kinds(optimised)) <= len(graph.nodes) + len(graph.outputs)


@pytest.mark.parametrize("shape", [(None, 4, 4, 3), (None, None, None, 3)])
def test_unknown_sizes_are_no_obstacle(shape):
    net = Net(4, 4, 3)
    y = net.add(ops.Relu(), net.norm(net.conv(net.x, 3, 4), 4))
    graph = net.graph(net.add(ops.Flatten(1), net.image(ops.GlobalAvgPool2d(), y)))
    graph = replace(graph, inputs={"input": TensorSpec(shape)})
    assert "Transpose" not in kinds(passes.optimise(graph))
