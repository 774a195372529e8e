"""Passes keep what a network computes, and leave of it what they promise.

Inputs and weights are whole numbers, and batch norms divide by 1/2 or 1: results are exact, also
with folded weights, and are compared so.
"""
from dataclasses import replace

import numpy as np
import pytest
from checks import integers
from graph_reference import evaluate, outputs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cnn import passes
from cnn.graph import Glue, Graph, Node
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
        return self.image(ops.BatchNorm(0.25), x, *self.norm_weights(c))

    def norm_weights(self, c):
        *names, var = (self.weight(c) for _ in range(4))
        self.constants[var] = self.rng.choice(np.array([0, 0.75], np.float32), c)
        return (*names, var)

    def graph(self, *outputs):
        return Graph(self.inputs, outputs, tuple(self.nodes), self.constants)


def check(graph, atol=0.0):
    """Optimise, compare with the original on a batch of 2, and return the result."""
    optimised = passes.optimise(graph)
    again = passes.optimise(optimised)
    assert again.nodes == optimised.nodes, "optimising twice must change nothing"
    assert {n for node in optimised.nodes for n in node.inputs} >= set(optimised.constants)
    shape = (2, *graph.inputs["input"].shape[1:])
    x = integers(np.random.default_rng(1), *shape)
    for ours, theirs in zip(outputs(optimised, {"input": x}), outputs(graph, {"input": x}),
                            strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    return optimised


def kinds(graph):
    return [type(node.op).__name__ for node in graph.nodes]


def test_a_residual_block_becomes_two_convolutions():
    net = Net(6, 7, 4)
    a = net.add(ops.Relu(), net.norm(net.conv(net.x, 4, 4), 4))
    b = net.norm(net.conv(a, 4, 4), 4)
    y = net.add(ops.Relu(), net.add(ops.Add(), b, net.x))
    y = net.image(ops.GlobalAvgPool2d(), y)
    done = check(net.graph(net.add(ops.Flatten(1), y)))
    assert kinds(done) == ["Conv2d", "Conv2d", "GlobalAvgPool2d", "Flatten"] or (
        kinds(done) == ["Conv2d", "Conv2d", "GlobalAvgPool2d", "Reshape"])
    first, second = done.nodes[:2]
    assert first.op.activation == second.op.activation == ops.Relu()
    assert len(first.inputs) == 3
    assert second.inputs[3] == "input"


def test_a_shortcut_with_a_convolution_is_added_by_the_later_one():
    net = Net(6, 6, 4)
    shortcut = net.norm(net.conv(net.x, 4, 8, 1), 8)
    main = net.norm(net.conv(net.conv(net.x, 4, 4), 4, 8), 8)
    for pair in ((main, shortcut), (shortcut, main)):
        inner = Net(6, 6, 4)
        inner.nodes, inner.constants = list(net.nodes), dict(net.constants)
        y = inner.add(ops.Relu(), inner.add(ops.Add(), *pair))
        done = check(inner.graph(inner.add(ops.Transpose(TO_NHWC), y)))
        assert kinds(done)[:3] == ["Conv2d"] * 3
        assert [len(node.inputs) for node in done.nodes[:3]] in ([2, 3, 4], [3, 2, 4])


def test_an_inverted_bottleneck_has_no_residual_in_its_depthwise_layer():
    net = Net(5, 6, 4)
    y = net.add(ops.Clip(0.0, 6.0), net.norm(net.conv(net.x, 4, 12, 1), 12))
    y = net.add(ops.Clip(0.0, 6.0), net.norm(net.conv(y, 12, 12, 3, groups=12), 12))
    y = net.add(ops.Add(), net.norm(net.conv(y, 12, 4, 1), 4), net.x)
    done = check(net.graph(net.add(ops.Transpose(TO_NHWC), y)))
    assert kinds(done)[:3] == ["Conv2d"] * 3
    assert "Transpose" not in kinds(done)
    direct = Net(5, 6, 4)
    other = direct.add(ops.Relu(), direct.x)
    y = direct.add(ops.Add(), direct.conv(direct.x, 4, 4, 3, groups=4), other)
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
    # A probability is at most 1 and wrong by 8 roundings; sums of 36 products with |weights| <= 2.
    bound = 2 * 36 * (36 + 8) * np.finfo(np.float64).eps
    done = check(soft.graph(soft.add(ops.Transpose(TO_NHWC), y)), bound)
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
    assert "BatchNorm" in kinds(check(before.graph(y)))
    shared = Net(4, 4, 3)
    conv = shared.conv(shared.x, 3, 4)
    y = shared.add(ops.Mul(), shared.norm(conv, 4), conv)
    assert "BatchNorm" in kinds(check(shared.graph(y)))
    active = Net(4, 4, 3)
    y = active.norm(active.add(ops.Relu(), active.conv(active.x, 3, 4)), 4)
    assert "BatchNorm" in kinds(check(active.graph(y)))


def test_a_batch_norm_that_stays_takes_in_the_activation_after_it():
    net = Net(4, 4, 3)
    y = net.conv(net.add(ops.Relu(), net.norm(net.x, 3)), 3, 4)
    assert check(net.graph(y)).nodes[0].op == ops.BatchNorm(0.25, ops.Relu())
    twice = Net(4, 4, 3)
    normed = twice.norm(twice.x, 3)
    y = twice.add(ops.Add(), twice.add(ops.Relu(), normed), normed)
    assert "Relu" in kinds(check(twice.graph(y)))


def test_batch_norms_in_a_row_all_fold():
    net = Net(4, 4, 3)
    y = net.norm(net.norm(net.conv(net.x, 3, 4), 4), 4)
    done = check(net.graph(net.add(ops.Transpose(TO_NHWC), y)))
    assert kinds(done)[0] == "Conv2d"
    assert "BatchNorm" not in kinds(done)


def test_a_bias_added_later_becomes_the_layers_own():
    net = Net(1, 1, 6)
    y = net.add(ops.Linear(), net.add(ops.Flatten(1), net.x), net.weight(4, 6))
    y = net.add(ops.Add(), net.weight(4), y)
    y = net.add(ops.BatchNorm(0.25), y, *net.norm_weights(4))
    done = check(net.graph(net.add(ops.Relu(), y)))
    assert kinds(done) == ["Reshape", "Linear"]
    assert done.nodes[-1].op.activation == ops.Relu()
    assert len(done.nodes[-1].inputs) == 3


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1), (1, 1, 1)])
def test_a_constant_of_any_shape_added_to_one_output(shape):
    net = Net(1, 1, 6)
    y = net.add(ops.Linear(), net.add(ops.Flatten(1), net.x), net.weight(1, 6))
    done = check(net.graph(net.add(ops.Add(), net.weight(*shape), y)))
    assert ("Add" not in kinds(done)) == (shape in [(), (1,), (1, 1)])


@pytest.mark.parametrize("groups", [1, 4])
def test_products_and_sums_with_constants_go_into_the_layer_before_them(groups):
    """As TensorFlow writes a batch norm, in any order and also for one number."""
    net = Net(5, 6, 4)
    y = net.conv(net.x, 4, 8, groups=groups)
    for op, shape in ((ops.Mul(), (8, 1, 1)), (ops.Add(), (1, 8, 1, 1)), (ops.Add(), ()),
                      (ops.Mul(), (1, 1)), (ops.Mul(), (8, 1, 1)), (ops.Add(), (8, 1, 1))):
        y = net.add(op, net.weight(*shape), y)
    y = net.norm(y, 8)
    done = check(net.graph(net.add(ops.Transpose(TO_NHWC), net.add(ops.Relu(), y))))
    assert kinds(done) == ["Conv2d", "Reshape"]         # a view, which the output is named after
    assert done.nodes[0].op.activation == ops.Relu()


def test_a_factor_that_can_not_go_into_a_weight_stays():
    net = Net(5, 6, 4)
    a, b = net.conv(net.x, 4, 4), net.conv(net.x, 4, 4, k=1)
    by_row, shared = net.add(ops.Mul(), a, net.weight(5, 1)), net.conv(net.x, 4, 4)
    active = net.add(ops.Mul(), net.add(ops.Relu(), b), net.weight(4, 1, 1))
    twice = net.add(ops.Mul(), net.add(ops.Mul(), shared, net.weight(4, 1, 1)), shared)
    done = check(net.graph(*(net.add(ops.Transpose(TO_NHWC), y)
                             for y in (by_row, active, twice))))
    assert kinds(done).count("Mul") == 4


@pytest.mark.parametrize("order", ["sum, product", "norm, product", "norm, sum", "norm, norm",
                                   "product, norm", "sum, sum, product, norm"])
def test_what_scales_and_shifts_one_after_the_other_is_one_batch_norm(order):
    """As Keras's networks normalise their input."""
    net = Net(5, 6, 4)
    y = net.image(ops.MaxPool2d((2, 2)), net.x)
    for kind in order.split(", "):
        y = net.norm(y, 4) if kind == "norm" else net.add(
            ops.Add() if kind == "sum" else ops.Mul(), y, net.weight(4, 1, 1))
    done = check(net.graph(net.add(ops.Transpose(TO_NHWC), net.add(ops.Relu(), y))))
    assert kinds(done) == ["MaxPool2d", "BatchNorm", "Reshape"]
    assert done.nodes[1].op.activation == ops.Relu()


def test_a_product_and_a_sum_without_a_layer_become_one_batch_norm():
    net = Net(5, 6, 4)
    pooled = net.image(ops.MaxPool2d((2, 2)), net.x)
    each = net.add(ops.Add(), net.add(ops.Mul(), pooled, net.weight(4, 1, 1)), net.weight())
    by_row = net.add(ops.Add(), net.add(ops.Mul(), net.x, net.weight(5, 1)), net.weight(1))
    y = net.conv(net.add(ops.Relu(), each), 4, 4)
    done = check(net.graph(*(net.add(ops.Transpose(TO_NHWC), y) for y in (y, by_row))))
    assert set(kinds(done)) == {"Add", "BatchNorm", "Conv2d", "MaxPool2d", "Mul", "Reshape"}
    assert next(node.op for node in done.nodes if node.op.kind == "BatchNorm") == ops.BatchNorm(
        0.0, ops.Relu())


def test_a_bias_that_is_no_constant_stays_what_it_is():
    net = Net(4, 4, 3)
    bias = net.add(ops.Reshape((3,)), net.image(ops.MaxPool2d((4, 4)), net.x))
    y = net.image(ops.Conv2d(), net.x, net.weight(3, 1, 1, 3), bias)
    y = net.add(ops.Add(), y, net.x)
    graph = replace(net.graph(y), inputs={"input": TensorSpec((1, 4, 4, 3))})
    done = passes.optimise(graph)
    assert not {node.output for node in done.nodes} & set(done.constants)
    x = integers(np.random.default_rng(1), 1, 4, 4, 3)
    np.testing.assert_array_equal(outputs(done, {"input": x}), outputs(graph, {"input": x}))


def test_a_gate_from_linear_layers_needs_no_transpose():
    """Squeeze and excitation with Linear layers: the gate is made (N, C, 1, 1) by a reshape."""
    net = Net(4, 5, 3)
    x = net.conv(net.x, 3, 4)
    squeezed = net.add(ops.Flatten(1), net.image(ops.MaxPool2d((4, 5)), x))
    gate = net.add(ops.Relu(), net.add(ops.Linear(), squeezed, net.weight(4, 4)))
    y = net.add(ops.Mul(), x, net.add(ops.Reshape((-1, 4, 1, 1)), gate))
    done = check(net.graph(net.add(ops.Transpose(TO_NHWC), net.conv(y, 4, 2))))
    assert "Transpose" not in kinds(done)


def test_one_reader_of_the_literal_order_does_not_bind_the_others():
    net = Net(4, 4, 3)
    x = net.conv(net.x, 3, 4)
    turned = net.add(ops.Reshape((-1, 4, 2, 8)), x)
    y = net.add(ops.Transpose(TO_NHWC), net.conv(net.add(ops.Relu(), x), 4, 2))
    assert kinds(check(net.graph(turned, y))).count("Transpose") == 1


def test_glue_gets_its_input_in_literal_order():
    net = Net(4, 4, 3)
    shape = net.add(Glue("Shape"), net.add(ops.Relu(), net.conv(net.x, 3, 4)))
    done = passes.optimise(net.graph(net.add(Glue("Cast"), shape)))
    assert kinds(done) == ["Conv2d", "Transpose", "Glue", "Glue"]
    assert passes.optimise(done).nodes == done.nodes


@pytest.mark.parametrize("swap", [False, True])
def test_a_value_times_its_sigmoid_becomes_the_layers_silu(swap):
    net = Net(5, 5, 3)
    conv = net.conv(net.x, 3, 4)
    pair = (conv, net.add(ops.Sigmoid(), conv))
    y = net.add(ops.Mul(), *(pair[::-1] if swap else pair))
    graph = net.graph(net.add(ops.Transpose(TO_NHWC), y))
    done = passes.optimise(graph)
    assert kinds(done)[:1] == ["Conv2d"]
    assert done.nodes[0].op.activation == ops.Silu()
    assert not {"Sigmoid", "Mul"} & set(kinds(done))
    x = integers(np.random.default_rng(1), 2, 5, 5, 3)
    for ours, theirs in zip(outputs(done, {"input": x}), outputs(graph, {"input": x}), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-15)    # the one divides, the other also
                                                                # multiplies: a rounding or two
    other = Net(5, 5, 3)        # the sigmoid of something else is a gate and stays one
    y = other.add(ops.Mul(), other.x, other.add(ops.Sigmoid(), other.conv(other.x, 3, 3)))
    assert "Mul" in kinds(passes.optimise(other.graph(y)))


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
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_kept_values_stay_in_their_literal_order():
    net = Net(3, 5, 4)
    active = net.add(ops.Relu(), net.norm(net.conv(net.x, 4, 6), 6))
    flat = net.add(ops.Flatten(1), active)
    graph = net.graph(net.add(ops.Linear(), flat, net.weight(7, 90)))
    keep = frozenset([active, flat])
    done = passes.optimise(graph, keep)
    assert passes.optimise(done, keep).nodes == done.nodes
    x = integers(np.random.default_rng(1), 2, 3, 5, 4)
    ours, theirs = evaluate(done, {"input": x}), evaluate(graph, {"input": x})
    for name in (*keep, *graph.outputs):
        np.testing.assert_array_equal(ours[name], theirs[name])


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
    values = evaluate(graph, {"input": x})
    assume(max(np.abs(value).max() for value in values.values()) < 2.0 ** 44)   # exact, also sums
    optimised = passes.optimise(graph)
    assert passes.optimise(optimised).nodes == optimised.nodes
    for name, ours in zip(graph.outputs, outputs(optimised, {"input": x}), strict=True):
        np.testing.assert_array_equal(ours, values[name])
    assert len(kinds(optimised)) <= len(graph.nodes) + len(graph.outputs)


@pytest.mark.parametrize("shape", [(None, 4, 4, 3), (None, None, None, 3)])
def test_unknown_sizes_are_no_obstacle(shape):
    net = Net(4, 4, 3)
    y = net.add(ops.Relu(), net.norm(net.conv(net.x, 3, 4), 4))
    graph = net.graph(net.add(ops.Flatten(1), net.image(ops.GlobalAvgPool2d(), y)))
    graph = replace(graph, inputs={"input": TensorSpec(shape)})
    assert "Transpose" not in kinds(passes.optimise(graph))
