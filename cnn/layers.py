"""Networks by hand, with torch.nn's names for layers and arguments.

Weights are kept as torch keeps them, so that `state_dict` and `load_state_dict` speak its names and
layouts. Images are NHWC: a net is called on (N, H, W, C) batches.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels import ops
from kernels.ops import Op, Padding, Pair, Shape, TensorSpec

from .errors import ModelError
from .graph import Graph, Node, infer_node

Array = np.ndarray
Size = int | Sequence[int]


class Layer:
    """Base of all layers. `arguments` rebuild it; `weights` are float32 arrays by torch's names."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.weights: dict[str, Array] = {}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{type(self).__name__}({shown})"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name."""
        return {}

    def initialise(self, rng: np.random.Generator) -> None:
        """Draw weights as torch does: uniform within 1 / sqrt(inputs of one output)."""
        shapes = self.shapes()
        if shapes:
            bound = 1 / math.sqrt(max(1, math.prod(shapes["weight"][1:])))
            self.weights = {name: rng.uniform(-bound, bound, shape).astype(np.float32)
                            for name, shape in shapes.items()}

    def build(self, builder: Builder, x: str, name: str) -> str:
        """Append this layer's nodes; returns the value it gives."""
        raise TypeError(f"{type(self).__name__} is no layer of its own")


@dataclass
class Builder:
    """The graph so far."""
    specs: dict[str, TensorSpec | None]
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def emit(self, op: Op, name: str, x: str, **weights: Array) -> str:
        inputs = [x]
        for key, array in weights.items():
            self.constants[f"{name}.{key}"] = np.ascontiguousarray(array)
            self.specs[f"{name}.{key}"] = TensorSpec(array.shape)
            inputs.append(f"{name}.{key}")
        node = Node(op, tuple(inputs), f"{name}:{len(self.nodes)}", name)
        self.specs[node.output] = infer_node(node, [self.specs[value] for value in inputs])
        self.nodes.append(node)
        return node.output

    def rank(self, value: str) -> int:
        spec = self.specs[value]
        return 0 if spec is None else len(spec.shape)


def _check(layer: str, **values: Any) -> None:
    """Every value must be a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{layer}: {name}={value!r} must be a whole number of at least 1")


def _pair(layer: str, name: str, size: Size, least: int = 1) -> Pair:
    """One number for both axes, or (height, width)."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < least
                             for n in pair):
        raise ModelError(f"{layer}: {name}={size!r} must be a whole number of at least {least}, or "
                         f"two of them")
    return pair[0], pair[1]


def _padding(layer: str, padding: Size) -> Padding:
    """One number, (height, width), or (top, left, bottom, right)."""
    if isinstance(padding, Sequence) and len(padding) == 4:
        begin, end = _padding(layer, padding[:2]), _padding(layer, padding[2:])
        return begin[0], begin[1], end[0], end[1]
    height, width = _pair(layer, "padding", padding, least=0)
    return height, width, height, width


# ---- layers with weights ----------------------------------------------------------------------

class Conv2d(Layer):
    """2-D convolution; weight (out, in / groups, KH, KW).

    padding is one number, (height, width), (top, left, bottom, right), "valid", or "same" (with
    stride 1: the output has the input's size, an odd pixel going to the bottom and right).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
                 padding: Size | str = 0, dilation: Size = 1, groups: int = 1,
                 bias: bool = True) -> None:
        super().__init__(in_channels=in_channels, out_channels=out_channels,
                         kernel_size=kernel_size, stride=stride, padding=padding,
                         dilation=dilation, groups=groups, bias=bias)
        _check("Conv2d", in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ModelError(f"Conv2d: groups={groups} must divide in_channels={in_channels} and "
                             f"out_channels={out_channels}")
        self.kernel = _pair("Conv2d", "kernel_size", kernel_size)
        self.op = ops.Conv2d(_pair("Conv2d", "stride", stride), (0, 0, 0, 0),
                             _pair("Conv2d", "dilation", dilation), groups)
        self.op = ops.Conv2d(self.op.stride, self._sides(padding), self.op.dilation, groups)

    def _sides(self, padding: Size | str) -> Padding:
        if padding == "valid":
            return 0, 0, 0, 0
        if not isinstance(padding, str):
            return _padding("Conv2d", padding)
        if padding != "same" or self.op.stride != (1, 1):
            raise ModelError(f"Conv2d: padding={padding!r} must be a number, 'valid', or, with "
                             f"stride 1, 'same'; stride is {self.op.stride}")
        height, width = (d * (k - 1) for d, k in zip(self.op.dilation, self.kernel, strict=True))
        return height // 2, width // 2, height - height // 2, width - width // 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        a = self.arguments
        weight = (a["out_channels"], a["in_channels"] // a["groups"], *self.kernel)
        return {"weight": weight, **({"bias": weight[:1]} if a["bias"] else {})}

    def build(self, builder: Builder, x: str, name: str) -> str:
        weights = dict(self.weights, weight=self.weights["weight"].transpose(0, 2, 3, 1))
        return builder.emit(self.op, name, x, **weights)


class Linear(Layer):
    """Fully connected layer; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features=in_features, out_features=out_features, bias=bias)
        _check("Linear", in_features=in_features, out_features=out_features)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        weight = (self.arguments["out_features"], self.arguments["in_features"])
        return {"weight": weight, **({"bias": weight[:1]} if self.arguments["bias"] else {})}

    def build(self, builder: Builder, x: str, name: str) -> str:
        return builder.emit(ops.Linear(), name, x, **self.weights)


class BatchNorm2d(Layer):
    """Batch norm with the running statistics, as torch does in eval mode."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features=num_features, eps=eps)
        _check("BatchNorm2d", num_features=num_features)
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise ModelError(f"BatchNorm2d: eps={eps!r} must be a number between 0 and 1")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.arguments["num_features"],)
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), shape)

    def initialise(self, rng: np.random.Generator) -> None:
        """Ones and zeros, so that it does nothing yet."""
        self.weights = {name: np.full(shape, name in ("weight", "running_var"), np.float32)
                        for name, shape in self.shapes().items()}

    def build(self, builder: Builder, x: str, name: str) -> str:
        return builder.emit(ops.BatchNorm(self.arguments["eps"]), name, x, **self.weights)


# ---- layers without weights -------------------------------------------------------------------

class _Elementwise(Layer):
    op: Op

    def __init__(self) -> None:
        super().__init__()

    def build(self, builder: Builder, x: str, name: str) -> str:
        return builder.emit(self.op, name, x)


class ReLU(_Elementwise):
    """max(x, 0)"""
    op = ops.Relu()


class ReLU6(_Elementwise):
    """min(max(x, 0), 6)"""
    op = ops.Clip(0.0, 6.0)


class Sigmoid(_Elementwise):
    """1 / (1 + exp(-x))"""
    op = ops.Sigmoid()


class Tanh(_Elementwise):
    """tanh(x)"""
    op = ops.Tanh()


class Softmax(Layer):
    """Softmax along `dim`, an axis of our NHWC (or (N, features)) value; -1 are the channels."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__(dim=dim)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise ModelError(f"Softmax: dim={dim!r} must be a whole number")

    def build(self, builder: Builder, x: str, name: str) -> str:
        return builder.emit(ops.Softmax(self.arguments["dim"]), name, x)


class MaxPool2d(Layer):
    """Greatest value of each window; stride None is kernel_size."""

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
                 dilation: Size = 1, ceil_mode: bool = False) -> None:
        super().__init__(kernel_size=kernel_size, stride=stride, padding=padding,
                         dilation=dilation, ceil_mode=ceil_mode)
        kernel = _pair("MaxPool2d", "kernel_size", kernel_size)
        self.op = ops.MaxPool2d(
            kernel, kernel if stride is None else _pair("MaxPool2d", "stride", stride),
            _padding("MaxPool2d", padding), _pair("MaxPool2d", "dilation", dilation),
            bool(ceil_mode))

    def build(self, builder: Builder, x: str, name: str) -> str:
        return builder.emit(self.op, name, x)


class AvgPool2d(Layer):
    """Mean of each window; stride None is kernel_size."""

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
                 ceil_mode: bool = False, count_include_pad: bool = True) -> None:
        super().__init__(kernel_size=kernel_size, stride=stride, padding=padding,
                         ceil_mode=ceil_mode, count_include_pad=count_include_pad)
        kernel = _pair("AvgPool2d", "kernel_size", kernel_size)
        self.op = ops.AvgPool2d(
            kernel, kernel if stride is None else _pair("AvgPool2d", "stride", stride),
            _padding("AvgPool2d", padding), (1, 1), bool(ceil_mode), bool(count_include_pad))

    def build(self, builder: Builder, x: str, name: str) -> str:
        return builder.emit(self.op, name, x)


class AdaptiveAvgPool2d(Layer):
    """Mean over height and width; only output_size=1 is there."""

    def __init__(self, output_size: Size = 1) -> None:
        super().__init__(output_size=output_size)
        if _pair("AdaptiveAvgPool2d", "output_size", output_size) != (1, 1):
            raise ModelError(f"AdaptiveAvgPool2d: output_size={output_size!r} is not supported, "
                             f"only 1; use AvgPool2d")

    def build(self, builder: Builder, x: str, name: str) -> str:
        return builder.emit(ops.GlobalAvgPool2d(), name, x)


class Flatten(Layer):
    """(N, H, W, C) -> (N, C * H * W) in torch's channel-first order, so that the weights of a
    Linear after it mean the same."""

    def __init__(self, start_dim: int = 1) -> None:
        super().__init__(start_dim=start_dim)
        if start_dim != 1:
            raise ModelError(f"Flatten: start_dim={start_dim!r} is not supported, only 1")

    def build(self, builder: Builder, x: str, name: str) -> str:
        if builder.rank(x) == 4:
            x = builder.emit(ops.Transpose((0, 3, 1, 2)), f"{name}:nchw", x)
        return builder.emit(ops.Flatten(1), name, x)


class Identity(Layer):
    """Passes its input on."""

    def __init__(self) -> None:
        super().__init__()

    def build(self, builder: Builder, x: str, name: str) -> str:
        return x


class Dropout(Identity):
    """Passes its input on: nets here only infer."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.arguments = {"p": p}


# ---- networks ---------------------------------------------------------------------------------

class Sequential(Layer):
    """Layers one after the other, named "0", "1", ... or by the keys of one mapping.

    Weights start random, the same in each run; `load_state_dict` sets them.
    """

    def __init__(self, *layers: Layer | Mapping[str, Layer]) -> None:
        super().__init__()
        named = (dict(layers[0]) if len(layers) == 1 and isinstance(layers[0], Mapping)
                 else {str(i): layer for i, layer in enumerate(layers)})
        for name, layer in named.items():
            if not isinstance(layer, Layer):
                raise ModelError(f"Sequential: {name!r} is {layer!r}, which is no layer of cnn")
            if not name or "." in name:
                raise ModelError(f"Sequential: the name {name!r} must not be empty or have a dot")
        self.layers: dict[str, Layer] = named       # type: ignore[assignment]
        self._models: dict[Shape, Any] = {}
        rng = np.random.default_rng(0)
        for _, layer in self.leaves():
            if not layer.weights:
                layer.initialise(rng)

    def __repr__(self) -> str:
        lines = (f"  {name}: {layer!r}".replace("\n", "\n  ") for name, layer in
                 self.layers.items())
        return "\n".join(["Sequential(", *lines, ")"])

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """(dotted path, layer) of all layers that are not containers, in order."""
        for name, layer in self.layers.items():
            if isinstance(layer, Sequential):
                yield from layer.leaves(f"{prefix}{name}.")
            else:
                yield prefix + name, layer

    def state_dict(self) -> dict[str, Array]:
        """Copies of all weights by torch's names."""
        return {f"{path}.{name}": array.copy() for path, layer in self.leaves()
                for name, array in layer.weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights from arrays or CPU tensors, by torch's names and in its layouts.

        ModelError that lists every missing, unexpected and misshapen key; nothing is changed
        then. Floating-point weights of other widths become float32.
        """
        wanted = {f"{path}.{name}": shape for path, layer in self.leaves()
                  for name, shape in layer.shapes().items()}
        counters = {f"{path}.num_batches_tracked" for path, layer in self.leaves()
                    if isinstance(layer, BatchNorm2d)}
        given = {key: _as_array(value) for key, value in state.items() if key not in counters}
        problems = [f"missing {key!r} {shape}" for key, shape in wanted.items()
                    if key not in given]
        problems += [f"unexpected {key!r}" for key in given if key not in wanted]
        problems += [f"{key!r} is {array.dtype} {array.shape}, float {wanted[key]} is needed"
                     for key, array in given.items() if key in wanted
                     and (array.shape != wanted[key] or array.dtype.kind != "f")]
        if problems:
            raise ModelError(f"the weights do not fit the network: {'; '.join(problems)}")
        for path, layer in self.leaves():
            layer.weights = {name: np.array(given[f"{path}.{name}"], np.float32)
                             for name in layer.shapes()}
        self._models.clear()

    def build(self, builder: Builder, x: str, name: str) -> str:
        for key, layer in self.layers.items():
            x = layer.build(builder, x, f"{name}.{key}" if name else key)
        return x

    def graph(self, input_shape: Shape) -> Graph:
        """The network for (N, H, W, C) inputs, N usually None; input "input", output "output".

        ModelError, naming the layer, where the layers do not fit each other.
        """
        spec = TensorSpec(tuple(input_shape))
        builder = Builder({"input": spec})
        last = self.build(builder, "input", "")
        if not builder.nodes:
            raise ModelError("Sequential: the network has no layer that computes anything")
        renamed = [Node(node.op, node.inputs, "output", node.name) if node.output == last else node
                   for node in builder.nodes]
        return Graph({"input": spec}, ("output",), tuple(renamed), builder.constants)

    def __call__(self, batch: Array) -> Array:
        """The network's raw output for an (N, H, W, C) float32 batch, on the CPU."""
        from .model import Model
        size = np.shape(batch)[1:]
        if size not in self._models:
            self._models[size] = Model(self, input_shape=(None, *size), device="cpu")
        return self._models[size].run({"input": batch})["output"]

    def save(self, path: Any, *, input_shape: Shape | None = None,
             labels: Sequence[str] | None = None, preprocess: Any = None) -> None:
        """Write weights and layers to a .safetensors file, which `cnn.load` rebuilds bit for bit.

        input_shape (H, W, C), labels and preprocess go with them, so that the file alone makes a
        Model.
        """
        from .weights import save_layers
        save_layers(self, path, input_shape, labels, preprocess)


def _as_array(value: Any) -> Array:
    """An array, also of a torch tensor that requires a gradient."""
    return np.asarray(value.detach() if hasattr(value, "detach") else value)
