"""A batch on the CPU as single images, each computed by one thread from end to end.

No thread waits for another within a network, and what lies between the layers of one image stays in
the cache of one core. Results have the same bits as those of the whole batch at once.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kernels import ops
from kernels.cpu.launch import Kernel, calls
from kernels.cpu.threads import team
from kernels.memory import copy_into
from kernels.ops import Op, Shape, count, known, normal_axis
from kernels.step import Array, Options

from .devices import HOST_MEMORY, CpuDevice, Device
from .errors import ModelError
from .executor import Program, open_batch, specialise
from .graph import Graph, Node
from .image import Photos

RUN_IMAGES = Kernel("program", "run_images")
MOST_WEIGHTS = 32 << 20     # bytes, of an L3 cache: more are better read once for all images
MOST_IDLE = 1.15            # time that threads may take, whose shares differ, of equal shares' time
ROW_BY_ROW = (ops.Unary, ops.Conv2d, ops.Linear, ops.Pool2d, ops.GlobalPool2d, ops.BatchNorm,
              ops.LayerNorm, ops.LocalResponseNorm, ops.Reshape, ops.Flatten, ops.Slice, ops.Pad)


def prepare(graph: Graph, shapes: Mapping[str, Shape], device: Device, options: Any,
            activation: Op | None = None) -> Program | ByImage:
    """What runs a network for inputs of these shapes: by image where that is faster. Only off the
    CPU is an activation of the output a part of it."""
    fixed = specialise(graph, shapes)
    if isinstance(device, CpuDevice):
        one = for_one_image(graph, fixed, options)
        if one is not None:
            return ByImage(one, _batch(graph, fixed), device, options)
        activation = None
    return Program(fixed, device, options, activation=activation, batch=open_batch(graph, shapes))


def for_one_image(graph: Graph, fixed: Graph, options: Options) -> Graph | None:
    """The network that is to run for each image of a batch, None where the batch runs as a whole;
    `fixed` is the graph for that batch."""
    batch = _batch(graph, fixed)
    if not pays(fixed, batch, options):
        return None
    try:
        one = specialise(graph, {name: (1, *spec.shape[1:]) for name, spec in fixed.inputs.items()})
    except ModelError:      # no network for single images
        return None
    return one if apart(one, fixed, batch) else None


def _batch(graph: Graph, fixed: Graph) -> int:
    """Images of every input, 1 where these differ or the network has a say in it."""
    sizes = {spec.shape[0] if spec.shape and graph.inputs[name].shape[0] is None else 1
             for name, spec in fixed.inputs.items()}
    return (sizes.pop() or 1) if len(sizes) == 1 else 1


def pays(graph: Graph, batch: int, options: Options) -> bool:
    """Whether a batch is faster by image, if it can run so: threads have about equal shares, and
    weights are read quickly enough to be read again for each image. A batch that is too large to
    be held at all is left to the device to refuse."""
    rounds = -(-batch // options.threads)
    weights = sum(array.nbytes for array in graph.constants.values())
    if _in_8_bits(graph):
        weights //= 4
    elif options.dtype == "bfloat16":
        weights //= 2
    inputs = sum(4 * count(spec.shape) for spec in graph.inputs.values())
    return (batch > 1 and rounds * options.threads <= MOST_IDLE * batch
            and weights <= MOST_WEIGHTS and inputs <= HOST_MEMORY)


def _in_8_bits(graph: Graph) -> bool:
    """Whether a network is quantised and the CPU multiplies it so."""
    if not any(isinstance(getattr(node.op, "activation", node.op), ops.FakeQuantize)
               for node in graph.nodes):
        return False
    from kernels.cpu.host.unit_choice import choose_int8  # with LLVM, which others do without
    return choose_int8() is not None


def apart(one: Graph, many: Graph, batch: int) -> bool:
    """Whether no image of a batch has a part in what comes out for another. The graphs are those of
    the same network for one image and for the batch."""
    shapes, of_all = _shapes(one), _shapes(many)
    if list(shapes) != list(of_all) or not {*one.constants}.isdisjoint(one.outputs):
        return False
    for name, shape in shapes.items():
        if name in one.constants:
            constant, other = one.constants[name], many.constants.get(name)
            if other is None or (other is not constant and not np.array_equal(constant, other)):
                return False
        elif shape[:1] != (1,) or of_all[name] != (batch, *shape[1:]):
            return False
    return all(_same(node, other) and _by_rows(node, shapes, one.constants)
               for node, other in zip(one.nodes, many.nodes, strict=True))


def _shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {name: known(spec.shape) for name, spec in graph.infer().items() if spec is not None}


def _same(node: Node, other: Node) -> bool:
    """Reshapes may hold the batch in their shape."""
    return node == (replace(other, op=node.op) if isinstance(node.op, ops.Reshape) else other)


def _by_rows(node: Node, shapes: Mapping[str, tuple[int, ...]],
             constants: Mapping[str, Array]) -> bool:
    """Whether row i of the output, along the first axis, comes of the rows i of those inputs that
    are no constants alone. What only moves elements in order is told by its shapes."""
    op, rank = node.op, len(shapes[node.output])
    fixed = [name in constants for name in node.inputs]
    if isinstance(op, ops.Binary):
        return all(len(shapes[name]) < rank or shapes[name][0] == 1 if name in constants
                   else len(shapes[name]) == rank for name in node.inputs)
    if any(fixed[i] != (i in op.packed) for i in range(len(fixed))):
        return False
    if isinstance(op, (ops.Softmax, ops.Concat)):
        return normal_axis(op.axis, rank) > 0
    if isinstance(op, ops.Transpose):
        return op.permutation[0] == 0
    return isinstance(op, ROW_BY_ROW) and rank > 1


class ByImage:
    """A network prepared for a batch, which runs as so many images. It is used as a Program is.

    graph, layers  of one image
    batch          images
    bytes          of memory for values, of all threads
    """

    def __init__(self, graph: Graph, batch: int, device: CpuDevice, options: Options) -> None:
        alone = replace(options, threads=1)
        self._device, self._threads, self.batch = device, options.threads, batch
        self._lanes = [Program(graph, device, alone) for _ in range(options.threads)]
        self.graph, self.layers = graph, self._lanes[0].layers
        self.bytes = sum(lane.bytes for lane in self._lanes)
        self._outputs = tuple(dict.fromkeys(graph.outputs))
        names = (*graph.inputs, *self._outputs)
        values = [[lane.values[name] for name in names] for lane in self._lanes]
        self._outside = np.zeros(len(names), np.int64)
        self._launch = RUN_IMAGES.bind(
            np.array([calls([launch for _, launches in lane.steps for launch in launches])
                      for lane in self._lanes]),
            np.array([[value.ctypes.data for value in lane] for lane in values], np.int64),
            self._outside, np.array([value.nbytes for value in values[0]], np.int64),
            len(graph.inputs), batch, options.threads)
        self._lock = threading.Lock()

    def start(self, inputs: Mapping[str, Any],
              on_gpu: bool = False) -> Callable[[], dict[str, Array]]:
        """As of a Program; on the CPU all is done when it returns."""
        given = [self._contiguous(inputs[name]) for name in self.graph.inputs]
        found = {name: np.empty((self.batch, *self._lanes[0].values[name].shape[1:]), np.float32)
                 for name in self._outputs}
        with self._lock, team(self._threads):
            self._outside[:] = [array.ctypes.data for array in (*given, *found.values())]
            self._launch()
        return lambda: found

    def _contiguous(self, array: Any) -> Array:
        if not isinstance(array, Photos) and array.flags.c_contiguous:
            return array
        value = np.empty(array.shape, np.float32)
        if isinstance(array, Photos):
            self._device.normalise(array, value)
        else:
            copy_into(value, array)
        return value
