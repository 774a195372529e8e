"""A batch norm and the convolution that reads what it gives become one layer where that can be."""
import numpy as np
import pytest
from test_passes import Net, kinds, outputs

from cnn import passes
from kernels import ops
from kernels.ops import NormConv2d


def network(*activation):
    """(net, x, y): a norm that comes first and an activation give x, a convolution y."""
    net = Net(5, 6, 4)
    x = net.norm(net.x, 4)
    for op in activation:
        x = net.add(op, x)
    return net, x, net.conv(x, 4, 6, 1)


def join(graph, takes=lambda *_: True, keep=frozenset()):
    """The optimised graph with such pairs joined, which computes what the graph does."""
    joined = passes.norms.join(passes.combine(passes.arrange(graph, keep), keep), takes, keep)
    x = {"input": np.random.default_rng(1).integers(-4, 4, (2, 5, 6, 4)).astype(np.float32)}
    for ours, theirs in zip(outputs(joined, x), outputs(graph, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    return joined


@pytest.mark.parametrize("activation", [(), (ops.Relu(),), (ops.Silu(),)])
def test_a_norm_joins_the_convolution_after_it(activation):
    net, _, y = network(*activation)
    asked = []
    joined = join(net.graph(net.add(ops.Relu(), y)), lambda *them: asked.append(them) or True)
    layer, = [node for node in joined.nodes if node.op.kind != "Transpose"]
    assert isinstance(layer.op, NormConv2d)
    assert layer.op.norm.activation == (activation[0] if activation else None)
    assert layer.op.conv.activation == ops.Relu()
    assert len(layer.inputs) == 6
    assert asked == [(layer.op.norm, layer.op.conv, (6, 1, 1, 4))]
    assert layer.name == next(node.name for node in net.nodes if node.op.kind == "Conv2d")


def test_what_a_device_does_not_take_stays_two_layers():
    net, _, y = network(ops.Relu())
    assert "NormConv2d" not in kinds(join(net.graph(y), lambda *_: False))


def test_a_norm_that_others_read_or_that_is_asked_for_stays_a_value():
    net, x, y = network(ops.Relu())
    both = net.graph(y, x)
    assert "NormConv2d" not in kinds(join(both))
    twice = net.graph(y, net.conv(x, 4, 6, 1, stride=(2, 2)))
    assert "NormConv2d" not in kinds(join(twice))
    norm = next(node.output for node in passes.optimise(net.graph(y)).nodes
                if node.op.kind == "BatchNorm")
    assert "NormConv2d" not in kinds(join(net.graph(y), keep=frozenset([norm])))


def test_a_convolution_with_a_residual_takes_none():
    net = Net(5, 6, 4)
    other = net.conv(net.x, 4, 6, 3)
    y = net.conv(net.add(ops.Relu(), net.norm(net.x, 4)), 4, 6, 1)
    joined = join(net.graph(net.add(ops.Add(), other, y)))
    assert kinds(joined)[:3] == ["Conv2d", "BatchNorm", "Conv2d"]
    assert len(joined.nodes[2].inputs) == 4
