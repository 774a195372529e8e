"""As much of CuPy as the GPU path uses, over NumPy memory; kernels run in the emulator.

Streams are as late as CUDA allows: what is put on one runs only when somebody waits for it, so a
result that is read too early, or memory that is used again too early, is wrong here. The null
stream runs everything at once. What it can not show is whether a driver takes the calls: that
`pytest -m gpu` does.
"""
from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import deque
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from kernels.axes import flat_pixels
from kernels.emulator import Emulator

ILLEGAL_ADDRESS = 700       # cudaErrorIllegalAddress
OUT_OF_MEMORY = 2           # cudaErrorMemoryAllocation
MOST_SHARED = 227 << 10     # bytes, of a block on an H100


class Error(RuntimeError):
    """CUDARuntimeError and CUDADriverError."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class OutOfMemoryError(MemoryError):
    pass


class ndarray(np.ndarray):
    """An array "on a GPU", of the number that its `device` says."""
    __module__ = "cupy"
    index, cupy = 0, None

    @property
    def device(self):
        return Device(self.index)

    @property
    def __cuda_array_interface__(self):
        return self.__array_interface__

    def __array_finalize__(self, other):
        self.index, self.cupy = getattr(other, "index", 0), getattr(other, "cupy", None)

    @property
    def data(self):
        return Memory(self)

    def set(self, host, stream=None):
        """Pinned memory is read when the stream gets there, other memory at once."""
        assert host.dtype == self.dtype
        assert host.shape == self.shape
        source = host if self.cupy.is_pinned(host) else host.copy()
        self.cupy.host_copies += 1
        (stream or here.stream).transfer(lambda: np.copyto(np.asarray(self), source))

    def get(self, stream=None, out=None, blocking=True):
        stream = stream or here.stream
        host = np.empty(self.shape, self.dtype) if out is None else out
        assert host.dtype == self.dtype
        assert host.shape == self.shape
        self.cupy.host_copies += 1
        stream.transfer(lambda: np.copyto(host, np.asarray(self)))
        if blocking:
            stream.synchronize()
        return host

    def copy(self, order="C"):
        """By a kernel that CuPy compiles, even where nothing but bytes is to be copied."""
        self.cupy.compiled += 1
        there = self.cupy.empty(self.shape, self.dtype)
        here.stream.put(lambda: np.copyto(np.asarray(there), np.asarray(self)))
        return there


class Memory:
    """What CuPy's MemoryPointer is to an array."""

    def __init__(self, array):
        self.bytes = np.asarray(array).reshape(-1).view(np.uint8)
        self.ptr, self.device_id = np.asarray(array).ctypes.data, array.index

    def copy_from_device_async(self, source, size, stream=None):
        (stream or here.stream).put(lambda: np.copyto(self.bytes[:size], source.bytes[:size]))


class Here(threading.local):
    """Of a thread: the devices and, on each of them, the streams that it has entered, the current
    one last."""

    def __init__(self):
        self.devices, self.streams, self.entered = [0], {}, []

    @property
    def device(self):
        return self.devices[-1]

    @property
    def stream(self):
        return self.stream_of(self.device)

    def stream_of(self, device):
        return self.streams.get(device, [Stream.null])[-1]


class Device:
    cupy = None

    def __init__(self, index):
        self.id = index

    def __enter__(self):
        if self.id != here.device:
            self.set()
        here.devices.append(self.id)

    def __exit__(self, *error):
        here.devices.pop()
        self.set()

    def set(self):
        """cudaSetDevice, which "may also return error codes from previous, asynchronous launches"
        """
        if self.cupy.devices_fail:
            self.cupy.check()


class Stream:
    """A queue, or, while it captures, the works of a graph."""
    null: Stream
    pointers = itertools.count(1 << 20)

    def __init__(self, cupy=None, null=False, non_blocking=False, ptds=False):
        self.cupy, self.immediate, self.queue, self.captured = cupy, null, deque(), None
        self.ptr = 0 if null else 2 if ptds else next(self.pointers)
        self.device_id = -1 if null or ptds else here.device

    def __enter__(self):
        """On its own device only, whose current stream it becomes."""
        if self.device_id not in (-1, here.device):
            raise RuntimeError(f"The device that the stream is created on ({self.device_id}) does "
                               f"not match with the current device ({here.device})")
        here.entered.append(here.device)
        here.streams.setdefault(here.device, [Stream.null]).append(self)
        return self

    def __exit__(self, *error):
        here.streams[here.entered.pop()].pop()

    def put(self, work):
        if self.captured is not None:
            self.captured.append(work)
            return
        self.queue.append(work)
        if self.immediate:
            self.drain()

    def transfer(self, work):
        """To or from the host, which CuPy lets nobody capture."""
        if self.captured is not None:
            raise RuntimeError("the current stream is capturing, so H2D and D2H transfers are "
                               "disallowed")
        self.put(work)

    def drain(self, until=None):
        while self.queue:
            work = self.queue.popleft()
            work()
            if work is until:
                break

    def synchronize(self):
        if self.captured is not None:
            raise Error("cudaErrorStreamCaptureUnsupported")
        self.drain()
        self.cupy.check()

    def record(self, event=None):
        event = event or Event(self.cupy)
        event.record(self)
        return event

    def wait_event(self, event):
        if self.captured is not None and not event.captured:
            raise Error("cudaErrorStreamCaptureIsolation")
        if self.captured is None and event.captured:
            raise Error("cudaErrorStreamCaptureUnjoined")
        self.put(event.completion())

    def is_capturing(self):
        return self.captured is not None

    def begin_capture(self, mode=None):
        """Of all that any thread puts here until the end: CuPy asks for no other mode."""
        if self.immediate or self.captured is not None:
            raise Error("cudaErrorStreamCaptureUnsupported")
        self.captured = []

    def end_capture(self):
        works, self.captured = self.captured, None
        graph = Graph(self.cupy, works)
        self.cupy.driver_takes(self.cupy.graph_bytes, graph)
        return graph


class Graph:
    def __init__(self, cupy, works):
        self.cupy, self.works = cupy, works

    def launch(self, stream=None):
        self.cupy.check()
        self.cupy.replays += 1
        for work in self.works:
            (stream or here.stream).put(work)


class Event:
    def __init__(self, cupy, block=False, disable_timing=False):
        self.cupy, self.timing, self.mark, self.stream = cupy, not disable_timing, None, None
        self.captured = False

    def record(self, stream=None):
        self.cupy.check()

        def mark():
            mark.time = self.cupy.milliseconds
        mark.time = None
        self.stream, self.mark = stream or here.stream, mark
        self.captured = self.stream.captured is not None
        self.stream.put(mark)

    @property
    def done(self):
        return self.mark is None or self.mark.time is not None

    def completion(self):
        """What brings the event about, as it is recorded now."""
        stream, mark = self.stream, self.mark
        return lambda: stream.drain(mark) if mark and mark.time is None else None

    def synchronize(self):
        if self.captured:
            raise Error("cudaErrorCapturedEvent")
        self.completion()()
        self.cupy.check()


class Module:
    def __init__(self, cupy):
        self.cupy = cupy

    def load(self, code):
        assert type(code) is bytes
        self.cupy.check()
        if self.cupy.load_error:
            raise Error(self.cupy.load_error, self.cupy.load_status)
        self.cupy.driver_takes(self.cupy.module_bytes, self)
        self.code = code

    def get_function(self, name):
        return Function(self.cupy, self.code, name)


class Function:
    """Launches go to the emulator, once a fault is planned for none of them. Blocks are as large as
    a GPU's may be."""

    def __init__(self, cupy, code, name):
        self.cupy, self.code, self.name, self.ptr = cupy, code, name, id(self)

    def __call__(self, grid, block, args, shared_mem=0, early=False, cluster=1):
        assert type(grid) is type(block) is tuple
        cupy = self.cupy
        cupy.check()
        if cupy.launch_error:
            raise Error(cupy.launch_error)
        if math.prod(block) > 1024:
            raise Error("CUDA_ERROR_INVALID_VALUE: invalid argument")
        if here.stream.captured is not None:
            cupy.meanwhile()
        device = here.device

        def work():
            cupy.calls.append(SimpleNamespace(name=self.name, grid=grid, block=block, args=args,
                                              shared=shared_mem, device=device, early=early,
                                              cluster=cluster))
            cupy.milliseconds += cupy.cost(self.name)
            if self.name in cupy.illegal:
                cupy.dead = Error("cudaErrorIllegalAddress: an illegal memory access was "
                                  "encountered", ILLEGAL_ADDRESS)
            if cupy.dead is None:
                memory = [flat_pixels(arg)[0] if isinstance(arg, ndarray) else arg for arg in args]
                Emulator().launch(self.code.decode(), self.name, grid, block, memory, shared_mem,
                                  (1, cluster, 1))
        here.stream.put(work)


Stream.null = Stream(null=True)
here = Here()


class FakeCupy:
    """Stands in for the module; its attributes plan what the machine is like.

    calls         what ran: name, grid, block, args, shared, device, early, cluster
    replays       launches of graphs
    host_copies   between the host and a GPU
    compiled      uses of a kernel that CuPy compiles by NVRTC
    illegal       names of kernels that make an illegal access
    devices_fail  whether one can not even change the device after that
    free          bytes of memory that are left on each GPU
    unused        more bytes, which the pool keeps and gives back when it is told to
    module_bytes  of that memory, which the driver takes for a module that is loaded
    graph_bytes   the same for a graph
    page          bytes of which an array takes whole multiples
    pinned_free   bytes of the host's memory, of which any one may be pinned
    cost          function of a kernel's name: milliseconds that it takes
    meanwhile     function that is called whenever a launch is captured
    """
    ndarray = ndarray

    def __init__(self, driver=13000, capabilities=((9, 0),), free=1 << 33, multiprocessors=4):
        self.calls, self.attributes, self.launch_error, self.load_error = [], {}, "", ""
        self.replays, self.illegal, self.dead, self.pinned = 0, set(), None, []
        self.free, self.page, self.pinned_free = free, 1, 1 << 40
        self.unused = self.module_bytes = self.graph_bytes = 0
        self.host_copies = self.compiled = self.load_status = 0
        self.devices_fail = False
        self.milliseconds, self.cost = 0.0, lambda name: 0.001
        self.meanwhile = lambda: None
        self.pool = SimpleNamespace(freed=0, free_all_blocks=self._free_all_blocks,
                                    used_bytes=lambda: 0, total_bytes=lambda: 0,
                                    get_limit=lambda: 0)
        runtime = SimpleNamespace(
            CUDARuntimeError=Error, driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: 13000, memGetInfo=lambda: (self.free, 1 << 34),
            getDeviceCount=lambda: len(capabilities), getDevice=lambda: here.device,
            getDeviceProperties=lambda i: {
                "name": b"Fake GPU", "major": capabilities[i][0], "minor": capabilities[i][1],
                "multiProcessorCount": multiprocessors, "l2CacheSize": 1 << 16,
                "maxThreadsPerMultiProcessor": 2048})
        Stream.null, Device.cupy = Stream(self, null=True), self
        here.__init__()
        self.cuda = SimpleNamespace(
            runtime=runtime, Device=Device, function=SimpleNamespace(Module=lambda: Module(self)),
            driver=SimpleNamespace(CUDADriverError=Error, funcSetAttribute=self.set_attribute,
                                   CU_FUNC_ATTRIBUTE_NUM_REGS=4,
                                   CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1,
                                   funcGetAttribute=lambda kind, _: 40 if kind == 4 else 1024,
                                   occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 2),
            Event=lambda **options: Event(self, **options),
            get_current_stream=lambda device_id=-1: (
                here.stream if device_id == -1 else here.stream_of(device_id)),
            get_elapsed_time=self.elapsed, alloc_pinned_memory=self.alloc_pinned,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            nvtx=SimpleNamespace(RangePush=lambda name: None, RangePop=lambda: None))
        self.cuda.Stream = self.stream = lambda **options: Stream(self, **options)
        self.cuda.Stream.null = Stream.null

    def check(self):
        """An error that is sticky is the answer to every call."""
        if self.dead is not None:
            raise self.dead

    def set_attribute(self, pointer, attribute, value):
        if value > MOST_SHARED:
            raise Error("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.attributes[attribute] = value

    def elapsed(self, start, stop):
        if not (start.timing and stop.timing):
            raise Error("cudaErrorInvalidResourceHandle")
        if start.mark.time is None or stop.mark.time is None:
            raise Error("cudaErrorNotReady")
        return stop.mark.time - start.mark.time

    def alloc_pinned(self, size):
        self.check()
        if size > self.pinned_free:
            raise Error("cudaErrorMemoryAllocation: out of memory", OUT_OF_MEMORY)
        memory = np.full(size, 0xFF, np.uint8)
        self.pinned.append(memory)
        return memory

    def is_pinned(self, array):
        return any(np.shares_memory(array, memory) for memory in self.pinned)

    def asarray(self, array):
        """A copy of the host's. By __cuda_array_interface__ bfloat16 comes as bytes of no meaning.
        """
        found = self._shared(array)
        if hasattr(array, "memory") and found.dtype == ml_dtypes.bfloat16:
            found = found.view("V2")
        return found

    def from_dlpack(self, array):
        return self._shared(array)

    def _shared(self, array):
        array = getattr(array, "memory", array)
        return self._there(array if isinstance(array, ndarray) else np.array(array))

    def _there(self, memory):
        found = memory.view(ndarray)
        found.index, found.cupy = here.device, self
        return found

    def ascontiguousarray(self, array):
        return self.asarray(np.ascontiguousarray(array))

    def empty(self, shape, dtype=np.float32):
        """Poison; OutOfMemoryError beyond `free`."""
        self.check()
        bytes_ = int(np.prod(shape)) * np.dtype(dtype).itemsize
        taken = -(-bytes_ // self.page) * self.page
        if taken > self.free:
            self._free_all_blocks()
        if taken > self.free:
            raise OutOfMemoryError(f"Out of memory allocating {bytes_:,} bytes")
        memory = np.full(bytes_, 0xFF, np.uint8)
        self._take(taken)
        weakref.finalize(memory, self._take, -taken)
        return self._there(memory.view(dtype).reshape(shape))

    def driver_takes(self, size, owner):
        """Which asks no pool for more."""
        if size > self.free:
            raise Error("cudaErrorMemoryAllocation: out of memory", OUT_OF_MEMORY)
        self._take(size)
        weakref.finalize(owner, self._take, -size)

    def _take(self, size):
        self.free -= size

    def asnumpy(self, array):
        self.host_copies += 1
        here.stream.synchronize()
        return np.asarray(array).copy()

    def get_default_memory_pool(self):
        return self.pool

    get_default_pinned_memory_pool = get_default_memory_pool

    def _free_all_blocks(self):
        self.pool.freed += 1
        self.free, self.unused = self.free + self.unused, 0
