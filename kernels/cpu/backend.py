"""prepare(...) for the CPU: which file's kernel runs which op."""
from __future__ import annotations

from collections.abc import Callable

from .. import ops
from ..ops import Op, TensorSpec
from ..step import Array, Options, Step
from .host import attention, codes, conv, copy, elementwise, matmul, norm, pool, softmax

PREPARE: dict[type[Op], Callable[..., Step]] = {
    ops.Conv2d: conv.prepare_conv2d,
    ops.Linear: matmul.prepare_linear,
    ops.MatMul: matmul.prepare_matmul,
    ops.Attention: attention.prepare_attention,
    ops.MaxPool2d: pool.prepare_pool2d,
    ops.AvgPool2d: pool.prepare_pool2d,
    **dict.fromkeys(pool.GLOBAL, pool.prepare_global_pool2d),
    **dict.fromkeys(elementwise.UNARY, elementwise.prepare_unary),
    **dict.fromkeys(elementwise.BINARY, elementwise.prepare_binary),
    ops.AddFakeQuantize: codes.prepare_add,
    ops.Softmax: softmax.prepare_softmax,
    ops.BatchNorm: norm.prepare_batch_norm,
    ops.LayerNorm: norm.prepare_layer_norm,
    ops.LocalResponseNorm: norm.prepare_local_response_norm,
    ops.Concat: copy.prepare_concat,
    ops.Slice: copy.prepare_slice,
    ops.Pad: copy.prepare_pad,
    ops.Transpose: copy.prepare_transpose,
    ops.Reshape: copy.prepare_reshape,
    ops.Flatten: copy.prepare_reshape,
}


def prepare(op: Op, inputs: list[TensorSpec], output: TensorSpec, weights: list[Array | None],
            options: Options) -> Step:
    """Choose a kernel for an op of these shapes.

    weights[i] is the array of input i where that is a constant of the network, else None.
    ValueError where an op can not run so: an unknown op, a weight that is not constant, bfloat16
    on a CPU without it.
    """
    if type(op) not in PREPARE:
        raise ValueError(f"the CPU has no kernel for {op.kind}; it has "
                         f"{sorted(known.__name__ for known in PREPARE)}")
    families = PREPARE
    if options.dtype == "bfloat16" or inputs[0].grid is not None:
        families = PREPARE | narrow()
    return families[type(op)](op, inputs, output, weights, options)


def narrow() -> dict[type[Op], Callable[..., Step]]:
    """What multiplies narrow numbers, where that is asked for or a file is quantised to them, and
    is imported only then; all other ops stay in float32."""
    from .host import dot_attention, dot_conv, dot_matmul
    return {ops.Conv2d: dot_conv.prepare_conv2d, ops.Linear: dot_matmul.prepare_linear,
            ops.MatMul: dot_attention.prepare_matmul,
            ops.Attention: dot_attention.prepare_attention}
