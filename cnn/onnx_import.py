""".onnx -> Graph: one small function per ONNX operator, named after it.

Semantics are kept literally. An ONNX image is NCHW, our ops are NHWC, so that Conv becomes
Transpose, Conv2d, Transpose; passes/layout.py moves and cancels the transposes. Each function takes
the importer, the names of its input values (None where one is left out), and the operator's
attributes by their own names; it returns the name of the resulting value.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from kernels import ops
from kernels.ops import Op, Padding, Shape, TensorSpec

from . import fold, onnx_file
from .errors import ModelError
from .graph import Glue, Graph, Node, infer_node

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
Ints = Sequence[int]
Value = str         # name of a value in the graph being built


@dataclass(frozen=True)
class Imported:
    """A graph whose rank-4 inputs are NHWC (NCHW in the file), and the file's metadata."""
    graph: Graph
    metadata: dict[str, str]


class Importer:
    """The graph so far. `here` is the ONNX node being imported, `name` its unique name."""

    def __init__(self, opset: int) -> None:
        self.opset, self.nodes = opset, list[Node]()
        self.constants: dict[Value, np.ndarray] = {}
        self.specs: dict[Value, TensorSpec | None] = {}
        self.aliases: dict[str, Value] = {}         # ONNX value -> ours, where the names differ
        self.shape_values: set[Value] = set()       # made by glue from shapes alone
        self.name = ""

    def error(self, sentence: str) -> ModelError:
        return ModelError(f"node {self.name!r}: {sentence}")

    def emit(self, op: Op, *inputs: Value, suffix: str = "") -> Value:
        """Append a node; the value's name is that of the layer until `finish` gives it its own."""
        node = Node(op, inputs, f"{self.name}{suffix}:{len(self.nodes)}", self.name + suffix)
        self.specs[node.output] = infer_node(node, [self.specs[value] for value in inputs])
        self.nodes.append(node)
        return node.output

    def channels_last(self, op: Op, x: Value, *rest: Value) -> Value:
        """An op on images, between the transposes that make NHWC of NCHW and back."""
        inside = self.emit(ops.Transpose(TO_NHWC), x, suffix=":nhwc")
        return self.emit(ops.Transpose(TO_NCHW), self.emit(op, inside, *rest), suffix=":nchw")

    def add_constant(self, name: Value, array: np.ndarray) -> Value:
        self.constants[name] = array
        self.specs[name] = TensorSpec(array.shape, array.dtype.name)
        return name

    def array(self, value: Value | None, what: str) -> np.ndarray:
        """The array behind a value that must be a constant."""
        if value not in self.constants:
            raise self.error(f"its {what} must be a constant of the file, it is {value!r}")
        return self.constants[value]

    def weight(self, value: Value | None, what: str, rank: int | None = None) -> np.ndarray:
        """A constant of float32, and of this rank."""
        array = self.array(value, what)
        if array.dtype != np.float32 or rank not in (None, array.ndim):
            raise self.error(f"its {what} is {array.dtype} of shape {array.shape}; float32"
                             f"{'' if rank is None else f' with {rank} axes'} is needed")
        return array

    def shape(self, value: Value) -> Shape:
        spec = self.specs[value]
        if spec is None:
            raise self.error(f"the shape of its input {value!r} can not be known")
        return spec.shape

    def finish(self, value: Value, onnx_name: str, first: int) -> None:
        """Give the value that a node returned the name that it has in the file."""
        if len(self.nodes) > first and self.nodes[-1].output == value:
            self.nodes[-1] = replace(self.nodes[-1], output=onnx_name)
            self.specs[onnx_name] = self.specs.pop(value)
        else:
            self.aliases[onnx_name] = value


# ---- images -----------------------------------------------------------------------------------

def Conv(net: Importer, x: Value, w: Value, b: Value | None = None, *,
         auto_pad: str = "NOTSET", dilations: Ints | None = None, group: int = 1,
         kernel_shape: Ints | None = None, pads: Ints | None = None,
         strides: Ints | None = None) -> Value:
    weight = net.weight(w, "weight", rank=4)
    if kernel_shape is not None and tuple(kernel_shape) != weight.shape[2:]:
        raise net.error(f"kernel_shape {tuple(kernel_shape)} is not that of its weight "
                        f"{weight.shape}")
    stride, dilation = _pair(strides), _pair(dilations)
    padding = _padding(net, x, auto_pad, pads, weight.shape[2:], stride, dilation)
    inputs = [net.add_constant(f"{w}:ohwi", np.ascontiguousarray(weight.transpose(0, 2, 3, 1)))]
    if b is not None:
        net.weight(b, "bias", rank=1)
        inputs.append(b)
    return net.channels_last(ops.Conv2d(stride, padding, dilation, group), x, *inputs)


def MaxPool(net: Importer, x: Value, *, auto_pad: str = "NOTSET", ceil_mode: int = 0,
            dilations: Ints | None = None, kernel_shape: Ints, pads: Ints | None = None,
            storage_order: int = 0, strides: Ints | None = None) -> Value:
    kernel, stride, dilation = _pair(kernel_shape), _pair(strides), _pair(dilations)
    padding = _padding(net, x, auto_pad, pads, kernel, stride, dilation)
    return net.channels_last(
        ops.MaxPool2d(kernel, stride, padding, dilation, bool(ceil_mode)), x)


def AveragePool(net: Importer, x: Value, *, auto_pad: str = "NOTSET", ceil_mode: int = 0,
                count_include_pad: int = 0, dilations: Ints | None = None, kernel_shape: Ints,
                pads: Ints | None = None, strides: Ints | None = None) -> Value:
    kernel, stride = _pair(kernel_shape), _pair(strides)
    if _pair(dilations) != (1, 1):
        raise net.error(f"AveragePool with dilations {tuple(dilations or ())} is not supported")
    padding = _padding(net, x, auto_pad, pads, kernel, stride, (1, 1))
    return net.channels_last(ops.AvgPool2d(kernel, stride, padding, (1, 1), bool(ceil_mode),
                                           bool(count_include_pad)), x)


def GlobalAveragePool(net: Importer, x: Value) -> Value:
    return net.channels_last(ops.GlobalAvgPool2d(), x)


def ReduceMean(net: Importer, x: Value, axes_input: Value | None = None, *,
               axes: Ints | None = None, keepdims: int = 1,
               noop_with_empty_axes: int = 0) -> Value:
    wanted = axes if axes_input is None else net.array(axes_input, "axes").tolist()
    shape = net.shape(x)
    if len(shape) != 4 or wanted is None or sorted(a % 4 for a in wanted) != [2, 3]:
        raise net.error(f"ReduceMean over axes {wanted} of shape {shape} is not supported, only "
                        f"over height and width of an image")
    y = net.channels_last(ops.GlobalAvgPool2d(), x)
    return y if keepdims else net.emit(ops.Reshape((0, 0)), y, suffix=":squeeze")


def BatchNormalization(net: Importer, x: Value, scale: Value, b: Value, mean: Value, var: Value,
                       *, epsilon: float = 1e-5, momentum: float = 0.9, spatial: int = 1,
                       training_mode: int = 0) -> Value:
    if training_mode or not spatial:
        raise net.error("BatchNormalization in training mode, or not per channel, is not supported")
    for value, what in ((scale, "scale"), (b, "bias"), (mean, "mean"), (var, "variance")):
        net.weight(value, what, rank=1)
    op, rank = ops.BatchNorm(epsilon), len(net.shape(x))
    if rank == 4:
        return net.channels_last(op, x, scale, b, mean, var)
    if rank != 2:
        raise net.error(f"BatchNormalization of {rank} axes is not supported, only of 2 or 4")
    return net.emit(op, x, scale, b, mean, var)


def _pair(values: Ints | None) -> tuple[int, int]:
    pair = (1, 1) if values is None else tuple(values)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{pair} must be two numbers of at least 1: only 2-D images are supported")
    return pair


def _padding(net: Importer, x: Value, auto_pad: str, pads: Ints | None, kernel: Ints, stride: Ints,
             dilation: Ints) -> Padding:
    """ONNX `pads`, or what auto_pad makes of the input's size."""
    if auto_pad == "NOTSET":
        given = (0, 0, 0, 0) if pads is None else tuple(pads)
        if len(given) != 4 or min(given) < 0:
            raise ValueError(f"pads {given} must be four numbers of at least 0")
        return given
    if auto_pad == "VALID":
        return (0, 0, 0, 0)
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad {auto_pad!r} is unknown")
    begin, end = [], []
    for size, k, s, d in zip(net.shape(x)[2:], kernel, stride, dilation, strict=True):
        if size is None:
            raise ValueError(f"auto_pad {auto_pad!r} needs the image's size in the file; export "
                             f"the model with fixed height and width")
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        begin.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
        end.append(total - begin[-1])
    return (begin[0], begin[1], end[0], end[1])


# ---- matrix products --------------------------------------------------------------------------

def Gemm(net: Importer, a: Value, b: Value, c: Value | None = None, *, alpha: float = 1.0,
         beta: float = 1.0, transA: int = 0, transB: int = 0) -> Value:
    if transA:
        raise net.error("Gemm with transA=1 is not supported")
    matrix = net.weight(b, "second input", rank=2)
    weight = np.float32(alpha) * (matrix if transB else matrix.T)
    inputs = [net.add_constant(f"{b}:linear:{net.name}", np.ascontiguousarray(weight))]
    if c is not None:
        bias = net.weight(c, "bias")
        if bias.size not in (1, len(weight)) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
            raise net.error(f"its bias has shape {bias.shape}; one number for each of the "
                            f"{len(weight)} outputs is needed")
        full = np.broadcast_to(np.float32(beta) * bias.reshape(-1), len(weight))
        inputs.append(net.add_constant(f"{c}:linear:{net.name}", np.ascontiguousarray(full)))
    return net.emit(ops.Linear(), a, *inputs)


def MatMul(net: Importer, a: Value, b: Value) -> Value:
    weight = np.ascontiguousarray(net.weight(b, "right side", rank=2).T)
    return net.emit(ops.Linear(), a, net.add_constant(f"{b}:linear:{net.name}", weight))


# ---- elementwise ------------------------------------------------------------------------------

def Relu(net: Importer, x: Value) -> Value:
    return net.emit(ops.Relu(), x)


def Clip(net: Importer, x: Value, low: Value | None = None, high: Value | None = None, *,
         min: float | None = None, max: float | None = None) -> Value:
    bounds = [attribute if value is None else float(net.array(value, "bound").reshape(()))
              for value, attribute in ((low, min), (high, max))]
    return net.emit(ops.Clip(-np.inf if bounds[0] is None else bounds[0],
                             np.inf if bounds[1] is None else bounds[1]), x)


def Sigmoid(net: Importer, x: Value) -> Value:
    return net.emit(ops.Sigmoid(), x)


def Tanh(net: Importer, x: Value) -> Value:
    return net.emit(ops.Tanh(), x)


def Swish(net: Importer, x: Value, *, alpha: float = 1.0) -> Value:
    if alpha != 1:
        raise net.error(f"Swish with alpha={alpha} is not supported, only 1")
    return net.emit(ops.Silu(), x)


def HardSwish(net: Importer, x: Value) -> Value:
    return net.emit(ops.HardSwish(), x)


def Add(net: Importer, a: Value, b: Value) -> Value:
    return net.emit(ops.Add(), a, b)


def Mul(net: Importer, a: Value, b: Value) -> Value:
    return net.emit(ops.Mul(), a, b)


def Sum(net: Importer, first: Value, *others: Value) -> Value:
    for other in others:
        first = net.emit(ops.Add(), first, other)
    return first


def Softmax(net: Importer, x: Value, *, axis: int | None = None) -> Value:
    if net.opset >= 13:
        return net.emit(ops.Softmax(-1 if axis is None else axis), x)
    shape, wanted = net.shape(x), 1 if axis is None else axis
    wanted = ops.normal_axis(wanted, len(shape))
    if wanted == len(shape) - 1:
        return net.emit(ops.Softmax(-1), x)
    # Before opset 13 all axes from `axis` on make up one row.
    back = ops.Reshape((-1, *ops.known(shape[1:])))
    flat = net.emit(ops.Flatten(wanted), x, suffix=":flat")
    return net.emit(back, net.emit(ops.Softmax(-1), flat), suffix=":back")


# ---- shape and order --------------------------------------------------------------------------

def Concat(net: Importer, *inputs: Value, axis: int) -> Value:
    return net.emit(ops.Concat(axis), *inputs)


def Flatten(net: Importer, x: Value, *, axis: int = 1) -> Value:
    return net.emit(ops.Flatten(axis), x)


def Reshape(net: Importer, x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    if shape in net.constants:
        return net.emit(ops.Reshape(tuple(net.constants[shape].tolist()), bool(allowzero)), x)
    return net.emit(Glue("Reshape", (("allowzero", allowzero),)), x, shape)


def Squeeze(net: Importer, x: Value, axes_input: Value | None = None, *,
            axes: Ints | None = None) -> Value:
    shape = net.shape(x)
    given = axes if axes_input is None else net.array(axes_input, "axes").tolist()
    gone = ([i for i, size in enumerate(shape) if size == 1] if given is None
            else [ops.normal_axis(axis, len(shape)) for axis in given])
    if any(shape[i] not in (1, None) for i in gone):
        raise ValueError(f"axes {gone} of shape {shape} are not all 1")
    return _reshape_to(net, x, [i for i in range(len(shape)) if i not in gone])


def Unsqueeze(net: Importer, x: Value, axes_input: Value | None = None, *,
              axes: Ints | None = None) -> Value:
    given = axes if axes_input is None else net.array(axes_input, "axes").tolist()
    rank = len(net.shape(x)) + len(given or ())
    new = [ops.normal_axis(axis, rank) for axis in given or ()]
    old = iter(range(rank))
    return _reshape_to(net, x, [None if i in new else next(old) for i in range(rank)])


def _reshape_to(net: Importer, x: Value, axes: Sequence[int | None]) -> Value:
    """Reshape to these axes of x, None being a new one of size 1."""
    shape = net.shape(x)
    sizes = [1 if axis is None else shape[axis] for axis in axes]
    target = [0 if size is None and axes[i] == i else size for i, size in enumerate(sizes)]
    if target.count(None) > 1:
        raise ValueError(f"shape {shape} is too little known to remove or insert axes")
    return net.emit(ops.Reshape(tuple(-1 if size is None else size for size in target)), x)


def Transpose(net: Importer, x: Value, *, perm: Ints | None = None) -> Value:
    reverse = range(len(net.shape(x)))[::-1]
    return net.emit(ops.Transpose(tuple(reverse if perm is None else perm)), x)


def Identity(net: Importer, x: Value) -> Value:
    return x


def Dropout(net: Importer, x: Value, ratio: Value | None = None,
            training_mode: Value | None = None, **_: Any) -> Value:
    if training_mode is not None and net.array(training_mode, "training_mode").any():
        raise net.error("Dropout in training mode is not supported")
    return x


def Cast(net: Importer, x: Value, *, to: np.dtype, saturate: int = 1) -> Value:
    if to != np.float32:
        raise net.error(f"Cast of a computed value to {to} is not supported; values are float32")
    return x


OPERATORS: dict[str, Callable[..., Value]] = {
    function.__name__: function for function in (
        Conv, MaxPool, AveragePool, GlobalAveragePool, ReduceMean, BatchNormalization, Gemm,
        MatMul, Relu, Clip, Sigmoid, Tanh, Swish, HardSwish, Add, Mul, Sum, Softmax, Concat,
        Flatten, Reshape, Squeeze, Unsqueeze, Transpose, Identity, Dropout, Cast)}


# ---- whole files ------------------------------------------------------------------------------

def load_onnx(path: str | os.PathLike) -> Imported:
    """The network in an ONNX file (opsets 7 and up).

    ModelError, with the file and the node, for what is broken, not supported, or not float32.
    """
    path = Path(path)
    model = onnx_file.read_model(path)
    net = Importer(onnx_file.opset(model, path))
    try:
        _require_operators(model)
        for tensor in model.graph.initializer:
            net.add_constant(tensor.name, onnx_file.read_tensor(tensor, path))
        inputs = {}
        for info in model.graph.input:
            if info.name not in net.constants:
                inputs[info.name] = _input(net, info)
        names = _unique_names(model.graph.node)
        for node, net.name in zip(model.graph.node, names, strict=True):
            _import_node(net, node, path)
        outputs = tuple(_output(net, info.name) for info in model.graph.output)
    except ModelError as error:
        raise ModelError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    used = {name for node in net.nodes for name in node.inputs}
    constants = {name: array for name, array in net.constants.items() if name in used}
    graph = Graph(inputs, outputs, tuple(net.nodes), constants)
    return Imported(fold.fold(graph), {p.key: p.value for p in model.metadata_props})


def _require_operators(model: onnx.ModelProto) -> None:
    """One error that lists every operator we lack, rather than the first."""
    lacking = [f"{'' if node.domain in ('', 'ai.onnx') else node.domain + '.'}{node.op_type} "
               f"(node {node.name or node.output[0]!r})"
               for node in model.graph.node
               if node.domain not in ("", "ai.onnx")
               or node.op_type not in OPERATORS.keys() | fold.EVALUATE.keys()]
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise ModelError(f"operators that are not supported: {', '.join(lacking[:5])}{more}. "
                         f"Supported are {', '.join(sorted(OPERATORS))}, and on constants and "
                         f"shapes {', '.join(sorted(fold.EVALUATE.keys() - OPERATORS.keys()))}")


def _unique_names(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """The nodes' names; where one is missing or taken, the operator and a running number."""
    taken, names = {node.name for node in nodes}, []
    seen: set[str] = set()
    for i, node in enumerate(nodes):
        name = node.name
        if not name or name in seen:
            name = f"{node.op_type}_{i}"
            while name in taken:
                name += "_"
        taken.add(name)
        seen.add(name)
        names.append(name)
    return names


def _input(net: Importer, info: onnx.ValueInfoProto) -> TensorSpec:
    """Declare an input of the file; one of four axes is an image, ours are NHWC."""
    tensor = info.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ModelError(f"input {info.name!r} is of type {kind}; only float32 is supported")
    if not tensor.HasField("shape"):
        raise ModelError(f"input {info.name!r} has no shape in the file")
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
    if len(shape) != 4:
        net.specs[info.name] = TensorSpec(shape)
        return TensorSpec(shape)
    spec = TensorSpec(tuple(shape[i] for i in TO_NHWC))
    net.specs[info.name], net.name = spec, info.name
    net.aliases[info.name] = net.emit(ops.Transpose(TO_NCHW), info.name, suffix=":nchw")
    return spec


def _output(net: Importer, name: str) -> Value:
    """The name itself: an output that another value stands for becomes a value of its own."""
    value = net.aliases.get(name, name)
    if value in net.constants or value not in net.specs:
        raise ModelError(f"output {name!r} is not computed from any input")
    if value != name:
        net.name = name
        first = len(net.nodes)
        shape = net.shape(value)
        net.finish(net.emit(ops.Reshape((0,) * len(shape)), value, suffix=":output"), name, first)
    return name


def _import_node(net: Importer, node: onnx.NodeProto, path: Path) -> None:
    inputs = [net.aliases.get(name, name) if name else None for name in node.input]
    while inputs and inputs[-1] is None:
        inputs.pop()
    for value in inputs:
        if value is not None and value not in net.specs:
            raise net.error(f"its input {value!r} is not computed by any node before it")
    if len([name for name in node.output if name]) > 1 and node.op_type != "Dropout":
        raise net.error(f"{node.op_type} with {len(node.output)} outputs is not supported")
    if node.output[0] in net.specs or node.output[0] in net.aliases:
        raise net.error(f"its output {node.output[0]!r} is computed twice")
    attributes = {a.name: onnx_file.read_attribute(a, path) for a in node.attribute}
    first = len(net.nodes)
    try:
        glue = node.op_type in fold.EVALUATE and all(
            value is None or value in net.constants or value in net.shape_values
            for value in inputs)
        if node.op_type == "Shape" or glue:
            value = _glue(net, node.op_type, inputs, attributes)
        elif node.op_type in OPERATORS:
            value = OPERATORS[node.op_type](net, *inputs, **attributes)
        else:
            raise net.error(f"{node.op_type} is supported only on constants and shapes")
    except (ValueError, TypeError) as error:
        raise net.error(f"{node.op_type}: {error}") from None
    net.finish(value, node.output[0], first)
    if value in net.shape_values:
        net.shape_values.add(node.output[0])


def _glue(net: Importer, operator: str, inputs: Sequence[Value | None],
          attributes: dict[str, Any]) -> Value:
    """Evaluate it now if all its inputs are constants, else leave it to `fold`."""
    frozen = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in attributes.items())
    op = Glue(operator, frozen)
    if all(value is None or value in net.constants for value in inputs):
        arrays = [None if value is None else net.constants[value] for value in inputs]
        return net.add_constant(f"{net.name}:folded", fold.evaluate(op, net.name, *arrays))
    if None in inputs:
        raise net.error(f"{operator} with an input left out is not supported here")
    value = net.emit(op, *(value for value in inputs if value is not None))
    net.shape_values.add(value)
    return value
