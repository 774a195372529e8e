"""A GPU through CuPy, which owns its memory and streams: what it is, and running launches on it.

A kernel's cubin is loaded once a device and launched with raw pointers; Numba's dispatcher, which
takes 7 to 41 us a launch, is not involved.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..axes import pixel_step
from ..device import DLPACK_CUDA
from .assembler import name_and_version
from .compiler import Kernel, cubin, overlaps
from .errors import CompilerMissing, CudaError, NoRoom
from .launch import Launch

LEAST_DRIVER = 13000        # CUDA 13.0, whose assembler makes the cubins; as the driver says it
OPT_IN_SHARED = 48 * 1024   # bytes of shared memory beyond which a kernel must ask
DYNAMIC_SHARED_SIZE = 8     # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# Errors after which CUDA refuses every call, by their numbers in both APIs (cudaError_t, CUresult):
# memory that can not be corrected, and those of which CUDA's headers say that the process must be
# relaunched: a fault that the GPU contained, an illegal access, a launch that took too long, an
# assert, from "hardware stack error" to "unspecified launch failure", tensor memory that leaked, a
# client that MPS ended, a device outside of CUDA.
STICKY = frozenset({214, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911})
OUT_OF_MEMORY = 2           # in both APIs, too
ACCESS = 16                 # bytes, the widest access of a kernel
NO_BINARY_FOR_GPU = 209     # CUresult, as is INVALID_IMAGE
INVALID_IMAGE = 200
SCALARS = {"int32": np.int32, "uint32": np.uint32, "uint64": np.uint64, "float32": np.float32}
C_TYPES = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "uint32": ctypes.c_uint32,
           "uint64": ctypes.c_uint64, "float32": ctypes.c_float}

_lost: dict[int, str] = {}      # by GPU: why nothing can run there any more


@dataclass(frozen=True)
class Gpu:
    """One GPU: its number, name, architecture such as "sm_90a", count of multiprocessors."""
    index: int
    name: str
    arch: str
    multiprocessors: int


@cache
def cupy() -> Any:
    """The module, once a GPU can be used by it. CudaError says what is missing otherwise."""
    try:
        import cupy as module
    except ImportError as error:
        raise CudaError(f"a GPU is used through CuPy, which can not be imported ({error}): "
                        f"pip install 'numba-cnn[cuda13]'") from error
    version = module.cuda.runtime.driverGetVersion()
    if version == 0:
        raise CudaError("no NVIDIA driver was found: install one of version 580 or newer, or use "
                        "the CPU")
    if version < LEAST_DRIVER:
        raise CudaError(f"the NVIDIA driver supports CUDA {cuda_version(version)} and the kernels "
                        f"are made by CUDA {cuda_version(LEAST_DRIVER)}: install a driver of "
                        f"version 580 or newer")
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        raise CudaError(f"no NVIDIA GPU can be used: {error}") from error
    if count == 0:
        raise CudaError("the NVIDIA driver sees no GPU; is CUDA_VISIBLE_DEVICES set to none?")
    return module


@cache
def bindings() -> Any:
    """CUDA's own driver module, for CuPy knows no attributes of launches. CudaError where it is
    missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaError(f"kernels are launched through CUDA's Python bindings on GPUs of sm_90 and "
                        f"newer, which can not be imported ({error}): pip install "
                        f"cuda-bindings") from error
    return driver


def faults() -> tuple[type[Exception], ...]:
    """What CuPy raises where the driver, or the runtime on it, refuses something."""
    return cupy().cuda.driver.CUDADriverError, cupy().cuda.runtime.CUDARuntimeError


def no_room(error: BaseException | None) -> bool:
    """Whether memory ran out: that of CuPy's pool, or the driver's, which loads kernels and graphs
    into some."""
    return isinstance(error, (NoRoom, cupy().cuda.memory.OutOfMemoryError)) or (
        isinstance(error, faults()) and getattr(error, "status", 0) == OUT_OF_MEMORY)


def with_room(make: Callable[[], Any]) -> Any:
    """What it returns. Where the driver has no room for it, CuPy's pool gives back what it keeps
    unused, which only the pool does by itself, and `make` is called once more."""
    try:
        return make()
    except faults() as error:
        if not no_room(error):
            raise
    cupy().get_default_memory_pool().free_all_blocks()
    return make()


def free_bytes(index: int) -> int:
    """What CuPy's pool can still get on a GPU, once it has given back what is unused."""
    with cupy().cuda.Device(index):
        free, _ = cupy().cuda.runtime.memGetInfo()
        pool = cupy().get_default_memory_pool()
        limit = pool.get_limit()
        return min(free, limit - pool.total_bytes()) if limit else free


def cuda_version(number: int) -> str:
    """ "13.0" of 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


@cache
def gpu(index: int) -> Gpu:
    """The GPU of this number. CudaError where there is none such, it is too old or out of order."""
    runtime = cupy().cuda.runtime
    count = runtime.getDeviceCount()
    if not 0 <= index < count:
        raise CudaError(f"there is no GPU {index}: this machine has {count}, numbered from 0")
    try:
        found = runtime.getDeviceProperties(index)
    except faults() as error:
        raise no_answer(error, index) from error
    major, minor, name = found["major"], found["minor"], found["name"].decode()
    if major * 10 + minor < 75:
        raise CudaError(f"GPU {index}, {name}, is of sm_{major}{minor}; the kernels need sm_75 "
                        f"(Turing) or newer")
    return Gpu(index, name, "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}",
               found["multiProcessorCount"])


@contextlib.contextmanager
def using(index: int) -> Iterator[None]:
    """Inside, a GPU is CuPy's current device; CudaError for what it refuses or reports, for memory
    that it has not, and at once where its context is lost."""
    check_context(index)
    try:
        with cupy().cuda.Device(index):
            yield
    except (NoRoom, cupy().cuda.memory.OutOfMemoryError, *faults()) as error:
        if not no_room(error):
            raise CudaError(explain(error, index)) from error
        raise NoRoom(f"GPU {index} has no room: {str(error).rstrip('.')}, and "
                     f"{free_bytes(index):,} bytes are free; use a smaller batch, or free other "
                     f"arrays") from error


def execute(launches: Iterable[Launch], overlapping: bool = False) -> None:
    """Put launches on CuPy's current stream of its current device, and return at once.

    overlapping: each but the first may begin before the one before it has ended, see overlap.py.
    """
    index = cupy().cuda.runtime.getDevice()
    for number, launch in enumerate(launches):
        kernel = launch.kernel
        args = [_argument(launch, kind, value, index)
                for kind, value in zip(kernel.signature, launch.args, strict=True)]
        function = load(kernel, index)
        try:
            early = overlapping and number > 0
            if early or launch.cluster > 1:
                launch_with_attributes(function, launch, args, early, index)
            else:
                function(launch.grid, (kernel.threads, 1, 1), args,
                         shared_mem=kernel.shared_bytes)
        except faults() as error:
            raise refusal(error)(f"{kernel.name} could not be launched on GPU {index} with grid "
                                 f"{launch.grid}: {explain(error, index)}") from error


def launch_with_attributes(function: Any, launch: Launch, args: Sequence[Any], early: bool,
                           index: int) -> None:
    """Put a launch on CuPy's current stream, of GPU `index`, its blocks in clusters.

    early: it may begin before what is there has ended. CudaError where the driver refuses.
    """
    driver = bindings()
    kinds, attributes = driver.CUlaunchAttributeID, []
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if launch.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = 1, launch.cluster, 1
        attributes.append(attribute)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.kernel.threads, 1, 1
    config.sharedMemBytes = launch.kernel.shared_bytes
    config.hStream = driver.CUstream(cupy().cuda.get_current_stream().ptr)
    config.attrs, config.numAttrs = attributes, len(attributes)
    signature = launch.kernel.signature
    values = tuple(value.data.ptr if kind == "pointer" else value.item()
                   for kind, value in zip(signature, args, strict=True))
    (status,) = driver.cuLaunchKernelEx(config, driver.CUfunction(function.ptr),
                                        (values, tuple(C_TYPES[kind] for kind in signature)), 0)
    if status:
        kind = NoRoom if int(status) == OUT_OF_MEMORY else CudaError
        raise kind(f"{launch.kernel.name} could not be launched on GPU {index} with grid "
                   f"{launch.grid}: {explained(int(status), status.name, index)}")


def capture(launches: Sequence[Launch]) -> Any:
    """The launches as one CUDA graph, on CuPy's current device.

    On GPUs that can, each begins before the one before it has ended (overlap.py). A graph knows
    addresses: whoever replays it holds on to the arrays. CudaError as of `execute`.
    """
    index = cupy().cuda.runtime.getDevice()
    for launch in launches:         # a module can not be loaded during capture
        load(launch.kernel, index)
    return with_room(lambda: _captured(launches, overlaps(gpu(index).arch)))


def _captured(launches: Sequence[Launch], overlapping: bool) -> Any:
    # Of its own: what other threads put on a stream meanwhile would become a part of the graph.
    stream = cupy().cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            execute(launches, overlapping)
        except CudaError:
            with contextlib.suppress(*faults()):    # it is about the same failure
                stream.end_capture()
            raise
        return stream.end_capture()


def refusal(error: Exception) -> type[CudaError]:
    """The kind of error that a driver's is told as."""
    return NoRoom if no_room(error) else CudaError


def explain(error: Exception, index: int) -> str:
    """What a driver's error means; one that loses the context is remembered."""
    return explained(getattr(error, "status", 0), str(error), index)


def no_answer(error: Exception, index: int) -> CudaError:
    """Of a driver's error where nothing but the GPU itself was asked for."""
    return CudaError(f"GPU {index} does not answer: {explain(error, index)}; nvidia-smi shows "
                     f"whether another process has it to itself or has taken its memory, and `cnn "
                     f"doctor` what other GPUs there are")


def explained(status: int, sentence: str, index: int) -> str:
    """The same, of its number and its sentence."""
    if status not in STICKY:
        return sentence
    _lost[index] = (f"GPU {index} reported {sentence}. With that, this process's CUDA context is "
                    f"lost, and all that was in it: restart the process. CNN_DEBUG=1 in its "
                    f"environment makes such an error name the layer")
    return _lost[index]


def check_context(index: int) -> None:
    """CudaError where an earlier error has lost this process's context on a GPU."""
    if index in _lost:
        raise CudaError(_lost[index])


@cache
def load(kernel: Kernel, index: int) -> Any:
    """The kernel as a function of CuPy on a device, compiled if need be."""
    found, driver = gpu(index), cupy().cuda.driver
    code = _cubin(kernel, found.arch)
    try:
        with cupy().cuda.Device(index):
            module = cupy().cuda.function.Module()
            with_room(lambda: module.load(code))
            function = module.get_function(kernel.name)
            if kernel.shared_bytes > OPT_IN_SHARED:
                driver.funcSetAttribute(function.ptr, DYNAMIC_SHARED_SIZE, kernel.shared_bytes)
    except faults() as error:
        raise refusal(error)(f"{kernel.name}, compiled for {found.arch}, could not be loaded "
                             f"on GPU {index}, {found.name}: {explain(error, index)}"
                             f"{_remedy(error, found.arch)}") from error
    return function


def _cubin(kernel: Kernel, arch: str) -> bytes:
    """The kernel's machine code; CompilerMissing also says what $CNN_CUBINS has instead."""
    try:
        return cubin(kernel, arch)
    except CompilerMissing as error:
        shipped = os.environ.get("CNN_CUBINS")
        if not shipped:
            raise
        files = Path(shipped).glob(f"{kernel.name}-*.cubin")
        others = sorted({path.name.split(".")[-2] for path in files})
        there = f"has it only for {', '.join(others)}" if others else "has it for no architecture"
        raise CompilerMissing(f"CNN_CUBINS={shipped} {there}, in other versions, or of other "
                              f"sources, and this GPU is {arch}. {error}") from error


def _remedy(error: Exception, arch: str) -> str:
    """What to do about machine code that the driver does not take."""
    status = getattr(error, "status", None)
    if status == NO_BINARY_FOR_GPU:
        return (f". It was made for another GPU: empty the folder that `cnn doctor` calls cache, "
                f"or fill CNN_CUBINS by `python -m kernels.cuda.build --arch {arch}`")
    if status == INVALID_IMAGE:
        driver = cuda_version(cupy().cuda.runtime.driverGetVersion())
        return (f". Machine code is made by {name_and_version()}, and the driver supports CUDA "
                f"{driver}: where that is older, install a newer driver, or pip install "
                f"'nvidia-cuda-nvcc=={driver}.*' 'nvidia-nvvm=={driver}.*' and empty the folder "
                f"that `cnn doctor` calls cache")
    return ""


def _argument(launch: Launch, kind: str, value: Any, index: int) -> Any:
    """A number in the width that the kernel reads; an array as it is, if the kernel can use it."""
    if kind != "pointer":
        return SCALARS[kind](value)
    name = launch.kernel.name
    if not isinstance(value, cupy().ndarray):
        raise TypeError(f"{name} takes CuPy arrays, not {type(value).__name__}; convert it with "
                        f"cupy.asarray(x)")
    if value.device.id != index:
        raise ValueError(f"{name} runs on GPU {index} and was given an array on GPU "
                         f"{value.device.id}; copy it, or switch with cupy.cuda.Device")
    try:
        pixel_step(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; convert it with cupy.ascontiguousarray(x)") from None
    return value


def aligned(array: Any) -> Any:
    """A CuPy array, C-contiguous, whose address suits the kernels, which access 16 bytes at a time:
    itself, or a copy of it, on the current stream."""
    if array.data.ptr % ACCESS == 0:
        return array
    there = cupy().empty(array.shape, array.dtype)      # copy() would have CuPy compile a kernel
    there.data.copy_from_device_async(array.data, array.nbytes)
    return there


def adopted(array: Any) -> Any:
    """Another library's array of a GPU as CuPy's, in the same memory.

    By DLPack where it can be: `__cuda_array_interface__` has no bfloat16, and PyTorch's tensors do
    not say by it on which stream they are still computed.
    """
    device = getattr(array, "__dlpack_device__", None)
    if device is not None and device()[0] == DLPACK_CUDA:
        try:
            return cupy().from_dlpack(array)
        except BufferError:     # PyTorch gives nothing to a thread's own default stream
            if not hasattr(array, "__cuda_array_interface__"):
                raise
    return cupy().asarray(array)
