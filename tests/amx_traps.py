"""Executes the instructions of AMX on a CPU that lacks them, so that their machine code is tested.

Such a CPU stops at each with SIGILL. The handler below then does what Intel's manual says, with
tiles in memory, and lets the program go on behind it. For one thread, and Linux on x86-64.
"""
from __future__ import annotations

import ctypes

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

SIGILL, SA_SIGINFO = 4, 4
REGISTERS, RIP = 40, 16         # offset of the registers in a ucontext_t, and which is RIP
ORDER = (13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)     # of RAX, RCX, RDX, ... there
NONE, P66, F3, F2 = 0, 1, 2, 3  # prefixes as VEX has them

TILES = np.zeros((8, 16, 64), np.uint8)
CONFIGURATION = np.zeros(64, np.uint8)      # all zeros: tiles can not be used
PRODUCTS = np.zeros(1, np.int64)            # executed tdpbf16ps and tdpbusd
TILES_AT, CONFIGURATION_AT = TILES.ctypes.data, CONFIGURATION.ctypes.data
PRODUCTS_AT = PRODUCTS.ctypes.data


@intrinsic
def pointer(typingctx, address, kind):
    """An address as a pointer to numbers of a kind."""
    def codegen(context, b, sig, args):
        return b.inttoptr(args[0], context.get_value_type(sig.return_type))
    return types.CPointer(kind.dtype)(types.int64, kind), codegen


@numba.njit
def rows_of(tile):
    return pointer(CONFIGURATION_AT, np.uint8)[48 + tile]


@numba.njit
def bytes_of(tile):
    return pointer(CONFIGURATION_AT, np.uint16)[8 + tile]


@numba.njit
def copy(target, source, count):
    to, of = pointer(target, np.uint8), pointer(source, np.uint8)
    for i in range(count):
        to[i] = of[i]


@numba.njit
def zero(target, count):
    to = pointer(target, np.uint8)
    for i in range(count):
        to[i] = 0


@numba.njit
def wide(address):
    """bfloat16 as float64."""
    word = np.int32(pointer(address, np.uint16)[0]) << 16
    return np.float64(np.int32(word).view(np.float32))


@numba.njit
def multiply(sums, x, w):
    """tdpbf16ps. Sums are rounded from float64, which has room for a product."""
    for row in range(rows_of(sums)):
        target = pointer(TILES_AT + sums * 1024 + row * 64, np.float32)
        for column in range(bytes_of(sums) // 4):
            even, odd = np.float32(0), np.float32(0)
            for k in range(bytes_of(x) // 4):
                a = TILES_AT + x * 1024 + row * 64 + 4 * k
                b = TILES_AT + w * 1024 + k * 64 + 4 * column
                even = np.float32(even + wide(a) * wide(b))
                odd = np.float32(odd + wide(a + 2) * wide(b + 2))
            target[column] += even + odd
    pointer(PRODUCTS_AT, np.int64)[0] += 1


@numba.njit
def multiply_int8(sums, x, w):
    """tdpbusd"""
    for row in range(rows_of(sums)):
        target = pointer(TILES_AT + sums * 1024 + row * 64, np.int32)
        for column in range(bytes_of(sums) // 4):
            total = np.int64(target[column])
            for k in range(bytes_of(x)):
                code = pointer(TILES_AT + x * 1024 + row * 64, np.uint8)[k]
                total += np.int64(code) * pointer(
                    TILES_AT + w * 1024 + k // 4 * 64 + 4 * column, np.int8)[k % 4]
            target[column] = total
    pointer(PRODUCTS_AT, np.int64)[0] += 1


@numba.njit
def execute(opcode, prefix, in_memory, tile, x, w, address, step):
    """Whether there is such an instruction and the tiles are configured for it."""
    if opcode == 0x49 and prefix == NONE and in_memory:         # ldtilecfg
        copy(CONFIGURATION_AT, address, 64)
        return True
    if opcode == 0x49 and prefix == NONE:                       # tilerelease
        zero(CONFIGURATION_AT, 64)
        return True
    if pointer(CONFIGURATION_AT, np.uint8)[0] != 1:
        return False
    tile_at = TILES_AT + tile * 1024
    if opcode == 0x49 and prefix == F2:                         # tilezero
        zero(tile_at, 1024)
    elif opcode == 0x4B and prefix == F2:                       # tileloadd
        for row in range(rows_of(tile)):
            copy(tile_at + row * 64, address + row * step, bytes_of(tile))
    elif opcode == 0x4B and prefix == F3:                       # tilestored
        for row in range(rows_of(tile)):
            copy(address + row * step, tile_at + row * 64, bytes_of(tile))
    elif opcode == 0x5C and prefix == F3:
        multiply(tile, x, w)
    elif opcode == 0x5E and prefix == P66:
        multiply_int8(tile, x, w)
    else:
        return False
    return True


@numba.cfunc(types.void(types.int32, types.int64, types.int64))
def on_illegal(signal, info, context):
    """Decodes C4 [RXB, map] [W, v, L, prefix] opcode ModRM [SIB] [displacement]."""
    registers = pointer(context + REGISTERS, np.int64)
    code = pointer(registers[RIP], np.uint8)
    mode, tile, low = code[4] >> 6, code[4] >> 3 & 7, code[4] & 7
    extend_base, extend_index = 8 * (~code[1] >> 5 & 1), 8 * (~code[1] >> 6 & 1)
    length, address, step = 5, 0, 0
    if mode != 3 and low == 4:
        length, base, index = 6, code[5] & 7, (code[5] >> 3 & 7) + extend_index
        address = registers[ORDER[base + extend_base]]
        if index != 4:
            step = registers[ORDER[index]] << (code[5] >> 6)
    elif mode != 3 and not (mode == 0 and low == 5):
        address = registers[ORDER[low + extend_base]]
    if mode == 1:
        address += np.int64(pointer(registers[RIP] + length, np.int8)[0])
        length += 1
    elif mode == 2 or (mode == 0 and low == 5):
        address += np.int64(pointer(registers[RIP] + length, np.int32)[0])
        length += 4
        if mode == 0:
            address += registers[RIP] + length
    known = code[0] == 0xC4 and code[1] & 31 == 2 and execute(
        code[3], code[2] & 3, mode != 3, tile, low, ~code[2] >> 3 & 15, address, step)
    # Any other instruction ends in a segmentation fault at address 0.
    registers[RIP] = registers[RIP] + length if known else 0


class Action(ctypes.Structure):
    """struct sigaction"""
    _fields_ = (("handler", ctypes.c_void_p), ("mask", ctypes.c_uint64 * 16),
                ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p))


def install() -> None:
    action = Action(on_illegal.address, (ctypes.c_uint64 * 16)(), SA_SIGINFO, None)
    assert ctypes.CDLL(None).sigaction(SIGILL, ctypes.byref(action), None) == 0
