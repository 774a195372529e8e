""".onnx -> Graph, for files of opset 7 and up.

What each operator becomes is said by operators/; the rest of a file is read here.
"""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from kernels import ops
from kernels.ops import Shape, TensorSpec

from . import arguments, fold, onnx_file
from .errors import ModelError
from .graph import Glue, Graph
from .importer import BATCHES, TO_NCHW, TO_NHWC, Importer, PerBatch, Value
from .operators import MICROSOFT, OPERATORS, TAKE_CODES, Operators
from .operators.quantised import moved

PHOTO_CHANNELS = (1, 3)
STANDARD = ("", "ai.onnx")
QUANTISED_AT_RUN_TIME = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "ConvInteger",
                         "MatMulInteger", "MatMulIntegerToFloat"}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class Imported:
    """A graph whose rank-4 inputs are NHWC, those of them that are NCHW in the file, and the
    file's metadata."""
    graph: Graph
    channels_first: frozenset[str]
    metadata: dict[str, str]


def load_onnx(path: str | os.PathLike, input_shape: Shape | None = None) -> Imported:
    """The network in an ONNX file (opsets 7 and up).

    float16 weights and values become float32. input_shape, (H, W, C) or (N, H, W, C), is that of
    the one image which the network takes, where the file leaves sizes of it open. ModelError, with
    the file and the node, for what is broken, not supported, or neither of both.
    """
    path = Path(path)
    model = onnx_file.read_model(path)
    net = Importer(onnx_file.opset(model, path))
    inputs: dict[str, TensorSpec] = {}
    try:
        _require_operators(model)
        for tensor in model.graph.initializer:
            net.add_constant(tensor.name, single(onnx_file.read_tensor(tensor, path)))
        given = [info for info in model.graph.input if info.name not in net.constants]
        if input_shape is not None and len(given) != 1:
            raise ModelError(f"input_shape={input_shape!r} is of one input, and the file has "
                             f"{len(given)}: {[info.name for info in given]}")
        for info in given:
            inputs[info.name] = _input(net, info, input_shape)
        names = _unique_names(model.graph.node)
        for node, net.name in zip(model.graph.node, names, strict=True):
            _import_node(net, node, path)
        outputs = tuple(_output(net, info.name) for info in model.graph.output)
    except ModelError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise ModelError(f"{where}{error}{_open_sizes(inputs)}") from None
    used = {name for node in net.nodes for name in node.inputs}
    constants = {name: array for name, array in net.constants.items() if name in used}
    graph = Graph(inputs, outputs, tuple(net.nodes), constants)
    channels_first = frozenset(inputs.keys() & net.aliases.keys())
    metadata = {p.key: p.value for p in model.metadata_props}
    return Imported(fold.fold(graph), channels_first, metadata)


def _require_operators(model: onnx.ModelProto) -> None:
    """One error that lists every operator we lack, rather than the first."""
    lacking = [f"{'' if node.domain in STANDARD else node.domain + '.'}{node.op_type} "
               f"(node {node.name or node.output[0]!r})"
               for node in model.graph.node
               if node.op_type not in _operators(node)
               and not (node.domain in STANDARD and node.op_type in fold.EVALUATE)]
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        dynamic = any(node.op_type in QUANTISED_AT_RUN_TIME for node in model.graph.node)
        advice = ("The file is quantised dynamically: its scales depend on all images of a batch, "
                  "and so would each result. Quantise it statically, as "
                  "onnxruntime.quantization.quantize_static does, or use the float file that it "
                  "was made of. " if dynamic else "")
        raise ModelError(f"operators that are not supported: {', '.join(lacking[:5])}{more}. "
                         f"{advice}"
                         f"Supported are {', '.join(sorted(OPERATORS))}, on constants and "
                         f"shapes {', '.join(sorted(fold.EVALUATE.keys() - OPERATORS.keys()))}, "
                         f"and of com.microsoft {', '.join(sorted(MICROSOFT))}")


def _operators(node: onnx.NodeProto) -> Operators:
    """All that its domain has."""
    if node.domain in STANDARD:
        return OPERATORS
    return MICROSOFT if node.domain == "com.microsoft" else {}


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


def _open_sizes(inputs: Mapping[str, TensorSpec]) -> str:
    """What may help where the network could not be understood, as its images are of any size."""
    for name, spec in inputs.items():
        if len(spec.shape) == 4 and None in spec.shape[1:]:
            return (f". The file leaves sizes of its input {name!r} open, (N, H, W, C) is "
                    f"{spec.shape}: give input_shape=(H, W, C), on the command line "
                    f"--input-shape HxWxC")
    return ""


def _input(net: Importer, info: onnx.ValueInfoProto, wanted: Shape | None) -> TensorSpec:
    """Declare an input of the file; one of four axes is an image, ours are NHWC. Sizes that the
    file leaves open are as `wanted`."""
    tensor = info.type.tensor_type
    if tensor.elem_type not in FLOATS:
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ModelError(f"input {info.name!r} is of type {kind}; only float32 is supported")
    if not tensor.HasField("shape"):
        raise ModelError(f"input {info.name!r} has no shape in the file")
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
    nchw = is_nchw(shape)
    if nchw:
        shape = tuple(shape[i] for i in TO_NHWC)
    spec = TensorSpec(shape if wanted is None else _filled(info.name, shape, wanted))
    net.specs[info.name], net.name = spec, info.name
    if None not in spec.shape[1:]:
        first, second = (tuple(batch if size is None else size for size in spec.shape)
                         for batch in BATCHES)
        net.sizes[info.name] = first, second
    if nchw:
        net.aliases[info.name] = net.emit(ops.Transpose(TO_NCHW), info.name, suffix=":nchw")
    return spec


def is_nchw(shape: Sequence[int | None]) -> bool:
    """Whether an input of a file, of this shape there, is an image that is NCHW: one of four axes,
    unless the last one alone has as many channels as a photo, as TensorFlow's networks have it."""
    return len(shape) == 4 and (shape[3] not in PHOTO_CHANNELS or shape[1] in PHOTO_CHANNELS)


def _filled(name: str, shape: Shape, wanted: Shape) -> Shape:
    """The file's shape of an image, with the sizes that it leaves open as wanted."""
    given = arguments.shape(wanted, "input_shape")
    full = (None, *given) if len(given) == 3 else given
    if len(shape) != 4 or len(full) != 4 or any(
            None not in (size, want) and size != want
            for size, want in zip(shape, full, strict=True)):
        raise ModelError(f"input_shape={wanted!r}, (H, W, C) or (N, H, W, C), does not fit input "
                         f"{name!r}, whose shape in the file is {shape}")
    return tuple(want if size is None else size for size, want in zip(shape, full, strict=True))


def _output(net: Importer, name: str) -> Value:
    """The name itself: an output that another value stands for becomes a value of its own."""
    value = net.aliases.get(name, name)
    if value in net.constants or value not in net.specs:
        raise ModelError(f"output {name!r} is not computed from any input")
    if name in net.grids:
        raise ModelError(f"output {name!r} is quantised ({net.grids[name]}); only float32 is "
                         f"supported: end the file with a DequantizeLinear")
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
    for name in filter(None, node.output):
        if name in net.specs or name in net.aliases:
            raise net.error(f"its output {name!r} is computed twice")
    attributes = {a.name: onnx_file.read_attribute(a, path) for a in node.attribute}
    first, net.outputs = len(net.nodes), len(node.output)
    net.coded = {value: net.grids[name] for name, value in zip(node.input, inputs, strict=False)
                 if value is not None and name in net.grids}
    values: tuple[Value, ...]
    try:
        glue = node.op_type in fold.EVALUATE and all(
            value is None or value in net.constants or value in net.batches for value in inputs)
        if node.op_type == "Shape" or glue:
            values = (_glue(net, node.op_type, inputs, attributes),)
        elif node.op_type in _operators(node):
            values = _computed(net, node, inputs, attributes)
        else:
            raise net.error(f"{node.op_type} is supported only on constants and shapes")
    except (ValueError, TypeError) as error:
        raise net.error(f"{node.op_type}: {error}") from None
    few = len(values) < len([name for name in node.output if name])
    if few and node.op_type not in ("Dropout", "BatchNormalization"):
        raise net.error(f"{node.op_type} with {len(node.output)} outputs is not supported")
    for value, name in zip(values, node.output, strict=False):
        if name:
            net.finish(value, name, first)


def _computed(net: Importer, node: onnx.NodeProto, inputs: list[Value | None],
              attributes: dict[str, Any]) -> tuple[Value, ...]:
    takes_codes = node.op_type in TAKE_CODES
    grid = None if takes_codes else moved(net, node.op_type, inputs, attributes.get("mode"))
    found = _operators(node)[node.op_type](net, *inputs, **attributes)
    values = (found,) if isinstance(found, str) else found
    if grid is not None:
        net.coded.update(dict.fromkeys(values, grid))
    return values


def _glue(net: Importer, operator: str, inputs: Sequence[Value | None],
          attributes: dict[str, Any]) -> Value:
    """Evaluate it now where no batch can change it, else leave it to `fold`."""
    frozen = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in attributes.items())
    op = Glue(operator, frozen)
    if all(value is None or value in net.constants for value in inputs):
        arrays = [None if value is None else net.constants[value] for value in inputs]
        return net.add_constant(f"{net.name}:folded",
                                single(fold.evaluate(op, net.name, *arrays)))
    if None in inputs:
        raise net.error(f"{operator} with an input left out is not supported here")
    names = [value for value in inputs if value is not None]
    found = _for_batches(net, op, names)
    if found is not None and np.array_equal(*found):
        return net.add_constant(f"{net.name}:folded", found[0])
    value = net.emit(op, *names)
    net.batches[value] = found
    if found is not None and found[0].dtype == np.float32:
        net.declare(value, (found[0].shape, found[1].shape))
    return value


def _for_batches(net: Importer, op: Glue, inputs: Sequence[Value]) -> PerBatch | None:
    """What the glue gives for each of BATCHES; None where more than the batch is not known."""
    known = [_known(net, op, value) for value in inputs]
    first, second = ([pair[i] for pair in known if pair is not None] for i in (0, 1))
    if len(first) < len(inputs):
        return None
    try:
        return fold.evaluate(op, net.name, *first), fold.evaluate(op, net.name, *second)
    except ModelError:
        return None         # it may fit the batches that come


def _known(net: Importer, op: Glue, value: Value) -> PerBatch | None:
    """An input of glue for each of BATCHES; of Shape's only the shape counts."""
    if op.operator == "Shape" and value not in net.batches:
        sizes = net.shapes(value)
        if sizes is None:
            return None
        first, second = (np.broadcast_to(np.zeros(()), ops.known(shape)) for shape in sizes)
        return first, second
    if value in net.constants:
        return net.constants[value], net.constants[value]
    return net.batches.get(value)


def single(array: np.ndarray) -> np.ndarray:
    """float16, which files use to be small, as float32."""
    return array.astype(np.float32) if array.dtype == np.float16 else array
