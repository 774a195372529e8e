"""How output rows are cut into tiles for depthwise.py, and what it is called with."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...memory import aligned
from ...ops import Conv2d, TensorSpec, known
from ...step import Array, Options, Step
from ..geometry import ConvGeometry
from ..launch import Kernel, Launch, flat_bits
from ..sizes import COMMON, LANES, WIDE, WINDOWS, Window
from ..sizes import DEPTHWISE_PIXELS as PIXELS
from .codes import code_bounds, divisor, meaning, writes_codes
from .epilogue import epilogue, in_registers

KERNELS = {COMMON: Kernel("depthwise", "depthwise_common"),
           WIDE: Kernel("depthwise", "depthwise_wide")}


def family_of(g: ConvGeometry) -> int:
    """The family among WINDOWS that has windows of this width."""
    return WIDE if any(window.taps == g.kernel_width for window in WINDOWS[WIDE]) else COMMON


def cut_columns(g: ConvGeometry) -> Array:
    """Tiles [.., 4] of an output row: first column, pixels (PIXELS or 1), number of its window in
    its family (-1: none), columns of the window that are outside on the left. The last tile moves
    back over its neighbour."""
    common = WINDOWS[family_of(g)]
    size = PIXELS if g.out_width >= PIXELS else 1
    tiles = []
    for start in range(0, g.out_width, size):
        column = min(start, g.out_width - size)
        first = column * g.stride_width - g.left
        end = first + (size - 1) * g.stride_width + g.kernel_width
        window = Window(g.kernel_width, g.stride_width, max(-first, 0), max(end - g.width, 0))
        fixed = size == PIXELS and g.dilation_width == 1 and window in common
        tiles.append((column, size, common.index(window) if fixed else -1, window.left))
    return np.array(tiles, np.int64)


def fits(op: Conv2d, weight_shape: tuple[int, ...], channels: int) -> bool:
    """One filter per channel, and one channel per filter."""
    return op.groups == channels == weight_shape[0] and weight_shape[3] == 1


def takes_codes(op: Conv2d, x: TensorSpec) -> tuple[tuple[int, ...], bool]:
    """(positions of inputs that it reads so, whether it writes them), as of Narrow."""
    return (0,) if x.grid is not None else (), writes_codes(op.activation)


def prepare_depthwise(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec, weight: Array,
                      bias: Array | None, options: Options) -> Step:
    """Inputs x, weight (C, KH, KW, 1), [bias]. Codes are numbers as any others, times a scale that
    weights take on."""
    batch, height, width, channels = known(inputs[0].shape)
    _, out_height, out_width, _ = known(output.shape)
    kh, kw = weight.shape[1:3]
    g = ConvGeometry(height, width, channels, out_height, out_width, channels, kh, kw, *op.stride,
                     *op.padding[:2], *op.dilation, per_group=1)
    padding = -channels % LANES

    (x_scale, x_zero), (y_scale, y_zero) = meaning(inputs[0]), divisor(output, op.activation)
    factor = x_scale / y_scale

    def pack(w: Array) -> Array:
        rows = w.reshape(channels, -1).T * factor
        return aligned(np.pad(rows, ((0, 0), (0, padding))).ravel())

    packed = options.pack(weight, f"depthwise {factor}", pack)
    shift = np.zeros(channels, np.float32) if bias is None else bias / y_scale
    packed_bias = np.pad(shift + y_zero, (0, padding))
    columns, geometry, kernel = cut_columns(g), tuple(g), KERNELS[family_of(g)]
    low, high, _, suffix = epilogue(op.activation)
    activation, a, b = in_registers(op.activation, output.dtype)
    if output.dtype == "uint8":
        low, high = code_bounds(op.activation)

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        x, flat = flat_bits(arrays[0]), flat_bits(y)
        zeros = np.full(LANES, x_zero, x.dtype)
        return [kernel.bind(x, packed, packed_bias, zeros, flat, batch, columns, geometry,
                            activation, low, high, a, b, x_zero if x_zero else 0,
                            options.threads)]

    return Step(f"depthwise_{kh}x{kw}_f32_{PIXELS}x{LANES}{suffix}", bind)
