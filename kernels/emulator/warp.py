"""Warp-wide instructions: shfl, vote, match, redux, activemask, elect (PTX ISA 9.7.9.6, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .atomic import COMBINE
from .geometry import WARP, Selection
from .instruction import Instruction, Pair, Sink
from .operation import NotCovered, Operation, full_mask, opcode
from .ptxtypes import U32, Array

if TYPE_CHECKING:
    from .machine import Machine

BITS = U32(1) << np.arange(WARP, dtype=U32)


def _ballot(warps: Array) -> Array:
    votes: Array = (warps * BITS).sum(1, dtype=U32)
    return votes


def per_warp(
    machine: Machine, threads: Array, values: Array, fill: Any, f: Callable[[Array], Any]
) -> Array:
    """f([warp, lane]) -> [warp], given back to the threads; `fill` stands for absent threads."""
    everyone = np.full(machine.geometry.threads, fill, values.dtype)
    everyone[threads] = values
    result: Array = np.repeat(f(everyone.reshape(-1, WARP)), WARP)[threads]
    return result


@opcode("shfl")
def shfl(machine: Machine, instruction: Instruction) -> Operation:
    """PTX ISA 9.7.9.6; c holds the clamp (bits 0-4) and the segment mask (bits 8-12)."""
    registers, mode = machine.registers, instruction.modifiers[1]
    if instruction.modifiers[0] != "sync" or mode not in ("up", "down", "bfly", "idx"):
        raise NotCovered("is a shfl without .sync, which is no longer part of PTX")
    target = instruction.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    destination = registers.destination(first, "u32")
    in_range = registers.destination(second, "pred")
    source = registers.spread(instruction.operands[1], "u32")
    lane_or_delta, clamp = (registers.spread(o, "u32") for o in instruction.operands[2:4])

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        lane = threads % WARP
        b, c = lane_or_delta[threads].astype(np.int64) & 31, clamp[threads].astype(np.int64)
        segment, c = c >> 8 & 31, c & 31
        limit = (lane & segment) | (c & ~segment)
        if mode == "up":
            other = lane - b
        elif mode == "down":
            other = lane + b
        elif mode == "bfly":
            other = lane ^ b
        else:
            other = (lane & segment) | (b & ~segment)
        fine = other >= limit if mode == "up" else other <= limit
        value = source[threads - lane + np.where(fine, other, lane)]
        destination[threads] = value
        in_range[threads] = fine

    return Operation(run, together=full_mask(instruction.operands[4]))


@opcode("vote")
def vote(machine: Machine, instruction: Instruction) -> Operation:
    mode = instruction.modifiers[1]
    predicate, negated = machine.registers.predicate(instruction.operands[1])
    kind = "u32" if mode == "ballot" else "pred"
    destination = machine.registers.destination(instruction.operands[0], kind)
    if mode not in ("all", "any", "uni", "ballot"):
        raise NotCovered(f"is vote.{mode}, which the emulator does not know")

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        holds = predicate[threads] ^ negated
        if mode == "ballot":
            result = per_warp(machine, threads, holds, False, _ballot)
        elif mode == "all":
            result = per_warp(machine, threads, holds, True, lambda w: w.all(1))
        elif mode == "any":
            result = per_warp(machine, threads, holds, False, lambda w: w.any(1))
        else:
            result = per_warp(machine, threads, holds, True, lambda w: w.all(1))
            result |= ~per_warp(machine, threads, holds, False, lambda w: w.any(1))
        destination[threads] = result

    return Operation(run, together=full_mask(instruction.operands[2]))


@opcode("match")
def match(machine: Machine, instruction: Instruction) -> Operation:
    """match.any: the lanes with this thread's value. match.all: all lanes, or none; and whether."""
    mode, kind = instruction.modifiers[0], instruction.type
    target, registers = instruction.operands[0], machine.registers
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    destination = registers.destination(first, "u32")
    agree = registers.destination(second, "pred")
    source = registers.spread(instruction.operands[1], kind)

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        present = np.zeros(machine.geometry.threads, bool)
        present[threads] = True
        lanes, values = present.reshape(-1, 1, WARP), source.reshape(-1, WARP)
        same = (values[:, :, None] == values[:, None, :]) & lanes
        if mode == "all":
            everybody = (same == lanes).all(2)
            same = lanes & everybody[:, :, None]
            agree[threads] = everybody.ravel()[threads]
        destination[threads] = (same * BITS).sum(2, dtype=U32).ravel()[threads]

    return Operation(run, together=full_mask(instruction.operands[2]))


@opcode("activemask")
def activemask(machine: Machine, instruction: Instruction) -> Operation:
    destination = machine.registers.destination(instruction.operands[0], "u32")

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        present = np.ones(threads.size, bool)
        destination[threads] = per_warp(machine, threads, present, False, _ballot)

    return Operation(run)


@opcode("redux")
def redux(machine: Machine, instruction: Instruction) -> Operation:
    """The whole warp takes part: absent threads would need the neutral element."""
    combine, kind = COMBINE[instruction.modifiers[1]], instruction.type
    if not isinstance(combine, np.ufunc) or not full_mask(instruction.operands[2]):
        raise NotCovered("reduces over part of a warp or with an unknown operation")
    destination = machine.registers.destination(instruction.operands[0], kind)
    source = machine.registers.spread(instruction.operands[1], kind)

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        result = combine.reduce(source[threads].reshape(-1, WARP), axis=1)
        destination[threads] = np.repeat(result, WARP)

    return Operation(run, together=True)


@opcode("elect")
def elect(machine: Machine, instruction: Instruction) -> Operation:
    """elect.sync d|p, mask: the emulator elects lane 0."""
    target = instruction.operands[0]
    if not isinstance(target, Pair):
        raise NotCovered("elects without a predicate")
    leader = machine.registers.destination(target.first, "u32")
    is_leader = machine.registers.destination(target.second, "pred")

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        is_leader[threads] = threads % WARP == 0
        leader[threads] = 0

    return Operation(run, together=True)
