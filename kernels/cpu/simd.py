"""Vector code as LLVM IR: what the micro-kernels of microkernels.py are built of, and a few
intrinsics on raw float pointers for kernels to use.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, SupportsFloat, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from .sizes import LANES

F32, I1, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(32), ir.IntType(64)
VECTOR, INT_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
MASK = ir.VectorType(I1, LANES)
Builder: TypeAlias = ir.IRBuilder
Value: TypeAlias = ir.Value


# ---- building blocks --------------------------------------------------------------------------

def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(value: SupportsFloat) -> ir.Constant:
    return _splat(float(value).hex())


@cache
def _splat(value: str) -> ir.Constant:
    """One constant wherever it stands, for each writes down its text: of a number as text, since 0
    and -0 are the same to a cache."""
    return ir.Constant(VECTOR, [float.fromhex(value)] * LANES)


def broadcast(b: Builder, scalar: Value, lanes: int = LANES) -> Value:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), None))


def advance(b: Builder, pointer: Value, *factors: Value | int) -> Value:
    """pointer + product of the factors, in floats."""
    offset = i64(1)
    for factor in factors:
        offset = b.mul(offset, i64(factor) if isinstance(factor, int) else factor)
    return b.gep(pointer, [offset])


def opaque(b: Builder, value: Value) -> Value:
    """The value, of which LLVM knows no longer how it was computed: it would compute others of it
    that lie at fixed distances, with an addition each."""
    same = ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", "=r,0")
    return b.call(same, [value])


def keep_order(b: Builder) -> None:
    """LLVM moves no load from after this to before it."""
    nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", side_effect=True)
    b.call(nothing, [])


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


def raise_two(b: Builder, exponent: Value) -> Value:
    """See `power_of_two`: of one number, or of each of a vector."""
    whole = I32 if exponent.type == F32 else INT_VECTOR
    biased = b.add(b.fptosi(exponent, whole), alike(whole, 127))
    return b.bitcast(b.shl(biased, alike(whole, 23)), exponent.type)


def root(b: Builder, x: Value) -> Value:
    """See `square_root`."""
    name = "llvm.sqrt.f32" if x.type == F32 else f"llvm.sqrt.v{LANES}f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type]), name),
                  [x])


def invert(b: Builder, x: Value) -> Value:
    """See `reciprocal`. Of a vector this is the CPU's estimate and a step of Newton's."""
    return b.fdiv(alike(x.type, 1.0), x, flags=("arcp", "contract", "ninf"))


def alike(kind: ir.Type, number: float) -> ir.Constant:
    """A constant of this type, in each lane if it is a vector's."""
    return ir.Constant(kind, [number] * LANES if isinstance(kind, ir.VectorType) else number)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, fused where the CPU can; plain multiply and add elsewhere."""
    return vector_call(b, "fmuladd", x, y, z)


def clip(b: Builder, value: Value, low: Value, high: Value) -> Value:
    """min(max(value, low), high); NaN stays NaN, because each comparison with it is false."""
    value = b.select(b.fcmp_ordered("<", value, low), low, value)
    return b.select(b.fcmp_ordered(">", value, high), high, value)


def least(b: Builder, x: Value, y: Value) -> Value:
    """The smaller of two integers."""
    return b.select(b.icmp_signed("<", x, y), x, y)


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


def apart(b: Builder, name: str, arguments: Sequence[Value],
          emit: Callable[..., None]) -> ir.Function:
    """emit(builder, *arguments) as a function of its own; once for a name, so that the name and the
    types of the arguments must say what it does."""
    found = b.module.globals.get(name)
    if found is not None:
        return found
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in arguments])
    function = ir.Function(b.module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    inner = ir.IRBuilder(function.append_basic_block())
    emit(inner, *function.args)
    inner.ret_void()
    return function


def choose(b: Builder, number: Value, arguments: Sequence[Value], name: str, cases: Sequence[Any],
           emit: Callable[..., None]) -> None:
    """emit(builder, case, *arguments) for cases[number].

    Each case is a function of its own: side by side in one, LLVM would keep what all of them need
    at hand, and spill.
    """
    done = b.append_basic_block("done")
    switch = b.switch(number, done)
    for i, case in enumerate(cases):
        function = apart(b, b.module.get_unique_name(f"{name}_{i}"), arguments,
                         lambda inner, *values, case=case: emit(inner, case, *values))
        block = b.append_basic_block(f"{name}_{i}")
        switch.add_case(i, block)
        with b.goto_block(block):
            b.call(function, arguments)
            b.branch(done)
    b.position_at_end(done)


def literal_ints(*arguments: Any) -> list[int] | None:
    """The values of literal arguments, or None while numba tries the call without literals."""
    if all(isinstance(argument, types.IntegerLiteral) for argument in arguments):
        return [argument.literal_value for argument in arguments]
    return None


def each_vector(b: Builder, count: Value, emit: Callable[[Value, Value | None], None]) -> None:
    """emit(first, mask) for each vector of `count` floats; the last may be a part."""
    whole = b.sdiv(count, i64(LANES))

    def vector(index, _):
        emit(b.mul(index, i64(LANES)), None)
        return []

    counted_loop(b, "vector", whole, [], vector)
    done = b.mul(whole, i64(LANES))
    with b.if_then(b.icmp_signed("<", done, count)):
        emit(done, first_lanes(b, b.sub(count, done)))


@intrinsic
def at(typingctx, array, offset):
    """(array, element offset) -> pointer, without bounds or wrap-around code."""
    def codegen(context, b, sig, args):
        return b.gep(make_array(sig.args[0])(context, b, args[0]).data, [args[1]])
    return types.CPointer(array.dtype)(array, types.intp), codegen


@intrinsic
def copy_numbers(typingctx, target, source, count):
    """Copy `count` numbers from one pointer to another of its type; the ranges must not overlap."""
    def codegen(context, b, sig, args):
        cgutils.raw_memcpy(b, *args, itemsize=target.dtype.bitwidth // 8)
        return context.get_dummy_value()
    return types.void(target, target, types.intp), codegen


@intrinsic
def transpose_tile(typingctx, x, x_step, y, y_step):
    """y[j*y_step + i] = x[i*x_step + j] for i and j below LANES, in registers: rows i and i + d
    exchange what lies at j + d of the one and at j of the other, for d = 1, 2, 4 ..."""
    def codegen(context, b, sig, args):
        x, x_step, y, y_step = args
        rows = [load(b, advance(b, x, x_step, i)) for i in range(LANES)]
        for bit in range(LANES.bit_length() - 1):
            d = 1 << bit
            low = [j if not j & d else LANES + j - d for j in range(LANES)]
            high = [j + d if not j & d else LANES + j for j in range(LANES)]
            for i in (i for i in range(LANES) if not i & d):
                pair = rows[i], rows[i + d]
                rows[i], rows[i + d] = (b.shuffle_vector(*pair, ir.Constant(INT_VECTOR, places))
                                        for places in (low, high))
        for j, row in enumerate(rows):
            store(b, row, advance(b, y, y_step, j))
        return context.get_dummy_value()
    return types.void(x, types.intp, y, types.intp), codegen


@intrinsic
def widest_vectors(typingctx):
    """Have LLVM make vectors of 512 bits of the caller's loops, where the CPU has such registers.
    By itself it takes 256, which is as good where memory decides, but not where arithmetic does."""
    def codegen(context, b, sig, args):
        set.add(b.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def clear(typingctx, target, count):
    """Write `count` zeros of what the pointer points to."""
    def codegen(context, b, sig, args):
        cgutils.memset(b, args[0], b.mul(args[1], i64(target.dtype.bitwidth // 8)), 0)
        return context.get_dummy_value()
    return types.void(target, types.intp), codegen


@intrinsic
def fill(typingctx, target, count, byte):
    """Write `count` numbers of what the pointer points to, all of whose bytes are this."""
    def codegen(context, b, sig, args):
        size = b.mul(args[1], i64(target.dtype.bitwidth // 8))
        cgutils.memset(b, args[0], size, b.trunc(args[2], ir.IntType(8)))
        return context.get_dummy_value()
    return types.void(target, types.intp, types.intp), codegen


@intrinsic
def power_of_two(typingctx, exponent):
    """2.0 ** exponent of a whole number from -127 (gives 0) to 128 (gives infinity)."""
    def codegen(context, b, sig, args):
        return raise_two(b, args[0])
    return types.float32(types.float32), codegen


@intrinsic
def split_exponent(typingctx, x):
    """(e, m) with x = m * 2.0 ** e, e an int32, and m at least sqrt(1/2) and below sqrt(2): of a
    positive, finite x from 2 ** -126 on. Of any other they are some numbers."""
    def codegen(context, b, sig, args):
        bits, places = b.bitcast(args[0], I32), ir.Constant(I32, 23)
        e = b.ashr(b.sub(bits, ir.Constant(I32, 0x3F3504F3)), places)       # sqrt(1/2)
        m = b.bitcast(b.sub(bits, b.shl(e, places)), F32)
        return context.make_tuple(b, sig.return_type, [e, m])
    return types.Tuple((types.int32, types.float32))(types.float32), codegen


@intrinsic
def square_root(typingctx, x):
    """Correctly rounded; NaN below 0. np.sqrt would call the C library."""
    def codegen(context, b, sig, args):
        return root(b, args[0])
    return types.float32(types.float32), codegen


@intrinsic
def reciprocal(typingctx, x):
    """1 / x within 2 ulp, for a finite x from 2 ** -126 on."""
    def codegen(context, b, sig, args):
        return invert(b, args[0])
    return types.float32(types.float32), codegen
