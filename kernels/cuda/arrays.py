"""One op on arrays that lie on a GPU: CuPy's, and others' through the two interchange protocols."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..device import on_gpu
from ..ops import Op, TensorSpec, count, known
from . import backend, gpu
from .launch import CudaOptions

DTYPES = ("float32", "float16", "bfloat16")

def run(op: Op, arrays: Sequence[Any]) -> Any:
    """The op's output, a CuPy array of the inputs' dtype, on CuPy's current stream.

    Inputs are float32, float16 or bfloat16, all alike, C-contiguous and on one GPU. Constants
    (`op.packed`) may be NumPy arrays; they are packed on the host, anew at each call: a Model, or
    `prepare` by hand, does so once.

    TypeError for a dtype, ValueError for a layout or a device that does not fit, CudaError where
    the GPU can not be used, has no room, or has lost this process's context by an earlier fault.
    """
    cupy = gpu.cupy()
    given = [_as_cupy(op, array) if i not in op.packed else array for i, array in enumerate(arrays)]
    inputs = [array for i, array in enumerate(given) if i not in op.packed]
    dtype, index = str(inputs[0].dtype), inputs[0].device.id
    for array in inputs:
        _check(op, array, dtype, index)
    shape = known(op.output_shape(*(array.shape for array in given)))
    with gpu.using(index):
        constants = [_on_host(op, array) if i in op.packed else None
                     for i, array in enumerate(given)]
        y = cupy.empty(shape, inputs[0].dtype)
        if count(shape) == 0:
            return y
        here = gpu.gpu(index)
        options = CudaOptions(dtype=dtype, arch=here.arch, multiprocessors=here.multiprocessors,
                              upload=cupy.asarray)
        step = backend.prepare(op, [TensorSpec(array.shape, dtype) for array in given],
                               TensorSpec(shape, dtype), constants, options)
        there = [gpu.aligned(array) if i not in op.packed else array
                 for i, array in enumerate(given)]
        gpu.execute(step.bind(there, y, cupy.empty(step.workspace, np.uint8)))
    return y


def _as_cupy(op: Op, array: Any) -> Any:
    """The same memory as a CuPy array."""
    cupy = gpu.cupy()
    if not on_gpu(array):
        raise TypeError(f"{op.kind} was given arrays on a GPU and one that is not, a "
                        f"{type(array).__name__}; copy it with cupy.asarray(x)")
    if isinstance(array, cupy.ndarray):
        return array
    with gpu.using(cupy.cuda.runtime.getDevice()):
        return gpu.adopted(array)


def _on_host(op: Op, array: Any) -> np.ndarray:
    host = gpu.cupy().asnumpy(_as_cupy(op, array)) if on_gpu(array) else np.asarray(array)
    return np.ascontiguousarray(host, np.float32)


def _check(op: Op, array: Any, dtype: str, device: int) -> None:
    if str(array.dtype) != dtype or dtype not in DTYPES:
        raise TypeError(f"{op.kind} on a GPU takes arrays of one dtype, one of {DTYPES}, not "
                        f"{array.dtype}; convert it with x.astype('float16') or another of these")
    if array.device.id != device:
        raise ValueError(f"{op.kind} was given arrays on GPU {device} and on GPU "
                         f"{array.device.id}; copy one to the other's")
    if not array.flags.c_contiguous:
        raise ValueError(f"{op.kind} takes C-contiguous arrays, not strides {array.strides} of "
                         f"shape {array.shape}; convert it with cupy.ascontiguousarray(x)")
