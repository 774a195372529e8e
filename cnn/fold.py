"""Evaluates constant and shape-only glue in NumPy, in the tensors' own dtypes.

Never through kernels/reference.py: INT64_MAX, the usual end of an ONNX Slice, does not survive
float64. One function per operator, named after it; inputs come as arrays, attributes as keywords.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from kernels import ops
from kernels.ops import TensorSpec

from .errors import ModelError
from .graph import Glue, Graph, Node, infer_node

Array = np.ndarray
MOST_ELEMENTS = 1 << 24     # of a constant that is made here


def Constant(*, value: Array | None = None, value_int: int | None = None,
             value_ints: Sequence[int] | None = None, value_float: float | None = None,
             value_floats: Sequence[float] | None = None) -> Array:
    if value is not None:
        return value
    if value_int is not None or value_ints is not None:
        return np.asarray(value_ints if value_int is None else value_int, np.int64)
    return np.asarray(value_floats if value_float is None else value_float, np.float32)


def check_size(shape: Sequence[int]) -> None:
    """ValueError for a constant so large that no network means it."""
    if math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"a constant of shape {list(shape)} is too large to fold")


def ConstantOfShape(shape: Array, *, value: Array | None = None) -> Array:
    filling = np.zeros(1, np.float32) if value is None else value
    check_size(shape.tolist())
    return np.full(tuple(shape), filling[0])


def Gather(data: Array, indices: Array, *, axis: int = 0) -> Array:
    return np.take(data, indices.astype(np.int64), axis=axis)


def GatherND(data: Array, indices: Array, *, batch_dims: int = 0) -> Array:
    if batch_dims:
        raise ValueError(f"batch_dims is {batch_dims}; only 0 is supported")
    check_size([*indices.shape[:-1], *data.shape[indices.shape[-1]:]])
    return data[tuple(np.moveaxis(indices.astype(np.int64), -1, 0))]


def ScatterND(data: Array, indices: Array, updates: Array, *, reduction: str = "none") -> Array:
    if reduction != "none":
        raise ValueError(f"reduction is {reduction!r}; only 'none' is supported")
    result = data.copy()
    result[tuple(np.moveaxis(indices.astype(np.int64), -1, 0))] = updates
    return result


def Unsqueeze(data: Array, axes_input: Array | None = None, *,
              axes: Sequence[int] | None = None) -> Array:
    wanted = axes if axes_input is None else axes_input.tolist()
    return np.expand_dims(data, tuple(wanted or ()))


def Squeeze(data: Array, axes_input: Array | None = None, *,
            axes: Sequence[int] | None = None) -> Array:
    wanted = axes if axes_input is None else axes_input.tolist()
    return np.squeeze(data, None if wanted is None else tuple(wanted))


def Concat(*arrays: Array, axis: int) -> Array:
    return np.concatenate(arrays, axis=axis)


def Slice(data: Array, starts: Array, ends: Array, axes: Array | None = None,
          steps: Array | None = None) -> Array:
    """Python's own slices clamp as ONNX wants, also at INT64_MAX and INT64_MIN. Before opset 10
    all but `data` were attributes."""
    starts, ends = np.asarray(starts), np.asarray(ends)
    axes = None if axes is None else np.asarray(axes)
    index = [slice(None)] * data.ndim
    chosen = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for axis, start, end, step in zip(chosen, starts.tolist(), ends.tolist(), strides,
                                      strict=True):
        if step < 0 and end < -data.shape[axis]:
            end = None      # before the first element, which no plain index can say
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def Cast(data: Array, *, to: np.dtype, saturate: int = 1) -> Array:
    return data.astype(to)


def DequantizeLinear(codes: Array, scale: Array, zero_point: Array | None = None, *, axis: int = 1,
                     block_size: int = 0, output_dtype: np.dtype | None = None) -> Array:
    """(codes - zero_point) * scale in float32, as ONNX Runtime does it. In place, so that a scale
    which does not fit the codes can not make more of them."""
    real = codes.astype(np.float32)
    if zero_point is not None:
        if codes.dtype == np.int32 and zero_point.any():
            raise ValueError("codes of int32 must have the zero point 0")
        real -= _beside(zero_point.astype(np.float32), codes.shape, axis, block_size)
    real *= _beside(scale, codes.shape, axis, block_size)
    return real


def QuantizeLinear(data: Array, scale: Array, zero_point: Array | None = None, *, axis: int = 1,
                   block_size: int = 0, saturate: int = 1, precision: int = 0,
                   output_dtype: np.dtype | None = None) -> Array:
    dtype = np.dtype(output_dtype or np.uint8) if zero_point is None else zero_point.dtype
    codes = data.astype(np.float32)
    codes /= _beside(scale, data.shape, axis, block_size)
    np.rint(codes, out=codes)
    if zero_point is not None:
        codes += _beside(zero_point.astype(np.float32), data.shape, axis, block_size)
    return np.clip(codes, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def _beside(numbers: Array, shape: Sequence[int], axis: int, block_size: int) -> Array:
    """Scales or zero points, one for all, for each element of an axis or for each block of it, in
    a shape that is broadcast to that of the codes."""
    if numbers.size == 1:
        return numbers.reshape(())
    if block_size:
        return np.take(numbers, np.arange(shape[axis]) // block_size, axis)
    if numbers.ndim == 1:
        axis = ops.normal_axis(axis, len(shape))
        return numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return numbers


def Add(a: Array, b: Array) -> Array:
    return a + b


def Sub(a: Array, b: Array) -> Array:
    return a - b


def Mul(a: Array, b: Array) -> Array:
    return a * b


def Div(a: Array, b: Array) -> Array:
    """Whole numbers divide towards zero."""
    if np.issubdtype(a.dtype, np.floating):
        return a / b
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


def Mod(a: Array, b: Array, *, fmod: int = 0) -> Array:
    return np.fmod(a, b) if fmod else np.mod(a, b)


def Max(*arrays: Array) -> Array:
    return reduce(np.maximum, arrays)


def Min(*arrays: Array) -> Array:
    return reduce(np.minimum, arrays)


def Clip(data: Array, low: Array | None = None, high: Array | None = None, *,
         min: float | None = None, max: float | None = None) -> Array:
    low = np.asarray(-np.inf if min is None else min) if low is None else low
    high = np.asarray(np.inf if max is None else max) if high is None else high
    return np.minimum(np.maximum(data, low), high).astype(data.dtype)


def Neg(data: Array) -> Array:
    return -data


def Ceil(data: Array) -> Array:
    return np.ceil(data)


def Floor(data: Array) -> Array:
    return np.floor(data)


def Sqrt(data: Array) -> Array:
    return np.sqrt(data)


def Reciprocal(data: Array) -> Array:
    return 1 / data


def Exp(data: Array) -> Array:
    return np.exp(data)


def Sin(data: Array) -> Array:
    return np.sin(data)


def Cos(data: Array) -> Array:
    return np.cos(data)


def Sigmoid(data: Array) -> Array:
    return (1 / (1 + np.exp(-data))).astype(data.dtype)


def Relu(data: Array) -> Array:
    return np.maximum(data, 0)


def MatMul(a: Array, b: Array) -> Array:
    check_size([*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *a.shape[-2:-1], *b.shape[-1:]])
    return a @ b


def CumSum(data: Array, axis: Array, *, exclusive: int = 0, reverse: int = 0) -> Array:
    if exclusive or reverse:
        raise ValueError("exclusive and reverse are not supported")
    return np.cumsum(data, int(axis), dtype=data.dtype)


def Pow(a: Array, b: Array) -> Array:
    return np.power(a, b).astype(a.dtype)


def ReduceMean(data: Array, axes_input: Array | None = None, *, axes: Sequence[int] | None = None,
               keepdims: int = 1, noop_with_empty_axes: int = 0) -> Array:
    return _reduce(np.mean, data, axes_input, axes, keepdims, noop_with_empty_axes)


def ReduceSum(data: Array, axes_input: Array | None = None, *, axes: Sequence[int] | None = None,
              keepdims: int = 1, noop_with_empty_axes: int = 0) -> Array:
    return _reduce(np.sum, data, axes_input, axes, keepdims, noop_with_empty_axes)


def _reduce(function: Callable[..., Array], data: Array, axes_input: Array | None,
            axes: Sequence[int] | None, keepdims: int, nothing_for_none: int) -> Array:
    wanted = axes if axes_input is None else axes_input.tolist()
    if not wanted and nothing_for_none:
        return data
    return function(data, tuple(wanted) if wanted else None, dtype=data.dtype,
                    keepdims=bool(keepdims))


def BatchNormalization(data: Array, scale: Array, bias: Array, mean: Array, variance: Array, *,
                       epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0,
                       spatial: int = 1) -> Array:
    """Of constants, as a weight that is standardised: in training mode by its own statistics."""
    others = (0, *range(2, data.ndim))
    if training_mode:
        mean, variance = data.mean(others), data.var(others)
    scale, bias, mean, variance = (array.reshape(-1, *[1] * (data.ndim - 2))
                                   for array in (scale, bias, mean, variance))
    return (data - mean) / np.sqrt(variance + np.float32(epsilon)) * scale + bias


def Equal(a: Array, b: Array) -> Array:
    return a == b


def Not(data: Array) -> Array:
    return ~data


def Where(condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition, a, b)


def Range(start: Array, limit: Array, delta: Array) -> Array:
    elements = max(0, int(np.ceil((limit - start) / delta)))
    check_size([elements])
    return (start + delta * np.arange(elements)).astype(start.dtype)


def Expand(data: Array, shape: Array) -> Array:
    check_size(shape.tolist())
    return np.array(data * np.ones(tuple(shape), data.dtype))


def Tile(data: Array, repeats: Array) -> Array:
    check_size([size * int(n) for size, n in zip(data.shape, repeats, strict=True)])
    return np.tile(data, repeats)


def Identity(data: Array) -> Array:
    return data


def Reshape(data: Array, shape: Array, *, allowzero: int = 0) -> Array:
    target = ops.Reshape(tuple(shape.tolist()), bool(allowzero)).output_shape(data.shape)
    return data.reshape(ops.known(target))


def Transpose(data: Array, *, perm: Sequence[int] | None = None) -> Array:
    return np.transpose(data, perm)


def Shape(data: Array, *, start: int = 0, end: int | None = None) -> Array:
    return np.array(data.shape, np.int64)[start:end]


EVALUATE: dict[str, Callable[..., Array]] = {
    function.__name__: function for function in (
        Constant, ConstantOfShape, Gather, GatherND, ScatterND, Unsqueeze, Squeeze, Concat, Slice,
        Cast, DequantizeLinear, QuantizeLinear, Add, Sub, Mul, Div, Mod, Max, Min, Clip, Neg, Ceil,
        Floor, Sqrt, Reciprocal, Pow, Exp, Sin, Cos, Sigmoid, Relu, MatMul, CumSum, ReduceMean,
        ReduceSum, BatchNormalization, Equal, Not, Where, Range, Expand, Tile, Identity, Reshape,
        Transpose, Shape)}


# Whose result may be larger than all that they are given.
BROADCASTING = {"Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Pow", "Equal", "Where"}


def evaluate(op: Glue, name: str, *arrays: Array | None) -> Array:
    """The operator's result; ModelError, naming the node, where its inputs do not fit."""
    try:
        if op.operator in BROADCASTING:
            given = [array for array in arrays if array is not None]
            shape = np.broadcast_shapes(*(array.shape for array in given))
            if math.prod(shape) > max(array.size for array in given):
                check_size(shape)
        with np.errstate(all="ignore"):
            return np.asarray(EVALUATE[op.operator](*arrays, **dict(op.attributes)), order="C")
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise ModelError(f"node {name!r}: {op.operator} can not be worked out: {error}") from None


def fold(graph: Graph) -> Graph:
    """The graph with all glue evaluated that its constants and known shapes decide; the graph
    itself where there is nothing to fold."""
    constants, nodes = dict(graph.constants), []
    specs: dict[str, TensorSpec | None] = dict(graph.inputs)
    specs.update((name, TensorSpec(a.shape, a.dtype.name)) for name, a in constants.items())
    for node in graph.nodes:
        value = _value(node, constants, specs)
        if value is not None:
            constants[node.output] = value
            specs[node.output] = TensorSpec(value.shape, value.dtype.name)
            continue
        if (isinstance(node.op, Glue) and node.op.operator == "Reshape"
                and specs[node.inputs[0]] is not None):     # else it may be glue, too
            node = _with_known_shape(node, constants)
        specs[node.output] = infer_node(node, [specs[name] for name in node.inputs])
        nodes.append(node)
    if nodes == list(graph.nodes):
        return graph
    return replace(graph, nodes=tuple(nodes), constants=constants)


def _value(node: Node, constants: dict[str, Array],
           specs: dict[str, TensorSpec | None]) -> Array | None:
    if not isinstance(node.op, Glue):
        return None
    if node.op.operator == "Shape":
        spec = specs[node.inputs[0]]
        if spec is None or None in spec.shape:
            return None
        stand_in = np.broadcast_to(np.zeros(()), ops.known(spec.shape))
        return evaluate(node.op, node.name, stand_in)
    if not all(name in constants for name in node.inputs):
        return None
    return evaluate(node.op, node.name, *(constants[name] for name in node.inputs))


def _with_known_shape(node: Node, constants: dict[str, Array]) -> Node:
    """A Reshape of a runtime value becomes a real op as soon as its shape is a constant."""
    x, shape = node.inputs
    if shape not in constants:
        return node
    assert isinstance(node.op, Glue)
    allow_zero = bool(dict(node.op.attributes).get("allowzero", 0))
    return replace(node, op=ops.Reshape(tuple(constants[shape].tolist()), allow_zero), inputs=(x,))


def require_folded(graph: Graph) -> None:
    """ModelError, naming operator and node, where glue is left that no shape decides."""
    for node in graph.nodes:
        if isinstance(node.op, Glue):
            raise ModelError(f"node {node.name!r}: the operator {node.op.operator} is supported "
                             f"only on constants and shapes, here it depends on the input's values")
