"""Activations, Add, Mul and Div: which kernel, which grid."""
from __future__ import annotations

from collections.abc import Sequence

from ...axes import collapse
from ...ops import AddFakeQuantize, Binary, Op, TensorSpec, Unary, count
from ...step import Array, Options, Step
from .. import elementwise, vector
from ..activation import ACTIVATIONS, activation_of
from ..compiler import Kernel
from ..launch import Launch
from .arguments import blocks, check_sizes, four_axes

SUMS = "add_fake_quantize", "add_relu_fake_quantize"
SWAPPED = {"add": "add", "mul": "mul", "div": "divide"}   # what f(b, a) is called


def flat_kernel(dtype: str, function: str) -> Kernel:
    """y = function(a, b) over arrays of one shape."""
    return Kernel(f"{function}_{vector.short(dtype)}x{vector.lanes(dtype)}", elementwise.flat,
                  (dtype, function), elementwise.FLAT_SIGNATURE, elementwise.THREADS,
                  arch=vector.arch(dtype))


def broadcast_kernel(dtype: str, lanes: int, function: str, repeat: bool) -> Kernel:
    """y = function(a, b) where a or b is broadcast."""
    along = "repeat" if repeat else "broadcast"
    return Kernel(f"{function}_{along}_{vector.short(dtype)}x{lanes}", elementwise.broadcast,
                  (dtype, lanes, function, repeat), elementwise.BROADCAST_SIGNATURE,
                  elementwise.THREADS, arch=vector.arch(dtype))


def kernels(dtype: str) -> list[Kernel]:
    """Those that networks meet."""
    return [*(flat_kernel(dtype, function)
              for function in (*ACTIVATIONS, *SWAPPED, *SUMS)),
            *(broadcast_kernel(dtype, lanes, "mul", repeat) for repeat in (False, True)
              for lanes in (vector.lanes(dtype), 1))]


def flat_grid(kernel: Kernel, elements: int) -> tuple[int, int, int]:
    dtype = kernel.config[0]
    return blocks(elements, elementwise.FLIGHT * vector.lanes(dtype) * kernel.threads)


def prepare_unary(op: Unary, inputs: list[TensorSpec], output: TensorSpec,
                  weights: list[Array | None], options: Options) -> Step:
    """y = f(x); y may be x."""
    check_sizes(op.kind, output)
    function, low, high = activation_of(op)
    kernel, elements = flat_kernel(output.dtype, function), count(output.shape)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        (x,) = arrays
        return [Launch(kernel, flat_grid(kernel, elements), (x, x, y, elements, low, high))]

    return Step(kernel.name, bind)


def prepare_add_fake_quantize(op: AddFakeQuantize, inputs: list[TensorSpec], output: TensorSpec,
                              weights: list[Array | None], options: Options) -> Step:
    """y may be an input."""
    check_sizes(op.kind, output)
    function, *numbers = activation_of(op.last)
    kernel, elements = flat_kernel(output.dtype, f"add_{function}"), count(output.shape)
    return Step(kernel.name, lambda arrays, y, workspace: [
        Launch(kernel, flat_grid(kernel, elements), (*arrays, y, elements, *numbers))])


def prepare_binary(op: Binary, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    """y = f(a, b) with NumPy's broadcasting; y may be an input of its own shape."""
    check_sizes(op.kind, output)
    function, elements = op.kind.lower(), count(output.shape)
    if all(count(spec.shape) == elements for spec in inputs):
        kernel = flat_kernel(output.dtype, function)
        return Step(kernel.name, lambda arrays, y, workspace: [
            Launch(kernel, flat_grid(kernel, elements), (*arrays, y, elements, 0.0, 0.0))])
    return _prepare_broadcast(op, inputs, output, function)


def _prepare_broadcast(op: Op, inputs: list[TensorSpec], output: TensorSpec, function: str
                       ) -> Step:
    dtype = output.dtype
    sizes, (a, b) = collapse(output.shape, *(spec.shape for spec in inputs))
    # Let a be the one that y may alias, or that steps along the last axis.
    swap = count(inputs[1].shape) == count(output.shape) or a[-1] == 0
    if swap:
        a, b, function = b, a, SWAPPED[function]
    repeat = b[-1] == 0
    lanes = vector.lanes(dtype, sizes[-1], *a[:-1], *([] if repeat else b[:-1]))
    kernel = broadcast_kernel(dtype, lanes, function, repeat)
    vectors = count(output.shape) // lanes
    axes = four_axes(op.kind, [*sizes[:-1], sizes[-1] // lanes], a, b)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        operands = arrays[::-1] if swap else arrays
        return [Launch(kernel, blocks(vectors, kernel.threads), (*operands, y, vectors, *axes))]

    return Step(kernel.name, bind)
