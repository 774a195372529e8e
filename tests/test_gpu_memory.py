"""Where memory runs out, on a stand-in for CuPy: what is said, and that what is advised fits."""
import re
from types import SimpleNamespace

import fake_cupy
import networks
import numpy as np
import onnx
import pytest

import cnn
import kernels
from cnn import executor
from cnn.errors import OutOfMemory
from cnn.executor import Program
from cnn.gpu_device import CudaDevice
from cnn.graph import Graph, Node
from kernels.cuda import gpu
from kernels.cuda.errors import NoRoom
from kernels.ops import Add, TensorSpec

PAGE = 2 << 20


@pytest.fixture
def cupy(machine):
    return machine(capabilities=((8, 0),))


@pytest.fixture
def crowded(cupy, monkeypatch):
    """The stand-in, whose arrays take whole pages, and which executes nothing."""
    monkeypatch.setattr(fake_cupy.Emulator, "launch", lambda *_: None)
    cupy.page = PAGE
    cupy.calls = SimpleNamespace(append=lambda call: None)      # they would hold their arrays
    return cupy


@pytest.fixture
def wide_model(tmp_path):
    """The file of a network whose output is larger than its input."""
    net = networks.Builder(0, 16)
    net.linear(net.global_pool(net.conv("input", "conv", 8, 3, stride=2)), "head", 1000)
    onnx.save(net.model("wide"), tmp_path / "wide.onnx")
    return tmp_path / "wide.onnx"


def load(path):
    return cnn.load(path, device="cuda", dtype="float16")


def zeros(size):
    return np.zeros((size, 16, 16, 3), np.float32)


def run_in_flight(model, size):
    """Two batches are on their way while the third one begins."""
    list(model.predict_batches([zeros(size)] * 3))


def fitting(caught):
    """The batch that an error advises."""
    return int(re.search(r"a batch of (\d+) would fit", str(caught.value))[1])


def test_too_large_a_batch_is_told_what_fits_and_smaller_ones_run(cupy, small_model):
    model, batch = load(small_model), zeros(2)
    expected = model.predict(batch)
    cupy.free = 20 << 20
    with pytest.raises(cnn.DeviceError, match=r"no room for the values of this network at batch 100"
                                              r"00: .* needed and .* free; a batch of \d+ would"):
        model.predict(zeros(10_000))
    np.testing.assert_array_equal(model.predict(batch), expected)
    cupy.free = 0
    with pytest.raises(cnn.DeviceError, match="no room for the weights"):
        load(small_model).predict(batch)


@pytest.mark.parametrize("network", ["small_model", "wide_model"])
@pytest.mark.parametrize("room", [20 << 20, 64 << 20, 97_531_246, 150 << 20])
def test_a_batch_that_is_advised_fits_and_a_larger_one_does_not(crowded, network, room, request):
    model, size = load(request.getfixturevalue(network)), 40_000
    run_in_flight(model, 2)
    crowded.free = room
    with pytest.raises(OutOfMemory, match="a batch of") as caught:
        model.predict(zeros(size))
    fits, image = fitting(caught), caught.value.needed / size
    assert fits > (room - executor.ROUNDING) / image - 1
    run_in_flight(model, fits)
    with pytest.raises(OutOfMemory):
        run_in_flight(model, int(caught.value.free / image) + 1)


@pytest.mark.parametrize("room", range(60 << 20, 96 << 20, 6 << 20))
def test_a_batch_that_is_advised_for_several_at_once_fits(crowded, small_model, room):
    """The first one may have run when there is no room for the second one's buffer."""
    model = load(small_model)
    run_in_flight(model, 2)
    crowded.free = room
    with pytest.raises(OutOfMemory, match="a batch of") as caught:
        run_in_flight(model, 11_000)
    run_in_flight(model, fitting(caught))


def test_whatever_has_no_room_the_answer_is_the_same(crowded, small_model):
    model, batch = load(small_model), zeros(2)
    model.predict(batch)
    # Beside the biases of two layers: the values, an output, probabilities, a buffer, a copy.
    for pages in range(2, 7):
        model._drop(len(model._programs))
        crowded.free = pages * PAGE
        with pytest.raises(OutOfMemory, match=r"^cuda:0 has no room for the values of this network "
                                              r"at batch 2: .*; perhaps not even a batch of 1"):
            model.predict(batch)
    crowded.free = 7 * PAGE
    model.predict(batch)


def test_programs_of_other_shapes_make_room(crowded, small_model):
    model = load(small_model)
    model.predict(zeros(2))
    for size, pages in enumerate(range(2, 7), 3):
        crowded.free = pages * PAGE
        model.predict(zeros(size))
        assert list(model._programs) == [((size, 16, 16, 3),)]


@pytest.mark.parametrize(("size", "kept"), [(4 << 30, [1]), (40 << 30, [2, 1])])
def test_programs_that_are_kept_take_a_quarter_of_the_gpus_memory(crowded, small_model, size, kept,
                                                                  monkeypatch):
    monkeypatch.setattr(crowded.cuda.runtime, "memGetInfo", lambda: (crowded.free, size))
    model = load(small_model)
    model.predict(zeros(2))
    program, = model._programs.values()
    program.bytes = 3 << 30
    model.predict(zeros(1))
    assert [shape[0] for shape, in model._programs] == kept


def test_no_size_is_refused_but_by_the_gpu(cupy):
    """Three values of 8 GiB."""
    device, spec = CudaDevice(0), TensorSpec((1 << 17, 64, 32, 7))
    graph = Graph({"x": spec, "z": spec}, ("y",), (Node(Add(), ("x", "z"), "y", "sum"),))
    with pytest.raises(OutOfMemory, match=r"batch 131072: .* needed .* a batch of \d+ would fit"):
        Program(graph, device, device.options(), batch=1 << 17)


def test_what_has_no_room_is_not_kept(crowded, small_model):
    model, batch = load(small_model), zeros(2)
    model.predict(batch)
    model._drop(1)
    crowded.free = 6 * PAGE
    try:
        model.predict(batch)
    except OutOfMemory:
        assert crowded.free == 6 * PAGE
    else:
        pytest.fail("a copy has no room")


def test_no_more_is_free_than_cupys_pool_may_take(crowded, small_model):
    model = load(small_model)
    model.predict(zeros(1))
    crowded.pool.get_limit, crowded.pool.total_bytes = lambda: 50 << 20, lambda: 20 << 20
    crowded.free = 40 << 20
    with pytest.raises(OutOfMemory, match=r"31\.46 MB are free"):
        model.predict(zeros(20_000))


def test_pinned_memory_that_the_host_has_not(cupy, small_model):
    model, batch = load(small_model), zeros(2)
    expected, room = model.predict(batch), cupy.pinned_free
    cupy.pinned_free = 10
    with pytest.raises(cnn.DeviceError, match=r"^the host has no room for pinned memory, through "
                                              r"which a batch goes to cuda:0 and back: .* are "
                                              r"needed and .* are free; use a smaller batch"):
        model.predict(batch)
    cupy.pinned_free = room
    np.testing.assert_array_equal(model.predict(batch), expected)


def no_room_at(batch):
    return pytest.raises(OutOfMemory, match=rf"^cuda:0 has no room for the values of this network "
                                            rf"at batch {batch}: .* needed and .* free; ")


def test_kernels_and_graphs_have_no_room(crowded, small_model):
    """The driver's memory, for which it asks no pool."""
    for kind in ("module_bytes", "graph_bytes"):
        gpu.load.cache_clear()
        model = load(small_model)
        setattr(crowded, kind, crowded.free - 2 * PAGE)
        with no_room_at(2):
            model.predict(zeros(2))
        setattr(crowded, kind, PAGE)
        model.predict(zeros(2))


def test_kernels_have_no_room_while_layers_run_one_by_one(crowded, small_model, monkeypatch):
    monkeypatch.setenv("CNN_DEBUG", "1")
    crowded.module_bytes = crowded.free - 2 * PAGE
    with no_room_at(2):
        load(small_model).predict(zeros(2))


@pytest.mark.parametrize("kind", ["module_bytes", "graph_bytes"])
def test_what_the_pool_keeps_unused_goes_to_kernels_and_graphs(crowded, small_model, kind):
    setattr(crowded, kind, 30 * PAGE)
    crowded.free, crowded.unused = 20 * PAGE, 400 * PAGE
    load(small_model).predict(zeros(2))


def test_programs_of_other_shapes_make_room_for_a_graph(crowded, small_model):
    model = load(small_model)
    crowded.graph_bytes = 30 * PAGE
    model.predict(zeros(2))
    crowded.free = 20 * PAGE
    model.predict(zeros(3))
    assert list(model._programs) == [((3, 16, 16, 3),)]


def test_an_op_that_the_driver_has_no_room_for(crowded):
    x = crowded.asarray(np.ones((4, 8), np.float32))
    crowded.module_bytes = crowded.free
    with pytest.raises(NoRoom, match=r"^GPU 0 has no room: .*relu|clip.* could not be loaded .*out "
                                     r"of memory, and [\d,]+ bytes are free; use a smaller batch"):
        kernels.relu(x)
    crowded.module_bytes = 0
    kernels.relu(x)


def test_a_copy_of_an_array_at_an_odd_address_has_no_room(crowded, small_model, monkeypatch):
    model, memory = load(small_model), crowded.asarray(np.zeros(2 * 768 + 8, np.float32))
    batch = memory[1:1 + 2 * 768].reshape(2, 16, 16, 3)
    model.predict(batch)

    empty = crowded.empty

    def no_room(shape, dtype=np.float32):
        if shape == batch.shape:
            raise fake_cupy.OutOfMemoryError("Out of memory allocating 6,144 bytes")
        return empty(shape, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(crowded, "empty", no_room)
        with no_room_at(2):
            model.predict(batch)
    model.predict(batch)


def model_of(tmp_path, text, **constants):
    graph = onnx.parser.parse_graph(text)
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name)
                             for name, array in constants.items())
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
    return cnn.load(path, device="cuda")


def test_constants_are_there_before_a_batch_is(crowded, tmp_path):
    """8 MB of them, and as many of each sample: what has no room is the batch."""
    model = model_of(tmp_path, "g (float[N,1000,2000] x) => (float[N,1000,2000] y) "
                               "{y = Mul (x, c)}", c=np.ones((1000, 2000), np.float32))
    for size in (3, 4, 5, 6, 12):
        model.release()
        crowded.free = 28 * PAGE
        with no_room_at(size):
            model.run({"x": np.zeros((size, 1000, 2000), np.float32)})
    model.release()
    crowded.free = PAGE
    with pytest.raises(OutOfMemory, match="no room for the weights of one more layer"):
        model.run({"x": np.zeros((1, 1000, 2000), np.float32)})


@pytest.mark.parametrize("second", ["float[1,1000000]", "float"])
def test_the_batch_is_what_the_file_leaves_open(crowded, tmp_path, second):
    model = model_of(tmp_path, f"g (float[N,1000000] x, {second} s) => (float[N,1000000] y) "
                               "{y = Mul (x, s)}")
    other = np.ones((1, 1_000_000) if "[" in second else (), np.float32)
    crowded.free = 120 * PAGE
    with no_room_at(30) as caught:
        model.run({"x": np.zeros((30, 1_000_000), np.float32), "s": other})
    fits = fitting(caught)
    assert fits > 1
    model.run({"x": np.zeros((fits, 1_000_000), np.float32), "s": other})


def test_no_batch_is_advised_that_the_file_does_not_take(crowded, tmp_path):
    model = model_of(tmp_path, "g (float[64,1000000] x) => (float[64,1000000] y) {y = Relu (x)}")
    crowded.free = 90 * PAGE
    with pytest.raises(OutOfMemory, match=r"no room for the values of this network: .* free; use a "
                                          r"smaller image, or another GPU$"):
        model.run({"x": np.zeros((64, 1_000_000), np.float32)})


def test_probabilities_are_counted_where_there_are_some(crowded, wide_model):
    needed = []
    for activation in ("softmax", "none"):
        model = cnn.load(wide_model, device="cuda", dtype="float16", activation=activation)
        model.predict(zeros(1))
        crowded.free = 20 << 20
        with no_room_at(40_000) as caught:
            model.predict(zeros(40_000))
        needed.append(caught.value.needed)
        crowded.free = 1 << 33
    assert needed[0] - needed[1] == 40_000 * 1000 * 4


def test_a_trace_is_told_what_fits(crowded, small_model):
    model = load(small_model)
    crowded.free = 64 << 20
    with no_room_at(20_000) as caught:
        model.trace(zeros(20_000))
    assert 1 < fitting(caught) < 20_000
