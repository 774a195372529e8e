"""The instructions of dot_units.py as LLVM IR. Words of 32 bits hold two inputs of bfloat16 or four
of 8 bits.

An emulated instruction computes what Intel's manual says, where each multiplication with addition
is fused and rounded to nearest even in float32:

    tdpbf16ps   products at even places of the pairs are summed from 0 on, those at odd places by
                themselves, and even + odd is added to what the tile held
    vdpbf16ps   to what the vector held the product at the odd place is added, then that at the even

But the instructions take numbers below 2 ** -126 for 0, read or written, and the emulation does
not; and which of several NaNs comes out may differ.

    tdpbusd, vpdpbusd   exact, but for what does not fit 32 bits
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir
from numba.core import cgutils

from .dot_units import COLUMNS, TILE_ROWS
from .simd import F32, I32, Builder, Value, apart, broadcast, counted_loop, i64

I8 = ir.IntType(8)
BYTES = I8.as_pointer()
SUMS, WORDS = ir.VectorType(F32, COLUMNS), ir.VectorType(I32, COLUMNS)


# ---- tiles ------------------------------------------------------------------------------------

class Tiles:
    """The eight tile registers of a thread, as `configure` of dot_simd.py sets them up: 16 rows of
    64 bytes each, but those of pixels and weights only hold `words` of inputs."""

    def __init__(self, b: Builder, words: Value, instruction: str) -> None:
        self.b, self.words, self.instruction = b, words, instruction

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
        """The same, a row a word of each output's inputs."""
        self.load_pixels(tile, pointer, step)

    def multiply(self, sums: int, pixels: int, weights: int) -> None:
        """sums[16, 16] += pixels[16, inputs of all words] @ weights[the same, 16]"""
        self._call(self.instruction, I8(sums), I8(pixels), I8(weights))

    def store(self, tile: int, pointer: Value, step: Value) -> None:
        self._call("tilestored64", I8(tile), self.b.bitcast(pointer, BYTES), step)


class EmulatedTiles:
    """The same registers in the stack's memory, and each instruction a function of the module's
    own: compiled once, and not in every place."""

    def __init__(self, b: Builder, words: Value, instruction: str) -> None:
        self.b, self.words, self.instruction = b, words, instruction
        self.tiles = [cgutils.alloca_once(b, WORDS, TILE_ROWS) for _ in range(8)]

    def _call(self, name: str, emit: Callable[..., None], *args: Value) -> None:
        self.b.call(apart(self.b, f"emulated_{name}", args, emit), args)

    def zero(self, tile: int) -> None:
        self._call("tilezero", _zero_tile, self.tiles[tile])

    def load_pixels(self, tile: int, pointer: Value, step: Value) -> None:
        self._call("load_pixels", _load_pixels, self.tiles[tile], self.b.bitcast(pointer, BYTES),
                   step, self.words)

    def load_weights(self, tile: int, pointer: Value, step: Value) -> None:
        self._call("load_weights", _load_weights, self.tiles[tile], self.b.bitcast(pointer, BYTES),
                   step, self.words)

    def multiply(self, sums: int, pixels: int, weights: int) -> None:
        self._call(self.instruction, partial(_multiply_tiles, ROW_PRODUCTS[self.instruction]),
                   *(self.tiles[tile] for tile in (sums, pixels, weights)), self.words)

    def store(self, tile: int, pointer: Value, step: Value) -> None:
        self._call("tilestored64", _store_tile, self.tiles[tile], self.b.bitcast(pointer, BYTES),
                   step)


def _each_row(b: Builder, rows: Value, emit: Callable[[Value], None]) -> None:
    def row(r: Value, _: list[Value]) -> list[Value]:
        emit(r)
        return []
    counted_loop(b, "row", rows, [], row)


def _zero_tile(b: Builder, tile: Value) -> None:
    _each_row(b, i64(TILE_ROWS), lambda r: b.store(ir.Constant(WORDS, None), b.gep(tile, [r])))


def _load_pixels(b: Builder, tile: Value, pointer: Value, step: Value, words: Value) -> None:
    _each_row(b, i64(TILE_ROWS), lambda r: b.store(
        load_some_words(b, b.gep(pointer, [b.mul(step, r)]), words), b.gep(tile, [r])))


def _load_weights(b: Builder, tile: Value, pointer: Value, step: Value, words: Value) -> None:
    _each_row(b, words, lambda r: b.store(
        load_words(b, b.gep(pointer, [b.mul(step, r)])), b.gep(tile, [r])))


def _store_tile(b: Builder, tile: Value, pointer: Value, step: Value) -> None:
    def row(r: Value) -> None:
        target = b.bitcast(b.gep(pointer, [b.mul(step, r)]), WORDS.as_pointer())
        b.store(b.load(b.gep(tile, [r])), target).align = 4
    _each_row(b, i64(TILE_ROWS), row)


def _multiply_tiles(of_row: Callable[..., None], b: Builder, sums: Value, pixels: Value,
                    weights: Value, words: Value) -> None:
    _each_row(b, i64(TILE_ROWS), lambda r: of_row(
        b, b.gep(sums, [r]), b.bitcast(b.gep(pixels, [r]), I32.as_pointer()), weights, words))


def _bfloat16_row(b: Builder, target: Value, inputs: Value, weights: Value, words: Value) -> None:
    def word(k, carried):
        x, w = broadcast_word(b, b.load(b.gep(inputs, [k]))), b.load(b.gep(weights, [k]))
        return [fused(b, place(b, x), place(b, w), total)
                for place, total in zip((even_place, odd_place), carried, strict=True)]

    even, odd = counted_loop(b, "word", words, [ir.Constant(SUMS, None)] * 2, word)
    target = b.bitcast(target, SUMS.as_pointer())
    b.store(b.fadd(b.load(target), b.fadd(even, odd)), target)


def _int8_row(b: Builder, target: Value, inputs: Value, weights: Value, words: Value) -> None:
    def word(k, carried):
        x, w = broadcast_word(b, b.load(b.gep(inputs, [k]))), b.load(b.gep(weights, [k]))
        return [emulated_dot_int8(b, carried[0], x, w)]

    (total,) = counted_loop(b, "word", words, [b.load(target)], word)
    b.store(total, target)


ROW_PRODUCTS = {"tdpbf16ps": _bfloat16_row, "tdpbusd": _int8_row}


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
    """sums + products of both places of the words, by the instruction."""
    function = ir.FunctionType(SUMS, [SUMS, BFLOATS, BFLOATS])
    callee = cgutils.get_or_insert_function(b.module, function,
                                            "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(callee, [sums, b.bitcast(w, BFLOATS), b.bitcast(x, BFLOATS)])


def emulated_dot(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    odd = fused(b, odd_place(b, x), odd_place(b, w), sums)
    return fused(b, even_place(b, x), even_place(b, w), odd)


def dot_int8(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    """sums + products of all four places of the words, of x without and of w with a sign."""
    function = ir.FunctionType(WORDS, [WORDS] * 3)
    # LLVM 22 has bytes in place of words, and knows what is meant.
    callee = cgutils.get_or_insert_function(b.module, function, "llvm.x86.avx512.vpdpbusd.512")
    return b.call(callee, [sums, x, w])


def dot_int8_by_halves(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    """The same by two vectors of 256 bits."""
    half = ir.VectorType(I32, 8)
    callee = cgutils.get_or_insert_function(b.module, ir.FunctionType(half, [half] * 3),
                                            "llvm.x86.avx512.vpdpbusd.256")
    return in_parts(b, half, lambda *parts: b.call(callee, parts), sums, x, w)


def dot_int16_by_halves(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    """sums + products of both places of the words, of whole numbers of 16 bits."""
    half, pairs = ir.VectorType(I32, 8), ir.VectorType(ir.IntType(16), 16)
    callee = cgutils.get_or_insert_function(b.module, ir.FunctionType(half, [pairs] * 2),
                                            "llvm.x86.avx2.pmadd.wd")

    def part(sums: Value, x: Value, w: Value) -> Value:
        return b.add(sums, b.call(callee, [b.bitcast(x, pairs), b.bitcast(w, pairs)]))
    return in_parts(b, half, part, sums, x, w)


def dot_int8_by_quarters(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    """sums + products of all four places of the words, of x less 128 and of w, by ARM's vectors."""
    quarter, fours = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
    callee = cgutils.get_or_insert_function(b.module, ir.FunctionType(quarter, [
        quarter, fours, fours]), "llvm.aarch64.neon.sdot.v4i32.v16i8")

    def part(sums: Value, x: Value, w: Value) -> Value:
        return b.call(callee, [sums, b.bitcast(w, fours), b.bitcast(x, fours)])
    return in_parts(b, quarter, part, sums, less_128(b, x), w)


def in_parts(b: Builder, kind: ir.VectorType, emit: Callable[..., Value], *vectors: Value) -> Value:
    """emit of the first parts of this type, of those that follow, ..., as one vector."""
    def places(start: int, end: int) -> ir.Constant:
        return ir.Constant(ir.VectorType(I32, end - start), list(range(start, end)))
    found = [emit(*(b.shuffle_vector(vector, vector, places(start, start + kind.count))
                    for vector in vectors)) for start in range(0, COLUMNS, kind.count)]
    while len(found) > 1:
        found = [b.shuffle_vector(*pair, places(0, 2 * pair[0].type.count))
                 for pair in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def emulated_dot_int8(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    for place in range(4):
        code = b.and_(b.lshr(x, splat_words(8 * place)), splat_words(0xFF))
        sums = b.add(sums, b.mul(code, signed_byte(b, w, place)))
    return sums


def emulated_dot_int8_less_128(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    x = less_128(b, x)
    for place in range(4):
        sums = b.add(sums, b.mul(signed_byte(b, x, place), signed_byte(b, w, place)))
    return sums


def less_128(b: Builder, words: Value) -> Value:
    """Of bytes without a sign those with one."""
    return b.xor(words, splat_words(0x80808080))


def signed_byte(b: Builder, words: Value, place: int) -> Value:
    return b.ashr(b.shl(words, splat_words(24 - 8 * place)), splat_words(24))


def even_place(b: Builder, words: Value) -> Value:
    """The lower halves as float32."""
    return b.bitcast(b.shl(words, splat_words(16)), SUMS)


def odd_place(b: Builder, words: Value) -> Value:
    return b.bitcast(b.and_(words, splat_words(0xFFFF0000)), SUMS)


def splat_words(value: int) -> ir.Constant:
    return ir.Constant(WORDS, [value] * COLUMNS)


def broadcast_word(b: Builder, word: Value) -> Value:
    return broadcast(b, word, COLUMNS)


def load_words(b: Builder, pointer: Value) -> Value:
    value = b.load(b.bitcast(pointer, WORDS.as_pointer()))
    value.align = 2
    return value


def load_some_words(b: Builder, pointer: Value, count: Value) -> Value:
    """The first `count` words; the others are 0 and are not touched."""
    lanes, address = ir.VectorType(ir.IntType(1), COLUMNS), b.bitcast(pointer, WORDS.as_pointer())
    wanted = broadcast_word(b, b.trunc(count, I32))
    mask = b.icmp_signed("<", ir.Constant(WORDS, list(range(COLUMNS))), wanted)
    function = ir.FunctionType(WORDS, [address.type, I32, lanes, WORDS])
    masked = cgutils.get_or_insert_function(b.module, function,
                                            f"llvm.masked.load.v{COLUMNS}i32.p0")
    return b.call(masked, [address, I32(1), mask, ir.Constant(WORDS, None)])


def fused(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once, on any CPU."""
    function = ir.FunctionType(SUMS, [SUMS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.fma.v{COLUMNS}f32"),
                  [x, y, z])
