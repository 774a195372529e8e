"""What elementwise.py is called with."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ... import ops
from ...axes import collapse
from ...ops import Op, TensorSpec, Unary, count
from ...step import Array, Options, Step
from ..launch import Kernel, Launch
from . import codes

# By name, and by name with the operands having changed places.
BINARY: dict[type[Op], tuple[str, str]] = {
    ops.Add: ("add", "add"), ops.Mul: ("mul", "mul"), ops.Div: ("div", "divide")}
UNARY: dict[type[Op], str] = {
    ops.Relu: "clip", ops.Clip: "clip", ops.Sigmoid: "sigmoid", ops.Tanh: "tanh", ops.Silu: "silu",
    ops.HardSwish: "hard_swish", ops.HardSigmoid: "hard_sigmoid", ops.LeakyRelu: "leaky_relu",
    ops.Elu: "elu", ops.Gelu: "gelu", ops.Erf: "erf", ops.Sqrt: "sqrt",
    ops.StarRelu: "star_relu",
    ops.FakeQuantize: "fake_quantize"}


def function_name(op: Op) -> str:
    """Of elementwise.py and scalar.py."""
    name = UNARY[type(op)]
    if isinstance(op, ops.Gelu) and op.tanh:
        return "gelu_tanh"
    if isinstance(op, ops.FakeQuantize) and (op.first or op.relu):
        return f"{function_name(op.first) if op.first else 'relu'}_{name}"
    return name


def unary_kernel(op: Op) -> tuple[Kernel, np.float32, np.float32]:
    """The kernel of an op, and the two numbers that its function takes, 0 where it takes none; Relu
    is a clip."""
    a, b = 0.0, 0.0
    if isinstance(op, ops.Relu):
        b = np.inf
    elif isinstance(op, ops.Clip):
        a, b = op.low, op.high
    elif isinstance(op, ops.HardSigmoid):
        a, b = op.alpha, op.beta
    elif isinstance(op, (ops.LeakyRelu, ops.Elu)):
        a = op.alpha
    elif isinstance(op, ops.StarRelu):
        a, b = op.scale, op.bias
    elif isinstance(op, ops.FakeQuantize):
        a, b = op.scale, op.zero_point
    return Kernel("elementwise", function_name(op)), np.float32(a), np.float32(b)


def in_place(op: Unary) -> Callable[[Array, int], list[Launch]]:
    """(flat array, threads) -> what applies the op to the array itself."""
    return lambda y, threads: [_unary(op, y, y, threads)]


def _unary(op: Op, x: Array, y: Array, threads: int) -> Launch:
    kernel, a, b = unary_kernel(op)
    return kernel.bind(a, b, x, y, x is y, threads)


def prepare_unary(op: Unary, inputs: list[TensorSpec], output: TensorSpec,
                  weights: list[Array | None], options: Options) -> Step:
    if isinstance(op, ops.FakeQuantize) and "uint8" in (inputs[0].dtype, output.dtype):
        return codes.prepare_quantize(op, inputs, output, options)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [_unary(op, arrays[0].reshape(-1), y.reshape(-1), options.threads)]

    return Step(f"{op.kind.lower()}_f32", bind)


def prepare_binary(op: ops.Binary, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    shape = output.shape or (1,)
    merged, steps = collapse(shape, inputs[0].shape, inputs[1].shape)
    sizes, a_steps, b_steps = (np.array(numbers, np.int64) for numbers in (merged, *steps))
    swap = bool(a_steps[-1] == 0 and b_steps[-1] != 0)      # let a be the dense one
    if swap:
        a_steps, b_steps = b_steps, a_steps
    kernel = Kernel("elementwise", BINARY[type(op)][swap])

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        a, b = (array.reshape(-1) for array in (arrays[::-1] if swap else arrays))
        return [kernel.bind(a, b, y.reshape(-1), sizes, a_steps, b_steps, options.threads)]

    broadcast = "" if count(inputs[0].shape) == count(inputs[1].shape) else "_broadcast"
    return Step(f"{op.kind.lower()}_f32{broadcast}", bind)
