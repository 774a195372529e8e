"""`kernels.conv2d` and its siblings on arrays of a GPU, and what is said where there is none."""
from types import SimpleNamespace

import fake_cupy
import ml_dtypes
import numpy as np
import pytest
from checks import integers

import kernels
from cnn import DeviceError, load
from kernels import ops, reference
from kernels.cuda import gpu
from kernels.cuda.errors import CompilerMissing, CudaError


def arrays(cupy, *shape, dtype="float32", seed=0):
    """The same whole numbers (on the host, on the GPU)."""
    host = integers(np.random.default_rng(seed), *shape)
    return host, cupy.asarray(host.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_convolution_gives_an_array_of_the_gpu(machine, dtype):
    cupy = machine()
    x, x_gpu = arrays(cupy, 1, 6, 7, 8, dtype=dtype)
    weight, weight_gpu = arrays(cupy, 16, 3, 3, 8, dtype=dtype, seed=1)
    bias, residual = np.ones(16, np.float32), integers(np.random.default_rng(2), 1, 6, 7, 16)
    y = kernels.conv2d(x_gpu, weight_gpu, bias, padding=1, activation=ops.Relu(),
                       residual=cupy.asarray(residual.astype(dtype)))
    assert isinstance(y, cupy.ndarray)
    assert y.dtype == dtype
    expected = reference.run(ops.Conv2d(padding=(1, 1, 1, 1), activation=ops.Relu()), x, weight,
                             bias, residual)
    np.testing.assert_array_equal(y, expected)
    assert cupy.calls[-1].name.startswith("conv_")


@pytest.mark.parametrize("call", [
    lambda x: kernels.max_pool2d(x, 3, 2, 1), lambda x: kernels.avg_pool2d(x, 2),
    lambda x: kernels.relu(x), lambda x: kernels.add(x, x), lambda x: kernels.concat([x, x], 1),
    lambda x: kernels.batch_norm(x, *np.float32([[0] * 8, [1] * 8, [2] * 8, [3] * 8]), eps=0.0),
    lambda x: kernels.linear(x, np.ones((3, 8), np.float32)),
    lambda x: kernels.global_avg_pool2d(x)])
def test_siblings_agree_with_the_cpu(machine, call):
    x, x_gpu = arrays(machine(), 1, 4, 4, 8)
    np.testing.assert_allclose(call(x_gpu), call(x), rtol=1e-6)


def test_arguments_are_packed_in_the_kernels_widths(machine):
    cupy = machine()
    x = arrays(cupy, 100)[1]
    kernels.clip(x, -1.0, 1.0)
    a, *_, elements, low, high = cupy.calls[-1].args
    assert a is x
    assert [type(value) for value in (elements, low, high)] == [np.uint32, np.float32, np.float32]
    assert cupy.calls[-1].block == (256, 1, 1)


def test_much_shared_memory_is_asked_for_once_a_kernel(machine):
    cupy = machine()
    x, weight = arrays(cupy, 1, 4, 4, 64, dtype="float16")[1], np.ones((64, 1, 1, 64), np.float32)
    kernels.conv2d(x, weight)
    shared = cupy.calls[-1].shared
    assert cupy.attributes == ({gpu.DYNAMIC_SHARED_SIZE: shared} if shared > 49152 else {})
    assert gpu.load.cache_info().misses == 1
    kernels.conv2d(x, weight)
    assert gpu.load.cache_info().misses == 1


def test_foreign_arrays_are_taken_by_either_protocol(machine):
    cupy = machine()
    host, x = arrays(cupy, 3, 8)
    interface = SimpleNamespace(__cuda_array_interface__={}, memory=x)
    dlpack = SimpleNamespace(__dlpack_device__=lambda: (2, 0), memory=x)
    for foreign in (interface, dlpack):
        np.testing.assert_array_equal(kernels.relu(foreign), np.maximum(host, 0))


def test_a_foreign_array_of_bfloat16(machine):
    """Of a library that speaks both protocols, as PyTorch does."""
    host, x = arrays(machine(), 3, 8, dtype=ml_dtypes.bfloat16)
    foreign = SimpleNamespace(__cuda_array_interface__={}, __dlpack_device__=lambda: (2, 0),
                              memory=x)
    found = kernels.relu(foreign)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), np.maximum(host, 0))


def test_a_foreign_array_that_is_not_given_by_dlpack(machine, monkeypatch):
    def refuse(array):
        raise BufferError("per-thread default stream is not supported.")
    cupy = machine()
    host, x = arrays(cupy, 3, 8)
    monkeypatch.setattr(cupy, "from_dlpack", refuse)
    foreign = SimpleNamespace(__dlpack_device__=lambda: (2, 0), memory=x)
    with pytest.raises(BufferError, match="per-thread"):
        kernels.relu(foreign)
    foreign.__cuda_array_interface__ = {}
    np.testing.assert_array_equal(kernels.relu(foreign), np.maximum(host, 0))


def test_foreign_weights_are_taken_too(machine):
    cupy = machine()
    host, x = arrays(cupy, 3, 8)
    weight, weight_gpu = arrays(cupy, 5, 8, seed=1)
    foreign = SimpleNamespace(__dlpack_device__=lambda: (2, 0), memory=weight_gpu, shape=(5, 8))
    np.testing.assert_array_equal(kernels.linear(x, foreign), host @ weight.T)


def test_the_result_lies_where_the_inputs_do(machine):
    cupy = machine(capabilities=((9, 0), (8, 0)))
    with cupy.cuda.Device(1):
        x = arrays(cupy, 8)[1]
    assert kernels.relu(x).device.id == 1
    assert cupy.calls[-1].device == 1


def test_arrays_that_do_not_fit_are_refused(machine):
    cupy = machine(capabilities=((9, 0), (8, 0)))
    x = arrays(cupy, 4, 8)[1]
    with pytest.raises(TypeError, match=r"one of \('float32', 'float16', 'bfloat16'\), not"):
        kernels.relu(cupy.asarray(np.zeros(3)))
    with pytest.raises(TypeError, match="arrays of one dtype"):
        kernels.add(x, cupy.asarray(np.zeros((4, 8), np.float16)))
    with pytest.raises(ValueError, match=r"C-contiguous arrays, not strides \(4, 32\) of shape"):
        kernels.relu(x.T)
    with pytest.raises(TypeError, match="one that is not, a ndarray"):
        kernels.add(x, np.zeros((4, 8), np.float32))
    with pytest.raises(ValueError, match="threads=2 is for the CPU"):
        kernels.relu(x, threads=2)
    with cupy.cuda.Device(1):
        other = arrays(cupy, 4, 8)[1]
    with pytest.raises(ValueError, match="on GPU 0 and on GPU 1"):
        kernels.add(x, other)
    assert cupy.calls == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_may_lie_at_any_address(machine, dtype):
    cupy = machine()
    memory = cupy.asarray((np.arange(200, dtype=np.float32) - 90).astype(dtype))
    for first in (0, 1, 2, 3):
        part = memory[first:first + 64]
        found = kernels.add(kernels.relu(part), part)
        np.testing.assert_array_equal(cupy.asnumpy(found), np.maximum(part, 0) + np.array(part))
    assert cupy.compiled == 0


def test_an_empty_array_needs_no_launch(machine):
    cupy = machine()
    assert kernels.relu(cupy.asarray(np.zeros((0, 3), np.float32))).shape == (0, 3)
    assert cupy.calls == []


@pytest.mark.parametrize(("options", "message"), [
    ({"driver": 0}, "no NVIDIA driver was found"),
    ({"driver": 12040}, "supports CUDA 12.4 and the kernels are made by CUDA 13.0: install"),
    ({"capabilities": ()}, "sees no GPU"),
    ({"capabilities": ((7, 0),)}, "Fake GPU, is of sm_70; the kernels need sm_75"),
])
def test_a_machine_that_can_not_is_told_why(machine, options, message):
    cupy = machine(**options)
    with pytest.raises(CudaError, match=message):
        kernels.relu(cupy.asarray(np.zeros(3, np.float32)))


def test_a_gpu_too_old_for_the_dtype_is_told_what_works(machine, monkeypatch):
    cupy = machine(capabilities=((7, 5),))
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy)
    with pytest.raises(CudaError, match="needs a GPU of sm_80 or newer and this one is sm_75; use "
                                        "dtype='float32'"):
        kernels.relu(cupy.asarray(np.zeros(3, np.float16)))


def test_cupy_missing(machine, monkeypatch):
    cupy = machine()
    x = cupy.asarray(np.zeros(3, np.float32))
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(CudaError, match=r"pip install 'numba-cnn\[cuda13\]'"):
        kernels.relu(x)


def test_a_gpu_that_is_not_there(machine):
    machine()
    with pytest.raises(CudaError, match="there is no GPU 3: this machine has 1"):
        gpu.gpu(3)


def test_errors_of_the_driver_name_the_kernel(machine):
    cupy = machine()
    x = cupy.asarray(np.zeros(3, np.float32))
    cupy.load_error = "CUDA_ERROR_NO_BINARY_FOR_GPU"
    with pytest.raises(CudaError, match="clip_f32x4, compiled for sm_90a, could not be loaded on "
                                        "GPU 0, Fake GPU: CUDA_ERROR_NO_BINARY"):
        kernels.relu(x)
    cupy.load_error, cupy.launch_error = "", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
    with pytest.raises(CudaError, match=r"clip_f32x4 could not be launched on GPU 0 with grid "
                                        r"\(1, 1, 1\): CUDA_ERROR_LAUNCH"):
        kernels.relu(x)


def test_after_an_illegal_access_every_call_says_so_at_once(machine):
    cupy = machine(capabilities=((9, 0), (8, 0)))
    x = arrays(cupy, 4, 8)[1]
    foreign = SimpleNamespace(__cuda_array_interface__={}, memory=x)
    kernels.relu(x)
    cupy.illegal = {cupy.calls[-1].name}
    kernels.relu(x)                 # the launch is accepted, and what it did is known later
    with pytest.raises(CudaError, match=r"GPU 0 reported .*illegal memory access.*context is lost"):
        kernels.add(x, x)
    launched, cupy.empty = len(cupy.calls), lambda *_: pytest.fail("the GPU was asked again")
    for again in (lambda: kernels.relu(x), lambda: kernels.relu(foreign)):
        with pytest.raises(CudaError, match=r"context is lost.*restart the process"):
            again()
    assert len(cupy.calls) == launched
    with pytest.raises(DeviceError, match="context is lost"):
        load(device="cuda")
    gpu.check_context(1)


def test_a_loss_that_is_noticed_while_arrays_are_taken(machine):
    cupy = machine()
    foreign = SimpleNamespace(__cuda_array_interface__={}, memory=arrays(cupy, 4, 8)[1])
    kernels.relu(foreign)

    def asarray(array):
        raise fake_cupy.Error("cudaErrorIllegalAddress", fake_cupy.ILLEGAL_ADDRESS)
    cupy.asarray = asarray
    with pytest.raises(CudaError, match="context is lost"):
        kernels.relu(foreign)


@pytest.mark.parametrize("call", [
    lambda x: kernels.relu(x), lambda x: kernels.linear(x, np.ones((3, 8), np.float32))])
def test_no_room_is_a_sentence_and_leaves_the_gpu_usable(machine, call):
    cupy = machine()
    host, x = arrays(cupy, 4, 8)
    room, cupy.free = cupy.free, 40
    with pytest.raises(CudaError, match=r"GPU 0 has no room: Out of memory allocating \d+ bytes, "
                                        r"and 40 bytes are free; use a smaller batch"):
        call(x)
    cupy.free = room
    np.testing.assert_array_equal(call(x), call(host))


@pytest.mark.parametrize(("status", "remedy"), [
    (209, "made for another GPU: empty .* or fill CNN_CUBINS by .* --arch sm_90a"),
    (200, r"made by ptxas \d+\.\d+, /.*ptxas, and the driver supports CUDA 13.0: .* pip install "
          r"'nvidia-cuda-nvcc==13.0.\*' .* empty the folder that `cnn doctor` calls cache")])
def test_machine_code_that_a_driver_does_not_take(machine, status, remedy):
    cupy = machine()
    cupy.load_error, cupy.load_status = "CUDA_ERROR", status
    with pytest.raises(CudaError, match=remedy):
        kernels.relu(cupy.asarray(np.zeros(3, np.float32)))


def test_shipped_kernels_for_another_gpu_only(machine, monkeypatch, tmp_path):
    cupy = machine()

    def missing(kernel, arch):
        raise CompilerMissing("no compiler")
    monkeypatch.setattr(gpu, "cubin", missing)
    monkeypatch.setenv("CNN_CUBINS", str(tmp_path))
    x = cupy.asarray(np.zeros(3, np.float32))
    with pytest.raises(CudaError, match=r"has it for no architecture.* this GPU is sm_90a"):
        kernels.relu(x)
    (tmp_path / "clip_f32x4-0123456789ab.sm_80.cubin").touch()
    with pytest.raises(CudaError, match=r"only for sm_80.* this GPU is sm_90a. no compiler"):
        kernels.relu(x)
