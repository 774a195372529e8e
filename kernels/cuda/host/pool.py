"""Pooling: which kernel, which grid, and over how many blocks a global one is split."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ... import ops
from ...axes import pixel_step
from ...ops import TensorSpec, known
from ...step import Array, Step
from .. import pool, vector
from ..compiler import Kernel
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import blocks, check_sizes, part_unit

COMPILED_IN = ((2, 2), (3, 3))      # windows whose taps are unrolled
# The kind of `pool.whole`, and those of its two halves.
GLOBAL: dict[type[ops.Op], tuple[str, str, str]] = {
    ops.GlobalAvgPool2d: ("avg", "avg", "avg"), ops.GlobalMaxPool2d: ("max", "max", "max"),
    ops.GlobalL2Pool2d: ("l2", "squares", "root")}
# Of a split by a whole block: each thread reads as often as loads are in flight.
LEAST_PIXELS = pool.WARPS * pool.WARP_ROWS * pool.FLIGHT[pool.WARPS]
# Of a multiprocessor, by registers; and warps there that hide what memory takes.
BLOCKS, WARPS_TO_FILL = 4, 16


def window_kernel(kind: str, dtype: str, lanes: int, window: tuple[int, int]) -> Kernel:
    compiled = window if window in COMPILED_IN else (0, 0)
    size = f"{window[0]}x{window[1]}" if window in COMPILED_IN else "any"
    return Kernel(f"{kind}_pool2d_{size}_{vector.short(dtype)}x{lanes}", pool.window,
                  (kind, dtype, lanes, *compiled), pool.WINDOW_SIGNATURE, pool.THREADS,
                  arch=vector.arch(dtype))


def whole_kernel(kind: str, source: str, target: str, lanes: int, warps: int) -> Kernel:
    """source, target: dtypes; partial results are float32. warps: that share a part's pixels."""
    return Kernel(f"global_{kind}_pool2d_{vector.short(source, target)}x{lanes}_w{warps}",
                  pool.whole, (kind, source, target, lanes, warps), pool.WHOLE_SIGNATURE,
                  pool.WHOLE_THREADS, arch=vector.arch(source, target), blocks=BLOCKS)


def kernels(dtype: str) -> list[Kernel]:
    """Those that networks meet."""
    wide, together = vector.lanes(dtype), pool.WARPS
    return [*(window_kernel(kind, dtype, wide, window) for kind in ("max", "avg")
              for window in (*COMPILED_IN, (0, 0))), window_kernel("max", dtype, 1, (3, 3)),
            *(whole_kernel("avg", dtype, dtype, lanes, warps) for lanes in (wide, 1)
              for warps in (1, together)),
            *(whole_kernel(kind, dtype, dtype, wide, together) for kind in ("max", "l2")),
            *(whole_kernel(kind, dtype, "float32", wide, together) for kind in ("avg", "squares")),
            *(whole_kernel(kind, "float32", dtype, 4, together) for kind in ("avg", "root"))]


def prepare_pool2d(op: ops.MaxPool2d | ops.AvgPool2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: CudaOptions) -> Step:
    check_sizes(op.kind, *inputs, output)
    batch, height, width, channels = known(inputs[0].shape)
    _, out_height, out_width, _ = known(output.shape)
    lanes = vector.lanes(output.dtype, channels)
    kind = "max" if isinstance(op, ops.MaxPool2d) else "avg"
    kernel = window_kernel(kind, output.dtype, lanes, op.kernel_size)
    top, left, bottom, right = op.padding
    threads = batch * out_height * out_width * (channels // lanes)
    # What an average counts along each axis: the image, or the image and its padding.
    margins, counted = (0, 0), (height, width)
    if isinstance(op, ops.AvgPool2d) and op.count_include_pad:
        margins, counted = (top, left), (height + top + bottom, width + left + right)
    numbers = (height, width, top, left, *op.kernel_size, *op.stride,
               *op.dilation, *margins, *counted, *divisor(channels // lanes), *divisor(out_width),
               *divisor(out_height))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        (x,) = arrays
        return [Launch(kernel, blocks(threads, kernel.threads), (
            x, y, threads, pixel_step(x), pixel_step(y), *numbers))]

    unit = part_unit(output.dtype)
    return Step(kernel.name, bind, strided=unit, reads_strided=unit)


def prepare_global_pool2d(op: ops.GlobalPool2d, inputs: list[TensorSpec], output: TensorSpec,
                          weights: list[Array | None], options: CudaOptions) -> Step:
    """One launch, or, where channels and batch alone leave multiprocessors idle, results of parts
    of the pixels in the workspace and a second launch that combines those."""
    check_sizes(op.kind, *inputs)
    batch, height, width, channels = known(inputs[0].shape)
    kind, first, second = GLOBAL[type(op)]
    dtype, pixels = output.dtype, height * width
    elements = 1 if kind == "max" else pixels       # what a result is divided by

    def groups_of(lanes: int) -> int:
        """Of an image's channels, those that a warp takes."""
        return -(-channels // (lanes * pool.VECTORS))

    def kernel_of(kind: str, source: str, target: str, splits: int) -> Kernel:
        lanes = vector.lanes(source, channels)
        alone = batch * splits * groups_of(lanes) >= options.multiprocessors * WARPS_TO_FILL
        return whole_kernel(kind, source, target, lanes, 1 if alone else pool.WARPS)

    def launch(kernel: Kernel, x: Array, y: Array, pixels: int, splits: int, divided_by: int
               ) -> Launch:
        *_, lanes, warps = kernel.config
        groups = groups_of(lanes)
        parts = batch * splits * groups
        return Launch(kernel, blocks(parts * warps, pool.WARPS),
                      (x, y, pixels, -(-pixels // splits), channels, parts, float(divided_by),
                       float(np.float32(1) / np.float32(divided_by)), *divisor(groups),
                       *divisor(splits)))

    per_image = groups_of(vector.lanes(dtype, channels))
    splits = max(1, min(pixels // LEAST_PIXELS, options.multiprocessors // (batch * per_image)))
    if splits == 1:
        only = kernel_of(kind, dtype, dtype, 1)
        return Step(only.name, lambda arrays, y, workspace: [
            launch(only, arrays[0], y, pixels, 1, elements)])
    of_parts = kernel_of(first, dtype, "float32", splits)
    of_all = kernel_of(second, "float32", dtype, 1)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        return [launch(of_parts, arrays[0], workspace, pixels, splits, 1),
                launch(of_all, workspace, y, splits, 1, elements)]

    return Step(f"{of_parts.name}_split{splits}", bind, workspace=batch * splits * channels * 4)
