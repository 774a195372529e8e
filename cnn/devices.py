"""Where a network runs. A device prepares ops into Steps, owns memory and runs what they bind."""
from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kernels.cpu.launch import Exchange, Launch, together
from kernels.cpu.threads import check_threads, team
from kernels.memory import aligned_zeros, copy_into
from kernels.ops import BatchNorm, Conv2d, Op, TensorSpec, known
from kernels.step import Array, Narrow, Options, Step

from .errors import DeviceError, ModelError
from .image import Photos

logger = logging.getLogger("cnn")
# Of a run; `Any` is the stream that its Turn gives it.
Turn = Callable[[bool], contextlib.AbstractContextManager[Any]]
Fill = Callable[[Any, Any], None]   # with Photos or a float32 array, which may be one of the GPU's
Run = Callable[[Any], None]
Fetch = Callable[[bool, Any], Callable[[], Array]]  # what that returns waits for the copy, float32
CPU_DTYPES = ("float32", "bfloat16")
# Bytes. A model from a file is data: what it asks for is checked before the host allocates it.
HOST_MEMORY = 16 << 30


class Device(Protocol):
    """What the executor asks of a device. Arrays are its own: NumPy's, or a GPU's.

    name     "cpu", "cuda:0", "emulator", "emulator:sm_90a"
    dtype    the compute type
    stored   the dtype that values have in its memory, but for what `narrow` says
    narrows  the narrower dtypes that some may have instead
    threads  CPU threads, None where kernels run elsewhere
    memory   bytes that there are for programs
    """
    name: str
    dtype: str
    stored: str
    narrows: tuple[str, ...]
    threads: int | None
    memory: int

    def options(self) -> Options:
        """What all steps of a model share."""

    def prepare(self, op: Op, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: Any) -> Step:
        """Choose the kernel for an op of these shapes; `weights` holds the constant inputs."""

    def narrow(self, dtype: str, op: Op, inputs: list[TensorSpec], weights: list[Array | None],
               options: Any) -> Narrow:
        """What the kernel for an op can do with one of the dtypes `narrows`."""

    def takes_norm(self, norm: BatchNorm, conv: Conv2d, weight_shape: tuple[int, ...]) -> bool:
        """Whether a convolution with weights of this shape can normalise what it reads."""

    def allocate(self, size: int) -> Array:
        """`size` bytes, aligned. OutOfMemory where a GPU has not as many, ModelError for more than
        the host shall be asked for."""

    def view(self, block: Array, spec: TensorSpec) -> Array:
        """A part of an allocation as a value of this shape and dtype."""

    def constant(self, array: Array, options: Any) -> Array:
        """A constant that a kernel reads as it is, copied once for all programs of `options`."""

    def compile(self, steps: Sequence[tuple[str, Any]]) -> Run:
        """What runs all that the steps of a program's layers, each with its name, have bound."""

    def turns(self) -> Turn:
        """What has to be around each run of a program, all that `compile`, `inlet` and `fetcher`
        return: it gives the stream for them. True: inputs lie on a GPU, and results stay there.
        DeviceError for what goes wrong inside."""

    def adopt(self, array: Any) -> Any:
        """Any library's array of a GPU as this device's; DeviceError where it is elsewhere."""

    def inlet(self, value: Array, spec: TensorSpec, readers: Sequence[Any]) -> Fill:
        """What fills an input. readers: the launches that read it, if nothing else does, which may
        be given the array itself."""

    def outlet(self, value: Array, spec: TensorSpec) -> tuple[Array, list[Any]]:
        """Where an output lies as float32 at the end of a run, and the launches that bring it
        there."""

    def fetcher(self, value: Array, spec: TensorSpec) -> Fetch:
        """What begins to copy a value: where it is told True, to an array of CuPy's, which stays
        on the GPU, else to one of NumPy's."""

    def synchronize(self) -> None:
        """Wait for all that was begun."""

    def release(self) -> None:
        """Give memory back that no program holds any more."""


class CpuDevice:
    """Hand-written numba.njit kernels on NumPy memory, where values are float32.

    With dtype "bfloat16" convolutions (but for depthwise ones), Linear layers and attention round
    what they multiply to it, and sum in float32; between layers values are stored rounded where
    both sides can do with that. With any dtype
    those of a file that is quantised to 8 bits multiply these.
    """
    name, stored, memory = "cpu", "float32", HOST_MEMORY

    def __init__(self, threads: int | None = None, dtype: str = "float32") -> None:
        """DeviceError where that many threads (None asks for all there are) or the dtype can not
        be had, or what CNN_INT8 asks for."""
        if dtype not in CPU_DTYPES:
            raise DeviceError(f"dtype={dtype!r} is not supported on the CPU; it can be 'float32', "
                              f"or 'bfloat16' where the CPU has AMX or AVX512_BF16")
        try:
            count = check_threads(threads)
            from kernels.cpu.host import unit_choice
            unit_choice.choose_int8()      # asks for AMX before there are workers
            if dtype == "bfloat16":
                unit_choice.choose()
        except ValueError as error:
            raise DeviceError(str(error)) from None
        self.dtype = dtype
        self.narrows: tuple[str, ...] = ("uint8",)
        if dtype == "bfloat16":
            self.narrows = ("uint8", "bfloat16")
        self.threads: int | None = count
        self.count = count

    def options(self) -> Options:
        return Options(self.count, self.dtype)

    def prepare(self, op: Op, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: Options) -> Step:
        from kernels.cpu.backend import prepare  # with LLVM, which `import cnn` does without
        return prepare(op, inputs, output, weights, options)

    def narrow(self, dtype: str, op: Op, inputs: list[TensorSpec], weights: list[Array | None],
               options: Options) -> Narrow:
        from kernels.cpu.host import narrow
        if dtype == "uint8":
            return narrow.codes(op, inputs, weights, options)
        return narrow.bfloat16(op, inputs)

    def takes_norm(self, norm: BatchNorm, conv: Conv2d, weight_shape: tuple[int, ...]) -> bool:
        return False

    def allocate(self, size: int) -> Array:
        return host_memory(size)

    def view(self, block: Array, spec: TensorSpec) -> Array:
        return block.view(spec.dtype).reshape(known(spec.shape))

    def constant(self, array: Array, options: Options) -> Array:
        return array

    def compile(self, steps: Sequence[tuple[str, Sequence[Launch]]]) -> Run:
        network = together([launch for _, launches in steps for launch in launches])

        def run(stream: Any) -> None:
            with team(self.count):
                network()
        return run

    def turns(self) -> Turn:
        return contextlib.nullcontext

    def adopt(self, array: Any) -> Any:
        raise not_there(self.name)

    def inlet(self, value: Array, spec: TensorSpec, readers: Sequence[Any]) -> Fill:
        exchange = Exchange(value, readers)

        def fill(array: Any, stream: Any) -> None:
            given = value
            if isinstance(array, Photos):
                self.normalise(array, value)
            elif exchange.possible and array.flags.c_contiguous and array.flags.aligned:
                given = array
            else:
                copy_into(value, array)
            if exchange.possible:
                exchange.give(given)
        return fill

    def normalise(self, photos: Photos, value: Array) -> None:
        """Write what `photos.normalised()` gives."""
        from kernels.cpu.host.norm import normalise
        settings = photos.settings
        with team(self.count):
            normalise(photos.pixels, settings.mean, settings.std, value, self.count)()

    def outlet(self, value: Array, spec: TensorSpec) -> tuple[Array, list[Launch]]:
        return value, []        # outputs are float32

    def fetcher(self, value: Array, spec: TensorSpec) -> Fetch:
        def fetch(on_gpu: bool, stream: Any) -> Callable[[], Array]:
            copy = value.copy()
            return lambda: copy
        return fetch

    def synchronize(self) -> None:
        """All work is done when it is given."""

    def release(self) -> None:
        """Memory is NumPy's."""


def host_memory(size: int) -> Array:
    """`size` bytes, aligned; ModelError for more than HOST_MEMORY."""
    if size > HOST_MEMORY:
        raise ModelError(f"this network needs {size / 1e9:.1f} GB for its values, and the limit is "
                         f"{HOST_MEMORY / 1e9:.1f} GB: use a smaller batch or image")
    return aligned_zeros(size)


def not_there(device: str) -> DeviceError:
    """The error for an array of a GPU that a model elsewhere was given."""
    return DeviceError(f"the array lies on a GPU and the model runs on {device!r}: load it with "
                       f"device='cuda', or copy the array with cupy.asnumpy(x)")


def open_device(device: str, dtype: str, threads: int | None) -> Device:
    """The device that a name asks for; DeviceError where it can not be had.

    device  "cpu", "cuda", "cuda:N", "emulator", "emulator:sm_90a" or "auto"
    dtype   the compute type: "float32"; "bfloat16" on a CPU with AMX or AVX512_BF16; on a GPU and
            in the emulator also "bfloat16", "float16" and "tf32"
    """
    kind = device.partition(":")[0] if isinstance(device, str) else ""
    if device not in ("auto", "cpu") and kind not in ("cuda", "emulator"):
        raise DeviceError(f"device={device!r} is unknown; it can be 'auto', 'cpu', 'cuda', "
                          f"'cuda:N', 'emulator' or 'emulator:sm_90a'")
    if kind in ("cuda", "emulator"):
        if threads is not None:
            raise DeviceError(f"threads={threads!r} is for the CPU and device={device!r} has none "
                              f"to set; leave it out")
        return _open_cuda(device, dtype)
    if kind == "auto":
        found, reason = _find_gpu(dtype, threads)
        logger.info("device 'auto' is %s: %s", found.name if found else "the CPU", reason)
        if found:
            return found
    return CpuDevice(threads, dtype)


def _find_gpu(dtype: str, threads: int | None) -> tuple[Device | None, str]:
    """(the first GPU, or None; why), for "auto"."""
    if threads is not None:
        return None, f"threads={threads} is for the CPU"
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return None, "CuPy, through which a GPU is used, is not installed"
    try:
        return _open_cuda("cuda", dtype), "it can be used"
    except DeviceError as error:
        return None, str(error)


def _open_cuda(device: str, dtype: str) -> Device:
    """A GPU or the emulator; the compiler is imported only when asked for."""
    from kernels.cuda.errors import CudaError
    try:
        kind, colon, arch = device.partition(":")
        if kind == "emulator":
            from .emulated_device import EmulatedDevice
            return EmulatedDevice(dtype, arch) if colon else EmulatedDevice(dtype)
        from .gpu_device import CudaDevice, number
        return CudaDevice(number(device), dtype)
    except CudaError as error:
        raise DeviceError(f"device={device!r} can not be used: {error}") from None
