"""wgmma: matrix products of four warps (PTX ISA 9.7.15): decoding and operand layouts.

What is in flight, and when it completes, is in warpgroup.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Divergence, OutOfBounds
from .geometry import WARP, Selection
from .instruction import Immediate, Instruction, Vector
from .operation import Kind, NotCovered, Operation, nothing, opcode
from .ptxtypes import Array
from .tensorcore import PER_REGISTER, decode, fragments, registers32, whole_warps
from .tensormap import swizzle
from .warpgroup import Product, Tile

if TYPE_CHECKING:
    from .machine import Machine

CHUNK = 16  # bytes


@opcode("wgmma")
def wgmma(machine: Machine, instruction: Instruction) -> Operation:
    """wgmma.fence, .commit_group, .wait_group, .mma_async"""
    groups, select = machine.warpgroups, machine.geometry.select
    form = instruction.modifiers[0]
    if form == "fence":
        return Operation(nothing, together=True)
    if form == "commit_group":
        return Operation(lambda at: groups.commit(select(at)), together=True)
    if form == "wait_group":
        keep = machine.registers.scalar(instruction.operands[0], 0)
        return Operation(lambda at: groups.wait(select(at), keep), Kind.WAIT, together=True)
    if form != "mma_async":
        raise NotCovered(f"is wgmma.{form}, which the emulator does not know")
    product = _Wgmma(machine, instruction)
    return Operation(product.issue, together=True, accumulates=True)


@dataclass(frozen=True)
class _Shape:
    """m64n<n>k<k> of operands `kind`, accumulated in `accumulator`."""

    n: int
    k: int
    kind: str
    accumulator: np.dtype[Any]


def _shape(instruction: Instruction) -> _Shape:
    name = ".".join(instruction.modifiers)
    pattern = r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(f32|s32)\.(\w+)\.(\w+)"
    match = re.fullmatch(pattern, name)
    unknown = NotCovered(f"is wgmma.{name}, which the emulator does not know")
    if match is None or match[4] != match[5] or match[4] not in PER_REGISTER:
        raise unknown
    kind = match[4]
    accumulator = "s32" if kind in ("s8", "u8") else "f32"
    if match[3] != accumulator or int(match[2]) != 8 * PER_REGISTER[kind]:
        raise unknown
    return _Shape(
        int(match[1]),
        int(match[2]),
        kind,
        np.dtype(np.int32 if accumulator == "s32" else np.float32),
    )


class _Wgmma:
    """wgmma.mma_async d, a, b-descriptor, scale-d{, imm-scale-a, -b{, imm-trans-a, -b}}"""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine, self.instruction = machine, instruction
        self.shape = _shape(instruction)
        registers = machine.registers
        d, a, b, scale, *rest = instruction.operands
        self.destination = registers32(d)
        self.a_rows = registers32(a) if isinstance(a, Vector) else None
        self.a = None if self.a_rows is not None else registers.spread(a, "u64")
        self.b = registers.spread(b, "u64")
        self.accumulate = registers.spread(scale, "pred")
        flags = [int(x.value) for x in rest if isinstance(x, Immediate)]
        if self.shape.accumulator.kind == "f" and flags[:2] != [1, 1]:
            raise NotCovered("negates an operand of wgmma, which the emulator does not know")
        transposed = flags[2:] if self.a_rows is None else [0, *flags[2:]]
        self.transpose_a, self.transpose_b = ([bool(t) for t in transposed] + [False, False])[:2]
        register, lane = np.arange(self.shape.n // 2)[:, None], np.arange(WARP)
        self.rows = register % 4 // 2 * 8 + lane // 4  # of D, for [register, lane]
        self.columns = register // 4 * 8 + lane % 4 * 2 + register % 2

    def issue(self, at: Selection) -> None:
        """Find the operands of all warps; they are read later."""
        machine, per_block = self.machine, self.machine.geometry.warps_per_block
        threads = machine.geometry.select(at)
        whole_warps(machine, threads)
        first = threads[::WARP]
        self.check_uniform(threads, first)
        warps = first >> 5
        product = Product(
            instruction=self.instruction,
            kind=self.shape.kind,
            accumulator=self.shape.accumulator,
            destination=self.destination,
            rows=self.rows,
            columns=self.columns,
            accumulate={
                int(w): bool(self.accumulate[t]) for w, t in zip(warps, first, strict=True)
            },
            clocks=machine.race.depart(warps) if machine.race else {},
        )
        right: dict[tuple[int, int], Tile] = {}  # one for all warps of a block that share it
        for warp, thread in zip(warps.tolist(), first.tolist(), strict=True):
            key = (int(self.b[thread]), warp // per_block)
            if key not in right:
                right[key] = self.tile(key[0], self.transpose_b, warp, 0, self.shape.n)
            left = None
            if self.a is not None:
                rows = warp % per_block % 4 * 16
                left = self.tile(int(self.a[thread]), self.transpose_a, warp, rows, 16)
            else:
                product.left[warp] = self.left_fragment(thread)
            product.tiles[warp] = (left, right[key])
        machine.warpgroups.issue(product, warps)

    def check_uniform(self, threads: Array, first: Array) -> None:
        """Descriptors and scale must be the same in a warp (first: its first threads)."""
        for operand in (self.a, self.b, self.accumulate):
            if operand is None:
                continue
            differs = operand[threads].reshape(-1, WARP) != operand[first][:, None]
            if differs.any():
                what = "gives wgmma an operand that is not the same in all threads of the warp"
                thread = int(threads[np.argmax(differs.ravel())])
                self.machine.fault(Divergence, f"{what} (divergence)", thread)

    def left_fragment(self, thread: int) -> Array:
        """A[16, k] of the warp from registers."""
        assert self.a_rows is not None
        lanes = thread + np.arange(WARP)
        raw = np.ascontiguousarray(self.machine.registers.files[32][self.a_rows[:, None], lanes])
        kind = self.shape.kind
        fragment: Array = decode(raw.reshape(-1), kind)[fragments(kind, self.shape.k)[0]]
        return fragment

    def tile(self, descriptor: int, transposed: bool, warp: int, low: int, count: int) -> Tile:
        """Where rows low .. low + count of an operand are (PTX ISA 9.7.15.5.1).

        The offsets are those of 16-byte chunks: of two chunks along k for each row, or, if the
        operand is transposed (M- or N-major), of count / 8 chunks along the rows for each k.
        Bits of the address itself swizzle it, wherever an operand begins: so an H200 does.
        """
        machine, space = self.machine, self.machine.memory.shared_space
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        if descriptor >> 49 & 7:
            machine.fault(
                OutOfBounds, "uses a matrix descriptor with a base offset", warp * WARP, start
            )
        span = (16, 128, 64, 32)[descriptor >> 62]
        if transposed:
            k, chunk = np.arange(16)[:, None], low // 8 + np.arange(count // 8)[None, :]
            per_span = span // CHUNK
            if span == 16:
                address = start + chunk * stride + k // 8 * leading + k % 8 * CHUNK
            else:
                address = start + chunk // per_span * leading + chunk % per_span * CHUNK
                address = address + k // 8 * stride + k % 8 * span
        else:
            row, chunk = (low + np.arange(count))[:, None], np.arange(2)[None, :]
            step = leading if span == 16 else CHUNK
            address = start + row // 8 * stride + row % 8 * span + chunk * step
        offset = swizzle(address, span) - space.base
        inside = (offset >= 0) & (offset <= space.size - CHUNK)
        if not inside.all() or not space.valid[offset].all():
            what = f"uses the matrix descriptor {descriptor:#x}, which leads out of shared memory"
            machine.fault(OutOfBounds, f"{what} (out of bounds)", warp * WARP, start)
        slot = warp // machine.geometry.warps_per_block
        return Tile(offset + slot * space.size, transposed)
