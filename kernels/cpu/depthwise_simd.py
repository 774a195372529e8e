"""The micro-kernels of depthwise convolution, as LLVM IR; see microkernels.py.

    depthwise_tile  neighbouring pixels x any channels
    depthwise_any   the same for any window, more slowly
"""
from __future__ import annotations

from functools import partial
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .convert import load_wide, store_narrow
from .simd import (
    VECTOR,
    Builder,
    Value,
    advance,
    broadcast,
    choose,
    clip,
    counted_loop,
    each_vector,
    fma,
    i64,
    literal_ints,
    load,
)
from .sizes import DEPTHWISE_PIXELS, WINDOWS, Window
from .traced import activate, function_of


@intrinsic(prefer_literal=True)
def depthwise_tile(typingctx, family, number, activation, arguments):
    """arguments: (x, channels, lines, x_line, w, w_tap, bias, y, count, low, high, a, b, zero)

    y[r, c] = clip(f(sum over l, t of (x[l, r*stride + t - left, c] - zero) * w[l, t, c] + bias[c],
                     a, b), low, high)

    for r < DEPTHWISE_PIXELS, c < count, l < lines, t < taps, of WINDOWS[family][number]; columns
    outside are left out. `x` points to the first column inside. Lines are x_line floats apart,
    columns `channels`, weights of a tap w_tap. w and bias are padded to whole vectors; of x and y
    nothing beyond `count` channels is touched. f is the activation, a function of scalar.py, or
    none, for a number; x and y each point to float32, bfloat16 or codes of 8 bits. zero is a
    float32; a whole number says that there is none.
    """
    sizes = literal_ints(family)
    if sizes is None:
        return None

    def codegen(context, b, sig, args):
        choose(b, args[1], cgutils.unpack_tuple(b, args[3]), "depthwise_tile", WINDOWS[sizes[0]],
               partial(_depthwise_window, function_of(activation)))
        return context.get_dummy_value()

    return types.void(family, types.int64, activation, arguments), codegen


def _depthwise_window(function: Any, b: Builder, window: Window, x: Value, channels: Value,
                      lines: Value, x_line: Value, w: Value, w_tap: Value, bias: Value, y: Value,
                      count: Value, *bounds: Value) -> None:
    taps, stride, left, right = window
    columns = range(left, (DEPTHWISE_PIXELS - 1) * stride + taps - right)
    low, high, *numbers, zero = (broadcast(b, number) for number in bounds)

    def tile(c, mask):
        def kernel_line(_, carried):
            pixel, weights, *acc = carried
            following = b.gep(pixel, [x_line])
            pixels = {}
            for column in columns:          # neighbours share their loads
                pixels[column] = _above(b, load_wide(b, pixel, mask), zero)
                pixel = b.gep(pixel, [channels])
            for t in range(taps):
                weight = load(b, advance(b, weights, w_tap, t))
                for r in range(DEPTHWISE_PIXELS):
                    if r * stride + t in columns:
                        acc[r] = fma(b, pixels[r * stride + t], weight, acc[r])
            return [following, advance(b, weights, w_tap, taps), *acc]

        start = [load(b, b.gep(bias, [c]))] * DEPTHWISE_PIXELS
        _, _, *acc = counted_loop(b, "kernel_line", lines,
                                  [b.gep(x, [c]), b.gep(w, [c]), *start], kernel_line)
        target = b.gep(y, [c])
        for value in acc:
            value = activate(b, function, value, *numbers)
            store_narrow(b, clip(b, value, low, high), target, mask)
            target = b.gep(target, [channels])

    each_vector(b, count, tile)


def _above(b: Builder, value: Value, zero: Value) -> Value:
    """value - zero, if there is one."""
    return b.fsub(value, zero) if zero.type == VECTOR else value


@intrinsic(prefer_literal=True)
def depthwise_any(typingctx, tile_rows, activation, arguments):
    """arguments: (x, column, width, channels, lines, x_line, zeros, w, w_tap, taps, dilation,
    stride, bias, y, count, low, high, a, b, zero)

    As depthwise_tile, for any window: `x` points to column 0 of the first line, and a column
    outside 0 .. width, of column + r*stride + t*dilation, is read from `zeros`, a vector of what
    stands for 0.
    """
    sizes = literal_ints(tile_rows)
    if sizes is None:
        return None

    def codegen(context, b, sig, args):
        (x, column, width, channels, lines, x_line, zeros, w, w_tap, taps, dilation,
         stride, bias, y, count, *bounds) = cgutils.unpack_tuple(b, args[2])
        low, high, *numbers, zero = (broadcast(b, number) for number in bounds)

        def tile(c, mask):
            def kernel_line(line, acc):
                first = b.gep(advance(b, x, line, x_line), [c])
                weights = b.gep(advance(b, w, line, taps, w_tap), [c])

                def pixel(index):
                    inside = b.icmp_unsigned("<", index, width)
                    there = advance(b, first, index, channels)
                    return _above(b, load_wide(b, b.select(inside, there, zeros), mask), zero)

                def tap(t, acc):
                    weight = load(b, advance(b, weights, w_tap, t))
                    start = b.add(column, b.mul(t, dilation))
                    return [fma(b, pixel(b.add(start, b.mul(stride, i64(r)))), weight, acc[r])
                            for r in range(len(acc))]
                return counted_loop(b, "tap", taps, acc, tap)

            start = load(b, b.gep(bias, [c]))
            acc = counted_loop(b, "kernel_line", lines, [start] * sizes[0], kernel_line)
            for r, value in enumerate(acc):
                value = activate(b, function_of(activation), value, *numbers)
                target = b.gep(advance(b, y, channels, r), [c])
                store_narrow(b, clip(b, value, low, high), target, mask)

        each_vector(b, count, tile)
        return context.get_dummy_value()

    return types.void(tile_rows, activation, arguments), codegen
