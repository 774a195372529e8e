"""Building a network by hand, with torch.nn's names for layers and arguments.

Values are NHWC, (N, features) after Flatten. Weights are kept under torch's names and in torch's
layouts; `emit` is where they become those of `kernels.ops`. Networks here infer and do not train:
Dropout passes values through, BatchNorm2d uses its running statistics.

Every layer raises ModelError for an argument that does not fit, naming layer, argument and value.
"""
from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kernels import ops
from kernels.ops import Op, Padding, Pair, Shape, TensorSpec

from . import arguments
from .arguments import flag, number, pair, refused, whole
from .errors import ModelError
from .graph import Graph, Node, infer_node

if TYPE_CHECKING:
    from .image import Preprocess
    from .model import Model

Array = np.ndarray
Size = int | Sequence[int]
Emitted = list[tuple[Op, dict[str, Array]]]

MAX_MODELS = 4      # image sizes for which `Sequential.__call__` keeps a prepared Model


class Layer:
    """One layer; the fields of a subclass are its arguments.

    Weights that nobody loaded are drawn when they are first needed, by torch's default rule, from
    np.random.default_rng(seed); `Sequential` gives each of its layers its own seed.
    """
    seed: Pair = (0, 0)
    _weights: dict[str, Array] | None = None

    def emit(self, shape: Shape) -> Emitted:
        """The ops that compute this layer one after the other for an input of this shape, each
        with its weights by name. ValueError for a shape that the layer does not take."""
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights, in torch's layouts and order."""
        return {}

    @property
    def weights(self) -> dict[str, Array]:
        """Name -> float32 array, of `shapes`. Arrays are replaced, never written into."""
        if self._weights is None:
            self._weights = self.draw(np.random.default_rng(self.seed))
        return self._weights

    @weights.setter
    def weights(self, weights: dict[str, Array] | None) -> None:
        self._weights = weights

    def draw(self, rng: np.random.Generator) -> dict[str, Array]:
        """Fresh weights, uniform in +-1 / sqrt(inputs per output): what torch's
        kaiming_uniform_(a=sqrt(5)) and its rule for biases amount to."""
        shapes = self.shapes()
        reach = 1 / math.sqrt(math.prod(shapes["weight"][1:])) if shapes else 0.0
        return {name: (rng.random(shape, np.float32) * 2 - 1) * np.float32(reach)
                for name, shape in shapes.items()}


# ---- layers with weights ----------------------------------------------------------------------

@dataclass(eq=False)
class Conv2d(Layer):
    """Weights: weight (out_channels, in_channels / groups, KH, KW), bias (out_channels,).

    kernel_size, stride, dilation are one number or (height, width). padding is one number,
    (height, width), (top, left, bottom, right), "valid" (none) or "same" (stride 1 only; the
    output is as large as the input, an odd element of padding goes to the bottom and right).
    """
    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = 1
    padding: Size | str = 0
    dilation: Size = 1
    groups: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        self.groups, self.bias = whole(self, "groups"), flag(self, "bias")
        for argument in ("in_channels", "out_channels"):
            setattr(self, argument, whole(self, argument))
            if getattr(self, argument) % self.groups:
                raise refused(self, argument, f"must divide into groups={self.groups}")
        for argument in ("kernel_size", "stride", "dilation"):
            setattr(self, argument, pair(self, argument))
        if not isinstance(self.padding, str):
            self.padding = arguments.padding(self)
        elif self.padding not in ("same", "valid"):
            raise refused(self, "padding", "can be a number, 'same' or 'valid'")
        elif self.padding == "same" and self.stride != (1, 1):
            raise refused(self, "padding", f"needs stride 1, not {self.stride}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        kernel = pair(self, "kernel_size")
        return _with_bias(self.bias, (self.out_channels, self.in_channels // self.groups, *kernel))

    def emit(self, shape: Shape) -> Emitted:
        op = ops.Conv2d(pair(self, "stride"), self._sides(), pair(self, "dilation"), self.groups)
        ohwi = np.ascontiguousarray(self.weights["weight"].transpose(0, 2, 3, 1))
        return [(op, {**self.weights, "weight": ohwi})]

    def _sides(self) -> Padding:
        if self.padding == "valid":
            return (0, 0, 0, 0)
        if self.padding != "same":
            return arguments.padding(self)
        height, width = (d * (k - 1) for d, k in zip(pair(self, "dilation"),
                                                     pair(self, "kernel_size"), strict=True))
        return (height // 2, width // 2, height - height // 2, width - width // 2)


@dataclass(eq=False)
class Linear(Layer):
    """(N, in_features) -> (N, out_features). Weights: weight (out, in), bias (out,)."""
    in_features: int
    out_features: int
    bias: bool = True

    def __post_init__(self) -> None:
        self.in_features = whole(self, "in_features")
        self.out_features = whole(self, "out_features")
        self.bias = flag(self, "bias")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _with_bias(self.bias, (self.out_features, self.in_features))

    def emit(self, shape: Shape) -> Emitted:
        if len(shape) == 4:     # torch would multiply along the width, NHWC along the channels
            raise ValueError(f"Linear takes (N, {self.in_features}), not an image of shape "
                             f"{shape}; put Flatten() before it")
        return [(ops.Linear(), self.weights)]


def _with_bias(bias: bool, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"weight": weight, "bias": weight[:1]} if bias else {"weight": weight}


@dataclass(eq=False)
class BatchNorm2d(Layer):
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias, of images.

    Weights, each (num_features,): weight, bias, running_mean, running_var; torch's
    num_batches_tracked is accepted by load_state_dict and not kept.
    """
    num_features: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.num_features, self.eps = whole(self, "num_features"), number(self, "eps", 1.0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        names = ("weight", "bias", "running_mean", "running_var")
        return dict.fromkeys(names, (self.num_features,))

    def draw(self, rng: np.random.Generator) -> dict[str, Array]:
        """Ones and zeros: the layer changes nothing yet, as in torch."""
        return {name: np.full(shape, name in ("weight", "running_var"), np.float32)
                for name, shape in self.shapes().items()}

    def emit(self, shape: Shape) -> Emitted:
        if len(shape) != 4:
            raise ValueError(f"BatchNorm2d takes (N, H, W, {self.num_features}), not {shape}")
        return [(ops.BatchNorm(self.eps), self.weights)]


# ---- layers without weights -------------------------------------------------------------------

@dataclass(eq=False)
class ReLU(Layer):
    """max(x, 0). inplace changes no result here."""
    inplace: bool = False
    op: ClassVar[ops.Unary] = ops.Relu()

    def __post_init__(self) -> None:
        flag(self, "inplace")

    def emit(self, shape: Shape) -> Emitted:
        return [(self.op, {})]


class ReLU6(ReLU):
    """min(max(x, 0), 6). inplace changes no result here."""
    op = ops.Clip(0.0, 6.0)


class SiLU(ReLU):
    """x / (1 + exp(-x)). inplace changes no result here."""
    op = ops.Silu()


class Hardswish(ReLU):
    """x * min(max(x + 3, 0), 6) / 6. inplace changes no result here."""
    op = ops.HardSwish()


@dataclass(eq=False)
class Tanh(Layer):
    """tanh(x)"""

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.Tanh(), {})]


@dataclass(eq=False)
class Sigmoid(Layer):
    """1 / (1 + exp(-x))"""

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.Sigmoid(), {})]


@dataclass(eq=False)
class Softmax(Layer):
    """exp(x) / sum(exp(x)) over the classes or, of an image, the channels: always the last axis.

    dim counts NHWC axes: -1, or 1 after Flatten, or 3 for an image (torch's dim=1 there).
    """
    dim: int = -1

    def __post_init__(self) -> None:
        self.dim = whole(self, "dim", least=-4)

    def emit(self, shape: Shape) -> Emitted:
        if ops.normal_axis(self.dim, len(shape)) != len(shape) - 1:
            raise ValueError(f"Softmax(dim={self.dim}) of a value of shape {shape} is not "
                             f"supported; channels and classes are the last axis here, dim=-1")
        return [(ops.Softmax(-1), {})]


class Pool(Layer):
    """What both kinds of pooling have in common."""
    kernel_size: Size
    stride: Size | None
    padding: Size
    dilation: Size = 1
    ceil_mode: bool

    def __post_init__(self) -> None:
        kernel = self.kernel_size = pair(self, "kernel_size")
        self.stride = kernel if self.stride is None else pair(self, "stride")
        self.padding, self.ceil_mode = arguments.padding(self), flag(self, "ceil_mode")
        dilation = self.dilation = pair(self, "dilation")
        window = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        if any(2 * side > size for side, size in zip(self.padding, window * 2, strict=True)):
            raise refused(self, "padding", f"must be at most half of the window {window}")

    def window(self) -> tuple[Pair, Pair, Padding, Pair, bool]:
        """The arguments of kernels.ops.Pool2d."""
        return (pair(self, "kernel_size"), pair(self, "stride"), arguments.padding(self),
                pair(self, "dilation"), self.ceil_mode)


@dataclass(eq=False)
class MaxPool2d(Pool):
    """Greatest value of each window, padding taking no part; arguments as in AvgPool2d."""
    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    dilation: Size = 1
    ceil_mode: bool = False

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.MaxPool2d(*self.window()), {})]


@dataclass(eq=False)
class AvgPool2d(Pool):
    """Mean of each window; padding counts as zeros unless count_include_pad is False.

    kernel_size and stride (None: kernel_size) are one number or (height, width); padding is one
    number, (height, width) or (top, left, bottom, right), at most half a window. With ceil_mode a
    last window may hang over the end.
    """
    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count_include_pad = flag(self, "count_include_pad")

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.AvgPool2d(*self.window(), self.count_include_pad), {})]


@dataclass(eq=False)
class AdaptiveAvgPool2d(Layer):
    """Mean over the whole image, (N, H, W, C) -> (N, 1, 1, C): output_size can only be 1."""
    output_size: Size

    def __post_init__(self) -> None:
        self.output_size = pair(self, "output_size")
        if self.output_size != (1, 1):
            raise refused(self, "output_size", "is not supported, only 1; use AvgPool2d")

    def emit(self, shape: Shape) -> Emitted:
        return [(ops.GlobalAvgPool2d(), {})]


@dataclass(eq=False)
class Flatten(Layer):
    """(N, H, W, C) -> (N, C * H * W), in torch's order: all of channel 0 first. A Linear after
    it so takes torch's weights as they are. start_dim can only be 1."""
    start_dim: int = 1

    def __post_init__(self) -> None:
        if not arguments.is_whole(self.start_dim, 1) or self.start_dim != 1:
            raise refused(self, "start_dim", "is not supported, only 1: the batch stays")

    def emit(self, shape: Shape) -> Emitted:
        channels_first: Emitted = [(ops.Transpose((0, 3, 1, 2)), {})]
        return (channels_first if len(shape) == 4 else []) + [(ops.Flatten(1), {})]


@dataclass(eq=False)
class Identity(Layer):
    """x"""

    def emit(self, shape: Shape) -> Emitted:
        return []


@dataclass(eq=False)
class Dropout(Layer):
    """x: values are dropped in training only. inplace changes no result here."""
    p: float = 0.5
    inplace: bool = False

    def __post_init__(self) -> None:
        self.p = number(self, "p", 1.0)
        flag(self, "inplace")

    def emit(self, shape: Shape) -> Emitted:
        return []


# ---- networks ---------------------------------------------------------------------------------

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
        ignored = {f"{path}.num_batches_tracked" for path, layer in self.leaves()
                   if isinstance(layer, BatchNorm2d)}
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

        Its input is named "input", its output "output", a node by its layer's dotted path.
        ModelError, naming the layer, where shapes do not fit.
        """
        value, spec = "input", TensorSpec(arguments.shape(input_shape, "input_shape"))
        inputs, nodes, constants = {value: spec}, list[Node](), dict[str, Array]()
        for path, layer in self.leaves():
            for op, weights in _emit(path, layer, spec.shape):
                own = {f"{path}.{name}": array for name, array in weights.items()}
                name = f"{path}:nchw" if isinstance(op, ops.Transpose) else path
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
