"""A batch norm, and its ReLU, of what a 1x1 convolution reads, between shared memory and products.

Where a batch norm comes first, as in DenseNet, what it gives is read once. Stored, that would be as
many bytes written and read again as x has. Here each lane normalises the elements of x that it is
about to multiply, in float32, and rounds them as they would be stored: the same bits.

Beyond the last channel scale and shift are zero, and so is what comes of them; beyond the last
pixel nothing is stored.
"""
from __future__ import annotations

from collections.abc import Callable

from .ptx import Regs, asm_op, cuda, float32, uint32, uint64
from .vector import STORAGE, load

BEFORE = "", "norm", "norm_relu"    # what happens to x: nothing, a batch norm, one with ReLU
DTYPES = ("float16", "bfloat16")
PAIR_BYTES = 16             # fp32 scale, scale, shift and shift of two neighbouring channels


def normaliser(dtype: str, rows: int, before: str) -> Callable:
    """Device function (a_frag, step, norm): normalises fragments of 16 columns of `rows` times 16
    rows, columns 16 * step and on of the slice whose numbers are at `norm`."""
    if not before:
        @cuda.jit(device=True, inline="always")
        def leave(a_frag, step, norm):
            """x is multiplied as it is."""
        return leave

    widen, narrow, load_pair = unpack(dtype), pack(dtype, before == "norm_relu"), load("float32", 4)

    @cuda.jit(device=True, inline="always")
    def normalise(a_frag, step, norm):
        lane = uint32(cuda.threadIdx.x) & uint32(3)     # its columns: 2 * lane and + 1, and 8 on
        numbers = cuda.local.array(8, float32)
        at = norm + uint64(lane * uint32(PAIR_BYTES)) + uint64(step * 8 * PAIR_BYTES)
        load_pair(numbers, 0, at)
        load_pair(numbers, 4, at + uint64(4 * PAIR_BYTES))
        for i in range(4 * rows):
            first = i % 4 // 2 * 4
            v = widen(a_frag[i])
            a_frag[i] = narrow(v[0] * numbers[first] + numbers[first + 2],
                               v[1] * numbers[first + 1] + numbers[first + 3])

    return normalise


def unpack(dtype: str) -> Callable:
    """Device function: a word of two elements -> both in float32."""
    words = STORAGE[dtype].widen.format("$0", "$1", w="$2")
    return asm_op(f"unpack_{dtype}", f"{{ .reg .b32 t; .reg .b16 lo, hi; {words} }}",
                  Regs(float32, 2), [uint32], pure=True)


def pack(dtype: str, relu: bool) -> Callable:
    """Device function: two numbers -> a word of them, rounded to nearest, negative ones as 0 if
    `relu`: the instruction can do both."""
    word = STORAGE[dtype].narrow.format("$1", "$2", w="$0")
    return asm_op(f"pack_{dtype}", word.replace("cvt.rn.", "cvt.rn.relu.") if relu else word,
                  uint32, [float32, float32], pure=True)
