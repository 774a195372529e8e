"""ConvTranspose: a convolution with more channels, which then become pixels.

Each pixel of the image adds its kernel to the result, `stride` pixels on from its neighbour's. So
the pixel of the result at q * stride + r gets, by each tap r + t * stride of the kernel, what the
image has at q - t. That is an ordinary convolution for each remainder r: it has ceil(kernel /
stride) taps, in reverse order. As channels of one convolution they are moved to their places as
DepthToSpace does it (Shi et al. 2016, arXiv:1609.07009). Padding is what is cut off the result.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels import ops

from ..importer import Importer, Ints, Value
from .shapes import regroup


def ConvTranspose(net: Importer, x: Value, w: Value, b: Value | None = None, *,
                  auto_pad: str = "NOTSET", dilations: Ints | None = None, group: int = 1,
                  kernel_shape: Ints | None = None, output_padding: Ints | None = None,
                  output_shape: Ints | None = None, pads: Ints | None = None,
                  strides: Ints | None = None) -> Value:
    weight = net.weight(w, "weight")
    if weight.ndim != 4 or any(step != 1 for step in dilations or ()):
        raise net.error(f"ConvTranspose with a weight of shape {weight.shape} and dilations "
                        f"{dilations} is not supported, only of images and without dilation")
    channels, *image = net.image(x)
    kernel, stride = weight.shape[2:], tuple(strides or (1, 1))
    if channels != len(weight) or channels % group or tuple(kernel_shape or kernel) != kernel:
        raise ValueError(f"its weight of shape {weight.shape} does not fit {channels} channels, "
                         f"group={group}, kernel_shape={kernel_shape}")
    full = [(size - 1) * step + length + more for size, step, length, more in zip(
        image, stride, kernel, output_padding or (0, 0), strict=True)]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [size * step for size, step in zip(image, stride, strict=True)]
    begin, sizes = _cut(full, pads, output_shape, auto_pad == "SAME_UPPER")
    before = [-(-length // step) - 1 for length, step in zip(kernel, stride, strict=True)]
    after = [max(0, -(-(first + size) // step) - pixels) for first, size, step, pixels in zip(
        begin, sizes, stride, image, strict=True)]
    inputs = [net.add_constant(f"{w}:by remainder", _by_remainder(weight, group, stride))]
    if b is not None:
        bias = net.weight(b, "bias", rank=1).reshape(group, -1)
        inputs.append(net.add_constant(f"{b}:by remainder", np.tile(
            bias, (1, stride[0] * stride[1])).reshape(-1)))
    op = ops.Conv2d((1, 1), (before[0], before[1], after[0], after[1]), (1, 1), group)
    y = _to_places(net, net.channels_last(op, x, *inputs), group, stride)
    for axis, first, size in zip((2, 3), begin, sizes, strict=True):
        if (first, size) != (0, net.shape(y)[axis]):
            y = net.emit(ops.Slice(axis, first, first + size), y, suffix=f":cut{axis}")
    return y


def _cut(full: Sequence[int], pads: Ints | None, wanted: Ints | None, upper: bool
         ) -> tuple[list[int], list[int]]:
    """Where in the full result its part begins, and the part's size."""
    if wanted is None:
        given = list(pads or (0, 0, 0, 0))
        sizes = [size - first - last for size, first, last in zip(full, given[:2], given[2:],
                                                                  strict=True)]
        begin = given[:2]
    else:
        sizes = list(wanted)[-2:]
        over = [size - want for size, want in zip(full, sizes, strict=True)]
        begin = [both // 2 if upper else both - both // 2 for both in over]
    if min(begin) < 0 or min(sizes) < 1:
        raise ValueError(f"its full result of {tuple(full)} pixels has no part of {tuple(sizes)} "
                         f"from {tuple(begin)}; pads={pads}, output_shape={wanted}")
    return begin, sizes


def _by_remainder(weight: np.ndarray, group: int, stride: Sequence[int]) -> np.ndarray:
    """(C, O / group, height, width) as the OHWI weight of O * stride * stride channels: of each
    group the remainders one after the other, so that channels stay neighbours."""
    channels, outputs, *kernel = weight.shape
    taps = [-(-length // step) for length, step in zip(kernel, stride, strict=True)]
    rows, columns = (count * step - length for count, step, length in zip(
        taps, stride, kernel, strict=True))
    full = np.pad(weight, ((0, 0), (0, 0), (0, rows), (0, columns)))
    split = full.reshape(group, channels // group, outputs, taps[0], stride[0], taps[1], stride[1])
    ordered = split[:, :, :, ::-1, :, ::-1].transpose(0, 4, 6, 2, 3, 5, 1)
    return np.ascontiguousarray(ordered).reshape(-1, *taps, channels // group)


def _to_places(net: Importer, y: Value, group: int, stride: Sequence[int]) -> Value:
    """The remainders become pixels."""
    channels, height, width = net.image(y)
    outputs = channels // (stride[0] * stride[1])
    if outputs == channels:
        return y
    return regroup(net, y, (-1, group, *stride, outputs // group, height, width),
                   (0, 1, 4, 5, 2, 6, 3), (-1, outputs, height * stride[0], width * stride[1]))
