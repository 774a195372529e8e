"""Fewer axes: neighbours that every operand walks through in one stride become one axis."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ops import Shape, count, known


def dense_steps(shape: Shape) -> list[int]:
    """By how many elements each axis of a C-contiguous array steps."""
    return [count(shape[axis + 1:]) for axis in range(len(shape))]


def broadcast_steps(shape: Shape, operand: Shape) -> list[int]:
    """By how many elements `operand`, C-contiguous, steps along the axes of `shape` that it is
    broadcast to: 0 where it has one element for all."""
    padded = (1,) * (len(shape) - len(operand)) + known(operand)
    return [0 if size == 1 else step
            for size, step in zip(padded, dense_steps(padded), strict=True)]


def merge_axes(sizes: Sequence[int], *steps: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """(sizes, steps of each operand) without axes of size 1, and with neighbouring axes merged
    where all operands allow it. One axis at least is left."""
    kept = [axis for axis, size in enumerate(sizes) if size != 1]
    merged = [sizes[axis] for axis in kept] or [1]
    result = [[step[axis] for axis in kept] or [1] for step in steps]
    for i in range(len(merged) - 2, -1, -1):
        if all(step[i] == step[i + 1] * merged[i + 1] for step in result):
            merged[i:i + 2] = [merged[i] * merged[i + 1]]
            for step in result:
                del step[i]
    return merged, result


def merge_padded(shape: Sequence[int], before: Sequence[int], after: Sequence[int],
                 mirrored: bool = False) -> list[tuple[int, ...]]:
    """(size, before, after) of each axis, one without padding merged into the axis before it; where
    the elements of that one are mirrored, it must have no padding either. One axis at least is
    left."""
    axes: list[tuple[int, ...]] = []
    for axis in zip(shape, before, after, strict=True):
        if axes and not any(axis[1:]) and not (mirrored and any(axes[-1][1:])):
            axes[-1] = tuple(number * axis[0] for number in axes[-1])
        else:
            axes.append(axis)
    return axes or [(1, 0, 0)]


def collapse(shape: Shape, *operands: Shape) -> tuple[list[int], list[list[int]]]:
    """`merge_axes` for operands that are broadcast to `shape`."""
    return merge_axes(known(shape), *(broadcast_steps(shape, operand) for operand in operands))


def pixel_step(y: np.ndarray) -> int:
    """Elements from a pixel of y, counted along all axes but the last, to the next one. y is
    C-contiguous, or some channels of a wider array that is; ValueError otherwise. It may be CuPy's.
    """
    if y.flags.c_contiguous:
        return y.shape[-1] if y.ndim else 1
    step = y.strides[-2] // y.itemsize if y.ndim > 1 else 0
    wider = (*y.shape[:-1], step)
    if step < y.shape[-1] or y.strides != tuple(y.itemsize * n for n in dense_steps(wider)):
        raise ValueError(f"an array of shape {y.shape} and strides {y.strides} is no part of the "
                         f"channels of a C-contiguous one")
    return step


def flat_pixels(y: np.ndarray) -> tuple[np.ndarray, int]:
    """(memory, step): y[..., c] of pixel p is memory[p * step + c]. ValueError as of `pixel_step`.
    """
    step = pixel_step(y)
    if y.flags.c_contiguous:
        return y.reshape(-1), step
    size = (count(y.shape[:-1]) - 1) * step + y.shape[-1]
    return np.lib.stride_tricks.as_strided(y, (size,), (y.itemsize,)), step


def as_matrices(shape: tuple[int, ...], permutation: Sequence[int]) -> tuple[int, int, int] | None:
    """(batch, rows, columns) if the permutation only swaps two runs of axes, as NHWC <-> NCHW."""
    fixed = next((i for i, axis in enumerate(permutation) if axis != i), len(shape))
    split = permutation[fixed] if fixed < len(shape) else fixed
    swapped = (*range(fixed), *range(split, len(shape)), *range(fixed, split))
    if tuple(permutation) != swapped:
        return None
    return count(shape[:fixed]), count(shape[fixed:split]), count(shape[split:])
