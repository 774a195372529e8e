"""A whole network in one call, for a batch or for each of several images."""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import kernel, njit
from .parallel import parallel_for
from .simd import I64


@kernel
def run_all(launches):
    """launches [.., 2]: of each its function and its argument, both addresses."""
    for i in range(len(launches)):
        enter(launches[i, 0], launches[i, 1])


@kernel
def run_images(launches, inside, outside, sizes, inputs, images, threads):
    """A network for one image, for each of several.

    launches [lanes, .., 2]: as of `run_all`, one lane a thread, with memory of its own; inside
    [lanes, values]: addresses there of the network's inputs, of which there are `inputs`, and
    outputs; outside [values]: of those of all images; sizes [values]: bytes of one image's.
    """
    parallel_for(some_images, images, threads, (launches, inside, outside, sizes, inputs))


@njit()
def some_images(thread, first, end, launches, inside, outside, sizes, inputs):
    for image in range(first, end):
        for value in range(inputs):
            copy_bytes(inside[thread, value], outside[value] + image * sizes[value], sizes[value])
        for i in range(launches.shape[1]):
            enter(launches[thread, i, 0], launches[thread, i, 1])
        for value in range(inputs, len(sizes)):
            copy_bytes(outside[value] + image * sizes[value], inside[thread, value], sizes[value])


@intrinsic
def enter(typingctx, function, argument):
    """Call the function of this address with one argument."""
    def codegen(context, b, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_bytes(typingctx, target, source, count):
    """Copy bytes from one address to another."""
    def codegen(context, b, sig, args):
        target, source = (b.inttoptr(arg, ir.IntType(8).as_pointer()) for arg in args[:2])
        cgutils.raw_memcpy(b, target, source, args[2], itemsize=1)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.int64), codegen
