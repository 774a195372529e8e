"""prepare(...) for CUDA: which file's kernel runs which op."""
from __future__ import annotations

from collections.abc import Callable

from .. import ops
from ..ops import Op, TensorSpec
from ..step import Array, Step
from .compiler import Kernel
from .host import (
    attention,
    conv,
    copy,
    depthwise,
    elementwise,
    layer_norm,
    local_response_norm,
    matmul,
    norm,
    norm_conv,
    pool,
    softmax,
    splitk,
)
from .host.conv import stored_as
from .launch import CudaOptions

PREPARE: dict[type[Op], Callable[..., Step]] = {
    ops.Conv2d: conv.prepare_conv2d,
    ops.Linear: matmul.prepare_linear,
    ops.MatMul: matmul.prepare_matmul,
    ops.Attention: attention.prepare_attention,
    ops.MaxPool2d: pool.prepare_pool2d,
    ops.AvgPool2d: pool.prepare_pool2d,
    **dict.fromkeys(pool.GLOBAL, pool.prepare_global_pool2d),
    ops.Relu: elementwise.prepare_unary,
    ops.Clip: elementwise.prepare_unary,
    ops.Sigmoid: elementwise.prepare_unary,
    ops.Tanh: elementwise.prepare_unary,
    ops.Silu: elementwise.prepare_unary,
    ops.HardSwish: elementwise.prepare_unary,
    ops.HardSigmoid: elementwise.prepare_unary,
    ops.LeakyRelu: elementwise.prepare_unary,
    ops.Elu: elementwise.prepare_unary,
    ops.Gelu: elementwise.prepare_unary,
    ops.Erf: elementwise.prepare_unary,
    ops.Sqrt: elementwise.prepare_unary,
    ops.StarRelu: elementwise.prepare_unary,
    ops.FakeQuantize: elementwise.prepare_unary,
    ops.Add: elementwise.prepare_binary,
    ops.AddFakeQuantize: elementwise.prepare_add_fake_quantize,
    ops.Mul: elementwise.prepare_binary,
    ops.Div: elementwise.prepare_binary,
    ops.Softmax: softmax.prepare_softmax,
    ops.BatchNorm: norm.prepare_batch_norm,
    ops.NormConv2d: norm_conv.prepare_norm_conv,
    ops.LayerNorm: layer_norm.prepare_layer_norm,
    ops.LocalResponseNorm: local_response_norm.prepare_local_response_norm,
    ops.Concat: copy.prepare_concat,
    ops.Slice: copy.prepare_slice,
    ops.Pad: copy.prepare_pad,
    ops.Transpose: copy.prepare_transpose,
    ops.Reshape: copy.prepare_reshape,
    ops.Flatten: copy.prepare_reshape,
}
# What makes probabilities of a network's float32 output, in whatever dtype it computes.
PROBABILITIES = (*softmax.kernels("float32"), elementwise.flat_kernel("float32", "sigmoid"))
DTYPES = ("float32", "tf32", "float16", "bfloat16")

__all__ = ["DTYPES", "PREPARE", "all_kernels", "prepare", "stored_as"]


def prepare(op: Op, inputs: list[TensorSpec], output: TensorSpec, weights: list[Array | None],
            options: CudaOptions) -> Step:
    """Choose a kernel for an op of these shapes, as the CPU's `prepare` does.

    ValueError where an op can not run so: an unknown op, a weight that is not constant, a tensor
    beyond 32-bit indices.
    """
    if type(op) not in PREPARE:
        raise ValueError(f"CUDA has no kernel for {op.kind}; it has "
                         f"{sorted(known.__name__ for known in PREPARE)}")
    return PREPARE[type(op)](op, inputs, output, weights, options)


def all_kernels(dtype: str) -> list[Kernel]:
    """Every kernel that is compiled ahead for a compute type of DTYPES."""
    stored = stored_as(dtype)
    families = (copy, depthwise, elementwise, norm, layer_norm, local_response_norm, pool, softmax)
    found = [*conv.kernels(dtype), *matmul.kernels(dtype), *splitk.kernels(dtype),
             *attention.kernels(dtype),
             *(norm_conv.kernels(dtype) if dtype in norm_conv.DTYPES else ()),
             *(kernel for family in families for kernel in family.kernels(stored)), *PROBABILITIES]
    return list(dict.fromkeys(found))
