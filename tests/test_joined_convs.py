"""Convolutions of one image that are added up become one; what only looks like it does not."""
import numpy as np
import pytest
from onnx_models import build, compare, node
from test_passes import Net, check, kinds

import cnn
from cnn import passes
from kernels import ops


def conv(net, x, k, padding, stride=1, groups=1, dilation=1, channels=4):
    kernel = (k, k) if isinstance(k, int) else k
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    op = ops.Conv2d((stride, stride), sides, (dilation, dilation), groups)
    return net.image(op, x, net.weight(4, *kernel, channels // groups))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("order", ["first", "last", "middle"])
def test_a_block_of_three_branches_becomes_one_convolution(groups, order):
    net = Net(8, 7, 4)
    large = net.norm(conv(net, net.x, 3, 1, groups=groups), 4)
    small, alone = net.norm(conv(net, net.x, 1, 0, groups=groups), 4), net.norm(net.x, 4)
    first, second, third = {"first": (large, small, alone), "last": (alone, small, large),
                            "middle": (small, large, alone)}[order]
    y = net.add(ops.Add(), net.add(ops.Add(), first, second), third)
    optimised = check(net.graph(net.add(ops.Relu(), y)))
    layer, *rest = [each for each in optimised.nodes if each.op.kind != "Transpose"]
    assert rest == []
    assert layer.op.activation == ops.Relu()
    assert optimised.constants[layer.inputs[1]].shape == (4, 3, 3, 4 // groups)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("swap", [False, True])
def test_the_image_itself_is_added_by_a_grouped_convolution(groups, swap):
    """As RepViT has it; without groups the image is the convolution's residual."""
    net = Net(8, 7, 4)
    pair = net.norm(conv(net, net.x, 3, 1, groups=groups), 4), net.x
    y = net.norm(net.add(ops.Add(), *pair[::-1 if swap else 1]), 4)
    optimised = check(net.graph(net.add(ops.Relu(), y)))
    layer, = [each for each in optimised.nodes if each.op.kind != "Transpose"]
    assert layer.op.activation == ops.Relu()
    for padding, stride in ((0, 1), (1, 2)):        # whose sizes or pixels are others
        other = Net(1, 1, 4)
        y = other.add(ops.Add(), conv(other, other.x, 1 + 2 * padding, padding, stride, 4),
                      other.x)
        assert ("Add" in kinds(check(other.graph(y)))) == (stride == 2)


def test_one_row_that_is_added_to_all_rows_stays_what_it_is():
    """A convolution would see it once."""
    for branch in (lambda net: net.x, lambda net: net.norm(net.x, 4)):
        net = Net(1, 7, 4)
        y = net.add(ops.Add(), conv(net, net.x, 3, (1, 1, 3, 1), groups=4), branch(net))
        assert "Add" in kinds(check(net.graph(y)))


def test_a_token_mixer_becomes_one_convolution():
    """x + gamma * (mixer(x) - norm(x)), as FastViT has it while it is trained."""
    net = Net(8, 7, 4)
    mixed = net.add(ops.Add(), net.add(ops.Add(), net.norm(net.x, 4),
                                       net.norm(conv(net, net.x, 1, 0, groups=4), 4)),
                    net.norm(conv(net, net.x, 3, 1, groups=4), 4))
    net.constants["minus"] = np.float32(-1)
    less = net.add(ops.Add(), mixed, net.add(ops.Mul(), net.norm(net.x, 4), "minus"))
    y = net.add(ops.Add(), net.x, net.add(ops.Mul(), net.weight(4, 1, 1), less))
    optimised = check(net.graph(y))
    assert [each.op.kind for each in optimised.nodes if each.op.kind != "Transpose"] == ["Conv2d"]


@pytest.mark.parametrize(("one", "other", "padding"), [
    ((3, 1, 2), (1, 0, 2), (1, 1, 1, 1)), ((5, 2, 1), (3, 1, 1), (2, 2, 2, 2)),
    ((3, 1, 1), (3, 1, 1), (1, 1, 1, 1)), ((1, 0, 2), (1, 0, 2), (0, 0, 0, 0)),
    (((3, 1), (1, 0, 1, 0), 1), (1, 0, 1), (1, 0, 1, 0)),
    ((3, (0, 2, 2, 0), 1), (1, 0, 1), (0, 2, 2, 0))])
def test_the_smaller_kernel_goes_where_it_sees_the_same_pixels(one, other, padding):
    net = Net(8, 7, 4)
    optimised = check(net.graph(net.add(ops.Add(), conv(net, net.x, *one),
                                        conv(net, net.x, *other))))
    layer, = [each for each in optimised.nodes if each.op.kind != "Transpose"]
    assert layer.op.padding == padding


def other_input(net):
    return conv(net, net.add(ops.Relu(), net.x), 1, 0)


@pytest.mark.parametrize("branch", [
    lambda net: conv(net, net.x, (1, 3), (0, 1, 0, 1)),
    lambda net: conv(net, net.x, 1, 0, groups=2),
    lambda net: conv(net, net.x, 3, 2, dilation=2),
    lambda net: net.add(ops.Relu(), conv(net, net.x, 1, 0)),
    lambda net: net.x, other_input])
def test_what_is_no_part_of_it_is_added(branch):
    net = Net(8, 7, 4)
    y = net.add(ops.Add(), conv(net, net.x, (3, 1), (1, 0, 1, 0)), branch(net))
    optimised = check(net.graph(net.add(ops.Relu(), y)))
    assert any(each.op.kind == "Add" or len(each.inputs) == 4 for each in optimised.nodes)


def test_other_strides_and_dilations_stay_apart():
    net = Net(8, 8, 4)
    y = net.add(ops.Add(), conv(net, net.x, 2, 0, stride=2), conv(net, net.x, 5, 0))
    assert kinds(check(net.graph(y))).count("Conv2d") == 2
    net = Net(8, 8, 4)
    y = net.add(ops.Add(), conv(net, net.x, 3, 2, dilation=2), net.norm(net.x, 4))
    assert kinds(check(net.graph(y))).count("Conv2d") == 1
    assert "BatchNorm" in kinds(check(net.graph(y)))


def test_values_that_somebody_needs_are_kept():
    net = Net(8, 7, 4)
    branches = conv(net, net.x, 3, 1), net.norm(net.x, 4)
    graph = net.graph(net.add(ops.Add(), *branches))
    for needed in branches:
        kept = passes.optimise(graph, frozenset({needed}))
        assert needed in [each.output for each in kept.nodes]
    net = Net(8, 7, 4)
    norm = net.norm(net.x, 4)
    y = net.add(ops.Add(), conv(net, net.x, 3, 1), norm)
    check(net.graph(y, net.add(ops.Sigmoid(), norm)), atol=1e-12)


def test_a_batch_norm_after_the_sum_is_folded_in_its_turn():
    net = Net(8, 7, 4)
    y = net.norm(net.add(ops.Add(), conv(net, net.x, 3, 1), conv(net, net.x, 1, 0)), 4)
    assert "BatchNorm" not in kinds(check(net.graph(y)))


def test_a_file_with_such_blocks(tmp_path):
    """As RepVGG and MobileOne are while they are trained."""
    rng = np.random.default_rng(0)

    def weights(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)
    constants = {"w3": weights(6, 6, 3, 3), "w1": weights(6, 6, 1, 1), "d3": weights(6, 1, 3, 3),
                 "d1": weights(6, 1, 1, 1), "scale": weights(6), "bias": weights(6),
                 "mean": weights(6), "var": np.abs(weights(6)) + 1}
    norm = ["scale", "bias", "mean", "var"]
    nodes = [node("Conv", ["x", "w3"], ["a"], pads=[1] * 4), node("Conv", ["x", "w1"], ["b"]),
             node("BatchNormalization", ["a", *norm], ["an"]),
             node("BatchNormalization", ["b", *norm], ["bn"]),
             node("BatchNormalization", ["x", *norm], ["n"]),
             node("Sum", ["n", "an", "bn"], ["s"]), node("Relu", ["s"], ["r"]),
             node("Conv", ["r", "d3"], ["c"], pads=[1] * 4, group=6, strides=[2, 2]),
             node("Conv", ["r", "d1"], ["d"], group=6, strides=[2, 2]),
             node("Add", ["c", "d"], ["e"]), node("Relu", ["e"], ["y"])]
    model = build(nodes, {"x": ["N", 6, 9, 8]}, constants=constants)
    compare(tmp_path, model, x=rng.normal(size=(2, 6, 9, 8)).astype(np.float32))
    done = passes.optimise(cnn.load(tmp_path / "net.onnx")._graph)
    assert kinds(done).count("Conv2d") == 2
    assert set(kinds(done)) == {"Conv2d", "Transpose"}
