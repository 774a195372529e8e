"""Resize: a pixel of the result is the nearest one of the image, or mixed of those beside it."""
from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np

from kernels import ops

from ..fold import check_size
from ..importer import TO_NCHW, TO_NHWC, Importer, Ints, Value
from .taking import take

MOST_PIXELS = 1 << 16       # along an axis: what a file asks for may be anything
HALF = Fraction(1, 2)


class Change(NamedTuple):
    """Of an axis from `old` pixels to `new`, scale times as many."""
    old: int
    new: int
    scale: Fraction


# Where pixel i of the result lies in the image, in its pixels, and which pixel is nearest.
PLACE: dict[str, Callable[[int, Change], Fraction]] = {
    "asymmetric": lambda i, change: i / change.scale,
    "half_pixel": lambda i, change: (i + HALF) / change.scale - HALF,
    "pytorch_half_pixel": lambda i, change: ((i + HALF) / change.scale - HALF if change.new > 1
                                             else Fraction(0)),
    "align_corners": lambda i, change: i * Fraction(change.old - 1, max(change.new - 1, 1))}
NEAREST: dict[str, Callable[[Fraction], int]] = {
    "round_prefer_floor": lambda place: math.ceil(place - HALF),
    "round_prefer_ceil": lambda place: math.floor(place + HALF),
    "floor": math.floor, "ceil": math.ceil}


def Resize(net: Importer, x: Value, roi: Value | None = None, scales: Value | None = None,
           sizes: Value | None = None, *, mode: str = "nearest",
           coordinate_transformation_mode: str = "half_pixel",
           nearest_mode: str = "round_prefer_floor", axes: Ints | None = None, antialias: int = 0,
           keep_aspect_ratio_policy: str = "stretch", cubic_coeff_a: float = -0.75,
           exclude_outside: int = 0, extrapolation_value: float = 0.0) -> Value:
    """Of an image, height and width one after the other."""
    shape, how = net.shape(x), (coordinate_transformation_mode, nearest_mode)
    if (mode not in ("nearest", *MIXED) or how[0] not in PLACE or how[1] not in NEAREST
            or len(shape) != 4 or antialias or exclude_outside
            or keep_aspect_ratio_policy != "stretch"):
        raise net.error(f"Resize of shape {shape} with mode {mode!r}, {', '.join(how)}"
                        f"{', antialias' * antialias} is not supported, only 'nearest', "
                        f"'linear' and 'cubic' of images, with {', '.join(PLACE)}")
    net.image(x)        # or it has no known size
    place, nearest = PLACE[how[0]], NEAREST[how[1]]
    for axis, change in _changes(net, x, scales, sizes, axes).items():
        places = [place(i, change) for i in range(change.new)]
        if mode in MIXED:
            if how[0] == "align_corners" and change.old * change.scale != change.new:
                raise net.error(f"Resize of {change.old} pixels to {change.new} with mode {mode!r} "
                                f"and align_corners is not supported: ONNX and its users disagree "
                                f"where a scale, here {float(change.scale)}, gives no whole number")
            shares = partial(MIXED[mode], coefficient=cubic_coeff_a)
            x = _mixed(net, x, axis, _weights(change, places, shares))
        else:       # repeated, or put together from slices
            x = take(net, x, axis, [min(max(nearest(at), 0), change.old - 1) for at in places])
    return x


def linear(part: float, coefficient: float) -> dict[int, float]:
    """Shares of the pixels around a place that is `part` beyond pixel 0."""
    return {0: 1 - part, 1: part}


def cubic(part: float, coefficient: float) -> dict[int, float]:
    """By the convolution of Keys, "Cubic Convolution Interpolation for Digital Image Processing",
    1981."""
    def share(x: float) -> float:
        a, x = coefficient, abs(x)
        if x <= 1:
            return ((a + 2) * x - (a + 3)) * x * x + 1
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return {pixel: share(part - pixel) for pixel in (-1, 0, 1, 2)}


MIXED: dict[str, Callable[..., dict[int, float]]] = {"linear": linear, "cubic": cubic}


def _weights(change: Change, places: list[Fraction], shares: Callable[[float], dict[int, float]]
             ) -> np.ndarray:
    """[new, old]: the shares of the pixels around each place, of those beyond the edge the last
    one's."""
    check_size((change.new, change.old))
    weights = np.zeros((change.new, change.old))
    for i, at in enumerate(places):
        first = math.floor(at)
        for pixel, share in shares(float(at - first)).items():
            weights[i, min(max(first + pixel, 0), change.old - 1)] += share
    return weights.astype(np.float32)


def _mixed(net: Importer, x: Value, axis: int, weights: np.ndarray) -> Value:
    """Height (axis 2) or width (axis 3) multiplied by a constant matrix, on NHWC."""
    channels, height, width = net.image(x)
    image = net.emit(ops.Transpose(TO_NHWC), x, suffix=f":{axis}:nhwc")
    if axis == 2:       # a row of the image is one row of a matrix
        rows = net.emit(ops.Reshape((0, height, -1)), image, suffix=f":{axis}:rows")
        matrix = net.add_constant(f"{net.name}:{axis}", weights[None])
        mixed = net.emit(ops.MatMul(), matrix, rows, suffix=f":{axis}:mixed")
        y = net.emit(ops.Reshape((0, 0, width, channels)), mixed, suffix=f":{axis}:image")
    else:
        matrix = net.add_constant(f"{net.name}:{axis}", weights[None, None])
        y = net.emit(ops.MatMul(), matrix, image, suffix=f":{axis}:mixed")
    return net.emit(ops.Transpose(TO_NCHW), y, suffix=f":{axis}")


def _changes(net: Importer, x: Value, scales: Value | None, sizes: Value | None, axes: Ints | None
             ) -> dict[int, Change]:
    """Of each axis that is to change, which must be height or width."""
    shape, changes = net.shape(x), dict[int, Change]()
    named = [ops.normal_axis(axis, 4) for axis in axes or range(4)]
    given = (net.array(scales, "scales") if scales is not None else
             net.beside_batch(sizes, tuple(shape[axis] for axis in named), "sizes"))
    for axis, number in zip(named, given.tolist(), strict=True):
        size = shape[axis]
        same = size is None if scales is None else number == 1
        if same or (scales is None and number == size):
            continue
        if axis < 2 or size is None:
            raise net.error(f"Resize of axis {axis} of shape {shape} is not supported, only of an "
                            f"image's height and width")
        new = number if scales is None else size * number
        if not 1 <= new <= MOST_PIXELS:
            raise net.error(f"Resize of {size} pixels to {new} is not supported, only to 1 to "
                            f"{MOST_PIXELS}")
        scale = Fraction(number, size) if scales is None else Fraction(number)
        changes[axis] = Change(size, math.floor(size * scale), scale)
    return changes
