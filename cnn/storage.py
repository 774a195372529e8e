"""The dtype in which each value lies in the memory of a device."""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import TensorSpec

from .devices import Device
from .graph import Graph
from .plan import views


def storage(graph: Graph, device: Device,
            keep: frozenset[str] = frozenset()) -> dict[str, TensorSpec]:
    """Spec of every value, with the dtype that it is stored in.

    That is the device's, and bfloat16 where the layer that gives a value and all that read it can
    do with that. What the caller writes or reads, values in `keep` too, is never of these.
    """
    specs = {name: stored(spec, device.stored) for name, spec in graph.infer().items()
             if spec is not None}
    shared, alike = views(graph), Alike()
    wide = [*graph.inputs, *graph.outputs, *graph.constants, *keep]
    for node in graph.nodes:
        can = device.narrow(node.op, [specs[name].shape for name in node.inputs])
        if can.moves or node.output in shared:
            for name in node.inputs:
                alike.join(name, node.output)
            continue
        wide += [name for i, name in enumerate(node.inputs) if i not in can.reads]
        wide += [] if can.writes else [node.output]
    unfit = {alike.first(name) for name in wide}
    return {name: spec if alike.first(name) in unfit else replace(spec, dtype="bfloat16")
            for name, spec in specs.items()}


class Alike:
    """Sets of values that are stored alike, each known by the one that is its first."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def join(self, name: str, other: str) -> None:
        """Make one set of those of two values."""
        first, target = self.first(name), self.first(other)
        if first != target:
            self._before[first] = target

    def first(self, name: str) -> str:
        while name in self._before:
            name = self._before[name]
        return name


def stored(spec: TensorSpec, dtype: str) -> TensorSpec:
    """As the device's memory holds it: only floats are there once glue is folded away."""
    return replace(spec, dtype=dtype) if spec.dtype == "float32" else spec
