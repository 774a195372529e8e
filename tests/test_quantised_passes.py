"""Passes over graphs that are quantised to 8 bits: what is left of them, and that they compute the
same."""
import numpy as np
import pytest
from checks import integers
from graph_reference import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_passes import TO_NHWC, Net, check, kinds

from cnn import passes
from kernels import ops
from kernels.ops import AddFakeQuantize, FakeQuantize

Q, COARSE, OTHER = FakeQuantize(0.5, 100), FakeQuantize(2.0, 30), FakeQuantize(1.0, 7)


def literal(net, *values):
    """The graph whose outputs are these, in the order of axes that ops of images have."""
    return net.graph(*(net.add(ops.Transpose(TO_NHWC), value) for value in values))


def by_kind(graph, kind):
    return [node for node in graph.nodes if isinstance(node.op, kind)]


# ---- before a Concat --------------------------------------------------------------------------

def branches(net, count=2):
    """Values that are computed, one for each."""
    return [net.conv(net.x, 3, 4, 1) for _ in range(count)]


def test_what_a_concat_joins_is_quantised_before():
    """So that each layer quantises what it gives."""
    net = Net(4, 4, 3)
    joined = net.add(ops.Concat(1), *branches(net, 3))
    done = check(literal(net, net.conv(net.add(Q, joined), 12, 2)))
    assert "FakeQuantize" not in kinds(done)
    assert [node.op.activation for node in by_kind(done, ops.Conv2d)] == [Q, Q, Q, None]
    assert len(by_kind(done, ops.Concat)) == 1


@pytest.mark.parametrize("relu", [False, True])
def test_what_a_max_pool_picks_is_quantised_before(relu):
    """By the layer before it, whose codes it then moves; also where a ReLU lies between."""
    net, last = Net(9, 8, 3), FakeQuantize(0.5, 0 if relu else 100)
    value = net.conv(net.x, 3, 4)
    if relu:
        value = net.add(ops.Relu(), value)
    pooled = net.image(ops.MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)), value)
    done = check(literal(net, net.conv(net.add(last, pooled), 4, 2)))
    assert kinds(done)[:3] == ["Conv2d", "MaxPool2d", "Conv2d"]
    assert done.nodes[0].op.activation == last


def test_a_quantised_concat_that_is_kept_has_its_name():
    net = Net(4, 4, 3)
    joined = net.add(ops.Concat(1), *branches(net))
    quantised = net.add(Q, joined)
    graph = literal(net, quantised)
    assert kinds(check(graph))[:3] == ["Conv2d", "Conv2d", "Concat"]
    kept, x = passes.optimise(graph, frozenset([quantised])), integers(net.rng, 2, 4, 4, 3)
    np.testing.assert_array_equal(evaluate(kept, {"input": x})[quantised],
                                  evaluate(graph, {"input": x})[quantised])


def test_a_value_that_is_joined_with_itself_is_quantised_before():
    net = Net(4, 4, 3)
    a = net.conv(net.x, 3, 4)
    y = net.conv(net.add(Q, net.add(ops.Concat(1), a, a)), 8, 2)
    check(literal(net, y))


@pytest.mark.parametrize("why", ["another reader", "an output", "kept", "a constant"])
def test_a_concat_that_must_stay_as_it_is_is_quantised_behind(why):
    net = Net(4, 4, 3)
    parts = branches(net)
    if why == "a constant":
        parts[1] = net.weight(2, 4, 4, 4)
    joined = net.add(ops.Concat(1), *parts)
    quantised = net.add(Q, joined)
    results = [net.conv(quantised, 8, 2)]
    if why == "another reader":
        results.append(net.add(ops.Relu(), joined))
    if why == "an output":
        results.append(joined)
    graph = literal(net, *results)
    if why == "kept":
        arranged = passes.arrange(graph, frozenset([joined]))
        done = passes.combine(arranged, frozenset([joined]))
        assert joined in {node.output for node in done.nodes}
    elif why == "a constant":
        done = passes.optimise(graph)
    else:
        done = check(graph)
    assert len(by_kind(done, FakeQuantize)) == 1
    assert not any(node.op.activation == Q for node in by_kind(done, ops.Conv2d))


def test_a_concat_of_a_concat_is_quantised_before_both():
    net = Net(4, 4, 3)
    a, b, c = branches(net, 3)
    inner = net.add(ops.Concat(1), a, b)
    y = net.conv(net.add(Q, net.add(ops.Concat(1), inner, c)), 12, 2)
    done = check(literal(net, y))
    assert [node.op.activation for node in by_kind(done, ops.Conv2d)] == [Q, Q, Q, None]


def test_a_clip_to_no_effect_does_not_come_between():
    net, above = Net(4, 4, 3), FakeQuantize(0.5, 0)
    joined = net.add(ops.Relu(), net.add(ops.Concat(1), *branches(net)))
    done = check(literal(net, net.conv(net.add(above, joined), 8, 2)))
    assert [node.op.activation for node in by_kind(done, ops.Conv2d)] == [above, above, None]
    assert not {"Relu", "FakeQuantize"} & {*kinds(done)}


def test_what_is_quantised_alike_before_is_not_quantised_again():
    net = Net(4, 4, 3)
    joined = net.add(ops.Concat(1), *(net.add(Q, part) for part in branches(net)))
    done = check(literal(net, net.conv(net.add(Q, joined), 8, 2)))
    assert "FakeQuantize" not in kinds(done)
    mixed = Net(4, 4, 3)
    a, b = branches(mixed)
    joined = mixed.add(ops.Concat(1), mixed.add(Q, a), mixed.add(COARSE, b))
    done = check(literal(mixed, mixed.conv(mixed.add(Q, joined), 8, 2)))
    assert [node.op for node in by_kind(done, FakeQuantize)] == [Q]


# ---- sums -------------------------------------------------------------------------------------

def two_values(net):
    """Computed ones that no layer can add: quantised."""
    return [net.add(op, part) for op, part in zip((Q, COARSE), branches(net), strict=True)]


def test_a_sum_and_what_quantises_it_are_one():
    net = Net(4, 4, 3)
    total = net.add(OTHER, net.add(ops.Add(), *two_values(net)))
    done = check(literal(net, net.conv(total, 4, 2)))
    assert kinds(done)[:4] == ["Conv2d", "Conv2d", "AddFakeQuantize", "Conv2d"]
    assert by_kind(done, AddFakeQuantize)[0].op == AddFakeQuantize(1.0, 7)


def test_a_value_is_added_to_itself():
    net = Net(4, 4, 3)
    a, _ = two_values(net)
    done = check(literal(net, net.conv(net.add(OTHER, net.add(ops.Add(), a, a)), 4, 2)))
    assert len(by_kind(done, AddFakeQuantize)) == 1


def test_a_layer_takes_in_the_sum_before_that():
    net = Net(4, 4, 3)
    a, _ = two_values(net)
    total = net.add(ops.Add(), a, net.conv(net.x, 3, 4))
    done = check(literal(net, net.conv(net.add(OTHER, total), 4, 2)))
    assert not by_kind(done, (AddFakeQuantize, FakeQuantize, ops.Add))
    assert OTHER in [node.op.activation for node in by_kind(done, ops.Conv2d)]


@pytest.mark.parametrize("why", ["a constant", "broadcast", "another reader", "an output", "kept",
                                 "a clip between"])
def test_a_sum_that_stays_one(why):
    net = Net(4, 4, 3)
    a, b = two_values(net)
    if why == "a constant":
        b = net.weight(4, 4, 4)
    if why == "broadcast":
        b = net.image(ops.MaxPool2d((4, 4)), b)
    total = net.add(ops.Add(), a, b)
    between = net.add(ops.Clip(-1.0, 1.0), total) if why == "a clip between" else total
    results = [net.conv(net.add(OTHER, between), 4, 2)]
    if why == "another reader":
        results.append(net.add(ops.Relu(), total))
    if why == "an output":
        results.append(total)
    graph = literal(net, *results)
    if why == "kept":
        keep = frozenset([total])
        done = passes.optimise(graph, keep)
        assert passes.optimise(done, keep).nodes == done.nodes
        x = integers(np.random.default_rng(1), 2, 4, 4, 3)
        ours, theirs = evaluate(done, {"input": x}), evaluate(graph, {"input": x})
        np.testing.assert_array_equal(ours[total], theirs[total])
    else:
        done = check(graph)
    assert len(by_kind(done, ops.Add)) == 1
    assert not by_kind(done, AddFakeQuantize)


@pytest.mark.parametrize("after", [
    [ops.Relu()], [ops.Add()], [ops.Mul()], [ops.BatchNorm(0.25)], [Q], [ops.Sigmoid(), ops.Mul()],
    [ops.MaxPool2d((2, 2))], [ops.Add(), OTHER], [ops.Concat(1), OTHER]])
def test_no_pass_takes_a_quantised_sum_for_a_sum(after):
    """Followed by what would go into an Add, or an Add into it."""
    net = Net(4, 4, 3)
    a, b = two_values(net)
    total = y = net.add(OTHER, net.add(ops.Add(), a, b))
    for op in after:
        if isinstance(op, ops.BatchNorm):
            y = net.norm(y, 4)
        elif isinstance(op, ops.MaxPool2d):
            y = net.image(op, y)
        elif isinstance(op, ops.Mul) and len(after) == 2:
            y = net.add(op, total, y)
        elif isinstance(op, ops.Concat):
            y = net.add(op, y, a)
        else:
            y = net.add(op, y, *([net.weight(4, 1, 1)] if isinstance(op, ops.Binary) else []))
    done = check(literal(net, y), 1e-12)
    relu = after == [ops.Relu()]        # which it takes in
    assert by_kind(done, AddFakeQuantize)[0].op == AddFakeQuantize(1.0, 7, relu)


def test_sums_of_sums_are_each_quantised():
    net = Net(4, 4, 3)
    a, b = two_values(net)
    first = net.add(OTHER, net.add(ops.Add(), a, b))
    second = net.add(Q, net.add(ops.Add(), first, b))
    third = net.add(OTHER, net.add(ops.Add(), second, first))
    done = check(literal(net, third))
    assert len(by_kind(done, AddFakeQuantize)) == 3
    assert not by_kind(done, (ops.Add, FakeQuantize))


def test_a_quantised_sum_has_any_order_of_axes():
    """No transpose is left between it and convolutions, and one is where its inputs differ."""
    net = Net(4, 4, 4)
    turned = net.add(ops.Transpose((0, 1, 3, 2)), net.add(COARSE, net.conv(net.x, 4, 4)))
    total = net.add(OTHER, net.add(ops.Add(), net.add(Q, net.conv(net.x, 4, 4)), turned))
    done = check(literal(net, net.conv(total, 4, 2)))
    assert len(by_kind(done, AddFakeQuantize)) == 1
    assert kinds(done).count("Transpose") == 1


def test_a_sum_of_different_batches_is_not_taken_for_one_of_equal_shapes():
    net = Net(4, 4, 3)
    done = passes.optimise(literal(net, net.add(OTHER, net.add(ops.Add(), *two_values(net)))))
    for batch in (1, 5):
        specs = done.with_input_shapes({"input": (batch, 4, 4, 3)}).infer()
        assert specs[by_kind(done, AddFakeQuantize)[0].output].shape == (batch, 4, 4, 4)


# ---- anything ---------------------------------------------------------------------------------

@st.composite
def random_nets(draw):
    """Quantised chains and branches of image ops."""
    net = Net(3, 3, 3)
    values, sizes = [net.x], {net.x: 3}
    for _ in range(draw(st.integers(2, 12))):
        x = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["conv", "quantise", "quantise", "relu", "clip", "add", "add",
                                     "concat", "concat", "pool", "norm"]))
        alike = [other for other in values if sizes[other] == sizes[x]]
        y, size = None, sizes[x]
        if kind == "conv":
            size = draw(st.integers(1, 4))
            y = net.conv(x, sizes[x], size, draw(st.sampled_from([1, 3])))
        elif kind == "quantise":
            y = net.add(draw(st.sampled_from([Q, COARSE, FakeQuantize(1.0, 0)])), x)
        elif kind in ("relu", "clip"):
            y = net.add(ops.Relu() if kind == "relu" else ops.Clip(0.0, 255.0), x)
        elif kind == "add":
            y = net.add(ops.Add(), x, draw(st.sampled_from(alike)))
        elif kind == "concat":
            other = draw(st.sampled_from(values))
            y, size = net.add(ops.Concat(1), x, other), sizes[x] + sizes[other]
        elif kind == "pool":
            y = net.image(ops.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), x)
        else:
            y = net.norm(x, sizes[x])
        values.append(y)
        sizes[y] = size
    picked = dict.fromkeys([values[-1], draw(st.sampled_from(values[1:]))])
    return literal(net, *picked)


@given(random_nets())
@settings(max_examples=200, deadline=None)
def test_random_quantised_networks_keep_their_values(graph):
    check(graph)


@pytest.mark.parametrize("order", ["relu, quantise", "quantise, relu", "both, twice"])
def test_a_relu_goes_into_what_quantises_it(order):
    """Of codes of int8 half are below 0, and a Relu takes them."""
    net, signed = Net(4, 4, 3), FakeQuantize(0.5, 128)
    y = net.conv(net.x, 3, 6)
    for op in {"relu, quantise": [ops.Relu(), signed], "quantise, relu": [signed, ops.Relu()],
               "both, twice": [signed, ops.Relu(), signed, ops.Relu()]}[order]:
        y = net.add(op, y)
    done = check(literal(net, net.conv(y, 6, 2)))
    assert kinds(done) == ["Conv2d", "Conv2d", "Reshape"]
    assert by_kind(done, ops.Conv2d)[0].op.activation == FakeQuantize(0.5, 128, relu=True)


def test_a_relu_whose_input_is_read_besides_stays():
    net, signed = Net(4, 4, 3), FakeQuantize(0.5, 128)
    y = net.add(signed, net.conv(net.x, 3, 6))
    done = check(literal(net, net.conv(net.add(ops.Relu(), y), 6, 2), net.conv(y, 6, 2)))
    assert len(by_kind(done, ops.Relu)) == 1
