"""Which CUDA kernels a network will launch on a GPU, found without one."""
from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import numpy as np

from kernels.cuda.backend import PROBABILITIES
from kernels.cuda.compiler import Kernel
from kernels.cuda.launch import CudaOptions, Launch
from kernels.ops import Shape, Softmax
from kernels.step import Array

from . import passes, zoo
from .cuda_devices import CudaKernels
from .devices import Run
from .emulated_device import EmulatedDevice
from .errors import ModelError
from .executor import Program, specialise
from .onnx_import import load_onnx


def kernels_of(source: str, options: CudaOptions, batch_sizes: Iterable[int]) -> list[Kernel]:
    """Those of a model file or a zoo name, for a GPU of `options` and each batch size, whatever
    makes probabilities of its output.

    ModelError for a file that can not be loaded, or whose inputs have sizes left open.
    """
    path = zoo.find(source)
    graph = passes.optimise(load_onnx(path).graph)
    found: dict[Kernel, None] = dict.fromkeys(PROBABILITIES)
    for batch_size in batch_sizes:
        shapes = {name: _sized(path.name, name, spec.shape, batch_size)
                  for name, spec in graph.inputs.items()}
        recorder = Recorder(options)
        Program(specialise(graph, shapes), recorder, recorder.options(),
                activation=Softmax(-1))
        found.update((launch.kernel, None) for launch in recorder.launches)
    return list(found)


def _sized(model: str, name: str, shape: Shape, batch_size: int) -> Shape:
    if None in shape[1:]:
        raise ModelError(f"{model}: its input {name!r} is {shape}, None being any size, and which "
                         f"kernels run depends on it; export it with the size that you will use")
    return (batch_size, *shape[1:])


class Recorder(EmulatedDevice):
    """Prepares and binds as a GPU of `options` would, and runs nothing."""

    def __init__(self, options: CudaOptions) -> None:
        CudaKernels.__init__(self, "recorder", options.dtype)
        self._wanted = options
        self.launches: list[Launch] = []

    def options(self) -> CudaOptions:
        return self._wanted

    def allocate(self, size: int) -> Array:
        """As much as a GPU may have: of pages that can not be written the host counts none."""
        pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
                          prot=mmap.PROT_READ)
        return np.frombuffer(pages, np.uint8, size)

    def compile(self, steps: Sequence[tuple[str, Sequence[Launch]]]) -> Run:
        self.launches += [launch for _, of_step in steps for launch in of_step]
        return lambda stream: None
