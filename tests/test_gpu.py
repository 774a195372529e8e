"""Whole networks on a GPU through every way in and out; the same on the stand-in for CuPy, which
shows that these tests are sound where there is no GPU."""
import contextlib
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import networks
import numpy as np
import pytest

import cnn
from kernels import ops
from kernels.cuda import gpu
from kernels.cuda.backend import prepare
from kernels.cuda.launch import CudaOptions

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cupy(request, machine):
    """The module: the stand-in, or the real one."""
    return machine() if request.param == "stand-in" else gpu.cupy()


@pytest.fixture
def model(small_model, cupy):
    return cnn.load(small_model, device="cuda", preprocess="imagenet")


@pytest.fixture
def on_cpu(small_model):
    return cnn.load(small_model, device="cpu", preprocess="imagenet")


def batches(count, size=2):
    return [RNG.standard_normal((size, 16, 16, 3)).astype(np.float32) for _ in range(count)]


def assert_near(found, expected):
    """float32 sums of 72 terms in another order, and probabilities of 10 classes."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_batches_in_flight(model, on_cpu):
    given = batches(6)
    for found, batch in zip(model.predict_batches(iter(given)), given, strict=True):
        assert_near(found, on_cpu.predict(batch))


def test_runs_give_the_same_bits(model):
    batch, = batches(1, 3)
    first = model.predict(batch)
    assert all(np.array_equal(model.predict(batch), first) for _ in range(5))


def test_photos(model, on_cpu):
    photos = sorted((ROOT / "tests" / "data").glob("*.png"))
    for found, expected in zip(model.classify(photos, batch_size=2),
                               on_cpu.classify(photos, batch_size=2), strict=True):
        assert_near([one.probability for one in found], [one.probability for one in expected])


def test_the_files_own_layout(model, on_cpu):
    batch = {"input": RNG.standard_normal((2, 3, 16, 16)).astype(np.float32)}
    assert_near(model.run(batch)["logits"], on_cpu.run(batch)["logits"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_of_the_gpu_on_a_stream_of_the_caller(cupy, model, on_cpu, dtype):
    batch = batches(1)[0].astype(dtype)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.empty(batch.shape, batch.dtype)
        x.set(batch)
        y = model.predict(x)
        x.set(np.full_like(batch, np.nan))
        assert isinstance(y, cupy.ndarray)
        found = y.get()
    assert_near(found, on_cpu.predict(batch.astype(np.float32)))


def test_streams_and_the_host_take_turns(cupy, model, on_cpu, request):
    """No run is awaited before all are begun, and each input is overwritten at once."""
    rounds = 50 if "gpu" in request.node.callspec.id else 2
    given = batches(4 * rounds, 16)
    a, b = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    begun = []
    for batch, stream in zip(given, itertools.cycle([a, b, cupy.cuda.Stream.null, None]),
                             strict=False):
        if stream is None:
            begun.append(model._start(batch))
            continue
        with stream:
            x = cupy.empty(batch.shape, batch.dtype)
            x.set(batch)
            y = model.predict(x)
            x.set(np.full_like(batch, np.nan))
        begun.append(functools.partial(y.get, stream))
    for finish, batch in zip(begun, given, strict=True):
        assert_near(finish(), on_cpu.predict(batch))


class Foreign:
    def __init__(self, array):
        self.memory = array


class Interface(Foreign):
    """An array of a library that speaks `__cuda_array_interface__` and nothing else."""

    @property
    def __cuda_array_interface__(self):
        return self.memory.__cuda_array_interface__


class Dlpack(Foreign):
    """An array of a library that speaks DLPack and nothing else."""

    def __dlpack__(self, **options):
        return self.memory.__dlpack__(**options)

    def __dlpack_device__(self):
        return 2, 0


def test_a_capture_of_the_caller_is_left_alone(cupy, model, on_cpu):
    (batch,) = batches(1)
    x, stream = cupy.asarray(batch), cupy.cuda.Stream(non_blocking=True)
    copy = cupy.empty(x.shape, x.dtype)
    assert_near(cupy.asnumpy(model.predict(x)), on_cpu.predict(batch))
    with stream:
        stream.begin_capture()
        with pytest.raises(cnn.DeviceError, match=r"capturing a CUDA graph.* between your graphs"):
            model.predict(x)
        copy.data.copy_from_device_async(x.data, x.nbytes, stream)
        graph = stream.end_capture()
        found = model.predict(x)
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(copy), batch)
    assert_near(cupy.asnumpy(found), on_cpu.predict(batch))


@pytest.mark.parametrize("protocol", [Interface, Dlpack])
def test_arrays_of_other_libraries(cupy, model, on_cpu, protocol):
    batch, = batches(1)
    found = model.predict(protocol(cupy.asarray(batch)))
    assert isinstance(found, cupy.ndarray)
    assert_near(cupy.asnumpy(found), on_cpu.predict(batch))
    planes = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    found = model.run({"input": protocol(cupy.asarray(planes))})["logits"]
    assert_near(cupy.asnumpy(found), on_cpu.run({"input": planes})["logits"])


def test_arrays_of_the_gpu_at_any_address(cupy, model, on_cpu):
    """A kernel's access of 16 bytes that is not aligned would cost the process its context."""
    memory = cupy.asarray(RNG.standard_normal(16 * 16 * 3 + 8).astype(np.float32))
    for first in (1, 2, 4, 7):
        batch = memory[first:first + 16 * 16 * 3].reshape(1, 16, 16, 3)
        assert_near(cupy.asnumpy(model.predict(batch)), on_cpu.predict(cupy.asnumpy(batch)))


@pytest.mark.gpu
def test_threads_run_while_others_prepare(small_model, on_cpu):
    """Each of four threads asks for eight shapes in an order of its own."""
    model, given = cnn.load(small_model, device="cuda", preprocess="imagenet"), {
        size: batches(1, size)[0] for size in range(1, 9)}
    expected = {size: on_cpu.predict(batch) for size, batch in given.items()}

    def run(seed):
        sizes = np.random.default_rng(seed).permutation(list(given) * 5).tolist()
        return [(size, model.predict(given[size])) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(4)):
            for size, probabilities in found:
                assert_near(probabilities, expected[size])


@pytest.fixture
def launch(cupy):
    """Of a convolution."""
    spec = ops.TensorSpec((1, 4, 4, 8))
    options = CudaOptions(arch=gpu.gpu(0).arch, upload=cupy.asarray)
    weight = np.ones((8, 1, 1, 8), np.float32)
    step = prepare(ops.Conv2d(), [spec, ops.TensorSpec(weight.shape)], spec, [None, weight],
                   options)
    x = cupy.asarray(np.ones(spec.shape, np.float32))
    launch, *_ = step.bind([x], cupy.empty(spec.shape, np.float32),
                           cupy.empty(step.workspace, np.uint8))
    return launch


def changed(launch, **kernel):
    return dataclasses.replace(launch, kernel=dataclasses.replace(launch.kernel, **kernel))


def test_a_kernel_that_wants_too_much_shared_memory_leaves_the_gpu_usable(launch, model, on_cpu):
    with pytest.raises(gpu.CudaError, match=rf"^{launch.kernel.name}\b.* could not be loaded on"):
        gpu.execute([changed(launch, shared_bytes=1 << 20)])
    batch, = batches(1)
    assert_near(model.predict(batch), on_cpu.predict(batch))


def test_a_launch_of_too_many_threads_leaves_the_gpu_usable(launch, model, on_cpu, monkeypatch):
    """Of a kernel that is loaded, so that it is the launch that the driver refuses."""
    function = gpu.load(launch.kernel, 0)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "load", lambda kernel, index: function)
        with pytest.raises(gpu.CudaError, match=f"^{launch.kernel.name} could not be launched on"):
            gpu.execute([changed(launch, threads=2048)])
    batch, = batches(1)
    assert_near(model.predict(batch), on_cpu.predict(batch))


@contextlib.contextmanager
def crowded(cupy, left):
    """The GPU with `left` bytes free."""
    free, _ = cupy.cuda.runtime.memGetInfo()
    if hasattr(cupy, "free"):
        cupy.free = left
        yield
        cupy.free = free
    else:
        taken = cupy.empty(max(0, free - left), np.uint8)
        yield
        del taken
        cupy.get_default_memory_pool().free_all_blocks()    # other processes need some, too


def test_running_out_of_memory_leaves_the_gpu_usable(cupy, model, on_cpu):
    batch, = batches(1)
    with crowded(cupy, 64 << 20), pytest.raises(
            cnn.DeviceError, match=r"no room for the values .* a batch of \d+ would fit"):
        model.predict(np.zeros((50_000, 16, 16, 3), np.float32))
    assert_near(model.predict(batch), on_cpu.predict(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("debug", ["", "1"])
def test_an_illegal_access_is_a_sentence(small_model, debug):
    """Weights at an address that nobody owns, in a process of their own: its context is lost."""
    script = f"""
import cupy, numpy as np
import cnn
from cnn.gpu_device import CudaDevice
def nowhere(device, array):
    memory = cupy.cuda.UnownedMemory(1 << 46, array.nbytes, None, 0)
    return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0))
CudaDevice._upload = nowhere
model = cnn.load({str(small_model)!r}, device="cuda")
for _ in range(2):
    try:
        model.predict(np.zeros((1, 16, 16, 3), np.float32))
    except cnn.DeviceError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          check=False, env={**os.environ, "CNN_DEBUG": debug})
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "context is lost" in first
    assert "context is lost" in second
    assert first.startswith("layer 'conv': ") == bool(debug)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_the_embedded_network_sees_the_cat(dtype):
    photo = ROOT / "examples" / "cat.jpg"
    expected = cnn.load(device="cpu").classify(photo)
    found = cnn.load(device="cuda", dtype=dtype).classify(photo)
    assert found[0].label == expected[0].label
    assert abs(found[0].probability - expected[0].probability) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_clusters_run_in_a_graph(dtype):
    """Their blocks may come before the kernel before them has ended, again and again."""
    model, on_cpu = (cnn.load(device=device, **options) for device, options in (
        ("cuda", {"dtype": dtype}), ("cpu", {})))
    photo = on_cpu.preprocess([ROOT / "examples" / "cat.jpg"])
    if gpu.gpu(0).arch == "sm_90a":
        assert any("cluster" in row.kernel for row in model.summary(1).rows)
    first = model.predict(photo)
    assert np.abs(first - on_cpu.predict(photo)).max() < 0.02
    for _ in range(200):
        np.testing.assert_array_equal(model.predict(photo), first)


@pytest.mark.gpu
def test_a_large_network_does_not_grow(tmp_path):
    import onnx
    onnx.save(networks.build("mobilenet_v2"), tmp_path / "net.onnx")
    model = cnn.load(tmp_path / "net.onnx", device="cuda", dtype="float16")
    batch = RNG.standard_normal((8, 224, 224, 3)).astype(np.float32)
    pool = gpu.cupy().get_default_memory_pool()
    for _ in range(3):
        model.predict(batch)
    held = pool.total_bytes()
    for _ in range(200):
        model.predict(batch)
    assert pool.total_bytes() == held
    model.release()
    assert pool.used_bytes() < held
