"""Graph + device + input shapes -> Program: a list of prepared steps that can be run again and
again without allocating or deciding anything."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kernels.ops import Concat, Op, Shape, TensorSpec, count, known
from kernels.step import Array, Step

from . import fold, passes
from .devices import Device, Fetch
from .errors import ModelError, OutOfMemory
from .graph import Graph, Node
from .plan import Part, plan, views
from .storage import storage

ROUNDING = 16 << 20     # bytes: a GPU's memory comes in pages of 2 MiB, to some eight allocations
PROBABILITIES = "(probabilities)"       # the name of what `activation` makes of an output


@dataclass(frozen=True)
class Layer:
    """A node with what was prepared for it.

    inputs  all but those that lie in the output already, as some of a Concat's do
    step    None where the node costs nothing
    """
    node: Node
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    step: Step | None


def specialise(graph: Graph, shapes: Mapping[str, Shape],
               keep: frozenset[str] = frozenset()) -> Graph:
    """The graph for inputs of these shapes, with all that they decide folded away."""
    folded = fold.fold(graph.with_input_shapes(dict(shapes)))
    fold.require_folded(folded)
    return passes.combine(passes.arrange(folded, keep), keep)


def open_batch(graph: Graph, shapes: Mapping[str, Shape]) -> int | None:
    """Samples of a batch for inputs of these shapes, None where the graph leaves no number open."""
    return max((known(shapes[name])[0] for name, spec in graph.inputs.items()
                if spec.shape[:1] == (None,)), default=None)


class Program:
    """A network prepared for fixed input shapes on a device.

    All values live in one arena at offsets planned ahead. Calls from several threads take turns.
    If `activated`, PROBABILITIES is a value, too: float32 (N, classes), the activation of the first
    output. `batch` is what a smaller one may be advised for, None where none is possible.

    steps   (name, launches) of each layer that runs
    values  arrays of the device, by name, of all but constants
    """

    def __init__(self, graph: Graph, device: Device, options: Any,
                 keep: frozenset[str] = frozenset(), activation: Op | None = None,
                 batch: int | None = None) -> None:
        graph = passes.norms.join(graph, device.takes_norm, keep)
        self.graph, self.device, self._batch = graph, device, batch
        self.activated = activation is not None and graph.outputs[0] not in graph.constants
        specs = storage(graph, device, options, keep)
        shared = views(graph)
        layers = [self._layer(node, specs, shared, options) for node in graph.nodes]
        workspaces = [layer.step.workspace if layer.step else 0 for layer in layers]
        strided = {layer.node.output: layer.step.strided for layer in layers
                   if layer.step and layer.step.strided}
        readers = {layer.node.output: layer.step.reads_strided for layer in layers
                   if layer.step and layer.step.reads_strided}
        layout = plan(graph, specs, workspaces, keep, strided, readers)
        self.layers = [without_parts(layer, layout.parts) for layer in layers]
        self.bytes, self._specs, self._held = layout.size, specs, 0
        # Before the arena, so that what has no room beside them is this batch.
        self._constants = {
            name: device.constant(graph.constants[name], options)
            for layer in self.layers if layer.step is not None
            for i, name in enumerate(layer.node.inputs)
            if name in graph.constants and i not in layer.node.op.packed}
        self._arena = self._allocate(layout.size)
        self.values: dict[str, Array] = {}
        for name, offset in layout.offsets.items():
            spec = specs[name]
            size = count(spec.shape) * np.dtype(spec.dtype).itemsize
            self.values[name] = device.view(self._arena[offset:offset + size], spec)
        for name, (whole, first) in layout.parts.items():
            channels = known(specs[name].shape)[-1]
            self.values[name] = self.values[whole][..., first:first + channels]
        self.steps = [
            (layer.node.name, self._bind(layer, layout.parts, offset, size)) for layer, offset, size
            in zip(self.layers, layout.workspaces, workspaces, strict=True)
            if layer.step is not None]
        self._inlets = {name: device.inlet(self.values[name], specs[name],
                                           self._readers(name, shared, keep))
                        for name in graph.inputs}
        self._outlets = {name: self._advised(device.outlet, self.values[name], specs[name])
                         for name in graph.outputs if name in self.values}
        if activation is not None and self.activated:
            self._outlets[PROBABILITIES] = self._activated(activation, options)
        last = [launch for _, launches in self._outlets.values() for launch in launches]
        self._run = self._advised(device.compile, [*self.steps, ("(output)", last)]
                                  if last else self.steps)
        self._fetches = {name: self._fetcher(name)
                         for name in {*graph.outputs, *keep, *self._outlets}}
        self._lock, self._turn = threading.Lock(), device.turns()

    def _readers(self, name: str, shared: dict[str, str], keep: frozenset[str]) -> list[Any]:
        """The launches that read an input, none where it is also given back."""
        names = {name, *(view for view, root in shared.items() if root == name)}
        if not names.isdisjoint((*self.graph.outputs, *keep)):
            return []
        running = [layer for layer in self.layers if layer.step is not None]
        return [launch for layer, (_, launches) in zip(running, self.steps, strict=True)
                if not names.isdisjoint(layer.node.inputs) for launch in launches]

    def _allocate(self, size: int) -> Array:
        block = self._advised(self.device.allocate, size)
        self._held += size
        return block

    def _advised(self, allocating: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns; OutOfMemory says what the program needs in all and what batch would fit.

        Beside the arena that is at most: outputs as float32, the probabilities if there are some,
        and of two batches, which are under way at the same time, inputs and results as float32.
        """
        try:
            return allocating(*arguments)
        except OutOfMemory as error:
            if error.device != self.device.name:        # it is the host's memory
                raise
            free = error.free + self._held
        outputs = self.graph.outputs
        needed = self.bytes + 2 * self._float32(self.graph.inputs) + 3 * self._float32(
            outputs) + self._float32(outputs[:self.activated])
        raise OutOfMemory(self.device.name, needed, free, self._words(needed, free))

    def _words(self, needed: int, free: int) -> tuple[str, str]:
        """What has no room, and what to do."""
        what, batch = "the values of this network", self._batch
        if batch is None:
            return what, "use a smaller image, or another GPU"
        fits = min(batch * (free - ROUNDING) // needed, batch - 1)
        return f"{what} at batch {batch}", (
            f"a batch of {fits} would fit" if fits > 0
            else "perhaps not even a batch of 1 would fit: use a smaller image")

    def _float32(self, names: Iterable[str]) -> int:
        """Bytes of these values as float32."""
        return sum(4 * count(self._specs[name].shape) for name in names)

    def _layer(self, node: Node, specs: dict[str, TensorSpec], shared: dict[str, str],
               options: Any) -> Layer:
        inputs, output = tuple(specs[name] for name in node.inputs), specs[node.output]
        if node.output in shared:
            return Layer(node, inputs, output, None)
        weights = [self.graph.constants.get(name) for name in node.inputs]
        try:
            step = self.device.prepare(node.op, list(inputs), output, weights, options)
        except ValueError as error:
            raise ModelError(f"layer {node.name!r}: {error}") from None
        return Layer(node, inputs, output, step)

    def _bind(self, layer: Layer, parts: Mapping[str, Part], offset: int, size: int) -> Any:
        assert layer.step is not None
        node = layer.node
        there = parts if isinstance(node.op, Concat) else {}
        inputs = [None if name in there else self._operand(node.op, i, name)
                  for i, name in enumerate(node.inputs)]
        return layer.step.bind(inputs, self.values[node.output],
                               self._arena[offset:offset + size])

    def _operand(self, op: Op, i: int, name: str) -> Array:
        """Input i of an op. A kernel reads what was packed, not the constant it was made of."""
        if name not in self.graph.constants:
            return self.values[name]
        return self.graph.constants[name] if i in op.packed else self._constants[name]

    def _activated(self, activation: Op, options: Any) -> tuple[Array, list[Any]]:
        """Where it lies, and the launches that make it: as for an output."""
        logits, _ = self._outlets[self.graph.outputs[0]]
        rows = logits.reshape(len(logits), -1)
        spec = self._specs[PROBABILITIES] = TensorSpec(rows.shape)
        step = self.device.prepare(activation, [spec], spec, [None], options)
        there = self.device.view(self._allocate(4 * rows.size), spec)
        return there, step.bind([rows], there, rows)

    def run(self, inputs: Mapping[str, Any], values: tuple[str, ...] = ()) -> dict[str, Array]:
        """Copies of the graph's outputs, or of the named values, for these inputs, as float32.

        Inputs are Photos or float32 arrays of exactly the shapes that the program was made for.
        """
        return self.start(inputs, values)()

    def start(self, inputs: Mapping[str, Any], values: tuple[str, ...] = (),
              on_gpu: bool = False) -> Callable[[], dict[str, Array]]:
        """Begin a run; what is returned waits for it and gives what `run` does.

        A GPU works meanwhile, also on runs that are begun before this one is waited for. on_gpu
        leaves the copies there.
        """
        return self._advised(self._start, inputs, values, on_gpu)

    def _start(self, inputs: Mapping[str, Any], values: tuple[str, ...],
               on_gpu: bool) -> Callable[[], dict[str, Array]]:
        with self._lock, self._turn(on_gpu) as stream:
            for name, fill in self._inlets.items():
                fill(inputs[name], stream)
            self._run(stream)
            copies = {name: self._fetches[name](on_gpu, stream)
                      for name in values or self.graph.outputs}
        return lambda: {name: wait() for name, wait in copies.items()}

    def _fetcher(self, name: str) -> Fetch:
        """What begins to copy a value that may be asked for."""
        if name in self._outlets:
            value, _ = self._outlets[name]
            return self.device.fetcher(value, TensorSpec(self._specs[name].shape))
        if name in self.values:
            return self.device.fetcher(self.values[name], self._specs[name])
        constant = self.graph.constants[name]
        return lambda on_gpu, stream: constant.copy


def without_parts(layer: Layer, parts: Mapping[str, Part]) -> Layer:
    """A Concat has those inputs to copy that are no parts of its output; maybe none."""
    if not isinstance(layer.node.op, Concat):
        return layer
    left = tuple(spec for name, spec in zip(layer.node.inputs, layer.inputs, strict=True)
                 if name not in parts)
    return replace(layer, inputs=left, step=layer.step if left else None)
