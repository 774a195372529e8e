"""One op at a time on arrays: `kernels.conv2d(x, weight, bias, padding=1)` and its siblings.

Arrays are NHWC, convolution weights OHWI (out, height, width, in / groups), Linear weights (out,
in). Results are new arrays. NumPy arrays are float32 and computed on the CPU; all functions take
`threads`, the number of CPU threads (None: all that this process may use).

Arrays on a GPU (CuPy's, or any that speaks `__cuda_array_interface__` or DLPack) are float32,
float16 or bfloat16 and computed there: the result is a CuPy array, on CuPy's current stream.
Weights and biases may then be NumPy arrays or lie on the GPU, too.

ValueError says which shape or argument does not fit, TypeError which dtype.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from . import ops
from .device import on_gpu
from .ops import Op, Padding, Pair, TensorSpec, count, known
from .step import Options

Array = np.ndarray
Size = int | Sequence[int]


def conv2d(x: Array, weight: Array, bias: Array | None = None, *, stride: Size = 1,
           padding: Size = 0, dilation: Size = 1, groups: int = 1,
           activation: ops.Unary | None = None, residual: Array | None = None,
           threads: int | None = None) -> Array:
    """activation(conv(x, weight) + bias + residual): (N, H, W, C) -> (N, OH, OW, O).

    padding is one number, (height, width), or (top, left, bottom, right).
    """
    op = ops.Conv2d(_pair(stride, "stride"), _padding(padding), _pair(dilation, "dilation"),
                    groups, activation)
    return run(op, x, weight, *_added(weight, bias, residual), threads=threads)


def linear(x: Array, weight: Array, bias: Array | None = None, *,
           activation: ops.Unary | None = None, residual: Array | None = None,
           threads: int | None = None) -> Array:
    """activation(x @ weight.T + bias + residual): (..., in) -> (..., out)."""
    return run(ops.Linear(activation), x, weight, *_added(weight, bias, residual), threads=threads)


def matmul(a: Array, b: Array, *, threads: int | None = None) -> Array:
    """a @ b: (..., M, K), (..., K, N) -> (..., M, N). The leading axes are alike, or 1 where one
    matrix serves all."""
    return run(ops.MatMul(), a, b, threads=threads)


def attention(q: Array, k: Array, v: Array, bias: Array | None = None, *,
              scale: float | None = None, threads: int | None = None) -> Array:
    """softmax(scale * q @ k.T + bias) @ v: (..., M, D), (..., N, D), (..., N, V) -> (..., M, V).

    bias is broadcast to (..., M, N); scale None is 1 / sqrt(D), as of torch's
    scaled_dot_product_attention.
    """
    op = ops.Attention(scale=q.shape[-1] ** -0.5 if scale is None else float(scale))
    return run(op, q, k, v, *([] if bias is None else [bias]), threads=threads)


def max_pool2d(x: Array, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
               dilation: Size = 1, ceil_mode: bool = False, *,
               threads: int | None = None) -> Array:
    """Greatest value of each window; stride None is kernel_size."""
    kernel = _pair(kernel_size, "kernel_size")
    op = ops.MaxPool2d(kernel, kernel if stride is None else _pair(stride, "stride"),
                       _padding(padding), _pair(dilation, "dilation"), ceil_mode)
    return run(op, x, threads=threads)


def avg_pool2d(x: Array, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
               ceil_mode: bool = False, count_include_pad: bool = True, *,
               threads: int | None = None) -> Array:
    """Mean of each window; stride None is kernel_size."""
    kernel = _pair(kernel_size, "kernel_size")
    op = ops.AvgPool2d(kernel, kernel if stride is None else _pair(stride, "stride"),
                       _padding(padding), (1, 1), ceil_mode, count_include_pad)
    return run(op, x, threads=threads)


def global_avg_pool2d(x: Array, *, threads: int | None = None) -> Array:
    """Mean over height and width: (N, H, W, C) -> (N, 1, 1, C)."""
    return run(ops.GlobalAvgPool2d(), x, threads=threads)


def global_max_pool2d(x: Array, *, threads: int | None = None) -> Array:
    """Greatest value over height and width: (N, H, W, C) -> (N, 1, 1, C)."""
    return run(ops.GlobalMaxPool2d(), x, threads=threads)


def global_l2_pool2d(x: Array, *, threads: int | None = None) -> Array:
    """Square root of the sum of squares over height and width: (N, H, W, C) -> (N, 1, 1, C)."""
    return run(ops.GlobalL2Pool2d(), x, threads=threads)


def relu(x: Array, *, threads: int | None = None) -> Array:
    """max(x, 0)"""
    return run(ops.Relu(), x, threads=threads)


def clip(x: Array, low: float, high: float, *, threads: int | None = None) -> Array:
    """min(max(x, low), high)"""
    return run(ops.Clip(float(low), float(high)), x, threads=threads)


def sigmoid(x: Array, *, threads: int | None = None) -> Array:
    """1 / (1 + exp(-x))"""
    return run(ops.Sigmoid(), x, threads=threads)


def tanh(x: Array, *, threads: int | None = None) -> Array:
    """tanh(x)"""
    return run(ops.Tanh(), x, threads=threads)


def silu(x: Array, *, threads: int | None = None) -> Array:
    """x / (1 + exp(-x))"""
    return run(ops.Silu(), x, threads=threads)


def hard_swish(x: Array, *, threads: int | None = None) -> Array:
    """x * min(max(x + 3, 0), 6) / 6"""
    return run(ops.HardSwish(), x, threads=threads)


def hard_sigmoid(x: Array, alpha: float = 1 / 6, beta: float = 0.5, *,
                 threads: int | None = None) -> Array:
    """min(max(alpha * x + beta, 0), 1)"""
    return run(ops.HardSigmoid(float(alpha), float(beta)), x, threads=threads)


def leaky_relu(x: Array, negative_slope: float = 0.01, *, threads: int | None = None) -> Array:
    """x where it is above 0, else negative_slope * x."""
    return run(ops.LeakyRelu(float(negative_slope)), x, threads=threads)


def elu(x: Array, alpha: float = 1.0, *, threads: int | None = None) -> Array:
    """x where it is above 0, else alpha * (exp(x) - 1)."""
    return run(ops.Elu(float(alpha)), x, threads=threads)


def gelu(x: Array, approximate: str = "none", *, threads: int | None = None) -> Array:
    """x * (1 + erf(x / sqrt(2))) / 2, or with approximate="tanh" what comes close to it."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} can be 'none' or 'tanh'")
    return run(ops.Gelu(approximate == "tanh"), x, threads=threads)


def erf(x: Array, *, threads: int | None = None) -> Array:
    """2 / sqrt(pi) * the integral of exp(-t * t) from 0 to x."""
    return run(ops.Erf(), x, threads=threads)


def sqrt(x: Array, *, threads: int | None = None) -> Array:
    """Square root of x; NaN below 0."""
    return run(ops.Sqrt(), x, threads=threads)


def star_relu(x: Array, scale: float = 1.0, bias: float = 0.0, *,
              threads: int | None = None) -> Array:
    """scale * max(x, 0) ** 2 + bias"""
    return run(ops.StarRelu(float(scale), float(bias)), x, threads=threads)


def fake_quantize(x: Array, scale: float, zero_point: int, relu: bool = False, *,
                  threads: int | None = None) -> Array:
    """(min(max(round(x / scale) + zero_point, 0), 255) - zero_point) * scale, half to even; relu:
    of max(x, 0)."""
    return run(ops.FakeQuantize(float(scale), int(zero_point), bool(relu)), x, threads=threads)


def add(a: Array, b: Array, *, threads: int | None = None) -> Array:
    """a + b, broadcast as NumPy does."""
    return run(ops.Add(), a, b, threads=threads)


def mul(a: Array, b: Array, *, threads: int | None = None) -> Array:
    """a * b, broadcast as NumPy does."""
    return run(ops.Mul(), a, b, threads=threads)


def div(a: Array, b: Array, *, threads: int | None = None) -> Array:
    """a / b, broadcast as NumPy does."""
    return run(ops.Div(), a, b, threads=threads)


def concat(arrays: Sequence[Array], axis: int = -1, *, threads: int | None = None) -> Array:
    """The arrays one after the other along `axis`."""
    return run(ops.Concat(axis), *arrays, threads=threads)


def pad(x: Array, pad_width: Any, constant_values: float = 0.0, mode: ops.PadMode = "constant", *,
        threads: int | None = None) -> Array:
    """`constant_values` around x, or with mode "edge" or "reflect" what np.pad has there; pad_width
    as np.pad has it: (before, after) of each axis, one such pair for all of them, or one number."""
    if mode not in get_args(ops.PadMode):
        raise ValueError(f"mode={mode!r} can be 'constant', 'edge' or 'reflect'")
    widths, rank = np.asarray(pad_width), np.ndim(x)
    if widths.dtype.kind not in "iu" or widths.shape not in ((), (1,), (2,), (1, 2), (rank, 2)):
        raise ValueError(f"pad_width={pad_width!r} must be a whole number, (before, after), or "
                         f"such a pair for each of {rank} axes")
    before, after = (tuple(side.tolist()) for side in np.broadcast_to(widths, (rank, 2)).T)
    return run(ops.Pad(before, after, float(constant_values), mode), x, threads=threads)


def softmax(x: Array, axis: int = -1, *, threads: int | None = None) -> Array:
    """exp(x) / sum(exp(x)) along `axis`."""
    return run(ops.Softmax(axis), x, threads=threads)


def log_softmax(x: Array, axis: int = -1, *, threads: int | None = None) -> Array:
    """x - log(sum(exp(x))) along `axis`."""
    return run(ops.Softmax(axis, log=True), x, threads=threads)


def batch_norm(x: Array, mean: Array, var: Array, weight: Array, bias: Array,
               eps: float = 1e-5, *, threads: int | None = None) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""
    return run(ops.BatchNorm(eps), x, weight, bias, mean, var, threads=threads)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5, *,
               threads: int | None = None) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias, of mean and variance along the last axis."""
    return run(ops.LayerNorm(eps), x, weight, bias, threads=threads)


def local_response_norm(x: Array, size: int, alpha: float = 1e-4, beta: float = 0.75,
                        k: float = 1.0, *, threads: int | None = None) -> Array:
    """x / (k + alpha / size * sum of x * x over `size` channels around) ** beta. Of an even size
    one channel more is after than before, as in ONNX."""
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size={size!r} must be a whole number of at least 1")
    return run(ops.LocalResponseNorm(size, float(alpha), float(beta), float(k)), x,
               threads=threads)


def run(op: Op, *arrays: Array, threads: int | None = None) -> Array:
    """Any op, where its arrays lie."""
    if any(on_gpu(array) for array in arrays):
        from .cuda import arrays as gpu_arrays
        if threads is not None:
            raise ValueError(f"threads={threads!r} is for the CPU, and {op.kind} was given arrays "
                             f"on a GPU; leave it out")
        return gpu_arrays.run(op, arrays)
    return _run_on_cpu(op, arrays, threads)


def _run_on_cpu(op: Op, arrays: Sequence[Array], threads: int | None) -> Array:
    from .cpu import backend
    from .cpu.threads import check_threads, team
    for array in arrays:
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            got = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"{op.kind} takes float32 NumPy arrays, not {got}; convert it with "
                            f"np.asarray(x, np.float32)")
    arrays = tuple(np.ascontiguousarray(array) for array in arrays)
    specs = [TensorSpec(array.shape) for array in arrays]
    output = TensorSpec(known(op.output_shape(*(array.shape for array in arrays))))
    result = np.empty(known(output.shape), np.float32)
    if count(output.shape) == 0:
        return result
    options = Options(check_threads(threads))
    constants = [array if i in op.packed else None for i, array in enumerate(arrays)]
    step = backend.prepare(op, specs, output, constants, options)
    launches = step.bind(arrays, result, np.empty(step.workspace, np.uint8))
    with team(options.threads):
        for launch in launches:
            launch()
    return result


def _added(weight: Array, bias: Array | None, residual: Array | None) -> list[Array]:
    """The inputs behind a layer's weight; a residual never stands without bias."""
    if residual is not None and bias is None:
        bias = np.zeros(len(weight), np.float32)
    return [array for array in (bias, residual) if array is not None]


def _pair(size: Size, name: str) -> Pair:
    """One number for both axes, or (height, width)."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in pair):
        raise ValueError(f"{name}={size!r} must be a whole number of at least 1, or two of them")
    return pair


def _padding(padding: Size) -> Padding:
    """One number, (height, width), or (top, left, bottom, right)."""
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    sides = sides * 2 if len(sides) == 2 else sides
    if len(sides) != 4 or not all(isinstance(n, int) and n >= 0 for n in sides):
        raise ValueError(f"padding={padding!r} must be a whole number of at least 0, "
                         f"(height, width) or (top, left, bottom, right)")
    return sides
