"""The time of each layer of a network on a GPU, and what its kernels take of a multiprocessor."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gpu_timing
from gpu_timing import interleave
from layer_cases import Arrays, gemm
from torch_rivals import Torch

from cnn.devices import Run
from cnn.gpu_device import CudaDevice
from kernels.cuda import gpu
from kernels.cuda.launch import Launch

PEAK_SIZE = 8192            # of the square matrices whose product is taken for the peak
SCRATCH_BYTES = 1 << 28     # written over and over while launches queue up
FASTEST_WRITE = 8e12        # bytes/s; no GPU writes faster, so it is busy for at least as long


@dataclass(frozen=True)
class LaunchFacts:
    """registers of a thread; bytes of shared memory of a block; occupancy: threads that a
    multiprocessor can hold of this kernel, of those that it has room for."""
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    shared_bytes: int
    occupancy: float


class GpuWatch(CudaDevice):
    """A GPU that runs layer by layer, with events between, and writes the times down.

    runs   of each run: (start, end) of each layer in ms after the run's start
    facts  of each layer's launches

    Layers are not captured in a graph but launched, each in an NVTX range of its name, which
    Nsight Systems shows. The GPU is kept busy until all are queued, so that waiting for launches is
    not taken for the time of a layer; what the event behind each layer takes is.
    """

    def __init__(self, index: int, dtype: str) -> None:
        super().__init__(index, dtype)
        self.runs: list[list[tuple[float, float]]] = []
        self.facts: list[list[LaunchFacts]] = []
        self._scratch = self.allocate(SCRATCH_BYTES)
        self._queueing = 0.0        # seconds that it took the last time

    def compile(self, steps: Sequence[tuple[str, Sequence[Launch]]]) -> Run:
        with self.guard, self.stream:
            self.facts = [[facts(launch, self.index) for launch in launches]
                          for _, launches in steps]
            events = [gpu.cupy().cuda.Event() for _ in range(len(steps) + 1)]

        def run(stream: Any) -> None:
            with self.guard, stream:
                for _ in range(1 + int(self._queueing * FASTEST_WRITE / SCRATCH_BYTES)):
                    self._scratch.fill(0)
                start = time.perf_counter()
                self._queue(steps, events, stream)
                self._queueing = time.perf_counter() - start
                stream.synchronize()
                marks = [gpu.cupy().cuda.get_elapsed_time(events[0], event) for event in events]
            self.runs.append(list(pairwise(marks)))
        return run

    def _queue(self, steps: Sequence[tuple[str, Sequence[Launch]]], events: Sequence,
               stream: Any) -> None:
        nvtx = gpu.cupy().cuda.nvtx
        events[0].record(stream)
        for (layer, launches), event in zip(steps, events[1:], strict=True):
            nvtx.RangePush(layer)
            gpu.execute(launches)
            nvtx.RangePop()
            event.record(stream)

    def limits(self, peak_tflops: float | None) -> tuple[float, str, float]:
        """(FLOP/s, where they come from, bytes/s of a copy) at best; a peak that is None is
        measured. ValueError where PyTorch is missing for that."""
        with self.guard, self.stream:
            bandwidth = gpu_timing.copy_bandwidth(self.stream)
            if peak_tflops is not None:
                return peak_tflops * 1e12, "as given by --peak", bandwidth
            arrays = Arrays(gemm(PEAK_SIZE, self.dtype), 2)
            rival, _ = next(Torch(self.index, self.stream, self.dtype).rivals(arrays))
            fastest = interleave([rival], self.stream, 10)[0].min_ms
        return (arrays.case.cost.flops / fastest * 1e3,
                f"measured: PyTorch's product of {PEAK_SIZE}x{PEAK_SIZE} matrices", bandwidth)


def facts(launch: Launch, index: int) -> LaunchFacts:
    """As the driver says, which also knows kernels that were compiled elsewhere."""
    kernel, cuda = launch.kernel, gpu.cupy().cuda
    function, driver = gpu.load(kernel, index).ptr, cuda.driver
    registers = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
    static_bytes = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
    blocks = driver.occupancyMaxActiveBlocksPerMultiprocessor(function, kernel.threads,
                                                              kernel.shared_bytes)
    room = cuda.runtime.getDeviceProperties(index)["maxThreadsPerMultiProcessor"]
    return LaunchFacts(kernel.name, launch.grid, kernel.threads, registers,
                       static_bytes + kernel.shared_bytes, blocks * kernel.threads / room)
