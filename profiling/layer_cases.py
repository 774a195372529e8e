"""Single layers to measure: which ones networks are made of, random arrays for them on a GPU, and
whether what was computed of those is right."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import roofline

from kernels import ops, reference
from kernels.cuda import gpu
from kernels.cuda.backend import stored_as
from kernels.ops import TensorSpec

MEASURED = (ops.Conv2d, ops.Linear, ops.MaxPool2d, ops.AvgPool2d, ops.GlobalAvgPool2d)
NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
         "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROUNDOFF = {"float32": 2.0 ** -24, "float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}
TINY = 2.0 ** -24           # half the distance between float16's least numbers
SUM_ROUNDOFF = 2.0 ** -23   # of fp32 sums: tensor cores truncate instead of rounding to nearest
TF32_TERM = 2.0 ** -9       # of a product whose factors have 10 bits of mantissa, one truncated
STEEPEST = 1.1              # slope of any activation
SAMPLES = 64                # output pixels, and at most 4 times as many channels of a Linear
BLOCK = (1 << 20) + 7       # random numbers that all arrays repeat; odd, so that rows differ


@dataclass(frozen=True)
class Case:
    """One layer: op, shapes of its inputs with its weights, compute type."""
    op: ops.Op
    shapes: tuple[ops.Shape, ...]
    dtype: str

    @property
    def stored(self) -> str:
        return stored_as(self.dtype)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return ops.known(self.op.output_shape(*self.shapes))

    @property
    def cost(self) -> roofline.Layer:
        """FLOPs, and bytes that must move at least once."""
        return roofline.cost(self.label, self.op, self.shapes, NUMPY[self.stored].itemsize)

    @property
    def working_set(self) -> int:
        """Bytes of all its arrays."""
        return sum(map(ops.count, (*self.shapes, self.output_shape))) * (
            NUMPY[self.stored].itemsize)

    @property
    def label(self) -> str:
        """ "conv 3x3 /2, 256x56x56x64 -> 64, + residual, relu": what people call it."""
        x, *rest = self.shapes
        words = [f"{self.op.kind.removesuffix('2d').lower()} "]
        if isinstance(self.op, ops.Conv2d):
            words += ["x".join(map(str, rest[0][1:3]))]
        elif isinstance(self.op, ops.Pool2d):
            words += ["x".join(map(str, self.op.kernel_size))]
        if isinstance(self.op, (ops.Conv2d, ops.Pool2d)) and self.op.stride != (1, 1):
            words += [f" /{self.op.stride[0]}"]
        words += [", " if words[1:] else "", "x".join(map(str, x))]
        if isinstance(self.op, (ops.Conv2d, ops.Linear)):
            words += [f" -> {rest[0][0]}"]
            words += [f", {self.op.groups} groups"] if getattr(self.op, "groups", 1) > 1 else []
            words += [", + residual"] if len(rest) > 2 else []
            words += [f", {self.op.activation.kind.lower()}"] if self.op.activation else []
        elif isinstance(self.op, ops.Attention):
            words += [", + bias"] if len(rest) > 2 else []
        return "".join(words)


read_network = cache(roofline.read_network)         # once for all batch sizes


def cases_of(network: str, batch: int, dtype: str) -> dict[Case, int]:
    """The distinct layers of a network that are measured, and how often it has each. What a Linear
    takes is a matrix: whether a row is a token or a pixel is all the same to it."""
    found: dict[Case, int] = {}
    for _, op, shapes in roofline.operations(read_network(network), batch):
        if isinstance(op, MEASURED):
            if isinstance(op, ops.Linear):
                shapes = tuple((ops.count(shape[:-1]), shape[-1]) if len(shape) > 2 else shape
                               for shape in shapes)
            case = Case(op, shapes, dtype)
            found[case] = found.get(case, 0) + 1
    return found


def gemm(size: int, dtype: str) -> Case:
    """A square matrix product."""
    return Case(ops.Linear(), ((size, size), (size, size)), dtype)


def attention(images: int, tokens: int, heads: int, columns: int, biased: bool, dtype: str) -> Case:
    """Queries, keys and values as Linear layers leave them, heads of a token side by side; a bias
    for all images."""
    op = ops.Attention(((0, 2, 1, 3),) * 4, scale=columns ** -0.5)
    shape = (images, tokens, heads, columns)
    return Case(op, (shape,) * 3 + ((heads, tokens, tokens),) * biased, dtype)


# ---- arrays -----------------------------------------------------------------------------------

class Arrays:
    """Random inputs of a case: constants on the host, the rest on a GPU in several copies.

    constants   by position, float32, but rounded to the dtype, so that all rivals have the same
    copies      of the other inputs, by position, None where a constant stands
    """

    def __init__(self, case: Case, copies: int) -> None:
        rng = np.random.default_rng(0)
        block = rng.standard_normal(BLOCK, np.float32)
        scale = math.sqrt(2 / ops.count(case.shapes[1][1:])) if case.op.packed else 1.0
        self.case = case
        self.constants = [
            rounded(np.resize(scale * block, ops.known(shape)), case.stored).astype(np.float32)
            if i in case.op.packed else None for i, shape in enumerate(case.shapes)]
        device_block = to_gpu(rounded(block, case.stored))
        self.copies = [[None if i in case.op.packed else repeated(device_block, shape)
                        for i, shape in enumerate(case.shapes)] for _ in range(copies)]

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(shape, self.case.stored) for shape in self.case.shapes]

    def empty_output(self) -> Any:
        return empty(self.case.output_shape, bits_of(NUMPY[self.case.stored]))

    def on_gpu(self, array: np.ndarray) -> Any:
        return to_gpu(rounded(array, self.case.stored))


def rounded(array: np.ndarray, stored: str) -> np.ndarray:
    return array.astype(NUMPY[stored])


def bits_of(dtype: np.dtype) -> np.dtype:
    """The dtype that an array has on the GPU: CuPy has no bfloat16, whose bits it holds."""
    return np.dtype(np.uint16) if dtype == NUMPY["bfloat16"] else dtype


def empty(shape: ops.Shape, dtype: np.dtype) -> Any:
    block = gpu.cupy().empty(ops.count(shape) * dtype.itemsize, np.uint8)
    return block.view(dtype).reshape(ops.known(shape))


def to_gpu(array: np.ndarray) -> Any:
    return gpu.cupy().asarray(np.ascontiguousarray(array).view(bits_of(array.dtype)))


def to_host(array: Any, stored: str) -> np.ndarray:
    """float64 of an array on the GPU, whatever its strides."""
    cupy = gpu.cupy()
    return cupy.asnumpy(cupy.ascontiguousarray(array)).view(NUMPY[stored]).astype(np.float64)


def picked(array: Any, stored: str, *index: np.ndarray) -> np.ndarray:
    """float64 of some elements of an array on the GPU."""
    return to_host(array[tuple(map(gpu.cupy().asarray, index))], stored)


def repeated(block: Any, shape: ops.Shape) -> Any:
    """A new array on the GPU that is full of the block."""
    array = empty(shape, block.dtype)
    flat = array.reshape(-1)
    for start in range(0, len(flat), len(block)):
        flat[start:start + len(block)] = block[:len(flat) - start]
    return array


# ---- right or wrong ---------------------------------------------------------------------------

def check(arrays: Arrays, y: Any, term_roundoff: float = 0.0) -> None:
    """ValueError where a sample of y, computed of the first copy, is further from float64 than
    rounding explains.

    term_roundoff  relative error that each term of a sum may have by itself: 0 where products
                   are exact
    """
    x = arrays.copies[0]
    case = arrays.case
    if isinstance(case.op, ops.Conv2d):
        found, expected, bound = _conv_sample(arrays, x, y, term_roundoff)
    elif isinstance(case.op, ops.Linear):
        found, expected, bound = _linear_sample(arrays, x, y, term_roundoff)
    elif isinstance(case.op, ops.Attention):
        found, expected, bound = _attention_sample(arrays, x, y)
    else:
        ends = np.unique([0, len(x[0]) - 1])
        found, images = (picked(array, case.stored, ends) for array in (y, x[0]))
        expected = reference.run(case.op, images)
        length = ops.count(case.shapes[0][1:-1])
        bound = length * SUM_ROUNDOFF * float(np.abs(images).max()) * np.ones_like(expected)
    allowed = bound + ROUNDOFF[case.stored] * np.abs(expected) + TINY
    excess = np.where(np.isfinite(found), np.abs(found - expected) / allowed, np.inf)
    if not excess.max() <= 1:
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise ValueError(f"{case.label}: {found[worst]} instead of {expected[worst]}, which is "
                         f"{excess[worst]:.3g} times what rounding explains")


Sample = tuple[np.ndarray, np.ndarray, np.ndarray]      # found, expected, bound of the difference


def _conv_sample(arrays: Arrays, x: Sequence[Any], y: Any, term_roundoff: float) -> Sample:
    """Some pixels of a convolution, all their channels."""
    case, op = arrays.case, arrays.case.op
    rng = np.random.default_rng(1)
    pixels = [np.append(rng.integers(0, size, SAMPLES), [0, size - 1])
              for size in case.output_shape[:3]]       # and both corners, where padding is
    weight = arrays.constants[1].astype(np.float64)
    patches = _patches(op, x[0], pixels, weight.shape[1:3], case.stored)
    outputs, inputs = len(weight) // op.groups, weight.shape[3]

    def product(patches: np.ndarray, weight: np.ndarray) -> np.ndarray:
        a = patches.reshape(len(patches), -1, op.groups, inputs).transpose(2, 0, 1, 3)
        b = weight.reshape(op.groups, outputs, -1, inputs)
        sums = a.reshape(op.groups, len(patches), -1) @ (
            b.reshape(op.groups, outputs, -1).transpose(0, 2, 1))
        return sums.transpose(1, 0, 2).reshape(len(patches), -1)
    added = [array for array in (arrays.constants[2:3] or [None]) if array is not None]
    if len(x) > 3:
        added.append(picked(x[3], case.stored, *pixels))
    return (picked(y, case.stored, *pixels),
            *_with_epilogue(case, product(patches, weight),
                            product(np.abs(patches), np.abs(weight)), added, term_roundoff))


def _patches(op: ops.Conv2d, x: Any, pixels: Sequence[np.ndarray], kernel: Sequence[int],
             stored: str) -> np.ndarray:
    """(pixel, row, column, channel): what each output pixel (image, row, column) sees of x."""
    image, *places = pixels
    index, inside = [], []
    for axis, place in enumerate(places):
        seen = (place[:, None] * op.stride[axis] - op.padding[axis]
                + np.arange(kernel[axis]) * op.dilation[axis])
        inside.append((seen >= 0) & (seen < x.shape[1 + axis]))
        index.append(np.clip(seen, 0, x.shape[1 + axis] - 1))
    seen = picked(x, stored, image[:, None, None], index[0][:, :, None], index[1][:, None, :])
    return seen * (inside[0][:, :, None, None] & inside[1][:, None, :, None])


def _linear_sample(arrays: Arrays, x: Sequence[Any], y: Any, term_roundoff: float) -> Sample:
    """Some rows and columns of a matrix product."""
    case = arrays.case
    rng = np.random.default_rng(1)
    rows, columns = (np.append(rng.integers(0, size, most), size - 1) for size, most in
                     zip(case.output_shape, (SAMPLES, 4 * SAMPLES), strict=True))
    a = picked(x[0], case.stored, rows)
    b = arrays.constants[1][columns].astype(np.float64).T
    added = [bias[columns] for bias in arrays.constants[2:3]]
    if len(x) > 3:
        added.append(picked(x[3], case.stored, rows[:, None], columns))
    return (picked(y, case.stored, rows[:, None], columns),
            *_with_epilogue(case, a @ b, np.abs(a) @ np.abs(b), added, term_roundoff))


def _attention_sample(arrays: Arrays, x: Sequence[Any], y: Any) -> Sample:
    """The first and the last image. An error of a score changes a share by as much; shares may be
    rounded to the storage type, scores too."""
    case, op = arrays.case, arrays.case.op
    ends = np.unique([0, len(x[0]) - 1])
    q, k, v = (picked(array, case.stored, ends) for array in x[:3])
    bias = [to_host(array, case.stored) for array in x[3:]]
    heads_first = [array.transpose(0, 2, 1, 3) for array in (q, k, np.abs(v))]
    scores = op.scale * heads_first[0] @ heads_first[1].swapaxes(2, 3) + sum(bias)
    shares = reference.run(ops.Softmax(), scores)
    roundoff = ROUNDOFF[case.stored] if case.dtype != "tf32" else TF32_TERM
    relative = 2 * roundoff * (1 + np.abs(scores).max(axis=3, keepdims=True))
    bound = (relative * (shares @ heads_first[2])).transpose(0, 2, 1, 3)
    return picked(y, case.stored, ends), reference.run(op, q, k, v, *bias), bound


def _with_epilogue(case: Case, sums: np.ndarray, magnitudes: np.ndarray,
                   added: Sequence[np.ndarray], term_roundoff: float
                   ) -> tuple[np.ndarray, np.ndarray]:
    """(expected, bound) of sums of products whose magnitudes add up so, after bias, residual and
    activation. A library may round to the storage type after each of these.

    The sum's own rounding errors are taken as independent (Higham and Mary 2019, "A New Approach
    to Probabilistic Rounding Error Analysis"), 8 deviations being the bound.
    """
    length = ops.count(case.shapes[1][1:]) + len(added)
    magnitudes = magnitudes + sum(np.abs(array) for array in added)
    if case.dtype == "tf32":
        term_roundoff = max(term_roundoff, TF32_TERM)
    expected = sums + sum(added)
    rounded_sums = len(added) * ROUNDOFF[case.stored] * (
        np.abs(sums) + sum(np.abs(array) for array in added))
    bound = (8 * math.sqrt(length) * SUM_ROUNDOFF + term_roundoff) * magnitudes + rounded_sums
    if case.op.activation is not None:
        expected = reference.run(case.op.activation, expected)
    return expected, STEEPEST * bound
