"""Folds a batch norm into the convolution or Linear layer before it.

(conv(x) + b - mean) * s + bias = conv(x) * s + (b - mean) * s + bias with s = scale /
sqrt(var + epsilon), so that s goes into the weight and the rest into the bias. Worked out in
float64 and rounded once. The new node keeps the layer's name and gives the batch norm's value.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from kernels.ops import BatchNorm, Conv2d, Linear

from ..graph import Graph, Node


def fold(graph: Graph, keep: frozenset[str] = frozenset()) -> Graph:
    """The graph with every batch norm folded whose convolution feeds nothing else."""
    producer, consumers = graph.producer(), graph.consumers()
    constants = dict(graph.constants)
    done: dict[str, Node] = {}      # value of a folded convolution -> the node that replaces both
    nodes = []
    for node in graph.nodes:
        conv = producer.get(node.inputs[0]) if isinstance(node.op, BatchNorm) else None
        if (conv is None or not isinstance(conv.op, (Conv2d, Linear)) or conv.op.activation
                or len(conv.inputs) > 3 or len(consumers[conv.output]) > 1
                or conv.output in keep or conv.output in graph.outputs
                or not all(name in constants for name in (*conv.inputs[1:], *node.inputs[1:]))):
            nodes.append(node)
            continue
        assert isinstance(node.op, BatchNorm)
        scale, bias, mean, var = (constants[name].astype(np.float64) for name in node.inputs[1:])
        scale = scale / np.sqrt(var + node.op.epsilon)
        weight = constants[conv.inputs[1]].astype(np.float64)
        before = constants[conv.inputs[2]] if len(conv.inputs) > 2 else np.zeros(1)
        names = f"{node.output}:weight", f"{node.output}:bias"
        scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        constants[names[0]] = scaled.astype(np.float32)
        constants[names[1]] = ((before - mean) * scale + bias).astype(np.float32)
        done[conv.output] = replace(conv, inputs=(conv.inputs[0], *names), output=node.output)
    nodes = [done.get(node.output, node) for node in nodes]
    return replace(graph, nodes=tuple(nodes), constants=constants)
