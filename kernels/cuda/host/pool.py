"""Pooling: which kernel, which grid, and over how many blocks a global one is split."""
from __future__ import annotations

from collections.abc import Sequence

from ... import ops
from ...axes import pixel_step
from ...ops import TensorSpec, known
from ...step import Array, Step
from .. import pool, vector
from ..compiler import Kernel
from ..index import divisor
from ..launch import CudaOptions, Launch
from .arguments import blocks, check_sizes

COMPILED_IN = ((2, 2), (3, 3))      # windows whose taps are unrolled
# The kind of `pool.whole`, and those of its two halves.
GLOBAL: dict[type[ops.Op], tuple[str, str, str]] = {
    ops.GlobalAvgPool2d: ("avg", "avg", "avg"), ops.GlobalMaxPool2d: ("max", "max", "max"),
    ops.GlobalL2Pool2d: ("l2", "squares", "root")}
LEAST_PIXELS = pool.ROWS * pool.FLIGHT      # of a split: each thread of its block reads FLIGHT


def window_kernel(kind: str, dtype: str, lanes: int, window: tuple[int, int]) -> Kernel:
    compiled = window if window in COMPILED_IN else (0, 0)
    size = f"{window[0]}x{window[1]}" if window in COMPILED_IN else "any"
    return Kernel(f"{kind}_pool2d_{size}_{vector.short(dtype)}x{lanes}", pool.window,
                  (kind, dtype, lanes, *compiled), pool.WINDOW_SIGNATURE, pool.THREADS,
                  arch=vector.arch(dtype))


def whole_kernel(kind: str, source: str, target: str, lanes: int) -> Kernel:
    """source, target: dtypes; partial results are float32."""
    return Kernel(f"global_{kind}_pool2d_{vector.short(source, target)}x{lanes}",
                  pool.whole, (kind, source, target, lanes), pool.WHOLE_SIGNATURE,
                  pool.WHOLE_THREADS, arch=vector.arch(source, target))


def kernels(dtype: str) -> list[Kernel]:
    """Those that networks meet."""
    wide = vector.lanes(dtype)
    return [*(window_kernel(kind, dtype, wide, window) for kind in ("max", "avg")
              for window in (*COMPILED_IN, (0, 0))), window_kernel("max", dtype, 1, (3, 3)),
            *(whole_kernel("avg", dtype, dtype, lanes) for lanes in (wide, 1)),
            whole_kernel("avg", dtype, "float32", wide), whole_kernel("avg", "float32", dtype, 4),
            *(whole_kernel(kind, dtype, dtype, wide) for kind in ("max", "l2")),
            whole_kernel("squares", dtype, "float32", wide),
            whole_kernel("root", "float32", dtype, 4)]


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

    return Step(kernel.name, bind, strided=lanes, reads_strided=lanes)


def prepare_global_pool2d(op: ops.GlobalPool2d, inputs: list[TensorSpec], output: TensorSpec,
                          weights: list[Array | None], options: CudaOptions) -> Step:
    """One launch, or, where channels and batch alone leave multiprocessors idle, results of parts
    of the pixels in the workspace and a second launch that combines those."""
    check_sizes(op.kind, *inputs)
    batch, height, width, channels = known(inputs[0].shape)
    kind, first, second = GLOBAL[type(op)]
    dtype, pixels = output.dtype, height * width
    elements = 1 if kind == "max" else pixels       # what a result is divided by
    per_image = -(-channels // (vector.lanes(dtype, channels) * pool.VECTORS))
    splits = max(1, min(pixels // LEAST_PIXELS, options.multiprocessors // (batch * per_image)))

    def launch(kind: str, source: str, target: str, x: Array, y: Array, pixels: int, splits: int,
               divided_by: int) -> Launch:
        lanes = vector.lanes(source, channels)
        groups = -(-channels // (lanes * pool.VECTORS))
        return Launch(whole_kernel(kind, source, target, lanes), (batch * splits * groups, 1, 1),
                      (x, y, pixels, -(-pixels // splits), channels, float(divided_by),
                       *divisor(groups), *divisor(splits)))

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        (x,) = arrays
        if splits == 1:
            return [launch(kind, dtype, dtype, x, y, pixels, 1, elements)]
        return [launch(first, dtype, "float32", x, workspace, pixels, splits, 1),
                launch(second, "float32", dtype, workspace, y, splits, 1, elements)]

    name = whole_kernel(kind if splits == 1 else first, dtype, dtype if splits == 1 else "float32",
                        vector.lanes(dtype, channels)).name
    return Step(name + (f"_split{splits}" if splits > 1 else ""), bind,
                workspace=0 if splits == 1 else batch * splits * channels * 4)
