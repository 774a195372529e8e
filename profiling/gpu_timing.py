"""Timing work on a GPU by CUDA events, through CuPy.

What is timed is captured in a CUDA graph, so that launching takes no part. One cycle of the graph
goes through so many copies of its arrays that all of them exceed the L2 cache: by the time that a
copy comes round again, none of it is left there, and each call reads from memory. Rivals take
turns, so that their ratio is of one state of the machine.
"""
from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import provenance as host_provenance
from common import version

from kernels.cuda import gpu

COPY_BYTES = 1 << 30        # of each array: far beyond any L2 cache
COPIES_OF_L2 = 2            # how many L2 caches one cycle fills: no cache replaces perfectly
MOST_COPIES = 512
RESOLUTION_MS = 0.0005      # of an event (CUDA Driver API, cuEventElapsedTime)
LEAST_MS = 2.0              # of a measurement: thousands of times as long
MOST_REPLAYS = 200
LIBRARIES = (               # what compiles and runs our kernels, and what those of others are of
    "cupy-cuda13x", "numba-cuda", "cuda-bindings", "cuda-toolkit", "nvidia-nvvm",
    "nvidia-cuda-nvcc", "nvidia-nvjitlink", "torch", "triton", "nvidia-cudnn-cu13",
    "nvidia-cublas", "jax", "jaxlib")
CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
          "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class Rival:
    """Something to time: `replay` puts `calls` calls of it on the stream that is measured."""
    name: str
    replay: Callable[[], object]
    calls: int


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, in each round."""
    rounds_ms: list[float]

    @property
    def min_ms(self) -> float:
        return min(self.rounds_ms)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    def ratio(self, other: Times) -> float:
        """Median over the rounds of this time over the other's in the same round."""
        return statistics.median(a / b for a, b in
                                 zip(self.rounds_ms, other.rounds_ms, strict=True))


def elapsed_ms(stream: Any, work: Callable[[], object], times: int = 1) -> float:
    """How long the GPU takes over what `work` puts on the stream, each of so many times."""
    cupy = gpu.cupy()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    for _ in range(times):
        work()
    stop.record(stream)
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / times


def interleave(rivals: Sequence[Rival], stream: Any, rounds: int) -> list[Times]:
    """The times of each rival. Each goes first in turn; a turn replays it for LEAST_MS or more."""
    replays = []
    for rival in rivals:
        rival.replay()                              # warms up instruction caches and clocks
        once = max(RESOLUTION_MS, elapsed_ms(stream, rival.replay))
        replays.append(min(MOST_REPLAYS, int(LEAST_MS / once) + 1))
    times: list[list[float]] = [[] for _ in rivals]
    order = list(zip(rivals, replays, times, strict=True))
    for _ in range(rounds):
        for rival, count, mine in order:
            mine.append(elapsed_ms(stream, rival.replay, count) / rival.calls)
        order = order[1:] + order[:1]
    return [Times(mine) for mine in times]


def capture(stream: Any, work: Callable[[], object]) -> Callable[[], None]:
    """What replays on the stream whatever `work` puts there, as one CUDA graph.

    `work` must have run before: loading a kernel can not be captured.
    """
    with stream:
        stream.begin_capture()
        work()
        graph = stream.end_capture()

    def replay() -> None:
        assert work         # a graph knows addresses; `work` holds the memory
        graph.launch(stream)
    return replay


def copies(working_set: int, l2_bytes: int) -> int:
    """How many copies of `working_set` bytes a cycle takes, so that each has left the cache by
    the time that it comes round again; MOST_COPIES at most, see `is_cold`."""
    return max(2, min(MOST_COPIES, COPIES_OF_L2 * l2_bytes // working_set + 1))


def is_cold(working_set: int, l2_bytes: int) -> bool:
    """Whether the copies of a cycle exceed the cache."""
    return copies(working_set, l2_bytes) * working_set > l2_bytes


def l2_bytes(index: int) -> int:
    return gpu.cupy().cuda.runtime.getDeviceProperties(index)["l2CacheSize"]


def copy_bandwidth(stream: Any, rounds: int = 10) -> float:
    """Bytes/s, read plus written, of copying one large array into another."""
    cupy = gpu.cupy()
    source, target = (cupy.empty(COPY_BYTES, np.uint8) for _ in range(2))

    def copy() -> None:
        target.data.copy_from_device_async(source.data, COPY_BYTES, stream)
    copied = interleave([Rival("copy", copy, 1)], stream, rounds)[0]
    return 2 * COPY_BYTES / copied.min_ms * 1e3


def provenance(index: int) -> dict[str, Any]:
    """What one must know to judge or repeat the figures: date, commit, command, GPU, versions."""
    cuda = gpu.cupy().cuda.runtime
    found = gpu.gpu(index)
    return {**host_provenance(), "gpu": {
        "name": found.name, "arch": found.arch, "multiprocessors": found.multiprocessors,
        "l2_bytes": l2_bytes(index), "driver_cuda": gpu.cuda_version(cuda.driverGetVersion()),
        "runtime_cuda": gpu.cuda_version(cuda.runtimeGetVersion()),
        "versions": {library: version(library) for library in LIBRARIES}, **clocks(index)}}


def clocks(index: int) -> dict[str, str]:
    """What nvidia-smi says of driver and clocks (MHz, W, C); nothing where it does not answer."""
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(CLOCKS)}",
               "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, answer.stdout.strip().split(", "), strict=False))
