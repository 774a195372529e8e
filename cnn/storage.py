"""The dtype in which each value lies in the memory of a device."""
from __future__ import annotations

from dataclasses import replace

from kernels.ops import TensorSpec

from .devices import Device
from .graph import Graph
from .plan import views

NOTHING: frozenset[str] = frozenset()


def storage(graph: Graph, device: Device, keep: frozenset[str] = NOTHING) -> dict[str, TensorSpec]:
    """Spec of every value, with the dtype that it is stored in.

    That is the device's, and bfloat16 where the layer that gives a value and all that read it can
    do with that. What the caller writes or reads, values in `keep` too, is never of these.
    """
    specs = {name: stored(spec, device.stored) for name, spec in graph.infer().items()
             if spec is not None}
    shared = views(graph)
    wide = {shared.get(name, name) for name in (*graph.inputs, *graph.outputs, *keep)}
    for node in graph.nodes:
        if node.output in shared:
            continue
        reads, writes = device.narrow(node.op, [specs[name].shape for name in node.inputs])
        wide.update(shared.get(name, name) for i, name in enumerate(node.inputs) if i not in reads)
        if not writes:
            wide.add(node.output)
    return {name: spec if name in graph.constants or shared.get(name, name) in wide
            else replace(spec, dtype="bfloat16") for name, spec in specs.items()}


def stored(spec: TensorSpec, dtype: str) -> TensorSpec:
    """As the device's memory holds it: only floats are there once glue is folded away."""
    return replace(spec, dtype=dtype) if spec.dtype == "float32" else spec
