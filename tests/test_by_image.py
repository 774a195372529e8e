"""A batch as single images: which networks run so, and that each image gets the bits that it would
get in the whole batch, whatever stands in the others."""
import threading

import numpy as np
import pytest
from checks import THREADS, integers, normal
from test_executor import expected

import cnn
from cnn.by_image import ByImage, apart, pays, prepare
from cnn.devices import CpuDevice
from cnn.executor import Program, specialise
from cnn.graph import Graph, Node
from kernels import ops
from kernels.ops import Conv2d, TensorSpec
from kernels.step import Options

MOST = max(THREADS)


def made(graph, batch, threads=MOST):
    device = CpuDevice(threads)
    shapes = {name: (batch, *spec.shape[1:]) for name, spec in graph.inputs.items()}
    return (prepare(graph, shapes, device, device.options()),
            Program(specialise(graph, shapes), device, device.options()))


def network(*nodes, outputs=("y",), inputs=None, **constants):
    return Graph(inputs or {"x": TensorSpec((None, 6, 5, 4))}, outputs,
                 tuple(Node(op, tuple(names), output, output) for op, names, output in nodes),
                 constants)


RNG = np.random.default_rng(0)
WEIGHT, BIAS = integers(RNG, 4, 3, 3, 4), integers(RNG, 4)
CONV = (Conv2d(padding=(1, 1, 1, 1), activation=ops.Relu()), ("x", "w", "b"), "c")

APART = {
    "convolution": network((CONV[0], CONV[1], "y"), w=WEIGHT, b=BIAS),
    "residual": network(CONV, (ops.Add(), ("x", "c"), "y"), w=WEIGHT, b=BIAS),
    "classifier": network(CONV, (ops.GlobalAvgPool2d(), ("c",), "g"), (ops.Flatten(), ("g",), "f"),
                          (ops.Linear(), ("f", "l"), "s"), (ops.Softmax(), ("s",), "y"),
                          w=WEIGHT, b=BIAS, l=integers(RNG, 3, 4)),
    "concat": network(CONV, (ops.Concat(-1), ("x", "c"), "y"), w=WEIGHT, b=BIAS),
    "concat of rows": network(CONV, (ops.Concat(1), ("x", "c"), "y"), w=WEIGHT, b=BIAS),
    "constants": network((ops.Mul(), ("x", "k"), "m"), (ops.Add(), ("m", "o"), "y"),
                         k=integers(RNG, 5, 1), o=integers(RNG, 1, 6, 1, 4)),
    "reshape": network((ops.Reshape((0, -1, 8)), ("x",), "y")),
    "transpose": network((ops.Transpose((0, 3, 1, 2)), ("x",), "y")),
    "slices": network((ops.Slice(-1, 1, 3), ("x",), "s"), (ops.Slice(1, 0, 6, 2), ("s",), "y")),
    "pad": network((ops.Pad((0, 1, 2, 0), (0, 0, 1, 0)), ("x",), "y")),
    "maximum": network((ops.GlobalMaxPool2d(), ("x",), "y")),
    "norms of a pixel": network((ops.LayerNorm(), ("x", "b", "b"), "n"),
                                (ops.LocalResponseNorm(3), ("n",), "y"), b=BIAS),
    "activations": network((ops.HardSigmoid(), ("x",), "h"), (ops.Gelu(), ("h",), "y")),
    "two outputs": network(CONV, (ops.Sigmoid(), ("c",), "y"), outputs=("y", "c"), w=WEIGHT,
                           b=BIAS),
    "two inputs": network((ops.Add(), ("x", "z"), "y"), inputs={
        "x": TensorSpec((None, 6, 5, 4)), "z": TensorSpec((None, 1, 5, 1))}),
    "an input is an output": network((ops.Tanh(), ("x",), "y"), outputs=("x", "y")),
}
# Of 4 images: some of these have the right shapes all the same.
MEET = {
    "softmax over images": network((ops.Softmax(0), ("x",), "y")),
    "concat of images": network((ops.Concat(0), ("x", "x"), "y")),
    "slice of images": network((ops.Slice(0, 0, 1), ("x",), "y")),
    "other images": network((ops.Slice(0, 0, 1), ("x",), "f"), (ops.Concat(0), ("x", "f"), "l"),
                            (ops.Slice(0, 1, 5), ("l",), "y")),
    "pad of images": network((ops.Pad((1, 0, 0, 0), (0, 0, 0, 0)), ("x",), "y")),
    "transposed": network((ops.Transpose((3, 1, 2, 0)), ("x",), "y")),
    "transposed and back": network((ops.Transpose((3, 1, 2, 0)), ("x",), "t"),
                                   (ops.Softmax(-1), ("t",), "s"),
                                   (ops.Transpose((3, 1, 2, 0)), ("s",), "y")),
    "flattened": network((ops.Flatten(0), ("x",), "y")),
    "fewer rows": network((ops.Reshape((-1, 6, 5, 8)), ("x",), "y")),
    "images against channels": network(
        (ops.GlobalAvgPool2d(), ("x",), "g"), (ops.Reshape((0, 4)), ("g",), "f"),
        (ops.Add(), ("x", "f"), "y"), inputs={"x": TensorSpec((None, 6, 4, 4))}),
    "a constant for each image": network((ops.Add(), ("x", "k"), "y"),
                                         k=integers(RNG, 4, 1, 1, 1)),
    "a constant output": network((ops.Relu(), ("x",), "y"), outputs=("y", "k"),
                                 k=integers(RNG, 3)),
}


def given(graph, batch):
    rng = np.random.default_rng(1)
    return {name: integers(rng, batch, *spec.shape[1:]) for name, spec in graph.inputs.items()}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", APART)
def test_images_that_do_not_meet_run_apart(name, threads):
    graph = APART[name]
    program, whole = made(graph, 4, threads)
    assert isinstance(program, ByImage)
    inputs = given(graph, 4)
    before = {name: array.copy() for name, array in inputs.items()}
    values = expected(graph, inputs)
    for _ in range(3):
        found = program.start(inputs)()
        assert list(found) == list(graph.outputs)
        for output, array in found.items():
            np.testing.assert_array_equal(array, whole.run(inputs)[output])
            np.testing.assert_allclose(array, values[output], rtol=1e-5, atol=1e-5)
    for name, array in before.items():
        np.testing.assert_array_equal(inputs[name], array)


@pytest.mark.parametrize("name", MEET)
def test_images_that_meet_run_together(name):
    program, _ = made(MEET[name], 4)
    assert isinstance(program, Program)
    inputs = given(MEET[name], 4)
    values = expected(MEET[name], inputs)
    for output, array in program.run(inputs).items():
        np.testing.assert_allclose(array, values[output], rtol=1e-5, atol=1e-5)


def test_a_network_of_a_fixed_batch_runs_together():
    fixed = network((ops.Relu(), ("x",), "y"), inputs={"x": TensorSpec((4, 6, 5, 4))})
    assert isinstance(made(fixed, 4)[0], Program)


def test_constants_that_depend_on_the_batch_are_seen():
    one, many = (network((ops.Mul(), ("x", "k"), "y"), k=np.float32([size]),
                         inputs={"x": TensorSpec((size, 6, 5, 4))}) for size in (1, 4))
    assert not apart(one, many, 4)
    assert apart(one, Graph(many.inputs, many.outputs, many.nodes, one.constants), 4)


@pytest.mark.parametrize(("batch", "threads", "wanted"), [
    (1, 1, False), (1, 2, False), (2, 1, True), (2, 2, True), (3, 2, False), (4, 2, True),
    (5, 2, False), (7, 2, True), (8, 2, True), (8, 3, True), (4, 3, False), (8, 16, False),
    (64, 16, True)])
def test_threads_must_have_about_equal_shares(batch, threads, wanted):
    graph = network((ops.Relu(), ("x",), "y"), inputs={"x": TensorSpec((batch, 6, 5, 4))})
    assert pays(graph, batch, Options(threads)) == wanted


@pytest.mark.parametrize(("size", "wide", "narrow", "codes"), [
    (64 << 20, False, False, False), (24 << 20, False, False, True), (12 << 20, False, True, True),
    (1 << 20, True, True, True)])
def test_great_weights_are_read_once_for_all_images(monkeypatch, size, wide, narrow, codes):
    monkeypatch.setenv("CNN_INT8", "vnni_emulated")
    shape = {"x": TensorSpec((8, 1))}
    weight = np.broadcast_to(np.float32(0), (size, 1))      # one number, of which it has many
    graph = network((ops.Linear(), ("x", "l"), "y"), inputs=shape, l=weight)
    assert pays(graph, 8, Options(2)) == wide
    assert pays(graph, 8, Options(2, "bfloat16")) == narrow
    quantised = network((ops.FakeQuantize(), ("x",), "q"), (ops.Linear(), ("q", "l"), "y"),
                        inputs=shape, l=weight)
    assert pays(quantised, 8, Options(2)) == codes
    monkeypatch.setenv("CNN_INT8", "none")
    assert pays(quantised, 8, Options(2)) == wide


def test_an_image_has_the_bits_of_the_whole_batch_whatever_is_in_the_others():
    model = cnn.load(device="cpu")
    _, height, width, channels = model.input_shape
    batch = normal(np.random.default_rng(0), 4, height, width, channels)
    alone = [model.predict(image[None]) for image in batch]
    program = model._program({model._image_input[0]: batch.shape})
    assert isinstance(program, ByImage)
    np.testing.assert_array_equal(model.predict(batch), np.concatenate(alone))
    batch[2] = np.nan
    found = model.predict(batch)
    assert np.isnan(found[2]).all()
    for i in (0, 1, 3):
        np.testing.assert_array_equal(found[i], alone[i][0])


def test_photos_are_normalised_on_the_way():
    model = cnn.load(device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 300, 400, 3), np.uint8)
    together = np.concatenate([model.predict(model.preprocess(one)) for one in pixels])
    found = model.classify(pixels, top=1000, batch_size=4)
    for best, row in zip(found, together, strict=True):
        assert [one.probability for one in best] == [row[one.index] for one in best]


def test_the_summary_says_that_images_run_one_by_one():
    model = cnn.load(device="cpu", threads=1)
    apart, whole = model.summary(4), model.summary()
    assert (apart.apart, whole.apart) == (4, 0)
    assert apart.rows == whole.rows
    assert "The 4 images of a batch run one by one, each on one thread" in str(apart)
    assert "one by one" not in str(whole)


def test_inputs_need_not_be_contiguous():
    graph = APART["residual"]
    program, _ = made(graph, 4)
    inputs = given(graph, 8)
    thinned = {name: array[::2] for name, array in inputs.items()}
    np.testing.assert_array_equal(
        program.start(thinned)()["y"],
        program.start({name: array.copy() for name, array in thinned.items()})()["y"])


def test_several_callers_get_their_own_answers():
    graph = APART["classifier"]
    program, whole = made(graph, 4)
    batches = [normal(np.random.default_rng(seed), 4, 6, 5, 4) for seed in range(8)]
    wanted = [whole.run({"x": batch})["y"] for batch in batches]
    wrong = []

    def call(first):
        for i in range(200):
            at = (first + i) % len(batches)
            if not np.array_equal(program.start({"x": batches[at]})()["y"], wanted[at]):
                wrong.append(at)

    callers = [threading.Thread(target=call, args=(first,)) for first in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
