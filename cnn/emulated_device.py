"""The emulator as a device: CUDA kernels over NumPy memory, where there is no GPU."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels.cuda.emulate import emulate
from kernels.cuda.launch import CudaOptions, Launch
from kernels.emulator import EmulatorError
from kernels.ops import TensorSpec, known
from kernels.step import Array

from .cuda_devices import NUMPY, CudaKernels, entry, source_of, widen
from .devices import HOST_MEMORY, Fetch, Fill, Run, Turn, host_memory, not_there
from .errors import DeviceError

# Multiprocessors of a GPU by its architecture: a small one, so that small networks meet split sums
# and several waves, too; an H100 or H200.
GPUS = {"sm_80": 4, "sm_90a": 132}


class EmulatedDevice(CudaKernels):
    """The PTX of the CUDA kernels, executed on the CPU: right as on a GPU, and slow."""
    memory = HOST_MEMORY

    def __init__(self, dtype: str = "float32", arch: str = "sm_80", race: bool = False) -> None:
        """arch: what a GPU of this architecture would get, one of GPUS; DeviceError for another.
        race: also look for races in shared memory, which takes longer still."""
        if arch not in GPUS:
            raise DeviceError(f"device='emulator:{arch}' is unknown; the emulator executes what "
                              f"GPUs of {' and '.join(GPUS)} get: write 'emulator:sm_90a', or "
                              f"'emulator' for sm_80")
        super().__init__("emulator" if arch == "sm_80" else f"emulator:{arch}", dtype)
        self._arch, self._race = arch, race

    def options(self) -> CudaOptions:
        return CudaOptions(dtype=self.dtype, arch=self._arch, multiprocessors=GPUS[self._arch])

    def allocate(self, size: int) -> Array:
        return host_memory(size)

    def view(self, block: Array, spec: TensorSpec) -> Array:
        return block.view(NUMPY[spec.dtype]).reshape(known(spec.shape))

    def turns(self) -> Turn:
        return contextlib.nullcontext

    def adopt(self, array: Any) -> Any:
        raise not_there(self.name)

    def inlet(self, value: Array, spec: TensorSpec, readers: Sequence[Any]) -> Fill:
        def fill(array: Any, stream: Any) -> None:
            memory, source = source_of(array, "float32")
            self._emulate(entry(source, spec).bind([memory], value, value))
        return fill

    def fetcher(self, value: Array, spec: TensorSpec) -> Fetch:
        def fetch(on_gpu: bool, stream: Any) -> Callable[[], Array]:
            host = np.empty(value.shape, np.float32)
            self._emulate(widen(spec).bind([value], host, value))
            return lambda: host
        return fetch

    def compile(self, steps: Sequence[tuple[str, Sequence[Launch]]]) -> Run:
        def run(stream: Any) -> None:
            for layer, launches in steps:
                self._emulate(launches, f"layer {layer!r}: ")
        return run

    def _emulate(self, launches: Sequence[Launch], where: str = "") -> None:
        try:
            emulate(launches, self._race)
        except EmulatorError as error:
            raise DeviceError(f"{where}{error}") from error

    def synchronize(self) -> None:
        """All work is done when it is given."""

    def release(self) -> None:
        """Memory is NumPy's."""
