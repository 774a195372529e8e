"""A GPU: CuPy owns its memory and streams, and a whole network is one CUDA graph.

A batch of the host's goes through three streams, so that the upload of the next one and the
download of the last one overlap with the kernels of this one. Events order them; the host waits
only for a result. What lies on the GPU is run on the caller's stream, see Turns.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kernels.cuda import gpu, tuned
from kernels.cuda.compiler import number_of
from kernels.cuda.errors import CudaError
from kernels.cuda.launch import CudaOptions, Launch
from kernels.device import on_gpu
from kernels.ops import Shape, TensorSpec, count, known
from kernels.step import Array

from .cuda_devices import NUMPY, CudaKernels, entry, source_of, widen
from .devices import Fetch, Fill, Run, Turn
from .errors import DeviceError, OutOfMemory

PER_THREAD = 2              # cudaStreamPerThread: another stream in each thread
WORDS = {4: np.uint32, 2: np.uint16}
NAMES = {dtype: name for name, dtype in NUMPY.items()}      # an array tells its own slowly


class CudaDevice(CudaKernels):
    """One GPU.

    Once it has reported an illegal access nothing runs there any more in this process, and every
    call says so. CNN_DEBUG=1 in the environment runs layers one by one, each awaited, so that such
    an error names its layer.
    """

    def __init__(self, index: int, dtype: str = "float32") -> None:
        """CudaError where the GPU can not be used, DeviceError where it can not in this dtype."""
        super().__init__(f"cuda:{index}", dtype)
        self._gpu, self._cupy = gpu.gpu(index), gpu.cupy()
        self.index = index
        if dtype != "float32" and number_of(self._gpu.arch) < 80:
            raise DeviceError(f"dtype={dtype!r} needs a GPU of sm_80 or newer, and {self.name}, "
                              f"{self._gpu.name}, is {self._gpu.arch}; use dtype='float32'")
        gpu.check_context(index)
        device = self._cupy.cuda.Device(index)
        try:
            with device:
                self.stream, self._uploads, self._downloads = (
                    self._cupy.cuda.Stream(non_blocking=True) for _ in range(3))
                _, self.memory = self._cupy.cuda.runtime.memGetInfo()
        except gpu.faults() as error:
            raise gpu.no_answer(error, index) from error
        self.guard = Guard(index, device)

    # ---- memory -------------------------------------------------------------------------------

    def options(self) -> CudaOptions:
        return CudaOptions(dtype=self.dtype, arch=self._gpu.arch,
                           multiprocessors=self._gpu.multiprocessors, upload=self._upload,
                           tuned=tuned.load(self._gpu))

    def _upload(self, array: Array) -> Array:
        """A constant on the GPU. bfloat16 lies there as the bits that it is."""
        try:
            there = self.allocate(array.nbytes)
        except OutOfMemory as error:
            raise OutOfMemory(self.name, error.needed, error.free, (
                "the weights of one more layer", "release() another model, or end the process "
                "that takes the memory")) from None
        with self.guard, self.stream:
            there.set(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        words = array.dtype if array.dtype != NUMPY["bfloat16"] else WORDS[2]
        return there.view(words).reshape(array.shape)

    def allocate(self, size: int) -> Any:
        """OutOfMemory where CuPy's pool can not get as many bytes, even after freeing its own."""
        with self.guard, self.stream:
            return self._empty((size,), np.uint8)

    def _empty(self, shape: Shape, dtype: type[np.generic]) -> Any:
        """Memory of the current stream: CuPy's pool gives it on only in the order of that one."""
        try:
            return self._cupy.empty(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError:
            needed = count(shape) * np.dtype(dtype).itemsize
            raise OutOfMemory(self.name, needed, gpu.free_bytes(self.index)) from None

    def pinned(self, size: int) -> Array:
        """Bytes of the host through which the GPU copies while others work."""
        try:
            memory = self._cupy.cuda.alloc_pinned_memory(max(1, size))
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            if not gpu.no_room(error):
                raise
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            raise OutOfMemory("the host", size, free, (
                f"pinned memory, through which a batch goes to {self.name} and back",
                "use a smaller batch")) from None
        return np.frombuffer(memory, np.uint8, size)

    def view(self, block: Array, spec: TensorSpec) -> Array:
        size = NUMPY[spec.dtype].itemsize
        return block[:count(spec.shape) * size].view(WORDS[size]).reshape(known(spec.shape))

    def synchronize(self) -> None:
        with self.guard:
            for stream in (self._uploads, self.stream, self._downloads):
                stream.synchronize()

    def release(self) -> None:
        """Give memory that nobody holds any more back to the driver."""
        with self.guard:
            self._cupy.get_default_memory_pool().free_all_blocks()
            self._cupy.get_default_pinned_memory_pool().free_all_blocks()

    # ---- running ------------------------------------------------------------------------------

    def turns(self) -> Turn:
        return Turns(self)

    def event(self) -> Any:
        """What waits for an event waits for what was recorded last: one serves run after run."""
        with self.guard:
            return self._cupy.cuda.Event(disable_timing=True)

    def callers_stream(self) -> Any:
        """Outside of `with self.stream`."""
        return self._cupy.cuda.get_current_stream(self.index)

    def compile(self, steps: Sequence[tuple[str, Sequence[Launch]]]) -> Run:
        """All steps as one CUDA graph."""
        launches = [launch for _, of_step in steps for launch in of_step]
        if os.environ.get("CNN_DEBUG") == "1" or not launches:
            return lambda stream: self._one_by_one(steps, stream)
        with self.guard, self.stream:
            graph = gpu.capture(launches)

        def replay(stream: Any) -> None:
            assert launches         # they hold the memory that the graph uses
            graph.launch(stream)
        return replay

    def _one_by_one(self, steps: Sequence[tuple[str, Sequence[Launch]]], stream: Any) -> None:
        for layer, launches in [("(input)", ()), *steps]:
            try:
                with self.guard, stream:
                    gpu.execute(launches)
                    stream.synchronize()
            except OutOfMemory:         # of no layer's doing
                raise
            except DeviceError as error:
                raise DeviceError(f"layer {layer!r}: {error}") from error

    # ---- in and out ---------------------------------------------------------------------------

    def adopt(self, array: Any) -> Any:
        if not isinstance(array, self._cupy.ndarray):
            with self.guard:
                array = gpu.adopted(array)
        index = array.data.device_id        # array.device is an object, made anew
        if index != self.index:
            raise DeviceError(f"the array lies on GPU {index} and the model runs on "
                              f"{self.name}: copy it, or load the model there")
        return array

    def inlet(self, value: Any, spec: TensorSpec, readers: Sequence[Any]) -> Fill:
        stages: list[Stage] = []
        as_it_is, size = NUMPY[spec.dtype], value.nbytes
        event = self.event()

        def fill(array: Any, stream: Any) -> None:
            if not on_gpu(array):
                self._send(array, value, spec, stages, stream)
                return
            if stream is self.stream:
                follow(stream, self.callers_stream(), event)
            if array.dtype == as_it_is and array.flags.c_contiguous:
                value.data.copy_from_device_async(array.data, size, stream)
                return
            memory, source = source_of(array, NAMES[array.dtype])
            with stream:
                gpu.execute(entry(source, spec).bind([gpu.aligned(memory)], value, value))
        return fill

    def _send(self, array: Array, value: Any, spec: TensorSpec, stages: list[Stage],
              stream: Any) -> None:
        """Fill from memory of the host."""
        memory, source = source_of(array, "float32")
        stage = self._free_stage(stages, memory.nbytes)
        there = stage.upload(memory, self._uploads)
        stream.wait_event(stage.uploaded)
        with stream:
            gpu.execute(entry(source, spec).bind([there], value, value))
        stage.consumed.record(stream)

    def _free_stage(self, stages: list[Stage], size: int) -> Stage:
        """One that no batch is in; a second one comes with the first batch that would wait."""
        free = next((stage for stage in stages if stage.consumed.done), None)
        if free is None and len(stages) < 2:
            stages.append(self._new_stage(size))
            return stages[-1]
        free = free or stages[0]
        free.consumed.synchronize()
        if free.size < size:
            stages[stages.index(free)] = free = self._new_stage(size)
        stages.append(stages.pop(stages.index(free)))       # the one used longest ago is first
        return free

    def _new_stage(self, size: int) -> Stage:
        stage = Stage(self, self.allocate(size), size)
        # That memory may have been in use on the stream whose it was.
        follow(self._uploads, self.stream, stage.uploaded)
        return stage

    def fetcher(self, value: Array, spec: TensorSpec) -> Fetch:
        shape = known(spec.shape)
        event = self.event()

        def fetch(on_gpu: bool, stream: Any) -> Callable[[], Any]:
            with stream:
                there = self._empty(shape, np.float32)
                if spec.dtype == "float32":
                    there.data.copy_from_device_async(value.data, there.nbytes, stream)
                else:
                    gpu.execute(widen(spec).bind([value], there, value))
            if on_gpu:
                return lambda: there
            follow(self._downloads, stream, event)
            return Download(self, there, self._downloads)
        return fetch


def follow(stream: Any, other: Any, event: Any) -> None:
    """What `stream` is given from now on comes after all that the other one has in hand."""
    event.record(other)
    stream.wait_event(event)


class Guard:
    """Inside, a GPU is CuPy's current device; DeviceError for what it refuses or reports, an
    OutOfMemory where it has no room.

    Entered once a call, before anything else: it is no generator, which would take longer.
    """

    def __init__(self, index: int, device: Any) -> None:
        self._index, self._device = index, device

    def __enter__(self) -> None:
        try:
            gpu.check_context(self._index)
            self._device.__enter__()
        except CudaError as error:
            raise DeviceError(str(error)) from error
        except gpu.faults() as error:
            raise DeviceError(gpu.explain(error, self._index)) from error

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._device.__exit__(kind, error, trace)
        except gpu.faults() as late:    # a lost context may answer even this call by its error
            error = error or late
        if error and gpu.no_room(error):
            raise OutOfMemory(f"cuda:{self._index}", 0, gpu.free_bytes(self._index), (
                f"what it was asked for ({str(error).rstrip('.')})",
                "use a smaller batch, or release() another model")) from error
        if isinstance(error, CudaError):
            raise DeviceError(str(error)) from error
        if error and isinstance(error, gpu.faults()):
            raise DeviceError(gpu.explain(error, self._index)) from error


class Turns:
    """Gives the runs of a program, which share its arena, their turn, each with a stream for all
    that it does.

    That is the device's own for what comes from the host. For arrays of the GPU it is the caller's,
    with no event between input, graph and result; the device's stream waits for it at the end. So
    whatever is put there afterwards comes after all runs: other callers' runs, synchronize(), and
    the use of memory that has gone back to CuPy's pool.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device, self._event = device, device.event()
        # The caller's of the run before, if it was one's. It is compared as an object, and held:
        # the address of a stream that is gone may be given to another one.
        self._before: Any = None

    @contextlib.contextmanager
    def __call__(self, on_gpu: bool) -> Iterator[Any]:
        own = self._device.stream
        with self._device.guard:
            if not on_gpu:
                self._before = None
                yield own
                return
            stream = self._device.callers_stream()
            if stream.is_capturing():
                raise DeviceError(f"CuPy's current stream on {self._device.name} is capturing a "
                                  f"CUDA graph, of which a model can not be a part: it is a graph "
                                  f"itself, whose memory other calls use, too. Call it between "
                                  f"your graphs")
            if stream is not self._before or stream.ptr == PER_THREAD:
                follow(stream, own, self._event)
            self._before = stream
            try:
                yield stream
            except BaseException:
                with contextlib.suppress(*gpu.faults()):    # it is about the same failure
                    follow(own, stream, self._event)
                raise
            follow(own, stream, self._event)


class Stage:
    """Pinned memory and as much of the GPU's, through which a batch is uploaded.

    uploaded  the batch has left the pinned memory
    consumed  the batch has left the GPU's
    """

    def __init__(self, device: CudaDevice, there: Any, size: int) -> None:
        self.size, self._there, self._pinned = size, there, device.pinned(size)
        self.uploaded, self.consumed = device.event(), device.event()

    def upload(self, array: Array, stream: Any) -> Array:
        """The array on the GPU, once `uploaded`."""
        part = self._pinned[:array.nbytes]
        part[:] = array.reshape(-1).view(np.uint8)
        there = self._there[:array.nbytes]
        there.set(part, stream)
        self.uploaded.record(stream)
        return there.view(array.dtype).reshape(array.shape)


class Download:
    """A copy to the host under way; calling it waits and gives float32 NumPy memory."""

    def __init__(self, device: CudaDevice, there: Any, stream: Any) -> None:
        self._device, self._there = device, there
        self._host = device.pinned(there.nbytes).view(np.float32).reshape(there.shape)
        there.get(stream, out=self._host, blocking=False)
        self._done = device.event()
        self._done.record(stream)

    def __call__(self) -> Array:
        with self._device.guard:
            self._done.synchronize()
        return self._host.copy()

    def __del__(self) -> None:
        # Memory that is still written must not go back to the pool, even if nobody wants it.
        with contextlib.suppress(Exception):
            self._done.synchronize()


def number(device: str) -> int:
    """1 of "cuda:1", 0 of "cuda". DeviceError where that is no number."""
    index = device.partition(":")[2] if ":" in device else "0"
    if not index.isdecimal():
        raise DeviceError(f"device={device!r} is unknown; write 'cuda' or 'cuda:N' with N the "
                          f"number of a GPU")
    return int(index)
