"""A graph evaluated node by node with kernels/reference.py, float64: the truth for passes, and for
whole networks."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cnn import fold
from cnn.graph import Graph
from cnn.onnx_import import load_onnx
from kernels import reference
from kernels.ops import Shape


def evaluate(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every value of the graph by name; glue must have been folded."""
    values = {**graph.constants, **inputs}
    for node in graph.nodes:
        values[node.output] = reference.run(node.op, *(values[name] for name in node.inputs))
    return values


def outputs(graph: Graph, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    values = evaluate(graph, inputs)
    return [np.asarray(values[name]) for name in graph.outputs]


def float64_logits(path: Path, images: np.ndarray, input_shape: Shape | None = None) -> np.ndarray:
    """(N, H, W, C) -> (N, classes), by the file's nodes as they are: no pass has touched them.
    input_shape: (H, W, C), where the file leaves it open."""
    graph = load_onnx(path, input_shape).graph
    name, = graph.inputs
    graph = fold.fold(graph.with_input_shapes({name: images.shape}))
    fold.require_folded(graph)
    return outputs(graph, {name: images})[0]
