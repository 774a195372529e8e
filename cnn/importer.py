"""The graph that an ONNX file's nodes become, while it grows.

Semantics are kept literally. An ONNX image is NCHW, our ops are NHWC, so that Conv becomes
Transpose, Conv2d, Transpose; passes/layout.py moves and cancels the transposes.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kernels import ops
from kernels.ops import Op, Shape, TensorSpec

from .errors import ModelError
from .graph import Glue, Node, infer_node

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
Ints = Sequence[int]
Value = str         # name of a value in the graph being built
PerBatch = tuple[np.ndarray, np.ndarray]
Sizes = tuple[Shape, Shape]
BATCHES = (17, 37)      # sizes that stand for an unknown batch: what both give alike, all do


class Grid(NamedTuple):
    """The numbers that a file's codes of 8 bits stand for; zero_point as ops.FakeQuantize has it,
    which counts codes from 0 whatever their dtype is."""
    scale: float
    zero_point: int
    dtype: str

    def __str__(self) -> str:
        return (f"{self.dtype}, scale {self.scale:.6g}, "
                f"zero point {self.zero_point + np.iinfo(self.dtype).min}")

    def real(self, code: float) -> float:
        """What a code of the file stands for."""
        number = code - np.iinfo(self.dtype).min - self.zero_point
        return float(np.float32(number) * np.float32(self.scale))


class Importer:
    """The graph so far.

    name     of the ONNX node being imported, unique
    outputs  how many it has
    aliases  ONNX value -> ours, where the names differ
    batches  of each value that glue works out from shapes alone: what it is for each of BATCHES,
             or None where other sizes matter, too
    sizes    of each value but constants its shape for each of BATCHES, or None as of batches
    grids    of each ONNX value that the file quantised, and that is here what its codes stand for
    coded    the same of our values, for the node being imported: its inputs and what it returns
    """

    def __init__(self, opset: int) -> None:
        self.opset, self.nodes = opset, list[Node]()
        self.constants: dict[Value, np.ndarray] = {}
        self.specs: dict[Value, TensorSpec | None] = {}
        self.aliases: dict[str, Value] = {}
        self.batches: dict[Value, PerBatch | None] = {}
        self.sizes: dict[Value, Sizes | None] = {}
        self.grids: dict[str, Grid] = {}
        self.coded: dict[Value, Grid] = {}
        self.name, self.outputs = "", 1

    def error(self, sentence: str) -> ModelError:
        return ModelError(f"node {self.name!r}: {sentence}")

    def emit(self, op: Op, *inputs: Value, suffix: str = "") -> Value:
        """Append a node; the value's name is that of the layer until `finish` gives it its own."""
        node = Node(op, inputs, f"{self.name}{suffix}:{len(self.nodes)}", self.name + suffix)
        self.specs[node.output] = infer_node(node, [self.specs[value] for value in inputs])
        if not isinstance(op, Glue):
            self.declare(node.output, self._sizes(op, inputs))
        self.nodes.append(node)
        return node.output

    def declare(self, value: Value, sizes: Sizes | None) -> None:
        """Say what shape a value has for each of BATCHES; where these agree, it is known."""
        self.sizes[value] = sizes
        if sizes is not None and len(sizes[0]) == len(sizes[1]):
            self.specs[value] = TensorSpec(tuple(
                a if a == b else None for a, b in zip(*sizes, strict=True)))

    def _sizes(self, op: Op, inputs: Sequence[Value]) -> Sizes | None:
        given = [self.shapes(value) for value in inputs]
        known = [sizes for sizes in given if sizes is not None]
        if len(known) < len(given):
            return None
        try:
            first, second = (op.output_shape(*(sizes[i] for sizes in known)) for i in (0, 1))
        except ValueError:      # it may fit the batches that come
            return None
        return first, second

    def shapes(self, value: Value) -> Sizes | None:
        """Of a value for each of BATCHES, where nothing else decides it."""
        if value in self.constants:
            return (self.constants[value].shape,) * 2
        return self.sizes.get(value)

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

    def given(self, value: Value | None, attribute: Ints | None, what: str) -> Ints | None:
        """What newer opsets have as an input, a constant, and older ones as an attribute."""
        return attribute if value is None else self.array(value, what).tolist()

    def beside_batch(self, value: Value | None, shape: Shape, what: str) -> np.ndarray:
        """The array behind a value that says something of each axis of `shape`, and is a constant
        but for what it says of axes of unknown size: of those it may be anything."""
        found = self.batches.get(value or "")
        if found is None:
            return self.array(value, what)
        if any(a != b and size is not None for a, b, size in zip(*found, shape, strict=True)):
            raise self.error(f"its {what} must not change with the batch, it is {value!r}")
        return found[0]

    def shape(self, value: Value) -> Shape:
        spec = self.specs[value]
        if spec is None:
            raise self.error(f"the shape of its input {value!r} can not be known: it comes from "
                             f"{self._origin(value)}, whose result depends on the batch; "
                             f"input_shape=(N, H, W, C) fixes that")
        return spec.shape

    def _origin(self, value: Value) -> str:
        """The operator, and its node, from which a value's shape is not known any more."""
        made = {node.output: node for node in self.nodes}
        while not isinstance(made[value].op, Glue):
            value = next(name for name in made[value].inputs if self.specs[name] is None)
        return f"{made[value].op.kind} at node {made[value].name!r}"

    def image(self, value: Value) -> tuple[int, ...]:
        """Channels, height and width, which must be known."""
        shape = self.shape(value)
        if len(shape) != 4 or None in shape[1:]:
            raise ValueError(f"it takes an image whose size is known, not shape {shape}")
        return ops.known(shape[1:])

    def by_rows(self, op: Op, axis: int, x: Value, *rest: Value) -> Value:
        """An op along the last axis, where all axes from `axis` on make up one row."""
        shape = self.shape(x)
        if axis == len(shape) - 1:
            return self.emit(op, x, *rest)
        back = ops.Reshape((-1, *ops.known(shape[1:])))
        flat = self.emit(ops.Flatten(axis), x, suffix=":flat")
        return self.emit(back, self.emit(op, flat, *rest), suffix=":back")

    def without_axes(self, x: Value, gone: Ints, suffix: str = "") -> Value:
        """Reshape to all other axes."""
        kept = [i for i in range(len(self.shape(x))) if i not in gone]
        return self.with_axes(x, kept, suffix)

    def with_axes(self, x: Value, axes: Sequence[int | None], suffix: str = "") -> Value:
        """Reshape to these axes of x, None being a new one of size 1."""
        shape = self.shape(x)
        sizes = [1 if axis is None else shape[axis] for axis in axes]
        target = [0 if size is None and axes[i] == i else size for i, size in enumerate(sizes)]
        if target.count(None) > 1:
            raise ValueError(f"shape {shape} is too little known to remove or insert axes")
        op = ops.Reshape(tuple(-1 if size is None else size for size in target))
        return self.emit(op, x, suffix=suffix)

    def finish(self, value: Value, onnx_name: str, first: int) -> None:
        """Give a value that a node returned the name that it has in the file."""
        if value in self.coded:
            self.grids[onnx_name] = self.coded[value]
        made = {node.output: i for i, node in enumerate(self.nodes[first:], first)}
        if value not in made or any(value in node.inputs for node in self.nodes[first:]):
            self.aliases[onnx_name] = value
            return
        self.nodes[made[value]] = replace(self.nodes[made[value]], output=onnx_name)
        self.specs[onnx_name] = self.specs.pop(value)
        if value in self.batches:
            self.batches[onnx_name] = self.batches.pop(value)
        if value in self.sizes:
            self.sizes[onnx_name] = self.sizes.pop(value)
