"""The instructions of bf16_units.py as LLVM IR.

An emulated instruction computes what Intel's manual says, where each multiplication with addition
is fused and rounded to nearest even in float32:

    tdpbf16ps   products at even places of the pairs are summed from 0 on, those at odd places by
                themselves, and even + odd is added to what the tile held
    vdpbf16ps   to what the vector held the product at the odd place is added, then that at the even

But the instructions take numbers below 2 ** -126 for 0, read or written, and the emulation does
not; and which of several NaNs comes out may differ.
"""
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .bf16_units import COLUMNS, TILE_ROWS
from .simd import F32, I32, I64, Builder, Value, counted_loop, i64

I8 = ir.IntType(8)
BYTES = I8.as_pointer()
SUMS, PAIRS = ir.VectorType(F32, COLUMNS), ir.VectorType(I32, COLUMNS)


# ---- tiles ------------------------------------------------------------------------------------

class Tiles:
    """The eight tile registers of a thread, as `configure` of bf16_simd.py sets them up: 16 rows of
    64 bytes each, but those of pixels and weights only hold `pairs` of inputs."""

    def __init__(self, b: Builder, pairs: Value) -> None:
        self.b, self.pairs = b, pairs

    def _call(self, name: str, *args: Value) -> None:
        function = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        callee = cgutils.get_or_insert_function(self.b.module, function, f"llvm.x86.{name}")
        self.b.call(callee, args)

    def zero(self, tile: int) -> None:
        self._call("tilezero", I8(tile))

    def load_pixels(self, tile: int, pointer: Value, step: Value) -> None:
        """Rows that are `step` bytes apart, a pixel each."""
        self._call("tileloadd64", I8(tile), self.b.bitcast(pointer, BYTES), step)

    def load_weights(self, tile: int, pointer: Value, step: Value) -> None:
        """The same, a row a pair of inputs."""
        self.load_pixels(tile, pointer, step)

    def multiply(self, sums: int, pixels: int, weights: int) -> None:
        """sums[16, 16] += pixels[16, 2 * pairs] @ weights[2 * pairs, 16]"""
        self._call("tdpbf16ps", I8(sums), I8(pixels), I8(weights))

    def store(self, tile: int, pointer: Value, step: Value) -> None:
        self._call("tilestored64", I8(tile), self.b.bitcast(pointer, BYTES), step)


class EmulatedTiles:
    """The same registers in the stack's memory."""

    def __init__(self, b: Builder, pairs: Value) -> None:
        self.b, self.pairs = b, pairs
        self.tiles = [cgutils.alloca_once(b, PAIRS, TILE_ROWS) for _ in range(8)]

    def _row(self, tile: int, row: Value) -> Value:
        return self.b.gep(self.tiles[tile], [row])

    def zero(self, tile: int) -> None:
        def row(r, _):
            self.b.store(ir.Constant(PAIRS, None), self._row(tile, r))
            return []
        counted_loop(self.b, "row", i64(TILE_ROWS), [], row)

    def load_pixels(self, tile: int, pointer: Value, step: Value) -> None:
        def row(r, _):
            pairs = load_some_pairs(self.b, self._memory(pointer, step, r), self.pairs)
            self.b.store(pairs, self._row(tile, r))
            return []
        counted_loop(self.b, "row", i64(TILE_ROWS), [], row)

    def load_weights(self, tile: int, pointer: Value, step: Value) -> None:
        def row(r, _):
            self.b.store(load_pairs(self.b, self._memory(pointer, step, r)), self._row(tile, r))
            return []
        counted_loop(self.b, "row", self.pairs, [], row)

    def multiply(self, sums: int, pixels: int, weights: int) -> None:
        self.b.call(_tile_product(self.b.module),
                    [*(self.tiles[tile] for tile in (sums, pixels, weights)), self.pairs])

    def store(self, tile: int, pointer: Value, step: Value) -> None:
        def row(r, _):
            target = self.b.bitcast(self._memory(pointer, step, r), PAIRS.as_pointer())
            self.b.store(self.b.load(self._row(tile, r)), target).align = 4
            return []
        counted_loop(self.b, "row", i64(TILE_ROWS), [], row)

    def _memory(self, pointer: Value, step: Value, row: Value) -> Value:
        return self.b.gep(self.b.bitcast(pointer, BYTES), [self.b.mul(step, row)])


def _tile_product(module: ir.Module) -> ir.Function:
    """sums[16, 16] += pixels[16, 2 * pairs] @ weights[2 * pairs, 16] as a function of the module's
    own: compiled once, and not in every place."""
    name = "emulated_tdpbf16ps"
    if name in module.globals:
        return module.globals[name]
    kind = ir.FunctionType(ir.VoidType(), [*[PAIRS.as_pointer()] * 3, I64])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b, zero = ir.IRBuilder(function.append_basic_block()), ir.Constant(SUMS, None)
    sums, pixels, weights, pairs = function.args

    def row(r, _):
        inputs = b.bitcast(b.gep(pixels, [r]), I32.as_pointer())

        def pair(k, carried):
            x, w = broadcast_pair(b, b.load(b.gep(inputs, [k]))), b.load(b.gep(weights, [k]))
            return [fused(b, place(b, x), place(b, w), total)
                    for place, total in zip((even_place, odd_place), carried, strict=True)]

        even, odd = counted_loop(b, "pair", pairs, [zero, zero], pair)
        target = b.bitcast(b.gep(sums, [r]), SUMS.as_pointer())
        b.store(b.fadd(b.load(target), b.fadd(even, odd)), target)
        return []

    counted_loop(b, "row", i64(TILE_ROWS), [], row)
    b.ret_void()
    return function


# ---- vectors ----------------------------------------------------------------------------------

class Bfloat(ir.types.Type):
    """LLVM's bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bfloat)

    def __hash__(self) -> int:
        return hash(Bfloat)


BFLOATS = ir.VectorType(Bfloat(), 2 * COLUMNS)


def dot(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    """sums + products of both places of the pairs, by the instruction."""
    function = ir.FunctionType(SUMS, [SUMS, BFLOATS, BFLOATS])
    callee = cgutils.get_or_insert_function(b.module, function,
                                            "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(callee, [sums, b.bitcast(w, BFLOATS), b.bitcast(x, BFLOATS)])


def emulated_dot(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    odd = fused(b, odd_place(b, x), odd_place(b, w), sums)
    return fused(b, even_place(b, x), even_place(b, w), odd)


def even_place(b: Builder, pairs: Value) -> Value:
    """The lower halves as float32."""
    return b.bitcast(b.shl(pairs, splat_pairs(16)), SUMS)


def odd_place(b: Builder, pairs: Value) -> Value:
    return b.bitcast(b.and_(pairs, splat_pairs(0xFFFF0000)), SUMS)


def splat_pairs(value: int) -> ir.Constant:
    return ir.Constant(PAIRS, [value] * COLUMNS)


def broadcast_pair(b: Builder, pair: Value) -> Value:
    undefined = ir.Constant(PAIRS, ir.Undefined)
    first = b.insert_element(undefined, pair, I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(PAIRS, None))


def load_pairs(b: Builder, pointer: Value) -> Value:
    value = b.load(b.bitcast(pointer, PAIRS.as_pointer()))
    value.align = 2
    return value


def load_some_pairs(b: Builder, pointer: Value, count: Value) -> Value:
    """The first `count` pairs; the others are 0 and are not touched."""
    lanes, address = ir.VectorType(ir.IntType(1), COLUMNS), b.bitcast(pointer, PAIRS.as_pointer())
    wanted = broadcast_pair(b, b.trunc(count, I32))
    mask = b.icmp_signed("<", ir.Constant(PAIRS, list(range(COLUMNS))), wanted)
    function = ir.FunctionType(PAIRS, [address.type, I32, lanes, PAIRS])
    masked = cgutils.get_or_insert_function(b.module, function,
                                            f"llvm.masked.load.v{COLUMNS}i32.p0")
    return b.call(masked, [address, I32(2), mask, ir.Constant(PAIRS, None)])


def fused(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once, on any CPU."""
    function = ir.FunctionType(SUMS, [SUMS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.fma.v{COLUMNS}f32"),
                  [x, y, z])
