"""Distributed shared memory: mapa, getctarank, whose memory an address means (PTX ISA 9.7.9.23).

What mapa makes of an address of shared memory holds the rank of a block plus one above its
RANK_SHIFT bits. Without a rank, an address means the memory of the executing thread's own block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError, Race, UnknownInstruction
from .geometry import Selection
from .instruction import Instruction
from .memory import LOCAL_WINDOW, RANK_SHIFT, SHARED_WINDOW
from .operation import NotCovered, Operation, opcode
from .ptxtypes import U32, Array, dtype_of

if TYPE_CHECKING:
    from .machine import Machine

RANKS = 0xFF << RANK_SHIFT  # the bits of an address that hold a rank


class DistributedMemory:
    """The shared memories of each cluster of a wave."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def owners(self, address: Array, at: Selection) -> tuple[Array, Selection]:
        """Addresses within a block, and a thread of the block for each of them."""
        geometry = self.machine.geometry
        blocks, rank = geometry.blocks_per_cluster, (address >> RANK_SHIFT) - 1
        mapped = (rank >= 0) & (rank < blocks)
        if not mapped.any():
            return address, at
        threads = geometry.select(at)
        own = geometry.block_slot[threads]
        slot = np.where(mapped, own - own % blocks + rank, own)
        address = np.where(mapped, address & ~RANKS, address)
        remote = slot != own
        self.check_there(slot[remote], address[remote], threads[remote])
        return address, np.where(remote, slot * geometry.slot, threads)

    def check_there(self, slots: Array, address: Array, threads: Array) -> None:
        """Other blocks, whose memory the threads use, must have started and not ended."""
        barriers, geometry = self.machine.cluster_barriers, self.machine.geometry
        for slot in np.unique(slots).tolist():
            users = np.flatnonzero(slots == slot)
            strangers = users[~barriers.met[threads[users] >> 5]]
            if strangers.size:
                i, why = strangers[0], "may not have started: this warp has passed no "
                why += "barrier.cluster.wait"
            elif barriers.has_ended(slot):
                i, why = users[0], "has ended"
            else:
                continue
            place = f"shared address {int(address[i]):#x} of block "
            place += f"{geometry.block_index(slot * geometry.slot)}"
            what = f"uses {place}, which {why} (race)"
            self.machine.fault(Race, what, int(threads[i]), int(address[i]))

    def refuse(self, what: str, address: int, thread: int) -> None:
        """Asynchronous operations find the memory of their own block alone."""
        if 0 < address >> RANK_SHIFT <= self.machine.geometry.blocks_per_cluster:
            what = f"uses {what} at {address:#x}, an address of mapa, which the emulator does not "
            self.machine.fault(UnknownInstruction, f"{what}know", thread, address)


@opcode("mapa")
def mapa(machine: Machine, instruction: Instruction) -> Operation:
    """mapa{.shared::cluster}.u32 / .u64 d, address, rank"""
    target, *sources = instruction.operands
    kind, blocks = instruction.type, machine.geometry.blocks_per_cluster
    destination = machine.registers.destination(target, kind)
    address = machine.registers.spread(sources[0], kind)
    rank = machine.registers.spread(sources[1], "u32")
    integer = dtype_of(kind).type
    generic = _is_generic(instruction)

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        low, wanted = address[threads], rank[threads]
        if generic:
            _check_shared(machine, low, threads)
        if (wanted >= blocks).any():
            i = int(np.argmax(wanted >= blocks))
            what = f"maps an address to block {wanted[i]} of its cluster, which has {blocks}"
            machine.fault(EmulatorError, what, int(threads[i]))
        if blocks > 1:
            high = (wanted.astype(integer) + integer(1)) << integer(RANK_SHIFT)
            low = (low & ~integer(RANKS)) | high
        destination[threads] = low

    return Operation(run)


@opcode("getctarank")
def getctarank(machine: Machine, instruction: Instruction) -> Operation:
    """getctarank{.shared::cluster}.u32 / .u64 rank, address"""
    target, source = instruction.operands
    destination = machine.registers.destination(target, "u32")
    address = machine.registers.spread(source, instruction.type)
    own = machine.registers.special["%cluster_ctarank"]
    generic = _is_generic(instruction)

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        if generic:
            _check_shared(machine, address[threads], threads)
        high = ((address[threads].astype(np.int64) & RANKS) >> RANK_SHIFT).astype(U32)
        destination[threads] = np.where(high > 0, high - U32(1), own[threads])

    return Operation(run)


def _is_generic(instruction: Instruction) -> bool:
    """Whether the instruction takes generic addresses, or those of .shared::cluster."""
    space = instruction.modifiers[:-1]
    if space not in ((), ("shared::cluster",)):
        raise NotCovered("names a state space other than .shared::cluster")
    return not space


def _check_shared(machine: Machine, address: Array, threads: Array) -> None:
    outside = (address < SHARED_WINDOW) | (address >= LOCAL_WINDOW)
    if outside.any():
        i = int(np.argmax(outside))
        what = f"gives the generic address {int(address[i]):#x}, which is not in shared memory"
        machine.fault(EmulatorError, what, int(threads[i]), int(address[i]))
