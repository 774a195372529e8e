"""Vector micro-kernels as LLVM IR: the only file that emits LLVM for the CPU.

Numba's own loops do not keep a block of accumulators in registers, so the few innermost loops
that decide the speed are written here as intrinsics on raw float pointers. Each takes its tile
size as literal ints: the intrinsic itself stays a module-level global, which numba's disk cache
needs, and every size compiles to code of its own. The other arguments come as one tuple.

    conv_tile       tile_rows pixels x (vectors * LANES) channels of a convolution or GEMM
    depthwise_tile  tile_rows pixels x any channels of a depthwise convolution
    winograd_*      the transforms of Winograd convolution along one axis
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from . import winograd_matrices
from .jit import LANES
from .winograd_matrices import Matrix

F32, I1, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(32), ir.IntType(64)
VECTOR, INT_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
MASK = ir.VectorType(I1, LANES)
FLOATS = types.CPointer(types.float32)
Builder: TypeAlias = ir.IRBuilder
Value: TypeAlias = ir.Value


# ---- building blocks --------------------------------------------------------------------------

def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [float(value)] * LANES)


def broadcast(b: Builder, scalar: Value) -> Value:
    vector = ir.VectorType(scalar.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(INT_VECTOR, [0] * LANES))


def advance(b: Builder, pointer: Value, *factors: Value | int) -> Value:
    """pointer + product of the factors, in floats."""
    offset = i64(1)
    for factor in factors:
        offset = b.mul(offset, i64(factor) if isinstance(factor, int) else factor)
    return b.gep(pointer, [offset])


def load(b: Builder, pointer: Value, mask: Value | None = None) -> Value:
    """LANES floats, unaligned; lanes that the mask leaves out are 0 and are not touched."""
    address = b.bitcast(pointer, VECTOR.as_pointer())
    if mask is not None:
        function = ir.FunctionType(VECTOR, [VECTOR.as_pointer(), I32, MASK, VECTOR])
        name = f"llvm.masked.load.v{LANES}f32.p0"
        masked = cgutils.get_or_insert_function(b.module, function, name)
        return b.call(masked, [address, ir.Constant(I32, 4), mask, splat(0)])
    value = b.load(address)
    value.align = 4
    return value


def store(b: Builder, value: Value, pointer: Value, mask: Value | None = None) -> None:
    address = b.bitcast(pointer, VECTOR.as_pointer())
    if mask is not None:
        function = ir.FunctionType(ir.VoidType(), [VECTOR, VECTOR.as_pointer(), I32, MASK])
        name = f"llvm.masked.store.v{LANES}f32.p0"
        masked = cgutils.get_or_insert_function(b.module, function, name)
        b.call(masked, [value, address, ir.Constant(I32, 4), mask])
        return
    b.store(value, address).align = 4


def first_lanes(b: Builder, lanes: Value) -> Value:
    """Mask of the first `lanes` (an I64) lanes."""
    wanted = broadcast(b, b.trunc(lanes, I32))
    return b.icmp_signed("<", ir.Constant(INT_VECTOR, list(range(LANES))), wanted)


def prefetch(b: Builder, pointer: Value) -> None:
    """Fetch the cache line of a pointer into the L2 cache; harmless for any address."""
    byte = ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    callee = cgutils.get_or_insert_function(b.module, function, "llvm.prefetch.p0")
    read, into_l2, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    b.call(callee, [b.bitcast(pointer, byte), read, into_l2, data])


def vector_call(b: Builder, name: str, *args: Value) -> Value:
    """llvm.<name> on float vectors."""
    function = ir.FunctionType(VECTOR, [VECTOR] * len(args))
    callee = cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.v{LANES}f32")
    return b.call(callee, args)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, fused where the CPU can; plain multiply and add elsewhere."""
    return vector_call(b, "fmuladd", x, y, z)


def clip(b: Builder, value: Value, low: Value, high: Value) -> Value:
    """min(max(value, low), high); NaN stays NaN, because each comparison with it is false."""
    value = b.select(b.fcmp_ordered("<", value, low), low, value)
    return b.select(b.fcmp_ordered(">", value, high), high, value)


def counted_loop(b: Builder, name: str, trips: Value, carried: list[Value],
                 body: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
    """`for i in range(trips): carried = body(i, carried)`. Returns the last values."""
    entry = b.block
    loop, done = b.append_basic_block(name), b.append_basic_block(f"{name}.done")
    b.cbranch(b.icmp_signed(">", trips, i64(0)), loop, done)
    b.position_at_end(loop)
    index = b.phi(I64)
    index.add_incoming(i64(0), entry)
    phis = [b.phi(value.type) for value in carried]
    results = body(index, phis)
    following, end = b.add(index, i64(1)), b.block
    index.add_incoming(following, end)
    b.cbranch(b.icmp_signed("<", following, trips), loop, done)
    b.position_at_end(done)
    last = [b.phi(value.type) for value in carried]
    for before, phi, result, after in zip(carried, phis, results, last, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(result, end)
        after.add_incoming(before, entry)
        after.add_incoming(result, end)
    return last


def literal_ints(*arguments: Any) -> list[int] | None:
    """The values of literal arguments, or None while numba tries the call without literals."""
    if all(isinstance(argument, types.IntegerLiteral) for argument in arguments):
        return [argument.literal_value for argument in arguments]
    return None


@intrinsic
def at(typingctx, array, offset):
    """(float32 array, element offset) -> pointer, without bounds or wrap-around code."""
    def codegen(context, b, sig, args):
        return b.gep(make_array(sig.args[0])(context, b, args[0]).data, [args[1]])
    return FLOATS(array, types.intp), codegen


@intrinsic
def copy_floats(typingctx, target, source, count):
    """Copy `count` floats from one pointer to another; the ranges must not overlap."""
    def codegen(context, b, sig, args):
        cgutils.raw_memcpy(b, *args, itemsize=4)
        return context.get_dummy_value()
    return types.void(FLOATS, FLOATS, types.intp), codegen


@intrinsic
def zero_floats(typingctx, target, count):
    """Write `count` zeros."""
    def codegen(context, b, sig, args):
        cgutils.memset(b, args[0], b.mul(args[1], i64(4)), 0)
        return context.get_dummy_value()
    return types.void(FLOATS, types.intp), codegen


@intrinsic
def power_of_two(typingctx, exponent):
    """2.0 ** exponent as float32 for an int32 from -127 (gives 0) to 128 (gives infinity)."""
    def codegen(context, b, sig, args):
        biased = b.add(args[0], ir.Constant(I32, 127))
        return b.bitcast(b.shl(biased, ir.Constant(I32, 23)), F32)
    return types.float32(types.int32), codegen


# ---- convolution and matrix product -----------------------------------------------------------

@intrinsic(prefer_literal=True)
def conv_tile(typingctx, tile_rows, vectors, arguments):
    """arguments: (x, x_step, lines, x_line, length, w, ahead, ahead_step, bias, residual,
    has_residual, y, y_step, valid, low, high)

    y[r, c] = clip(sum over l, k of x[r*x_step + l*x_line + k] * w[l*length + k, c]
                      + bias[c] + residual[r*y_step + c], low, high)

    for r < tile_rows, c < vectors * LANES, l < lines, k < length. All accumulators stay in
    registers through both loops. Of the last vector only the first `valid` channels are read
    from `residual` and written. Pointers are to float32; steps count floats. Each tap also asks for
    ahead[(l*length + k)*ahead_step] to be fetched into the L2 cache: weights that come next.
    """
    sizes = literal_ints(tile_rows, vectors)
    if sizes is None:
        return None
    mr, nv = sizes

    def codegen(context, b, sig, args):
        (x, x_step, lines, x_line, length, w, ahead, ahead_step, bias, residual, has_residual,
         y, y_step, valid, low, high) = cgutils.unpack_tuple(b, args[2])
        start = [load(b, advance(b, bias, j * LANES)) for _ in range(mr) for j in range(nv)]

        def kernel_line(line, carried):
            weights, *acc = carried
            first = advance(b, x, line, x_line)
            pixels = [advance(b, first, x_step, r) for r in range(mr)]
            wanted = advance(b, ahead, b.mul(line, length), ahead_step)

            def tap(k, acc):
                prefetch(b, advance(b, wanted, k, ahead_step))
                w_line = advance(b, weights, k, nv * LANES)
                w_vectors = [load(b, advance(b, w_line, j * LANES)) for j in range(nv)]
                total = []
                for r in range(mr):
                    pixel = broadcast(b, b.load(b.gep(pixels[r], [k])))
                    total += [fma(b, pixel, w_vectors[j], acc[r * nv + j]) for j in range(nv)]
                return total

            acc = counted_loop(b, "tap", length, acc, tap)
            return [advance(b, weights, length, nv * LANES), *acc]

        _, *acc = counted_loop(b, "kernel_line", lines, [w, *start], kernel_line)
        low, high = broadcast(b, low), broadcast(b, high)

        def write(mask, add_residual):
            for r in range(mr):
                for j in range(nv):
                    last = mask if j == nv - 1 else None
                    value = acc[r * nv + j]
                    if add_residual:
                        other = advance(b, advance(b, residual, y_step, r), j * LANES)
                        value = b.fadd(value, load(b, other, last))
                    target = advance(b, advance(b, y, y_step, r), j * LANES)
                    store(b, clip(b, value, low, high), target, last)

        with b.if_else(b.icmp_signed("!=", has_residual, i64(0))) as (then, otherwise):
            with then:
                _full_or_masked(b, valid, lambda mask: write(mask, True))
            with otherwise:
                _full_or_masked(b, valid, lambda mask: write(mask, False))
        return context.get_dummy_value()

    return types.void(tile_rows, vectors, arguments), codegen


def _full_or_masked(b: Builder, valid: Value, emit: Callable[[Value | None], None]) -> None:
    """emit(None) where all lanes are valid: plain stores are faster than masked ones."""
    with b.if_else(b.icmp_signed("==", valid, i64(LANES))) as (full, partial):
        with full:
            emit(None)
        with partial:
            emit(first_lanes(b, valid))


# ---- depthwise convolution --------------------------------------------------------------------

@intrinsic(prefer_literal=True)
def depthwise_tile(typingctx, tile_rows, fixed_taps, fixed_stride, inside, arguments):
    """arguments: (x, column, width, channels, lines, x_line, zeros, w, w_tap, taps, dilation,
    stride, bias, y, count, low, high)

    y[r, c] = clip(sum over l, t of x[l, column + r*stride + t*dilation, c] * w[l, t, c]
                      + bias[c], low, high)

    for r < tile_rows, c < count, l < lines, t < taps. `x` points to column 0 of the first line;
    lines are x_line floats apart, columns `channels`, weights of a tap w_tap; a column outside
    0 .. width is read from `zeros`, a vector of them, and with `inside` there is none. w and
    bias are padded to whole vectors; of x and y nothing beyond `count` channels is touched. With
    fixed_taps > 0 taps and stride are compile-time constants (and dilation is 1), so that
    neighbouring pixels share their loads.
    """
    sizes = literal_ints(tile_rows, fixed_taps, fixed_stride, inside)
    if sizes is None:
        return None
    mr, kw, step, is_inside = sizes

    def codegen(context, b, sig, args):
        (x, column, width, channels, lines, x_line, zeros, w, w_tap, taps, dilation,
         stride, bias, y, count, low, high) = cgutils.unpack_tuple(b, args[4])
        low, high = broadcast(b, low), broadcast(b, high)

        def tile(c, mask):
            def pixel(first, offset):
                index = b.add(column, offset)
                if is_inside:
                    return load(b, advance(b, first, index, channels), mask)
                inside = b.icmp_unsigned("<", index, width)
                return load(b, b.select(inside, advance(b, first, index, channels), zeros), mask)

            def fixed(first, weights, acc):
                acc, loaded = list(acc), {}
                for t in range(kw):
                    weight = load(b, advance(b, weights, w_tap, t))
                    for r in range(mr):
                        offset = r * step + t
                        if offset not in loaded:
                            loaded[offset] = pixel(first, i64(offset))
                        acc[r] = fma(b, loaded[offset], weight, acc[r])
                return acc

            def general(first, weights, acc):
                def tap(t, acc):
                    weight = load(b, advance(b, weights, w_tap, t))
                    start = b.mul(t, dilation)
                    return [fma(b, pixel(first, b.add(start, b.mul(stride, i64(r)))), weight,
                                acc[r]) for r in range(mr)]
                return counted_loop(b, "tap", taps, acc, tap)

            def kernel_line(line, acc):
                first = b.gep(advance(b, x, line, x_line), [c])
                weights = b.gep(advance(b, w, line, taps, w_tap), [c])
                return (fixed if kw else general)(first, weights, acc)

            start = load(b, b.gep(bias, [c]))
            acc = counted_loop(b, "kernel_line", lines, [start] * mr, kernel_line)
            for r in range(mr):
                target = b.gep(advance(b, y, channels, r), [c])
                store(b, clip(b, acc[r], low, high), target, mask)

        def vector(index, _):
            tile(b.mul(index, i64(LANES)), None)
            return []

        whole = b.sdiv(count, i64(LANES))
        counted_loop(b, "vector", whole, [], vector)
        done = b.mul(whole, i64(LANES))
        with b.if_then(b.icmp_signed("<", done, count)):
            tile(done, first_lanes(b, b.sub(count, done)))
        return context.get_dummy_value()

    return types.void(tile_rows, fixed_taps, fixed_stride, inside, arguments), codegen


# ---- Winograd transforms ----------------------------------------------------------------------

def combine(b: Builder, matrix: Matrix, vectors: list[Value]) -> list[Value]:
    """matrix @ vectors. Each row of these matrices has a 1, at which its sum starts."""
    totals = []
    for row in matrix:
        start = row.index(1)
        total = vectors[start]
        for k, factor in enumerate(row):
            if factor and k != start:
                total = fma(b, splat(factor), vectors[k], total)
        totals.append(total)
    return totals


def _transform(matrices: dict[int, Matrix], tile: Any, arguments: Any):
    """The intrinsic's body for both directions; see winograd_input."""
    sizes = literal_ints(tile)
    if sizes is None:
        return None
    matrix = matrices[sizes[0]]

    def codegen(context, b, sig, args):
        x, x_step, y, y_step, length = cgutils.unpack_tuple(b, args[1])

        def vector(index, _):
            first, target = advance(b, x, index, LANES), advance(b, y, index, LANES)
            vectors = [load(b, advance(b, first, x_step, k)) for k in range(len(matrix[0]))]
            for i, total in enumerate(combine(b, matrix, vectors)):
                store(b, total, advance(b, target, y_step, i))
            return []

        counted_loop(b, "vector", b.sdiv(length, i64(LANES)), [], vector)
        return context.get_dummy_value()

    return types.void(tile, arguments), codegen


@intrinsic(prefer_literal=True)
def winograd_input(typingctx, tile, arguments):
    """arguments: (x, x_step, y, y_step, length)

    y[i*y_step + c] = sum over k of B^T[i, k] * x[k*x_step + c]

    for c < length, a multiple of LANES; B^T is that of F(tile, 3).
    """
    return _transform(winograd_matrices.INPUT, tile, arguments)


@intrinsic(prefer_literal=True)
def winograd_output(typingctx, tile, arguments):
    """As winograd_input, with A^T in place of B^T."""
    return _transform(winograd_matrices.OUTPUT, tile, arguments)


@intrinsic(prefer_literal=True)
def winograd_pixels(typingctx, tile, arguments):
    """arguments: (x, x_step, bias, residual, residual_step, y, y_step, pixels, channels, low,
    high)

    y[j*y_step + c] = clip(sum over k of A^T[j, k] * x[k*x_step + c]
                               + bias[c] + residual[j*residual_step + c], low, high)

    for j < pixels <= tile, c < channels. x and bias are padded to whole vectors; of residual and
    y nothing beyond `channels` is touched.
    """
    sizes = literal_ints(tile)
    if sizes is None:
        return None
    matrix = winograd_matrices.OUTPUT[sizes[0]]

    def codegen(context, b, sig, args):
        (x, x_step, bias, residual, residual_step, y, y_step, pixels, channels, low,
         high) = cgutils.unpack_tuple(b, args[1])
        low, high = broadcast(b, low), broadcast(b, high)

        def vector(index, _):
            c = b.mul(index, i64(LANES))
            first = b.gep(x, [c])
            totals = combine(b, matrix, [load(b, advance(b, first, x_step, k))
                                         for k in range(len(matrix[0]))])
            start, left = load(b, b.gep(bias, [c])), b.sub(channels, c)

            def write(mask):
                for j, total in enumerate(totals):
                    with b.if_then(b.icmp_signed("<", i64(j), pixels)):
                        other = b.gep(advance(b, residual, residual_step, j), [c])
                        value = b.fadd(b.fadd(total, start), load(b, other, mask))
                        store(b, clip(b, value, low, high),
                              b.gep(advance(b, y, y_step, j), [c]), mask)

            full = b.icmp_signed(">", left, i64(LANES))
            _full_or_masked(b, b.select(full, i64(LANES), left), write)
            return []

        vectors = b.sdiv(b.add(channels, i64(LANES - 1)), i64(LANES))
        counted_loop(b, "vector", vectors, [], vector)
        return context.get_dummy_value()

    return types.void(tile, arguments), codegen
