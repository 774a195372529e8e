"""Activations that files write as several operators become one; padding joins what follows it."""
import math

import numpy as np
import pytest
from checks import integers
from graph_reference import outputs

from cnn import passes
from cnn.graph import Graph, Node
from cnn.passes import written_out
from kernels import ops
from kernels.ops import TensorSpec

CONSTANTS = {"three": 3.0, "sixth": 0.16666667, "half": 0.5, "one": 1.0, "root": 0.70710677,
             "scale": 0.875, "bias": -0.25}


def build(*steps):
    """A graph on "x" (N, 6, 7, 4) of steps (output, op, inputs); its output is the last one."""
    constants = {name: np.array(value, np.float32) for name, value in CONSTANTS.items()}
    rng = np.random.default_rng(0)
    constants["w"] = integers(rng, 5, 3, 3, 4, low=-2, high=3)
    nodes = tuple(Node(op, tuple(inputs.split()), output, f"node {output}")
                  for output, op, inputs in steps)
    return Graph({"x": TensorSpec((None, 6, 7, 4))}, (steps[-1][0],), nodes, constants)


def same(graph, done, exact):
    x = np.random.default_rng(1).normal(0, 3, (2, 6, 7, 4))
    x = np.round(x) if exact else x
    (ours,), (theirs,) = outputs(done, {"x": x}), outputs(graph, {"x": x})
    if exact:
        np.testing.assert_array_equal(ours, theirs)
    else:       # the constants are rounded to float32, and 1 / 6 is not
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


HARD_SIGMOID = [("plus", ops.Add(), "x three"), ("clip", ops.Clip(0.0, 6.0), "plus"),
                ("gate", ops.Mul(), "clip sixth")]
SQUARE = [("r", ops.Relu(), "x"), ("square", ops.Mul(), "r r")]
ERF = [("scaled", ops.Mul(), "x root"), ("erf", ops.Erf(), "scaled"),
       ("gate", ops.Add(), "erf one")]


@pytest.mark.parametrize(("steps", "op"), [
    ([("gate", ops.Sigmoid(), "x"), ("y", ops.Mul(), "x gate")], ops.Silu()),
    (HARD_SIGMOID, ops.HardSigmoid()),
    ([*HARD_SIGMOID, ("y", ops.Mul(), "gate x")], ops.HardSwish()),
    ([("gate", ops.HardSigmoid(0.16666667), "x"), ("y", ops.Mul(), "x gate")], ops.HardSwish()),
    ([*ERF, ("twice", ops.Mul(), "x gate"), ("y", ops.Mul(), "half twice")], ops.Gelu()),
    ([*ERF, ("less", ops.Mul(), "x half"), ("y", ops.Mul(), "gate less")], ops.Gelu()),
    ([*ERF, ("less", ops.Mul(), "half gate"), ("y", ops.Mul(), "x less")], ops.Gelu()),
    ([*SQUARE, ("s", ops.Mul(), "scale square"), ("y", ops.Add(), "s bias")],
     ops.StarRelu(0.875, -0.25))])
def test_one_op_is_left(steps, op):
    graph = build(*steps)
    done = passes.optimise(graph)
    assert [node.op for node in done.nodes] == [op]
    same(graph, done, exact=False) if op != ops.HardSwish() else None


@pytest.mark.parametrize("steps", [
    [("gate", ops.HardSigmoid(0.2, 0.5), "x"), ("y", ops.Mul(), "x gate")],
    [("plus", ops.Add(), "x one"), ("clip", ops.Clip(0.0, 6.0), "plus"),
     ("y", ops.Mul(), "clip sixth")],
    [("erf", ops.Erf(), "x"), ("gate", ops.Add(), "erf one"), ("twice", ops.Mul(), "x gate"),
     ("y", ops.Mul(), "twice half")],
    [*ERF, ("y", ops.Mul(), "x gate")],
    [*ERF, ("less", ops.Mul(), "half gate"), ("y", ops.Mul(), "less three")],
    [("r", ops.Relu(), "x"), ("square", ops.Mul(), "r x"), ("s", ops.Mul(), "scale square"),
     ("y", ops.Add(), "s bias")]])
def test_other_numbers_stay_as_they_are_written(steps):
    graph = build(*steps)
    assert written_out.join(graph).nodes == graph.nodes


PAD = ops.Pad((0, 1, 2, 0), (0, 0, 1, 0))


@pytest.mark.parametrize(("pad", "op", "inputs", "padding"), [
    (PAD, ops.Conv2d((2, 1), (1, 0, 0, 1)), "p w", (2, 2, 0, 2)),
    (ops.Pad((0, 1, 1, 0), (0, 1, 0, 0), -math.inf), ops.MaxPool2d((3, 3)), "p", (1, 1, 1, 0)),
    (PAD, ops.AvgPool2d((3, 3)), "p", (1, 2, 0, 1)),
    (PAD, ops.AvgPool2d((3, 3), count_include_pad=True), "p", (1, 2, 0, 1))])
def test_padding_is_taken_in(pad, op, inputs, padding):
    graph = build(("p", pad, "x"), ("y", op, inputs))
    done = passes.optimise(graph)
    assert [node.op.kind for node in done.nodes] == [op.kind]
    assert done.nodes[0].op.padding == padding
    same(graph, done, exact=True)


@pytest.mark.parametrize(("pad", "op", "inputs"), [
    (ops.Pad((0, 1, 1, 0), (0, 1, 1, 0), 2.0), ops.Conv2d(), "p w"),
    (ops.Pad((1, 0, 0, 0), (0, 0, 0, 0)), ops.Conv2d(), "p w"),
    (ops.Pad((0, 1, 1, 0), (0, 1, 1, 0), mode="reflect"), ops.Conv2d(), "p w"),
    (ops.Pad((0, 1, 1, 0), (0, 1, 1, 0), mode="edge"), ops.AvgPool2d((3, 3)), "p"),
    (PAD, ops.MaxPool2d((3, 3)), "p"),
    (PAD, ops.AvgPool2d((2, 2), (2, 2), (1, 0, 0, 0)), "p"),
    (ops.Pad((0, 3, 0, 0), (0, 0, 0, 0)), ops.AvgPool2d((3, 3)), "p"),
    (PAD, ops.AvgPool2d((3, 3), ceil_mode=True), "p")])
def test_padding_that_means_something_else_stays(pad, op, inputs):
    graph = build(("p", pad, "x"), ("y", op, inputs))
    done = passes.optimise(graph)
    assert [node.op.kind for node in done.nodes] == ["Pad", op.kind]
    same(graph, done, exact=True)
    kept = passes.combine(build(("p", PAD, "x"), ("y", ops.Conv2d(), "p w")), frozenset({"p"}))
    assert [node.output for node in kept.nodes] == ["p", "y"]
