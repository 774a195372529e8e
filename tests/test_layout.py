"""Slices, padding and shuffled channels move with the transposes around them, exactly."""
import numpy as np
import pytest
from graph_reference import outputs
from hypothesis import given
from hypothesis import strategies as st

from cnn import passes
from cnn.graph import Graph, Node
from cnn.passes.layout import _groups
from kernels import ops
from kernels.ops import TensorSpec

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
SHAPE = (None, 3, 5, 8)


class Net:
    """Ops one after the other on an image of SHAPE, NHWC, that was made NCHW first."""

    def __init__(self, *chain):
        self.nodes, value = [], "input"
        for op in (ops.Transpose(TO_NCHW), *chain):
            self.nodes.append(Node(op, (value,), f"v{len(self.nodes)}", f"n{len(self.nodes)}"))
            value = self.nodes[-1].output
        self.graph = Graph({"input": TensorSpec(SHAPE)}, (value,), tuple(self.nodes))
        self.done = passes.optimise(self.graph)

    @property
    def kinds(self):
        return [node.op.kind for node in self.done.nodes]

    def check(self):
        x = np.arange(2 * 3 * 5 * 8, dtype=float).reshape(2, 3, 5, 8)
        for ours, theirs in zip(outputs(self.done, {"input": x}), outputs(self.graph, {"input": x}),
                                strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_slice_of_channels_is_one_of_the_last_axis():
    net = Net(ops.Slice(1, 2, 7, 2), ops.Relu(), ops.Transpose(TO_NHWC))
    net.check()
    assert net.kinds == ["Slice", "Relu", "Reshape"]     # the output under its name
    assert net.done.nodes[0].op == ops.Slice(3, 2, 7, 2)


def test_padding_lies_around_the_same_pixels():
    net = Net(ops.Pad((0, 1, 2, 0), (0, 0, 1, 3), 7.0), ops.Relu(), ops.Transpose(TO_NHWC))
    net.check()
    assert net.kinds == ["Pad", "Relu", "Reshape"]
    assert net.done.nodes[0].op == ops.Pad((0, 2, 0, 1), (0, 1, 3, 0), 7.0)


@pytest.mark.parametrize("batch", [-1, 0])
def test_the_shuffle_of_channels_takes_one_transpose(batch):
    net = Net(ops.Reshape((batch, 2, 4, 3, 5)), ops.Transpose((0, 2, 1, 3, 4)),
              ops.Reshape((batch, 8, 3, 5)), ops.Relu(), ops.Transpose(TO_NHWC))
    net.check()
    assert net.kinds.count("Transpose") == 1
    moved, = (node for node in net.done.nodes if isinstance(node.op, ops.Transpose))
    assert moved.op == ops.Transpose((0, 1, 2, 4, 3))       # of (N, H, W, 2, 4)


def test_space_to_depth_takes_one_transpose():
    net = Net(ops.Transpose((0, 1, 3, 2)), ops.Reshape((-1, 4, 2, 5, 3)),
              ops.Transpose((0, 2, 1, 3, 4)), ops.Reshape((-1, 8, 5, 3)), ops.Relu(),
              ops.Transpose((0, 3, 2, 1)))
    net.check()
    assert net.kinds.count("Transpose") == 1


@given(st.data())
def test_any_chain_of_reshapes_and_transposes_means_the_same(data):
    """Each Reshape splits an axis in two, joins two, or both at once."""
    shape, chain = [SHAPE[0], *(SHAPE[axis] for axis in (3, 1, 2))], []
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(1, len(shape))))
            chain.append(ops.Transpose((0, *order)))
            shape = [shape[0], *(shape[i] for i in order)]
        else:
            i = data.draw(st.integers(1, len(shape) - 1))
            if len(shape) > 3 and i + 1 < len(shape) and data.draw(st.booleans()):
                shape = [*shape[:i], shape[i] * shape[i + 1], *shape[i + 2:]]
            elif len(shape) < 6:
                divisor = data.draw(st.sampled_from([d for d in range(1, shape[i] + 1)
                                                     if shape[i] % d == 0]))
                shape = [*shape[:i], divisor, shape[i] // divisor, *shape[i + 1:]]
            chain.append(ops.Reshape((-1, *shape[1:])))
    Net(*chain, ops.Relu()).check()


@pytest.mark.parametrize(("shape", "target", "sizes"), [
    ((None, 6, 5), (None, 2, 3, 5), [(None,), (2, 3), (5,)]),
    ((None, 2, 3, 5), (None, 6, 5), [(None,), (6,), (5,)]),
    ((None, 4, 3), (None, 4, 1, 3, 1, 1), [(None,), (4,), (1, 3, 1, 1)]),
    ((4, 3, 1), (4, 3), [(4,), (3,)]),
    ((4, 3, 2), (24,), [(24,)]), ((3, 1, 2), (3, 2), [(3,), (2,)]),
    ((6, 2), (4, 3), None), ((2, 6), (2, 4, 3), None), ((None, 4), (None, 2, 3), None),
    ((None, 4), (2, 2), None), ((2, 3), (2,), None)])
def test_a_reshape_falls_into_groups_or_none(shape, target, sizes):
    groups = _groups(shape, target)
    assert (groups and [group.sizes for group in groups]) == sizes
    if groups:
        assert [axis for group in groups for axis in group.old] == [*range(len(shape))]
