"""Measures which tiles and splits are fastest for convolutions and linear layers on a GPU.

For each problem the choices whose estimates are near the best are timed against the present one, a
launch of each in turn, with a cold L2 cache. The values are small whole numbers: their sums are
exact in any order, so a kernel that is right gives the very bits of the present one, and one that
does not is never chosen. Each choice is saved (tuned.py) as soon as it is found.
"""
from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..ops import Conv2d, Linear, Op, TensorSpec, count, known
from ..step import Array
from . import backend, tuned, vector
from .compiler import Kernel
from .gpu import Gpu, capture, cupy, execute
from .host import conv, gemv, matmul
from .host.conv_choice import candidates
from .host.conv_shape import Conv, Cut, folded, problem
from .host.weights import stored
from .launch import Choice, CudaOptions, Launch
from .workers import Workers

logger = logging.getLogger("kernels")

NEAR = 3.0          # estimates are rough: those within this factor of the best are tried
ROUNDS = 11         # launches of each choice that are timed
LEAST_FLUSH = 256 << 20     # bytes, which take a GPU longer than the host takes to queue a graph
BLOCK = 1_000_003   # random numbers that fill a tensor over and over; a prime, so that rows differ
POISON = 0xFF       # bytes of an output that nobody has written: NaNs


class Layer(NamedTuple):
    """A layer that a choice is to be found for, if it is a convolution or linear."""
    name: str
    op: Op
    inputs: Sequence[TensorSpec]
    output: TensorSpec


class Clock(Protocol):
    """What measures time, so that a test can plan it."""

    def now(self) -> float:
        """Seconds since some moment."""

    def timer(self, launches: Sequence[Launch]) -> Callable[[], float]:
        """What runs them once, with a cold cache, and says for how many microseconds. They have
        run before."""


class GpuClock:
    """Events around a CUDA graph on CuPy's current stream, which is not the null stream."""

    def __init__(self, gpu: Gpu) -> None:
        cuda = cupy().cuda
        size = cuda.runtime.getDeviceProperties(gpu.index)["l2CacheSize"]
        # Written over before each timing: the cache, and so much that meanwhile the host can queue
        # the rest.
        self._flushed = cupy().empty(max(2 * size, LEAST_FLUSH), np.uint8)
        self._start, self._stop = cuda.Event(), cuda.Event()

    def now(self) -> float:
        return time.perf_counter()

    def timer(self, launches: Sequence[Launch]) -> Callable[[], float]:
        stream, graph = cupy().cuda.get_current_stream(), capture(launches)

        def microseconds() -> float:
            self._flushed.data.memset_async(0, self._flushed.nbytes, stream)
            self._start.record(stream)
            graph.launch(stream)
            self._stop.record(stream)
            self._stop.synchronize()
            return 1e3 * float(cupy().cuda.get_elapsed_time(self._start, self._stop))
        return microseconds


@dataclass(frozen=True)
class Outcome:
    """What was found for one problem.

    layers            that have it
    before, after     the choices; the same where nothing was faster by more than the noise
    *_microseconds    medians, with a cold cache
    tried             choices that were timed
    refused           those that were faster and gave other results
    """
    problem: str
    layers: tuple[str, ...]
    before: Choice
    after: Choice
    before_microseconds: float
    after_microseconds: float
    tried: int
    refused: tuple[Choice, ...] = ()


@dataclass
class TuneReport:
    """left: layers whose problems did not fit into the budget; path: where choices were saved."""
    outcomes: list[Outcome] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    interrupted: bool = False
    path: Path | None = None

    @property
    def changed(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.after != one.before]

    @property
    def choices(self) -> dict[str, Choice]:
        return {one.problem: one.after for one in self.outcomes}

    def __str__(self) -> str:
        before, after = (sum(len(one.layers) * getattr(one, f"{when}_microseconds")
                             for one in self.outcomes) for when in ("before", "after"))
        said = [f"Of {len(self.outcomes)} sizes of layers that were measured "
                f"{len(self.changed)} got a faster kernel"]
        if self.changed:
            said.append(f": {after:.0f} us with a cold cache for all of them, "
                        f"{before:.0f} us before")
        said.append(f". Saved in {self.path}." if self.path else ". Nothing is saved.")
        if self.left:
            why = "the search was interrupted" if self.interrupted else "the budget was spent"
            said.append(f" {len(self.left)} layers are left, for {why}: another search begins "
                        f"with them.")
        return "".join(said)


class Problem:
    """Layers of the same sizes, and how they can run."""

    def __init__(self, layer: Layer, options: CudaOptions) -> None:
        self.op, self.inputs, self.output = layer.op, list(layer.inputs), layer.output
        self.layers: list[str] = []
        self._options, dtype = options, options.dtype
        plain, few = _sizes(layer)
        self.name = problem(plain, dtype)
        lanes = vector.lanes(conv.stored_as(dtype))
        sizes = folded(plain, lanes)

        def whole(choice: Choice) -> Choice:
            """Splits have whole slices, so that several counts may come to the same."""
            tile, splits, cluster = choice
            return choice if tile is None else Choice(tile, Cut.of(sizes, tile, lanes,
                                                                   splits).splits, cluster)
        self.present = whole(conv.decide(plain, options, vector_product=few))
        self.sizes = sizes.pixels, sizes.group_out, sizes.depth, sizes.groups
        found = candidates(*self.sizes, dtype, options)
        self.estimate = found[0][0]         # in cycles, of one layer
        near = [whole(choice) for cycles, choice in found if cycles <= NEAR * self.estimate]
        vector_product = [Choice(None)] if few else []
        self.choices = list(dict.fromkeys([self.present, *vector_product, *near]))

    def bind(self, choice: Choice, data: Data) -> list[Launch]:
        options = replace(data.options, tuned={self.name: choice})
        step = backend.prepare(self.op, self.inputs, self.output, data.weights, options)
        return list(step.bind(data.inputs, data.output, data.scratch(step.workspace)))

    def kernels(self) -> list[Kernel]:
        """Of all choices."""
        data = Data.missing(self, self._options)
        return list(dict.fromkeys(launch.kernel for choice in self.choices
                                  for launch in self.bind(choice, data)))


def _sizes(layer: Layer) -> tuple[Conv, bool]:
    """A layer's sizes, and whether a product of matrix and vector can be its kernel."""
    if isinstance(layer.op, Conv2d):
        return conv.as_gemm(layer.op, layer.inputs, layer.output), False
    assert isinstance(layer.op, Linear)
    return (matmul.as_gemm(layer.op, layer.inputs, layer.output),
            gemv.fits(count(layer.inputs[0].shape[:-1])))


@dataclass
class Data:
    """A problem's tensors on a GPU; weights, which `prepare` packs, on the host."""
    options: CudaOptions
    weights: list[Array | None]
    inputs: list[Any]
    output: Any
    allocate: Callable[[int], Any]
    workspace: Any = None

    def scratch(self, size: int) -> Any:
        """Of so many bytes or more; the same memory for all choices, as far as it goes."""
        if self.workspace is None or len(self.workspace) < size:
            self.workspace = self.allocate(size)
        return self.workspace

    @classmethod
    def missing(cls, problem: Problem, options: CudaOptions) -> Data:
        """Memory that is never touched, to learn which kernels there are."""
        arrays = [np.empty(known(spec.shape), np.float32) for spec in problem.inputs]
        weights = [arrays[i] if i in problem.op.packed else None for i in range(len(arrays))]
        return cls(_Unpacked(dtype=options.dtype, arch=options.arch,
                             multiprocessors=options.multiprocessors), weights, list(arrays),
                   np.empty(known(problem.output.shape), np.float32),
                   lambda size: np.empty(size, np.uint8))

    @classmethod
    def random(cls, problem: Problem, options: CudaOptions, seed: int = 0) -> Data:
        """Whole numbers of -2 to 2."""
        block = np.random.default_rng(seed).integers(-2, 3, BLOCK).astype(np.float32)
        values = stored(block, conv.stored_as(options.dtype))
        packed = problem.op.packed
        weights = [np.resize(block, known(spec.shape)) if i in packed else None
                   for i, spec in enumerate(problem.inputs)]
        # The caller's packed weights are not these, and those here are let go at the end.
        fresh = replace(options, packed={})
        inputs = [None if i in packed else options.upload(np.resize(values, known(spec.shape)))
                  for i, spec in enumerate(problem.inputs)]
        return cls(fresh, weights, inputs, cls._poisoned(problem.output, options),
                   lambda size: cupy().empty(size, np.uint8))

    @staticmethod
    def _poisoned(output: TensorSpec, options: CudaOptions) -> Any:
        zeros = stored(np.zeros(1, np.float32), conv.stored_as(options.dtype))
        poison = np.full(count(output.shape) * zeros.itemsize, POISON, np.uint8)
        return options.upload(poison.view(zeros.dtype).reshape(known(output.shape)))

    def result(self, problem: Problem, choice: Choice) -> bytes:
        """What a choice computes, where nothing is left of what others have."""
        def poisoned(size: int) -> Any:
            return self.options.upload(np.full(size, POISON, np.uint8))
        fresh = replace(self, output=self._poisoned(problem.output, self.options),
                        allocate=poisoned, workspace=None)
        execute(problem.bind(choice, fresh))
        result: bytes = cupy().asnumpy(fresh.output).tobytes()
        return result


class _Unpacked(CudaOptions):
    """Weights are not packed, which takes long and which kernels do not depend on."""

    def pack(self, weight: Array, packing: str, make: Callable[[Array], Array]) -> Array:
        return weight


def problems_of(layers: Sequence[Layer], options: CudaOptions) -> list[Problem]:
    """Those not tuned yet first, and then those that take most of the time."""
    found: dict[str, Problem] = {}
    for layer in layers:
        if not isinstance(layer.op, (Conv2d, Linear)) or (isinstance(layer.op, Conv2d) and (
                conv.own_kernel(layer.op, list(layer.inputs), layer.output, options))):
            continue
        one = Problem(layer, options)
        found.setdefault(one.name, one).layers.append(layer.name)
    return sorted(found.values(), key=lambda one: (one.name in options.tuned,
                                                   -one.estimate * len(one.layers)))


def tune(layers: Sequence[Layer], options: CudaOptions, gpu: Gpu, budget: float,
         progress: Callable[[int, int, str], None] | None = None, clock: Clock | None = None,
         jobs: int | None = None) -> TuneReport:
    """Search for `budget` seconds, compiling included, on the device that is CuPy's current one.

    progress  is told (problems done, problems, name of the layer at work)
    jobs      processes that compile; None takes one per core

    CudaError for a kernel that can not be compiled or launched. An interrupt from the keyboard
    ends the search; what was found so far is kept. A folder that can not be written is named in a
    WARNING.
    """
    clock = clock or GpuClock(gpu)
    end = clock.now() + budget
    report, problems = TuneReport(), problems_of(layers, options)

    def out_of_time() -> bool:
        return clock.now() >= end

    kernels = {} if out_of_time() else {one.name: one.kernels() for one in problems}
    with Workers(chain.from_iterable(kernels.values()), gpu.arch,
                 jobs or len(os.sched_getaffinity(0))) as workers:
        try:
            for done, one in enumerate(problems):
                if progress is not None:
                    progress(done, len(problems), one.layers[0])
                if out_of_time() or not workers.wait(kernels[one.name], out_of_time):
                    break
                report.outcomes.append(measure(one, options, clock))
                report.path = _saved(gpu, report.choices) or report.path
        except KeyboardInterrupt:
            report.interrupted = True
    if progress is not None:
        progress(len(report.outcomes), len(problems), "")
    report.left = [layer for one in problems[len(report.outcomes):] for layer in one.layers]
    return report


def _saved(gpu: Gpu, choices: dict[str, Choice]) -> Path | None:
    try:
        return tuned.save(gpu, choices)
    except OSError as error:
        logger.warning("the choices can not be saved in %s (%s): they last as long as this "
                       "process. Set CNN_CACHE_DIR to a folder that can be written",
                       tuned.path_of(gpu), error.strerror)
        return None


def measure(one: Problem, options: CudaOptions, clock: Clock) -> Outcome:
    """The present choice, unless another is faster by more than the noise and gives its results."""
    data = Data.random(one, options)
    launches = {choice: one.bind(choice, data) for choice in one.choices}
    for each in launches.values():
        execute(each)           # loads the kernels
    timers = {choice: clock.timer(each) for choice, each in launches.items()}
    before, refused = one.present, []
    first = race(timers, one.choices)
    for choice in sorted(first, key=lambda choice: statistics.median(first[choice])):
        if not faster(first[choice], first[before]):
            continue
        # The best of many was lucky, too: what is told comes from a second race, of the two alone.
        times = race(timers, [before, choice])
        if not faster(times[choice], times[before]):
            continue
        if data.result(one, choice) == data.result(one, before):
            break
        logger.warning("%s: %s gives other results than %s and is not chosen; please report this",
                       one.name, choice, before)
        refused.append(choice)
    else:
        choice, times = before, first
    return Outcome(one.name, tuple(one.layers), before, choice, statistics.median(times[before]),
                   statistics.median(times[choice]), len(one.choices), tuple(refused))


def race(timers: Mapping[Choice, Callable[[], float]], choices: Sequence[Choice]
         ) -> dict[Choice, list[float]]:
    """Microseconds of each in ROUNDS turns, every other one backwards: nobody always follows the
    same."""
    times: dict[Choice, list[float]] = {choice: [] for choice in choices}
    for turn in range(ROUNDS):
        for choice in choices if turn % 2 else choices[::-1]:
            times[choice].append(timers[choice]())
    return times


def faster(times: Sequence[float], present: Sequence[float]) -> bool:
    """By more than the middle half of the present choice's times spreads."""
    low, _, high = statistics.quantiles(present, n=4)
    return (statistics.median(times) < statistics.median(present) - (high - low)
            and min(times) < min(present))
