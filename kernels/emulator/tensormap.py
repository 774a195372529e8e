"""Tensor maps: what the driver's cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .empty import Empty, unwrap
from .ptxtypes import Array


@dataclass(frozen=True)
class Im2col:
    """The bounding box of a convolution's input pixels; corners are innermost (w, h, d) first."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    channels: int
    pixels: int


class TensorMap:
    """A CUtensorMap over a C-contiguous array (or Empty), to be passed as a kernel argument.

    box: extents, innermost dimension first, as the driver takes them (tiled mode).
    swizzle: 0, 32, 64 or 128 bytes.
    strides: element (traversal) strides, innermost first; 1 when not given.
    im2col: (lower corner, upper corner, channels per pixel, pixels per column) selects im2col mode;
    the array is N, spatial dimensions, C.
    """

    def __init__(
        self,
        source: Array | Empty,
        box: Sequence[int] | None = None,
        swizzle: int = 128,
        strides: Sequence[int] | None = None,
        im2col: tuple[Sequence[int], Sequence[int], int, int] | None = None,
    ) -> None:
        array = unwrap(source)
        if (box is None) == (im2col is None):
            raise ValueError("A TensorMap takes either box or im2col.")
        if swizzle not in (0, 32, 64, 128):
            raise ValueError(f"The swizzle of a TensorMap is 0, 32, 64 or 128, not {swizzle}.")
        if box is not None and len(box) != array.ndim:
            raise ValueError(f"The box {tuple(box)} does not have {array.ndim} dimensions.")
        self.source, self.array, self.swizzle = source, array, swizzle
        self.extents = array.shape[::-1]
        self.strides = tuple(strides or (1,) * array.ndim)
        self.box = tuple(box or ())
        self.im2col = None
        if im2col is not None:
            lower, upper, channels, pixels = im2col
            self.im2col = Im2col(tuple(lower), tuple(upper), channels, pixels)

    @property
    def inner_bytes(self) -> int:
        """Bytes of the innermost box dimension, which a swizzle span must hold."""
        inner = self.im2col.channels if self.im2col else self.box[0]
        return inner * self.array.itemsize

    def elements(self, coordinates: Sequence[int], offsets: Sequence[int] = ()) -> Array:
        """Element numbers of the box in the order of shared memory; -1 where out of bounds.

        coordinates and offsets (im2col) are innermost first.
        """
        if self.im2col:
            indices = self._im2col_indices(self.im2col, coordinates, offsets)
        else:
            indices = [
                (start + np.arange(0, extent, step)).reshape((-1,) + (1,) * axis)
                for axis, (start, extent, step) in enumerate(
                    zip(coordinates, self.box, self.strides, strict=True)
                )
            ]
        inside: Any = True
        linear: Any = 0
        pitch = 1
        for index, extent in zip(indices, self.extents, strict=True):
            inside = inside & (index >= 0) & (index < extent)
            linear = linear + index * pitch
            pitch *= extent
        return np.where(inside, linear, -1).ravel()

    def _im2col_indices(
        self, box: Im2col, coordinates: Sequence[int], offsets: Sequence[int]
    ) -> list[Array]:
        """Walk w, then h, then n through the bounding box, `pixels` positions in all."""
        position = np.arange(box.pixels)
        spatial = []
        for axis, start in enumerate(coordinates[1:-1]):
            low, step = box.lower[axis], self.strides[axis + 1]
            extent = -(-(self.extents[axis + 1] + box.upper[axis] - low) // step)
            position = position + (start - low) // step
            spatial.append(position % extent * step + low + offsets[axis])
            position = position // extent
        channel = coordinates[0] + np.arange(box.channels)[None, :]
        return [channel] + [i[:, None] for i in [*spatial, coordinates[-1] + position]]


def swizzle(address: Array, span: int) -> Array:
    """XOR swizzle of TMA and wgmma: the 16-byte chunk's index is XORed with the 128-byte row's."""
    return address ^ (((address >> 7) & (span // 16 - 1)) << 4) if span > 16 else address
