"""Searching for the kernels that run a network fastest on a GPU."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kernels.cuda import gpu, tune
from kernels.cuda.launch import CudaOptions
from kernels.cuda.tune import TuneReport

from . import passes
from .devices import Device
from .errors import DeviceError, ModelError, OutOfMemory
from .gpu_device import CudaDevice
from .graph import Graph
from .plan import views
from .storage import storage

Progress = Callable[[int, int, str], None]


def search(graph: Graph, device: Device, options: CudaOptions, budget: float,
           progress: Progress | None = None) -> TuneReport:
    """Of a graph whose shapes are known, for `budget` seconds; see `Model.tune`."""
    assert isinstance(device, CudaDevice)
    if not budget >= 0:
        raise ModelError(f"budget={budget!r} must be a number of seconds, 0 or more")
    graph = passes.norms.join(graph, device.takes_norm)
    specs = storage(graph, device, options)
    free = views(graph)
    layers = [tune.Layer(node.name, node.op, tuple(specs[name] for name in node.inputs),
                         specs[node.output]) for node in graph.nodes if node.output not in free]
    here = gpu.gpu(device.index)
    try:
        with device.guard, device.stream:
            return tune.tune(layers, replace(options, packed={}), here, budget, progress)
    except ValueError as error:
        raise ModelError(str(error)) from None
    except OutOfMemory as error:
        raise OutOfMemory(device.name, error.needed, error.free, (
            "a layer beside what is there", "tune for a smaller batch, or release() other models"
            )) from None
    except MemoryError as error:
        raise DeviceError(f"the host has no room for the values of a layer ({error}); tune for a "
                          f"smaller batch") from None
