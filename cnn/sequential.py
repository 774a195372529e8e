"""Layers one after the other."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.ops import Shape, TensorSpec

from . import arguments
from .errors import ModelError
from .graph import Graph, Node, infer_node
from .layer import Array, Emitted, Layer

if TYPE_CHECKING:
    from .image import Preprocess
    from .model import Model

MAX_MODELS = 4      # image sizes for which `Sequential.__call__` keeps a prepared Model


class Sequential:
    """Layers one after the other; a layer may be a Sequential itself.

    layers  the layers, named "0", "1" ..., or one mapping of name -> layer, as in torch.nn

    Weights start as torch's do, but always the same: layer number i draws its own from
    np.random.default_rng((0, i)), unless it already has some. ModelError for what is no layer.
    """

    def __init__(self, *layers: Layer | Sequential | Mapping[str, Any]) -> None:
        named: Mapping[str, Any] = {str(i): layer for i, layer in enumerate(layers)}
        if len(layers) == 1 and isinstance(layers[0], Mapping):
            named = layers[0]
        for name, layer in named.items():
            if not isinstance(name, str) or not name or set(name) & set(".:"):
                raise ModelError(f"Sequential: {name!r} can not be a layer's name; a name is a "
                                 f"string without '.' and ':'")
            if not isinstance(layer, (Layer, Sequential)):
                raise ModelError(f"Sequential: layer {name!r} is {layer!r}, which is no layer of "
                                 f"cnn; give objects such as cnn.ReLU()")
        self.layers: dict[str, Layer | Sequential] = dict(named)
        self._models: dict[Shape, Model] = {}
        self._prepared: list[Array] = []        # the weights that _models were made with
        for i, (_, leaf) in enumerate(self.leaves()):
            leaf.seed = (0, i)                  # without effect on weights that it has

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer | Sequential]:
        return iter(self.layers.values())

    def __getitem__(self, index: int) -> Layer | Sequential:
        return list(self.layers.values())[index]

    def __repr__(self) -> str:
        lines = [f"({name}): {layer!r}" for name, layer in self.layers.items()]
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"Sequential(\n  {body}\n)" if lines else "Sequential()"

    def leaves(self) -> Iterator[tuple[str, Layer]]:
        """(torch's dotted path, layer) of every layer, those of nested Sequentials included."""
        for name, layer in self.layers.items():
            if isinstance(layer, Layer):
                yield name, layer
            else:
                yield from ((f"{name}.{path}", leaf) for path, leaf in layer.leaves())

    # ---- weights ------------------------------------------------------------------------------

    def reset_parameters(self, seed: int = 0) -> None:
        """Forget all weights; layer number i draws new ones from default_rng((seed, i))."""
        if not arguments.is_whole(seed, 0):
            raise ModelError(f"reset_parameters: seed={seed!r} must be a whole number of at least "
                             f"0")
        for i, (_, layer) in enumerate(self.leaves()):
            layer.seed, layer.weights = (int(seed), i), None

    def state_dict(self) -> dict[str, Array]:
        """Copies of all weights, float32, by torch's names ("0.weight") and in its layouts."""
        return {f"{path}.{name}": array.copy() for path, layer in self.leaves()
                for name, array in layer.weights.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take all weights from a mapping as torch's `state_dict()` gives it.

        Values are float arrays or torch tensors of torch's shapes; they are converted to float32
        and copied. ModelError lists every key that is missing, unexpected, misshapen or no float;
        nothing is changed then.
        """
        from .weights import fitting
        shapes = {f"{path}.{name}": shape for path, layer in self.leaves()
                  for name, shape in layer.shapes().items()}
        ignored = {f"{path}.{name}" for path, layer in self.leaves() for name in layer.ignored}
        arrays = fitting(state_dict, shapes, ignored)
        for path, layer in self.leaves():
            layer.weights = {name: arrays[f"{path}.{name}"] for name in layer.shapes()}

    def save(self, path: str | os.PathLike, *, labels: Sequence[str] | None = None,
             preprocess: Preprocess | None = None, input_shape: Shape | None = None) -> None:
        """Write layers and weights to a .safetensors file, which `cnn.load` rebuilds bit for bit.

        labels, preprocess and input_shape (H, W, C), as in `cnn.Model`, are kept with them, so
        that the file alone classifies photos. ModelError where the file can not be written; one
        that was there is then untouched.
        """
        from .weights import save_layers
        save_layers(self, path, labels=labels, preprocess=preprocess, input_shape=input_shape)

    # ---- running ------------------------------------------------------------------------------

    def graph(self, input_shape: Shape) -> Graph:
        """The network for an input of this shape: NHWC (or (N, features)), None for any size.

        Its input is named "input", its output "output", a node by its layer's dotted path; of a
        layer of several nodes the last one is, others add their kind. ModelError, naming the
        layer, where shapes do not fit.
        """
        value, spec = "input", TensorSpec(arguments.shape(input_shape, "input_shape"))
        inputs, nodes, constants = {value: spec}, list[Node](), dict[str, Array]()
        for path, layer in self.leaves():
            emitted = _emit(path, layer, spec.shape)
            for i, (op, weights) in enumerate(emitted, 1):
                own = {f"{path}.{name}": array for name, array in weights.items()}
                name = path if i == len(emitted) else f"{path}:{op.kind.lower()}"
                node = Node(op, (value, *own), f"{name}:out", name)
                found = infer_node(node, [spec, *(TensorSpec(a.shape) for a in own.values())])
                assert found is not None
                value, spec = node.output, found
                nodes.append(node)
                constants |= own
        if not nodes:
            raise ModelError("Sequential: it has no layer that computes anything")
        nodes[-1] = replace(nodes[-1], output="output")
        return Graph(inputs, ("output",), tuple(nodes), constants)

    def __call__(self, batch: Array) -> Array:
        """The network's raw output for an NHWC (or (N, features)) float32 batch, on the CPU.

        A Model prepared for the batch's image size is kept for later calls. ModelError for a
        batch that does not fit.
        """
        from .model import Model
        if not isinstance(batch, np.ndarray) or batch.ndim < 2:
            got = f"shape {batch.shape}" if isinstance(batch, np.ndarray) else repr(batch)[:80]
            raise ModelError(f"Sequential: a batch is a NumPy array (N, H, W, C), not {got}")
        weights = [a for _, layer in self.leaves() for a in layer.weights.values()]
        if [*map(id, weights)] != [*map(id, self._prepared)]:
            self._models, self._prepared = {}, weights
        size = batch.shape[1:]
        if size not in self._models:
            if len(self._models) >= MAX_MODELS:
                del self._models[next(iter(self._models))]
            self._models[size] = Model(self, input_shape=size, device="cpu")
        return self._models[size].run({"input": batch})["output"]


def _emit(path: str, layer: Layer, shape: Shape) -> Emitted:
    try:
        return layer.emit(shape)
    except ValueError as error:
        raise ModelError(f"layer {path!r}: {error}") from None
