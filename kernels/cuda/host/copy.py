"""Ops that only move data, and the two that bring data in: conversion and photos' pixels."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from ...axes import as_matrices, dense_steps, merge_axes, merge_padded, pixel_step
from ...ops import (
    Concat,
    Flatten,
    Pad,
    Reshape,
    Slice,
    TensorSpec,
    Transpose,
    count,
    known,
    normal_axis,
)
from ...step import Array, Options, Step
from .. import copy, vector
from ..compiler import Kernel
from ..index import divisor
from ..launch import Launch
from .arguments import MOST_AXES, blocks, check_sizes, four_axes, part_unit
from .weights import stored

LEAST_SIDE = 8      # of a matrix worth a tile of 32; three planes of a photo are not


def moved(source: str, target: str) -> tuple[str, str]:
    """The dtypes as the kernels see them: where they are equal, bits are moved unseen."""
    if source != target:
        return source, target
    bits = f"bits{8 * vector.STORAGE[source].bytes}"
    return bits, bits


def strided_kernel(source: str, target: str, lanes: int) -> Kernel:
    return Kernel(f"copy_{vector.short(source, target)}x{lanes}", copy.strided,
                  (source, target, lanes), copy.STRIDED_SIGNATURE, copy.THREADS,
                  arch=vector.arch(source, target))


def pad_kernel(dtype: str, lanes: int, mode: str = "constant") -> Kernel:
    bits, _ = moved(dtype, dtype)
    name = "pad" if mode == "constant" else f"pad_{mode}"
    return Kernel(f"{name}_{vector.short(bits)}x{lanes}", copy.pad, (bits, lanes, mode),
                  copy.PAD_SIGNATURE, copy.THREADS)


def transpose_kernel(source: str, target: str, lanes: int) -> Kernel:
    side = copy.SIDE * lanes
    return Kernel(f"transpose_{vector.short(source, target)}_{side}x{side}", copy.transpose,
                  (source, target, lanes), copy.TRANSPOSE_SIGNATURE, copy.THREADS,
                  arch=vector.arch(source, target))


def pixels_kernel(dtype: str, channels: int, padded: int, group: int) -> Kernel:
    """uint8 (.., channels) -> dtype (.., padded), `group` pixels a thread."""
    return Kernel(f"pixels_u8x{channels}_{vector.short(dtype)}x{padded}_p{group}", copy.pixels,
                  (dtype, channels, padded, group), copy.PIXELS_SIGNATURE, copy.THREADS,
                  arch=vector.arch(dtype))


def kernels(dtype: str) -> list[Kernel]:
    """Those that networks meet: moves of the dtype, conversion from float32, photos."""
    pairs = dict.fromkeys([moved(dtype, dtype), moved("float32", dtype), moved(dtype, "float32")])
    return [*(strided_kernel(*pair, lanes) for pair in pairs
              for lanes in (min(map(vector.lanes, pair)), 1)),
            *(pad_kernel(dtype, lanes) for lanes in (vector.lanes(dtype), 1)),
            pad_kernel(dtype, vector.lanes(dtype), "reflect"),
            *(transpose_kernel(*pair, lanes) for pair in pairs for lanes in (1, 2)),
            *(pixels_kernel(dtype, 3, padded, group) for padded in (3, 4, 8) for group in (1, 4))]


def strided_launch(what: str, source: str, target: str, sizes: Sequence[int],
                   x_steps: Sequence[int], y_steps: Sequence[int], x_first: int = 0,
                   y_first: int = 0) -> tuple[Kernel, Callable[[Array, Array], Launch]]:
    """(kernel, function (x, y) -> Launch) that copies elements by these sizes and steps, from x's
    element `x_first` and on to y's `y_first` and on."""
    dtypes = moved(source, target)
    sizes, (x_steps, y_steps) = merge_axes(sizes, x_steps, y_steps)
    lanes = 1
    if x_steps[-1] == y_steps[-1] == 1:
        counts = (sizes[-1], *x_steps[:-1], *y_steps[:-1], x_first, y_first)
        lanes = min(vector.lanes(dtype, *counts) for dtype in dtypes)
    kernel = strided_kernel(*dtypes, lanes)
    vectors = math.prod(sizes) // lanes
    axes = four_axes(what, [*sizes[:-1], sizes[-1] // lanes], x_steps, y_steps)
    return kernel, lambda x, y: Launch(kernel, blocks(vectors, kernel.threads),
                                       (x, y, vectors, x_first, y_first, *axes))


def strided_launches(what: str, source: str, target: str, sizes: Sequence[int],
                     x_steps: Sequence[int], y_steps: Sequence[int], x_first: int = 0,
                     y_first: int = 0) -> list[tuple[Kernel, Callable[[Array, Array], Launch]]]:
    """As one, or, with more axes than a kernel walks over, one for each step along the shortest."""
    sizes, (x_steps, y_steps) = merge_axes(sizes, x_steps, y_steps)
    if len(sizes) <= MOST_AXES:
        return [strided_launch(what, source, target, sizes, x_steps, y_steps, x_first, y_first)]
    short = min(range(len(sizes) - 1), key=sizes.__getitem__)
    others, of_x, of_y = ([*each[:short], *each[short + 1:]]
                          for each in (sizes, x_steps, y_steps))
    return [launch for i in range(sizes[short]) for launch in strided_launches(
        what, source, target, others, of_x, of_y, x_first + i * x_steps[short],
        y_first + i * y_steps[short])]


def prepare_concat(op: Concat, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: Options) -> Step:
    """One launch an input: rows of it become parts of the output's rows."""
    check_sizes(op.kind, output)
    axis = normal_axis(op.axis, len(output.shape))
    bounds = list(accumulate((count(spec.shape[axis:]) for spec in inputs), initial=0))
    rows, width, of_channels = count(output.shape[:axis]), bounds[-1], axis + 1 == len(output.shape)

    def part(i: int, step: int) -> tuple[Kernel, Callable[[Array, Array], Launch]]:
        """Copies input i into rows of y that are so many elements apart."""
        size = bounds[i + 1] - bounds[i]
        return strided_launch(op.kind, inputs[i].dtype, output.dtype, (rows, size), (size, 1),
                              (step, 1), y_first=bounds[i])

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        step = pixel_step(y) if of_channels else width
        return [part(i, step)[1](x, y) for i, x in enumerate(arrays) if x is not None]

    return Step(f"concat_{part(0, width)[0].name}", bind,
                strided=part_unit(output.dtype) if of_channels else 0)


def prepare_slice(op: Slice, inputs: list[TensorSpec], output: TensorSpec,
                  weights: list[Array | None], options: Options) -> Step:
    """Vectors where the slice begins and ends at whole ones."""
    check_sizes(op.kind, *inputs)
    shape = known(inputs[0].shape)
    axis, x_steps = normal_axis(op.axis, len(shape)), dense_steps(shape)
    first = op.start * x_steps[axis]
    x_steps[axis] *= op.step
    kernel, launch = strided_launch(op.kind, inputs[0].dtype, output.dtype, known(output.shape),
                                    x_steps, dense_steps(output.shape), x_first=first)
    return Step(f"slice_{kernel.name}", lambda arrays, y, workspace: [launch(arrays[0], y)])


def prepare_pad(op: Pad, inputs: list[TensorSpec], output: TensorSpec,
                weights: list[Array | None], options: Options) -> Step:
    """One launch that writes each vector of y once."""
    check_sizes(op.kind, output)
    dtype, shape = output.dtype, known(inputs[0].shape)
    mirrored = op.mode != "constant"
    axes = merge_padded(shape, op.before, op.after, mirrored)
    lanes = 1 if mirrored and any(axes[-1][1:]) else vector.lanes(dtype, *axes[-1])
    kernel, vectors = pad_kernel(dtype, lanes, op.mode), count(output.shape) // lanes
    axes = [(1, 0, 0)] * (4 - len(axes)) + axes
    sizes = [size + before + after for size, before, after in axes]
    numbers = four_axes(op.kind, [*sizes[:-1], sizes[-1] // lanes],
                        [before for _, before, _ in axes], [size for size, _, _ in axes])
    value = stored(np.array([op.value], np.float32), dtype)
    bits = int(value.view(np.uint32 if value.itemsize == 4 else np.uint16)[0])
    return Step(kernel.name, lambda arrays, y, workspace: [
        Launch(kernel, blocks(vectors, kernel.threads), (arrays[0], y, vectors, bits, *numbers))])


def prepare_transpose(op: Transpose, inputs: list[TensorSpec], output: TensorSpec,
                      weights: list[Array | None], options: Options) -> Step:
    """Through tiles where two runs of axes are swapped, as between image layouts, else by
    strides; output.dtype may differ from the input's."""
    check_sizes(op.kind, output)
    shape = known(inputs[0].shape)
    source, target = inputs[0].dtype, output.dtype
    matrices = as_matrices(shape, op.permutation)
    if matrices is not None and min(matrices[1:]) >= LEAST_SIDE:
        return _transpose_matrices(matrices, *moved(source, target))
    steps = dense_steps(shape)
    parts = strided_launches(op.kind, source, target, known(output.shape),
                             [steps[axis] for axis in op.permutation], dense_steps(output.shape))
    return Step(f"transpose_{parts[0][0].name}", lambda arrays, y, workspace: [
        launch(arrays[0], y) for _, launch in parts])


def _transpose_matrices(matrices: tuple[int, int, int], source: str, target: str) -> Step:
    batch, rows, columns = matrices
    short = min(vector.STORAGE[dtype].bytes for dtype in (source, target)) == 2
    lanes = 2 if short and rows % 2 == columns % 2 == 0 else 1
    kernel, side = transpose_kernel(source, target, lanes), copy.SIDE * lanes
    down, across = -(-rows // side), -(-columns // side)
    numbers = (rows, columns, *divisor(across), *divisor(down))
    return Step(kernel.name, lambda arrays, y, workspace: [
        Launch(kernel, (batch * down * across, 1, 1), (arrays[0], y, *numbers))])


def prepare_reshape(op: Reshape | Flatten, inputs: list[TensorSpec], output: TensorSpec,
                    weights: list[Array | None], options: Options) -> Step:
    """The executor makes views of these; a copy is needed only where one is asked for alone."""
    return prepare_convert(inputs[0], output)


def prepare_convert(source: TensorSpec, target: TensorSpec) -> Step:
    """The same elements in the same order, in the target's dtype."""
    check_sizes("conversion", source)
    kernel, launch = strided_launch("conversion", source.dtype, target.dtype,
                                    (count(source.shape),), (1,), (1,))
    return Step(kernel.name, lambda arrays, y, workspace: [launch(arrays[0], y)])


def prepare_pixels(source: TensorSpec, target: TensorSpec, mean: Sequence[float],
                   std: Sequence[float]) -> Step:
    """Photos become a network's input: (pixel - mean) / std, pixels 0 to 255.

    source: uint8 (.., 1 or 3 channels); target: a float dtype and the same shape but for its
    channels, which may be more: those are zero, so that a first convolution reads whole vectors.
    mean, std: a number per channel of the source.
    """
    check_sizes("pixels", target)
    *places, channels = known(source.shape)
    *target_places, padded = known(target.shape)
    if source.dtype != "uint8" or not 1 <= channels == len(mean) == len(std) <= 3:
        raise ValueError(f"photos are uint8 of 1 to 3 channels with a mean and std each, not "
                         f"{source} with mean={mean!r} and std={std!r}")
    if places != target_places or padded < channels:
        raise ValueError(f"photos of shape {source.shape} do not become inputs of shape "
                         f"{target.shape}: only channels may be added")
    group = 4 if math.prod(places) % 4 == 0 else 1
    kernel = pixels_kernel(target.dtype, channels, padded, group)
    threads, missing = math.prod(places) // group, [0.0] * (3 - channels)
    numbers = ([1 / s for s in std] + missing + [-m / s for m, s in zip(mean, std, strict=True)]
               + missing)
    return Step(kernel.name, lambda arrays, y, workspace: [
        Launch(kernel, blocks(threads, kernel.threads), (arrays[0], y, threads, *numbers))])
