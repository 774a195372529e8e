"""Devices of the CUDA kernels: a GPU through CuPy, and the emulator over NumPy memory.

Both get the very same launches. What differs is where arrays lie and who executes.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from kernels.cuda import gpu
from kernels.cuda.backend import DTYPES, prepare, stored_as
from kernels.cuda.compiler import number_of
from kernels.cuda.emulate import emulate
from kernels.cuda.errors import CudaError
from kernels.cuda.launch import CudaOptions, Launch
from kernels.emulator import EmulatorError
from kernels.ops import Op, TensorSpec, count, known
from kernels.step import Array, Step

from .devices import aligned_zeros
from .errors import DeviceError

NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
         "bfloat16": np.dtype(ml_dtypes.bfloat16)}
WORDS = {4: np.uint32, 2: np.uint16}


class CudaKernels:
    """What both devices share: the kernels, and values stored in the compute type."""
    threads: int | None = None

    def __init__(self, name: str, dtype: str) -> None:
        if dtype not in DTYPES:
            raise DeviceError(f"dtype={dtype!r} is not supported on CUDA; it can be one of "
                              f"{DTYPES}")
        self.name, self.dtype = name, dtype
        self.stored = stored_as(dtype)

    def prepare(self, op: Op, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: CudaOptions) -> Step:
        return prepare(op, inputs, output, weights, options)

    def constant(self, array: Array, options: CudaOptions) -> Array:
        return options.pack(array, f"constant_{self.stored}",
                            lambda host: options.upload(self._narrow(host)))

    def _narrow(self, array: Array) -> Array:
        """float32 to what is stored; beyond float16's range is infinity."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array).astype(NUMPY[self.stored], copy=False)


class EmulatedDevice(CudaKernels):
    """The PTX of the CUDA kernels, executed on the CPU: right as on a GPU, and slow."""

    def __init__(self, dtype: str = "float32", race: bool = False) -> None:
        """race: also look for races in shared memory, which takes longer still."""
        super().__init__("emulator", dtype)
        self._race = race

    def options(self) -> CudaOptions:
        """As for a small GPU, so that small networks meet split sums and several waves, too."""
        return CudaOptions(dtype=self.dtype, arch="sm_80", multiprocessors=4)

    def allocate(self, size: int) -> Array:
        return aligned_zeros(size)

    def view(self, block: Array, spec: TensorSpec) -> Array:
        return block.view(NUMPY[spec.dtype]).reshape(known(spec.shape))

    def write(self, value: Array, array: Array) -> None:
        value[...] = self._narrow(array)

    def read(self, value: Array) -> Array:
        return value.astype(np.float32)

    def compile(self, bound: Sequence[Sequence[Launch]]) -> Callable[[], None]:
        launches = [launch for step in bound for launch in step]

        def run() -> None:
            try:
                emulate(launches, self._race)
            except EmulatorError as error:
                raise DeviceError(str(error)) from error
        return run


class CudaDevice(CudaKernels):
    """A GPU. Memory is CuPy's and work goes to the stream that is CuPy's current one."""

    def __init__(self, index: int, dtype: str = "float32") -> None:
        """CudaError where the GPU can not be used, DeviceError where it can not in this dtype."""
        super().__init__(f"cuda:{index}", dtype)
        self._gpu, self._cupy = gpu.gpu(index), gpu.cupy()
        if dtype != "float32" and number_of(self._gpu.arch) < 80:
            raise DeviceError(f"dtype={dtype!r} needs a GPU of sm_80 or newer, and {self.name}, "
                              f"{self._gpu.name}, is {self._gpu.arch}; use dtype='float32'")
        self._device = self._cupy.cuda.Device(index)

    def options(self) -> CudaOptions:
        return CudaOptions(dtype=self.dtype, arch=self._gpu.arch,
                           multiprocessors=self._gpu.multiprocessors, upload=self._upload)

    def _upload(self, array: Array) -> Array:
        """A copy on the GPU. bfloat16 lies there as the bits that it is."""
        with self._device:
            return self._cupy.asarray(array.view(WORDS[array.itemsize])
                                      if array.dtype == NUMPY["bfloat16"] else array)

    def allocate(self, size: int) -> Array:
        with self._device:
            return self._cupy.empty(size, np.uint8)

    def view(self, block: Array, spec: TensorSpec) -> Array:
        size = NUMPY[spec.dtype].itemsize
        return block[:count(spec.shape) * size].view(WORDS[size]).reshape(known(spec.shape))

    def write(self, value: Any, array: Array) -> None:
        host = self._narrow(array)
        with self._device:
            value.set(host.view(WORDS[host.itemsize]))

    def read(self, value: Array) -> Array:
        with self._device:
            host = self._cupy.asnumpy(value)
        return host.view(NUMPY[self.stored]).astype(np.float32)

    def compile(self, bound: Sequence[Sequence[Launch]]) -> Callable[[], None]:
        launches = [launch for step in bound for launch in step]

        def run() -> None:
            try:
                with self._device:
                    gpu.execute(launches)
            except CudaError as error:
                raise DeviceError(str(error)) from error
        return run


def number(device: str) -> int:
    """1 of "cuda:1", 0 of "cuda". DeviceError where that is no number."""
    index = device.partition(":")[2] if ":" in device else "0"
    if not index.isdecimal():
        raise DeviceError(f"device={device!r} is unknown; write 'cuda' or 'cuda:N' with N the "
                          f"number of a GPU")
    return int(index)
