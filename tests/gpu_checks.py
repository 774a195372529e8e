"""Runs a step on a real GPU for cuda_checks.py; arrays cross as bits, so that no dtype matters."""
from __future__ import annotations

import numpy as np

from kernels.cuda import gpu
from kernels.step import Step

WORDS = {4: np.uint32, 2: np.uint16, 1: np.uint8}


def upload(array: np.ndarray):
    return gpu.cupy().asarray(np.ascontiguousarray(array).view(WORDS[array.itemsize]))


def execute(step: Step, arrays, wide: np.ndarray, part: slice, block: np.ndarray,
            workspace: np.ndarray) -> None:
    """The output is these channels of `wide`, a view into the middle of `block`; it, and the
    inputs, are copied back."""
    cupy = gpu.cupy()
    inputs, around = [there(array) for array in arrays], upload(block)
    guard = (block.size - wide.size) // 2
    y = around[guard:guard + wide.size].reshape(wide.shape)[..., part]
    gpu.execute(step.bind(inputs, y, upload(workspace)))
    block[:] = cupy.asnumpy(around)
    for array, device_array in zip(arrays, inputs, strict=True):
        array.view(WORDS[array.itemsize])[...] = cupy.asnumpy(device_array)


def there(array: np.ndarray):
    """The array, or the same channels of the wider one that it is a view of."""
    if array.flags.c_contiguous:
        return upload(array)
    whole = array.base
    first = (array.ctypes.data - whole.ctypes.data) // array.itemsize
    return upload(whole)[..., first:first + array.shape[-1]]
