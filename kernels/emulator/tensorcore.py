"""ldmatrix, stmatrix and mma.sync (PTX ISA 9.7.14).

Products are summed in float32 (of integers: exactly), in an order that is not the hardware's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Divergence
from .geometry import WARP, Selection
from .instruction import Instruction, Operand, Register, Vector
from .operation import NotCovered, Operation, opcode
from .ptxtypes import U8, U16, U32, Array, bf16_to_f32

if TYPE_CHECKING:
    from .machine import Machine

PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}  # elements in 32 bits


def decode(raw: Array, kind: str) -> Array:
    """Contiguous bytes -> float32 values of an operand type (the last axis gets longer)."""
    if kind == "bf16":
        values = bf16_to_f32(raw.view(U16))
    elif kind == "tf32":  # the hardware ignores the low 13 bits
        values = (raw.view(U32) & U32(0xFFFFE000)).view(np.float32)
    else:
        dtypes: dict[str, Any] = {"f16": np.float16, "s8": np.int8, "u8": U8}
        values = raw.view(dtypes[kind]).astype(np.float32)
    result: Array = values
    return result


def fragments(kind: str, k: int) -> tuple[Array, Array, Array]:
    """Fragment layouts of mma.m16n8k<k>: where the elements of A[16, k], B[8, k] and C[16, 8] are.

    Positions count [register][lane][element in the register] (PTX ISA 9.7.14.5).
    """
    per = PER_REGISTER[kind]
    depth, row, column = np.arange(k), np.arange(16)[:, None], np.arange(8)
    register, lane, element = depth // (4 * per), depth // per % 4, depth % per
    a = ((2 * register + row // 8) * WARP + row % 8 * 4 + lane) * per + element
    b = (register * WARP + np.arange(8)[:, None] * 4 + lane) * per + element
    c = (2 * (row // 8) + column % 2) * WARP + row % 8 * 4 + column // 2
    return a, b, c


def registers32(operand: Operand) -> Array:
    """Row numbers of a vector of 32-bit registers."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    rows = []
    for item in items:
        if not isinstance(item, Register) or item.width != 32:
            raise NotCovered(f"takes {item} where a 32-bit register is expected")
        rows.append(item.row)
    return np.array(rows)


def whole_warps(machine: Machine, threads: Array) -> None:
    """A matrix is spread over 32 lanes: none may be missing, not even one that has ended."""
    if threads.size % WARP:
        what = "executes a matrix instruction in a warp that is not whole (divergence)"
        machine.fault(Divergence, what, int(threads[0]))


def _matrices(instruction: Instruction) -> int:
    """1, 2 or 4: .x1, .x2, .x4"""
    count = next(m for m in instruction.modifiers if re.fullmatch(r"x[124]", m))
    if not instruction.has("m8n8") or instruction.type != "b16":
        raise NotCovered("moves matrices that are not .m8n8 of .b16")
    return int(count[1:])


@opcode("ldmatrix")
def ldmatrix(machine: Machine, instruction: Instruction) -> Operation:
    """Lane 8 * i + r has the address of row r of matrix i; lane l gets elements 2l and 2l + 1."""
    count, transposed = _matrices(instruction), instruction.has("trans")
    file = machine.registers.files[32]
    destinations = [file[row] for row in registers32(instruction.operands[0])]
    address, space = machine.memory.address(instruction.operands[1]), machine.memory.shared_space

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        whole_warps(machine, threads)
        used = np.flatnonzero(threads % WARP < 8 * count)
        offset = machine.memory.read(space, address(at)[used], 16, threads[used])
        matrices = space.rows(8, 2)[offset // 16].view(U16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(U32).reshape(-1, count, WARP)
        for i, destination in enumerate(destinations):
            destination[threads] = pairs[:, i].ravel()

    return Operation(run, together=True)


@opcode("stmatrix")
def stmatrix(machine: Machine, instruction: Instruction) -> Operation:
    """The inverse of ldmatrix."""
    count, transposed = _matrices(instruction), instruction.has("trans")
    address, space = machine.memory.address(instruction.operands[0]), machine.memory.shared_space
    file, rows = machine.registers.files[32], registers32(instruction.operands[1])

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        whole_warps(machine, threads)
        pairs = file[rows[:, None], threads].reshape(count, -1, WARP).swapaxes(0, 1)
        matrices = np.ascontiguousarray(pairs).view(U16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        used = np.flatnonzero(threads % WARP < 8 * count)
        offset = machine.memory.write(space, address(at)[used], 16, threads[used])
        chunks = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint64)
        space.rows(8, 2)[offset // 16] = chunks

    return Operation(run, together=True)


@opcode("mma")
def mma(machine: Machine, instruction: Instruction) -> Operation:
    """mma.sync.aligned.m16n8k*.row.col.d.a.b.c"""
    kind, k = _mma_shape(instruction)
    position_a, position_b, position_c = fragments(kind, k)
    scatter = np.empty(position_c.size, np.int64)  # [row, column] -> [register][lane]
    scatter[position_c.ravel()] = np.arange(position_c.size)
    d, a, b, c = (registers32(operand) for operand in instruction.operands)
    file = machine.registers.files[32]
    accumulator = np.dtype(np.int32 if kind in ("s8", "u8") else np.float32)

    def gather(rows: Array, threads: Array | None) -> Array:
        """Registers of all warps as [warp][register, lane]"""
        x = file[rows] if threads is None else file[rows[:, None], threads]
        by_warp = x.reshape(len(rows), -1, WARP).swapaxes(0, 1)
        return np.ascontiguousarray(by_warp).reshape(-1, len(rows) * WARP)

    def run(at: Selection) -> None:
        threads = None if at is None else machine.geometry.select(at)
        if threads is not None:
            whole_warps(machine, threads)
        left = decode(gather(a, threads), kind)[:, position_a]
        right = decode(gather(b, threads), kind)[:, position_b]
        product = np.matmul(left, right.swapaxes(1, 2)).reshape(-1, scatter.size)[:, scatter]
        total = gather(c, threads).view(accumulator) + product.astype(accumulator)
        result = total.view(U32).reshape(-1, 4, WARP).swapaxes(0, 1).reshape(4, -1)
        if threads is None:
            file[d] = result
        else:
            file[d[:, None], threads] = result

    return Operation(run, together=True)


def _mma_shape(instruction: Instruction) -> tuple[str, int]:
    """Operand type and k of an mma that the emulator knows."""
    name = ".".join(instruction.modifiers)
    pattern = r"sync\.aligned\.m16n8k(\d+)\.row\.col\.(f32|s32)\.(\w+)\.(\w+)\.(f32|s32)"
    match = re.fullmatch(pattern, name)
    if match is None or match[3] != match[4] or match[3] not in PER_REGISTER:
        raise NotCovered(f"is mma.{name}, which the emulator does not know")
    kind, k = match[3], int(match[1])
    accumulator = "s32" if kind in ("s8", "u8") else "f32"
    depths = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32)}
    if k not in depths[kind] or match[2] != accumulator or match[5] != accumulator:
        raise NotCovered(f"is mma.{name}, which the emulator does not know")
    return kind, k
