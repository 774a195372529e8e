"""The dtype in which each value lies in the memory of a device."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from kernels.ops import (
    AddFakeQuantize,
    Concat,
    FakeQuantize,
    Flatten,
    Grid,
    MaxPool2d,
    Reshape,
    TensorSpec,
)

from .devices import Device
from .graph import Graph, Node
from .plan import views

Specs = dict[str, TensorSpec]
MOVING = (Concat, Flatten, MaxPool2d, Reshape)      # ops that only pick numbers


def storage(graph: Graph, device: Device, options: Any,
            keep: frozenset[str] = frozenset()) -> Specs:
    """Spec of every value, with the dtype that it is stored in, and the grid of 8 bits that it is
    known to be of.

    The dtype is the device's, and a narrower one where the layer that gives a value and all that
    read it can do with that. What the caller writes or reads, values in `keep` too, is never of
    these.
    """
    specs = {name: stored(spec, device.stored) for name, spec in graph.infer().items()
             if spec is not None}
    if not device.narrows:
        return specs
    for node in graph.nodes:
        specs[node.output] = replace(specs[node.output], grid=_grid(node, specs))
    wide = {*graph.inputs, *graph.outputs, *graph.constants, *keep}
    for dtype in device.narrows:
        specs = _narrowed(dtype, graph, device, options, specs, wide)
    return specs


def _grid(node: Node, specs: Specs) -> Grid | None:
    """Of what a node gives."""
    last = getattr(node.op, "activation", node.op)
    if isinstance(last, (FakeQuantize, AddFakeQuantize)):
        return last.grid
    grids = {specs[name].grid for name in node.inputs}
    return grids.pop() if isinstance(node.op, MOVING) and len(grids) == 1 else None


def _narrowed(dtype: str, graph: Graph, device: Device, options: Any, specs: Specs,
              wide: set[str]) -> Specs:
    """The specs with this dtype for what can be stored so, is not yet narrow, and not in `wide`."""
    too_wide = {name for name, spec in specs.items() if not _can_be(dtype, spec, device)}
    if len(too_wide) == len(specs):
        return specs
    shared, alike, unfit = views(graph), Alike(), [*wide, *too_wide]
    for node in graph.nodes:
        weights = [graph.constants.get(name) for name in node.inputs]
        can = device.narrow(dtype, node.op, [specs[name] for name in node.inputs], weights, options)
        if can.moves or node.output in shared:
            for name in node.inputs:
                alike.join(name, node.output)
            continue
        unfit += [name for i, name in enumerate(node.inputs) if i not in can.reads]
        unfit += [] if can.writes else [node.output]
    left_wide = {alike.first(name) for name in unfit}
    return {name: spec if alike.first(name) in left_wide else replace(spec, dtype=dtype)
            for name, spec in specs.items()}


def _can_be(dtype: str, spec: TensorSpec, device: Device) -> bool:
    return spec.dtype == device.stored and (dtype != "uint8" or spec.grid is not None)


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
