"""Elementwise ops: one expression each, swept over flat arrays by all threads."""
from __future__ import annotations

from . import scalar
from .jit import kernel, njit
from .parallel import parallel_for
from .simd import at, copy_numbers, widest_vectors

SWEEP = 512         # elements, 2 KB: a part that stays in L1, and a size that memcpy is fast for


# ---- one input --------------------------------------------------------------------------------

def unary(function):
    """The kernel of y = function(x, a, b), where a and b are the two numbers of the function. One
    each, so that a network compiles those that it has."""
    @njit(keep=False, fastmath={"contract"})    # products fused with sums where the CPU can
    def sweep(thread, first, end, a, b, x, y, in_place):
        """Copy and work on the copy in L1: of two arrays that may be one, LLVM makes scalar
        code."""
        widest_vectors()
        for start in range(first * SWEEP, end * SWEEP, SWEEP):
            part = y[start:start + SWEEP]
            if not in_place:
                copy_numbers(at(y, start), at(x, start), len(part))
            for i in range(len(part)):
                part[i] = function(part[i], a, b)

    @kernel
    def sweeps(a, b, x, y, in_place, threads):
        """in_place: x is y."""
        parallel_for(sweep, -(-len(y) // SWEEP), threads, (a, b, x, y, in_place))

    return sweeps


clip, sigmoid, tanh, silu = map(unary, (scalar.clip, scalar.sigmoid, scalar.tanh, scalar.silu))
hard_swish, hard_sigmoid = unary(scalar.hard_swish), unary(scalar.hard_sigmoid)
leaky_relu, elu, erf = unary(scalar.leaky_relu), unary(scalar.elu), unary(scalar.erf)
gelu, gelu_tanh = unary(scalar.gelu), unary(scalar.gelu_tanh)
sqrt, star_relu = unary(scalar.sqrt), unary(scalar.star_relu)
fake_quantize = unary(scalar.fake_quantize)
relu_fake_quantize = unary(scalar.relu_fake_quantize)
gelu_fake_quantize = unary(scalar.gelu_fake_quantize)
gelu_tanh_fake_quantize = unary(scalar.gelu_tanh_fake_quantize)
silu_fake_quantize = unary(scalar.silu_fake_quantize)
hard_swish_fake_quantize = unary(scalar.hard_swish_fake_quantize)


# ---- two inputs -------------------------------------------------------------------------------

def binary(function):
    """The kernel of y = function(a, b) over the collapsed axes `sizes`; steps count elements, 0
    along a broadcast. The last axis is the inner loop; there a steps by 1 and b by 1 or 0."""
    @njit(keep=False)
    def sweep(thread, i, end, a, b, y, sizes, a_steps, b_steps):
        inner, last = sizes[-1], len(sizes) - 1
        while i < end:
            row, column = i // inner, i % inner
            run = min(inner - column, end - i)
            a_first, b_first = column * a_steps[last], column * b_steps[last]
            for axis in range(last - 1, -1, -1):
                a_first += row % sizes[axis] * a_steps[axis]
                b_first += row % sizes[axis] * b_steps[axis]
                row //= sizes[axis]
            # Of slices, unlike sums of indices, LLVM sees that nothing wraps: it makes vector code.
            out, left, right = y[i:i + run], a[a_first:a_first + run], b[b_first:b_first + run]
            if b_steps[last] == 0:
                for k in range(run):
                    out[k] = function(left[k], right[0])
            else:
                for k in range(run):
                    out[k] = function(left[k], right[k])
            i += run

    @kernel
    def sweeps(a, b, y, sizes, a_steps, b_steps, threads):
        parallel_for(sweep, len(y), threads, (a, b, y, sizes, a_steps, b_steps))

    return sweeps


add, mul, div, divide = map(binary, (scalar.add, scalar.mul, scalar.div, scalar.divide))
