"""Runs a step on a real GPU for cuda_checks.py; arrays cross as bits, so that no dtype matters."""
from __future__ import annotations

import numpy as np

from kernels.cuda import gpu
from kernels.step import Step

WORDS = {4: np.uint32, 2: np.uint16, 1: np.uint8}


def upload(array: np.ndarray):
    return gpu.cupy().asarray(np.ascontiguousarray(array).view(WORDS[array.itemsize]))


def execute(step: Step, arrays, output: np.ndarray, block: np.ndarray, workspace: np.ndarray
            ) -> None:
    """The output is a view into the middle of `block`; both, and the inputs, are copied back."""
    cupy = gpu.cupy()
    inputs, around = [upload(array) for array in arrays], upload(block)
    guard = (block.size - output.size) // 2
    y = around[guard:guard + output.size].reshape(output.shape)
    gpu.execute(step.bind(inputs, y, upload(workspace)))
    block[:] = cupy.asnumpy(around)
    for array, device_array in zip(arrays, inputs, strict=True):
        array.view(WORDS[array.itemsize])[...] = cupy.asnumpy(device_array)
