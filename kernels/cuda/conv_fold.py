"""Makes an image's pixels whole 16-byte chunks, which conv_mma.py copies.

`fold` neighbouring columns become the channels of one, zeros fill up the last chunk:

    y[n, h, w, j * C + c] = x[n, h, w * fold + j - left, c]

With fold = stride, the convolution over y moves by whole columns and its kernel is `fold` times
narrower. For the first layer of a network, 3 channels and stride 2, 8 channels are used 6 times
out of 8: less than half the products of padding 3 channels to 8. The copy moves the smallest
image once; reading it element by element inside the convolution would cost 8 times the load
instructions of a chunk in each of its kernel's taps.

Where `fold` does not divide the kernel's width, its last column has weights of zero for a real
pixel: an infinite pixel there makes a NaN of one output more than IEEE arithmetic would.

With groups (fold is 1 then) each group's channels are filled up on their own.
"""
from __future__ import annotations

from collections.abc import Callable

from . import vector
from .index import DIVISOR, split, thread_index
from .ptx import cuda, uint32, uint64

THREADS = 128

# x, y, count of threads, elements of a row of x, channels, those of a group, real channels of a
# group in y, left, fold, then divisors: chunks of a pixel of y, its width, channels of its groups
SIGNATURE = ("pointer", "pointer") + ("uint32",) * 7 + DIVISOR * 3


def make(bits: str) -> Callable:
    """bits: "bits16" or "bits32", the elements' storage."""
    size = vector.STORAGE[bits].bytes
    lanes = 16 // size
    load, store = vector.load(bits, 1, fill=0.0), vector.store(bits, lanes)

    def fold_columns(x, y, count, line, channels, group, used, left, fold, chunks, chunks_m,
                     chunks_s, out_width, out_width_m, out_width_s, padded, padded_m, padded_s):
        i = thread_index(THREADS)
        if i >= count:
            return
        pixel, chunk = split(i, chunks, chunks_m, chunks_s)
        row, column = split(pixel, out_width, out_width_m, out_width_s)
        which, e = split(uint32(chunk * uint32(lanes)), padded, padded_m, padded_s)
        # What becomes one pixel's channels of a group lies side by side in a row of x; to the left
        # of the row `at` wraps around.
        at = uint32((column * fold - left) * channels + which * group + e)
        value = cuda.local.array(lanes, uint32)
        for k in range(lanes):
            inside = uint32(e + uint32(k)) < used and uint32(at + uint32(k)) < line
            load(value, k, x + uint64(uint32(row * line + at + uint32(k))) * uint64(size), inside)
        store(y + uint64(i) * uint64(16), value, 0)

    return fold_columns
