"""What a GPU and the emulator share: both get the very same launches.

What differs is where arrays lie and who executes: gpu_device.py, emulated_device.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from kernels.cuda.backend import DTYPES, prepare, stored_as
from kernels.cuda.host import norm_conv
from kernels.cuda.host.copy import prepare_convert, prepare_pixels, prepare_transpose
from kernels.cuda.launch import CudaOptions, Launch
from kernels.ops import BatchNorm, Conv2d, Op, TensorSpec, Transpose, count
from kernels.step import Array, Narrow, Step

from .errors import DeviceError
from .image import Photos, Preprocess

NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
         "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class CudaKernels:
    """What both devices share: the kernels, and values stored in the compute type."""
    threads: int | None = None

    def __init__(self, name: str, dtype: str) -> None:
        if dtype not in DTYPES:
            raise DeviceError(f"dtype={dtype!r} is not supported on CUDA; it can be one of "
                              f"{DTYPES}")
        self.name, self.dtype = name, dtype
        self.stored = stored_as(dtype)

    def allocate(self, size: int) -> Array:
        """Bytes of the device."""
        raise NotImplementedError

    def view(self, block: Array, spec: TensorSpec) -> Array:
        """A part of an allocation as a value of this shape and dtype."""
        raise NotImplementedError

    def prepare(self, op: Op, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: CudaOptions) -> Step:
        return prepare(op, inputs, output, weights, options)

    narrows: tuple[str, ...] = ()       # values are all stored in one dtype

    def narrow(self, dtype: str, op: Op, inputs: list[TensorSpec], weights: list[Array | None],
               options: Any) -> Narrow:
        return Narrow()

    def takes_norm(self, norm: BatchNorm, conv: Conv2d, weight_shape: tuple[int, ...]) -> bool:
        return norm_conv.serves(norm, conv, weight_shape, self.dtype)

    def outlet(self, value: Array, spec: TensorSpec) -> tuple[Array, list[Launch]]:
        if spec.dtype == "float32":
            return value, []
        single = TensorSpec(spec.shape)
        there = self.view(self.allocate(4 * count(spec.shape)), single)
        return there, widen(spec).bind([value], there, value)

    def constant(self, array: Array, options: CudaOptions) -> Array:
        return options.pack(array, f"constant_{self.stored}",
                            lambda host: options.upload(self._narrow(host)))

    def _narrow(self, array: Array) -> Array:
        """float32 to what is stored; beyond float16's range is infinity."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array).astype(NUMPY[self.stored], copy=False)


@dataclass(frozen=True)
class Source:
    """What an input of a program is filled from.

    how  the Preprocess of photos, "NCHW" for an array that is still to be transposed, or None
    """
    spec: TensorSpec
    how: Preprocess | str | None = None


def source_of(array: Any, dtype: str) -> tuple[Any, Source]:
    """(contiguous memory, its Source) of Photos, or of an array of `dtype` seen as (N, H, W, C).

    What was turned from NCHW is turned back, for a kernel to transpose it.
    """
    if isinstance(array, Photos):
        return np.ascontiguousarray(array.pixels), Source(TensorSpec(array.shape, "uint8"),
                                                          array.settings)
    if not array.flags.c_contiguous:
        planes = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
        if planes.flags.c_contiguous:
            return planes, Source(TensorSpec(planes.shape, dtype), "NCHW")
        array = np.ascontiguousarray(array)
    return array, Source(TensorSpec(array.shape, dtype))


@lru_cache(256)
def entry(source: Source, target: TensorSpec) -> Step:
    """The kernel that fills an input."""
    if isinstance(source.how, Preprocess):
        return prepare_pixels(source.spec, target, source.how.mean, source.how.std)
    if source.how == "NCHW":
        return prepare_transpose(Transpose((0, 2, 3, 1)), [source.spec], target, [],
                                 CudaOptions())
    return prepare_convert(source.spec, target)


@lru_cache(256)
def widen(spec: TensorSpec) -> Step:
    """The kernel that copies a value for the caller, as float32."""
    return prepare_convert(spec, TensorSpec(spec.shape))
