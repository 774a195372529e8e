"""CudaDevice on a stand-in for CuPy whose streams are as late as CUDA allows."""
import itertools
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest

import cnn
from cnn.executor import Program
from cnn.gpu_device import CudaDevice
from cnn.graph import Graph, Node
from kernels.cuda import gpu
from kernels.cuda.backend import prepare
from kernels.cuda.launch import CudaOptions
from kernels.ops import Add, Relu, TensorSpec

PHOTO = Path(__file__).parent / "data" / "coffee.png"
RNG = np.random.default_rng(0)


@pytest.fixture
def cupy(machine):
    return machine(capabilities=((8, 0), (8, 0)))


def batches(count, size=2):
    return [RNG.standard_normal((size, 16, 16, 3)).astype(np.float32) for _ in range(count)]


def load(path, device="cuda", **options):
    return cnn.load(path, device=device, dtype="float16", preprocess="imagenet", **options)


def test_auto_is_the_gpu_where_one_can_be_used(machine, small_model, caplog):
    machine()
    with caplog.at_level("INFO", logger="cnn"):
        assert cnn.load(small_model, device="auto", dtype="float16").device == "cuda:0"
        assert cnn.load(small_model, device="auto", threads=1).device == "cpu"
        machine(driver=12040)
        assert cnn.load(small_model, device="auto").device == "cpu"
    assert "'auto' is cuda:0: it can be used" in caplog.text
    assert "'auto' is the CPU: threads=1 is for the CPU" in caplog.text
    assert "'auto' is the CPU: device='cuda' can not be used: the NVIDIA driver" in caplog.text
    with pytest.raises(cnn.DeviceError, match="not supported on the CPU"):
        cnn.load(small_model, device="auto", dtype="float16")


def test_a_run_is_one_graph_between_what_brings_data_in_and_out(cupy, small_model):
    model, (batch,) = load(small_model), batches(1)
    model.predict(batch)
    first = [call.name for call in cupy.calls]
    assert cupy.replays == 1
    assert first[0].startswith("copy_f32_f16")
    assert first[-2].startswith("copy_f16_f32")
    assert first[-1].startswith("softmax_warp_f32")
    model.predict(batch)
    assert cupy.replays == 2
    assert [call.name for call in cupy.calls] == 2 * first


@pytest.mark.parametrize(("capability", "early"), [((8, 0), False), ((8, 9), False),
                                                   ((9, 0), True), ((10, 0), True)])
def test_in_a_graph_all_launches_but_the_first_begin_early_where_they_can(
        machine, small_model, capability, early):
    cupy = machine(capabilities=(capability,))
    load(small_model).predict(batches(1)[0])
    before, first, *rest = [call.early for call in cupy.calls]
    assert [before, first] == [False] * 2
    assert rest
    assert set(rest) == {early}


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_batches_in_flight_do_not_disturb_each_other(cupy, small_model, device):
    given = batches(5)
    emulated = load(small_model, "emulator")
    model, taken = load(small_model, device), itertools.count(1)
    results = model.predict_batches(batch for batch in given if next(taken))
    first = next(results)
    assert next(taken) == 3                     # the second was begun before the first was out
    for found, batch in zip([first, *results], given, strict=True):
        np.testing.assert_array_equal(found, emulated.predict(batch))
    assert {call.device for call in cupy.calls} == {int(device[5:] or 0)}


def test_more_batches_in_flight_than_buffers(cupy, small_model):
    model, given = load(small_model), batches(5)
    emulated = load(small_model, "emulator")
    begun = [model._start(batch) for batch in given]
    for finish, batch in zip(begun, given, strict=True):
        np.testing.assert_array_equal(finish(), emulated.predict(batch))


def test_two_buffers_serve_any_number_of_batches(cupy, small_model):
    model = load(small_model)
    list(model.predict_batches(batches(2)))
    pinned = len(cupy.pinned)
    list(model.predict_batches(batches(6)))
    assert len(cupy.pinned) - pinned == 6       # downloads only, of which a pool makes fewer


def test_a_result_that_nobody_waits_for_leaves_its_memory_alone(cupy, small_model):
    model, given = load(small_model), batches(2)
    started = model._start(given[0])
    pinned = cupy.pinned[-1]
    before = pinned.copy()
    del started
    assert not np.array_equal(pinned, before)   # the copy had to come first
    emulated = load(small_model, "emulator")
    np.testing.assert_array_equal(model.predict(given[1]), emulated.predict(given[1]))


def test_another_thread_may_run_while_a_shape_is_captured(cupy, small_model):
    (small,), (large,) = batches(1), batches(1, 3)
    model, emulated, found = load(small_model), load(small_model, "emulator"), []
    model.predict(small)
    (program,) = model._programs.values()

    def meanwhile():
        cupy.meanwhile = lambda: None
        thread = threading.Thread(target=lambda: found.append(program.run({"input": small})))
        thread.start()
        thread.join()
    cupy.meanwhile = meanwhile
    np.testing.assert_array_equal(model.predict(large), emulated.predict(large))
    (outputs,) = found
    alone = emulated._program({"input": small.shape}).run({"input": small})
    assert outputs.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_array_equal(outputs[name], value)


def test_arrays_of_the_gpu_may_lie_at_any_address(cupy, small_model):
    """A part of an array begins where it begins; the kernels' accesses of 16 bytes may not."""
    model, emulated = load(small_model), load(small_model, "emulator")
    memory = cupy.asarray(RNG.standard_normal(2 * 16 * 16 * 3 + 9).astype(np.float32))
    for first in (1, 2, 4, 7):
        batch = memory[first:first + 2 * 16 * 16 * 3].reshape(2, 16, 16, 3)
        found = model.predict(batch)
        assert isinstance(found, cupy.ndarray)
        np.testing.assert_array_equal(cupy.asnumpy(found), emulated.predict(np.array(batch)))
    assert cupy.compiled == 0


def test_photos_go_up_as_bytes(cupy, small_model):
    model = load(small_model)
    found = model.classify([PHOTO, PHOTO, PHOTO], batch_size=2)
    assert cupy.calls[0].name.startswith("pixels_u8")
    assert cupy.calls[0].args[0].nbytes == 2 * 16 * 16 * 3
    assert found[0] == found[1] == found[2]
    assert found[0] == load(small_model, "emulator").classify(PHOTO)
    on_cpu = cnn.load(small_model, device="cpu", preprocess="imagenet").classify(PHOTO)
    assert [one.index for one in found[0]] == [one.index for one in on_cpu]
    np.testing.assert_allclose([one.probability for one in found[0]],
                               [one.probability for one in on_cpu], atol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_of_the_gpu_stay_there(cupy, small_model, dtype):
    model, (batch,) = load(small_model), batches(1)
    batch = batch.astype(dtype)
    expected = load(small_model, "emulator").predict(batch.astype(np.float32))
    model.warmup([2])
    copies = cupy.host_copies
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.empty(batch.shape, batch.dtype)
        stream.put(lambda: np.copyto(np.asarray(x), batch))     # still under way
        y = model.predict(x)
        stream.put(lambda: x.fill(np.nan))                      # may follow at once
    assert isinstance(y, cupy.ndarray)
    assert y.dtype == np.float32
    model._device.synchronize()
    stream.synchronize()
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert cupy.host_copies == copies


@pytest.mark.parametrize(("dtype", "kernels"), [("float32", ["copy_f32_f16"]), ("float16", [])])
def test_what_is_to_lie_there_as_it_is_needs_no_kernel_outside_the_graph(
        cupy, small_model, dtype, kernels, monkeypatch):
    model = load(small_model)
    model.warmup([2])
    launched, execute = [], gpu.execute
    monkeypatch.setattr(gpu, "execute", lambda launches: execute(
        [launched.append(launch.kernel.name) or launch for launch in launches]))
    replays = cupy.replays
    y = model.predict(cupy.asarray(batches(1)[0].astype(dtype)))
    model._device.synchronize()
    assert y.dtype == np.float32
    assert cupy.replays == replays + 1
    assert [name[:12] for name in launched] == kernels


def test_the_host_does_little_before_the_graph_is_launched(cupy, small_model, monkeypatch):
    """For so long the GPU waits: the device is entered once a call, no event is made, and none is
    waited for before the end."""
    model, x = load(small_model), cupy.asarray(batches(1)[0].astype(np.float16))
    model.predict(x)
    seen = []

    def watch(kind, name):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *arguments, **options: (
            seen.append(f"{kind.__name__}.{name}"), original(*arguments, **options))[1])
    for kind, name in ((fake_cupy.Device, "__init__"), (fake_cupy.Device, "__enter__"),
                       (fake_cupy.Stream, "__enter__"), (fake_cupy.Graph, "launch"),
                       (fake_cupy.Event, "record"), (fake_cupy.Stream, "wait_event"),
                       (fake_cupy.Memory, "copy_from_device_async")):
        watch(kind, name)
    monkeypatch.setattr(cupy.cuda, "Event", lambda **options: pytest.fail("an event was made"))
    model.predict(x)
    assert seen == ["Device.__enter__", "Memory.copy_from_device_async", "Graph.launch",
                    "Stream.__enter__", "Memory.copy_from_device_async",
                    "Event.record", "Stream.wait_event"]


@pytest.fixture
def waits(monkeypatch):
    """(a stream, the one that it waits for), as it is said."""
    said, wait_event = [], fake_cupy.Stream.wait_event
    monkeypatch.setattr(fake_cupy.Stream, "wait_event", lambda stream, event: (
        said.append((stream, event.stream)), wait_event(stream, event))[1])
    return said


def test_runs_of_a_program_are_in_order_on_whatever_streams(cupy, small_model, waits):
    model, (batch,) = load(small_model), batches(1)
    x, device = cupy.asarray(batch), model._device
    a, b = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    null, each_threads = cupy.cuda.Stream.null, cupy.cuda.Stream(ptds=True)

    def assert_waits(stream, before):
        waits.clear()
        with stream:
            model.predict(x)
        assert waits == [*before, (device.stream, stream)]
    model._program({"input": batch.shape})          # whose weights are on their way
    for stream, is_another in [(a, True), (a, False), (a, False), (b, True), (a, True),
                               (null, True), (null, False), (each_threads, True),
                               (each_threads, True), (a, True), (a, False)]:
        assert_waits(stream, [(stream, device.stream)] * is_another)
    waits.clear()
    model.predict(batch)
    first, *others = waits
    assert first == (device._uploads, device.stream)        # a new stage, of memory used before
    assert others == [(device.stream, device._uploads), (device._downloads, device.stream)]
    assert_waits(a, [(a, device.stream)])


def test_the_address_of_a_stream_that_is_gone_is_not_taken_for_it(cupy, small_model, waits):
    model, x = load(small_model), cupy.asarray(batches(1)[0])
    for _ in range(2):
        stream = cupy.cuda.Stream(non_blocking=True)
        stream.ptr = 1 << 20
        waits.clear()
        with stream:
            model.predict(x)
        assert waits[0] == (stream, model._device.stream)


def test_after_a_failure_the_devices_stream_still_waits_for_the_callers(
        cupy, small_model, waits):
    model, batch = load(small_model), batches(1)[0]
    x, own = cupy.asarray(batch), model._device.stream
    expected = load(small_model, "emulator").predict(batch)
    a, b = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    for stream in (a, a, b):
        with stream:
            model.predict(x)
            cupy.launch_error = "cudaErrorInvalidConfiguration"
            waits.clear()
            with pytest.raises(cnn.DeviceError, match="could not be launched on GPU 0 with grid"):
                model.predict(x)
            cupy.launch_error = ""
            assert waits == [(own, stream)]
            np.testing.assert_array_equal(cupy.asnumpy(model.predict(x)), expected)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_inputs_of_the_host_and_of_the_gpu(cupy, waits, on_gpu):
    spec = TensorSpec((2, 4, 4, 8))
    device = CudaDevice(0)
    graph = Graph({"x": spec, "z": spec}, ("y",), (Node(Add(), ("x", "z"), "y", "sum"),))
    program = Program(graph, device, device.options())
    x, z = (RNG.standard_normal((2, 4, 4, 8)).astype(np.float32) for _ in range(2))
    with cupy.cuda.Stream(non_blocking=True) as caller:
        there = cupy.empty(x.shape)
        caller.put(lambda: np.copyto(np.asarray(there), x))     # still under way
        found = program.start({"x": there, "z": z}, on_gpu=on_gpu)()["y"]
        caller.put(lambda: there.fill(np.nan) if on_gpu else None)
    stream = caller if on_gpu else device.stream
    assert (device._uploads, device.stream) in waits
    assert (stream, device._uploads) in waits
    assert waits[0] == ((caller, device.stream) if on_gpu else (device.stream, caller))
    assert isinstance(found, cupy.ndarray) == on_gpu
    caller.synchronize()
    np.testing.assert_array_equal(found, x + z)


def test_calls_in_flight_on_streams_of_their_own(cupy, small_model):
    """They share a program and its events, and each is awaited by its own stream alone."""
    model, given = load(small_model), batches(3)
    expected = [load(small_model, "emulator").predict(batch) for batch in given]
    begun = []
    for batch in given:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            x = cupy.empty(batch.shape, batch.dtype)
            stream.put(lambda x=x, batch=batch: np.copyto(np.asarray(x), batch))
            begun.append((stream, model.predict(x)))
            stream.put(lambda x=x: x.fill(np.nan))
    for (stream, y), probabilities in zip(reversed(begun), reversed(expected), strict=True):
        stream.synchronize()
        np.testing.assert_allclose(y, probabilities, rtol=1e-6)


def test_foreign_arrays_in_the_files_own_layout(cupy, small_model):
    model, (batch,) = load(small_model), batches(1)
    planes = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    expected = load(small_model, "emulator").run({"input": planes})
    foreign = SimpleNamespace(__dlpack_device__=lambda: (2, 0), memory=cupy.asarray(planes))
    found = model.run({"input": foreign})
    cupy.cuda.get_current_stream().wait_event(model._device.stream.record())
    assert isinstance(found["logits"], cupy.ndarray)
    np.testing.assert_array_equal(found["logits"], expected["logits"])


@pytest.mark.parametrize(("make", "error", "sentence"), [
    (lambda cupy: cupy.asarray(np.zeros((1, 16, 16, 3))), cnn.ModelError,
     "must be float32 or float16, it is float64"),
    (lambda cupy: cupy.asarray(np.zeros((1, 3, 16, 16), np.float32)).transpose(0, 2, 3, 1),
     cnn.ModelError, "must be C-contiguous on the GPU"),
    (lambda cupy: cupy.asarray(np.zeros((1, 8, 16, 3), np.float32)), cnn.ModelError, "has shape"),
])
def test_arrays_of_the_gpu_that_do_not_fit(cupy, small_model, make, error, sentence):
    with pytest.raises(error, match=sentence):
        load(small_model).predict(make(cupy))


@pytest.mark.parametrize("device", ["cpu", "emulator", "cuda:1"])
def test_arrays_of_a_gpu_are_refused_elsewhere(cupy, small_model, device):
    model = cnn.load(small_model, device=device)
    with pytest.raises(cnn.DeviceError, match=f"lies on (a )?GPU.* the model runs on '?{device}"):
        model.predict(cupy.asarray(np.zeros((1, 16, 16, 3), np.float32)))


def test_release_frees_and_the_next_call_prepares_anew(cupy, small_model):
    model, (batch,) = load(small_model), batches(1)
    expected = model.predict(batch)
    model.release()
    assert cupy.pool.freed == 2                 # on the GPU, and pinned
    assert not model._programs
    assert not model._options.packed
    np.testing.assert_array_equal(model.predict(batch), expected)


def test_a_launch_that_is_refused_leaves_the_device_usable(cupy, small_model):
    model, (batch,) = load(small_model), batches(1)
    cupy.launch_error = "cudaErrorInvalidConfiguration"
    with pytest.raises(cnn.DeviceError, match="could not be launched on GPU 0 with grid"):
        model.predict(batch)
    cupy.launch_error = ""
    np.testing.assert_array_equal(model.predict(batch),
                                  load(small_model, "emulator").predict(batch))


def conv_kernel(model):
    return next(row.kernel for row in model.summary(2).rows if row.layer == "conv")


@pytest.mark.parametrize("devices_fail", [False, True])
def test_after_an_illegal_access_every_call_says_so_at_once(cupy, small_model, devices_fail):
    model, (batch,) = load(small_model), batches(1)
    cupy.illegal, cupy.devices_fail = {conv_kernel(model)}, devices_fail
    with pytest.raises(cnn.DeviceError, match=r"illegal memory access.*context is lost.*restart"):
        model.predict(batch)
    launched = len(cupy.calls)
    for again in (lambda: model.predict(batch), lambda: load(small_model).predict(batch)):
        with pytest.raises(cnn.DeviceError, match=r"context is lost.*CNN_DEBUG=1"):
            again()
    assert len(cupy.calls) == launched
    with pytest.raises(gpu.CudaError, match="context is lost"):
        gpu.check_context(0)
    gpu.check_context(1)


@pytest.mark.parametrize("status", [214, 226, 700, 702, 710, *range(714, 720), 721, 810, 911])
def test_what_cuda_says_of_a_process_that_must_be_relaunched(cupy, status):
    with pytest.raises(gpu.CudaError, match=r"reported cudaError\. .*context is lost.*restart"), (
            gpu.using(0)):
        raise fake_cupy.Error("cudaError", status)
    with pytest.raises(gpu.CudaError, match="context is lost"):
        gpu.check_context(0)


@pytest.mark.parametrize("broken", ["Stream", "getDeviceProperties"])
def test_a_gpu_that_does_not_answer_can_not_be_used(cupy, small_model, broken, caplog):
    def fail(*_, **options):
        raise fake_cupy.Error("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or "
                              "unavailable", 46)
    setattr(cupy.cuda if broken == "Stream" else cupy.cuda.runtime, broken, fail)
    sentence = (r"device='cuda(:0)?' can not be used: GPU 0 does not answer: "
                r"cudaErrorDevicesUnavailable: .*; nvidia-smi shows whether another process has it")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(cnn.DeviceError, match=sentence):
            load(small_model, name)
    with caplog.at_level("INFO", logger="cnn"):
        assert cnn.load(small_model, device="auto").device == "cpu"
    assert re.search(sentence, caplog.text)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_illegal_access_is_said_of_arrays_of_the_gpu_too(cupy, small_model, dtype):
    model, x = load(small_model), cupy.asarray(batches(1)[0].astype(dtype))
    model.predict(x)
    cupy.illegal = {conv_kernel(model)}
    with cupy.cuda.Stream(non_blocking=True):
        model.predict(x)
    with pytest.raises(cnn.DeviceError, match=r"illegal memory access.*context is lost.*restart"):
        model._device.synchronize()
    replays = cupy.replays
    with pytest.raises(cnn.DeviceError, match=r"context is lost.*CNN_DEBUG=1"):
        model.predict(x)
    assert cupy.replays == replays


def test_a_context_that_others_have_lost_is_said_by_every_call(cupy, small_model):
    """By a kernel of their own on another GPU than the current one."""
    model, (batch,) = load(small_model, "cuda:1"), batches(1)
    model.predict(batch)
    cupy.dead = fake_cupy.Error("cudaErrorIllegalAddress", fake_cupy.ILLEGAL_ADDRESS)
    cupy.devices_fail = True
    with pytest.raises(cnn.DeviceError, match=r"GPU 1 reported cudaErrorIllegal.*restart"):
        model.predict(batch)


@pytest.mark.parametrize("devices_fail", [False, True])
def test_a_kernel_that_a_lost_context_does_not_take_is_named(cupy, devices_fail):
    x = cupy.asarray(np.ones(4, np.float32))
    cupy.dead = fake_cupy.Error("cudaErrorIllegalAddress", fake_cupy.ILLEGAL_ADDRESS)
    cupy.devices_fail = devices_fail
    with pytest.raises(gpu.CudaError, match=r"^clip.* could not be loaded on GPU 0, .*restart"):
        gpu.execute(prepare(Relu(), [TensorSpec((4,))], TensorSpec((4,)), [None],
                            CudaOptions()).bind([x], x, x))


def test_what_comes_of_a_lost_context_does_not_hide_what_was_launched(cupy, small_model):
    model, x = load(small_model), cupy.asarray(batches(1)[0])
    model.predict(x)
    cupy.dead = fake_cupy.Error("cudaErrorIllegalAddress", fake_cupy.ILLEGAL_ADDRESS)
    with pytest.raises(cnn.DeviceError, match=r"copy_f32_f16.* with grid .*context is lost"):
        model.predict(x)


def test_the_callers_device_and_stream_are_current_after_a_fault(cupy, small_model):
    model = load(small_model, "cuda:1")
    x = cupy.asarray(batches(1)[0])
    x.index = 1
    model.predict(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.launch_error = "cudaErrorInvalidConfiguration"
    with stream:
        with pytest.raises(cnn.DeviceError, match="could not be launched on GPU 1"):
            model.predict(x)
        assert cupy.cuda.get_current_stream() is stream
        assert cupy.cuda.runtime.getDevice() == 0


def test_debugging_names_the_layer(cupy, small_model, monkeypatch):
    monkeypatch.setenv("CNN_DEBUG", "1")
    model, (batch,) = load(small_model), batches(1)
    expected = load(small_model, "emulator").predict(batch)
    np.testing.assert_array_equal(model.predict(batch), expected)
    assert cupy.replays == 0
    cupy.illegal = {conv_kernel(model)}
    with pytest.raises(cnn.DeviceError, match=r"^layer 'conv': .*illegal memory access"):
        model.predict(batch)
