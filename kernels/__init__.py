"""Arithmetic on arrays, by kernels that can be read. It knows no graph, no file, no image.

    import kernels
    y = kernels.relu(kernels.conv2d(x, weight, bias, padding=1))
"""
from .functional import (
    add,
    avg_pool2d,
    batch_norm,
    clip,
    concat,
    conv2d,
    global_avg_pool2d,
    hard_swish,
    linear,
    max_pool2d,
    mul,
    relu,
    run,
    sigmoid,
    silu,
    softmax,
    tanh,
)

PROJECT = "numba-cnn"     # tells this package from another of the same name on PyPI

__all__ = [
    "PROJECT",
    "add",
    "avg_pool2d",
    "batch_norm",
    "clip",
    "concat",
    "conv2d",
    "global_avg_pool2d",
    "hard_swish",
    "linear",
    "max_pool2d",
    "mul",
    "relu",
    "run",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]
