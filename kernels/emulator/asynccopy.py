"""cp.async: copies from global to shared memory in groups (PTX ISA 9.7.9.25.3).

A copy reads global memory when it is issued and lands as late as the program allows: when a
wait_group, or an mbarrier that it arrives on, says that it must have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import EmulatorError, Misaligned
from .geometry import Selection
from .instruction import Immediate, Instruction, Negated, Operand, Register
from .operation import NotCovered, Operation, opcode
from .ptxtypes import U8, Array
from .shared import CP_ASYNC
from .tma import bulk

if TYPE_CHECKING:
    from .machine import Machine

EVERYTHING = 1 << 40  # a limit above all group numbers


@dataclass
class _Copy:
    """One executed instruction; arrays over the threads that executed it."""

    threads: Array
    offset: Array  # in shared memory
    data: Array  # rows of bytes
    group: Array  # number of the group that will hold it
    landed: Array


class AsyncCopies:
    """The copies in flight, and how many groups each thread has committed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed: Array = np.zeros(machine.geometry.threads, np.int64)  # groups per thread
        self.pending: list[_Copy] = []

    def reset(self) -> None:
        self.committed[:] = 0
        self.pending = []

    def issue(self, threads: Array, offset: Array, data: Array) -> None:
        """The bytes at the offsets belong to the copy until it lands."""
        self.machine.shared.write(offset, data.shape[1], threads >> 5, CP_ASYNC)
        self.machine.shared.in_flight += threads.size
        landed = np.zeros(threads.size, bool)
        self.pending.append(_Copy(threads, offset, data, self.committed[threads], landed))

    def wait(self, threads: Array, keep: int | None) -> None:
        """All but the last `keep` groups have landed; None: also what is not committed."""
        limit = EVERYTHING if keep is None else self.committed[threads] - keep
        self.land_below(self.limits(threads, limit))

    def limits(self, threads: Array, limit: Any) -> Array:
        """For every thread: copies of groups below this number shall land."""
        limits = np.full(self.machine.geometry.threads, -1)
        limits[threads] = limit
        return limits

    def land_below(self, limits: Array, clocks: dict[int, Array] | None = None) -> None:
        """clocks: when an mbarrier waits for the copies, the clocks of their warps at that time."""
        race, shared = self.machine.race, self.machine.shared
        for copy in self.pending:
            due = ~copy.landed & (copy.group < limits[copy.threads])
            if not due.any():
                continue
            offset = copy.offset[due]
            shared.land(offset, copy.data[due])
            shared.in_flight -= offset.size
            copy.landed |= due
            if race:
                warps = copy.threads[due] >> 5
                epochs = race.now(warps)
                if clocks is not None:
                    own = warps % self.machine.geometry.warps_per_cluster
                    epochs = np.array(
                        [clocks[int(w)][i] for w, i in zip(warps, own, strict=True)], np.int32
                    )
                race.rewrite(offset, copy.data.shape[1], epochs)
        self.pending = [copy for copy in self.pending if not copy.landed.all()]


@opcode("cp")
def cp(machine: Machine, instruction: Instruction) -> Operation:
    """All of cp.async; the bulk forms are in tma.py."""
    copies, geometry = machine.copies, machine.geometry
    if instruction.modifiers[0] != "async":
        raise NotCovered(f"is cp.{instruction.modifiers[0]}, which the emulator does not know")
    form = instruction.modifiers[1]
    if form == "bulk":
        return bulk(machine, instruction)
    if form in ("ca", "cg"):
        return _copy(machine, instruction)
    if form == "mbarrier":
        return _arrive_when_landed(machine, instruction)
    if form == "commit_group":

        def commit(at: Selection) -> None:
            copies.committed[geometry.select(at)] += 1

        return Operation(commit)
    if form not in ("wait_group", "wait_all"):
        raise NotCovered(f"is cp.async.{form}, which the emulator does not know")
    keep = None
    if form == "wait_group":
        keep = machine.registers.scalar(instruction.operands[0], 0)
    return Operation(lambda at: copies.wait(geometry.select(at), keep))


def _copy(machine: Machine, instruction: Instruction) -> Operation:
    """cp.async.ca / .cg [shared], [global], size{, bytes to read or ignore-source}{, hint}"""
    geometry, memory = machine.geometry, machine.memory
    destination, source = (memory.address(o) for o in instruction.operands[:2])
    size_operand = instruction.operands[2]
    if not isinstance(size_operand, Immediate):
        raise NotCovered("has a size that is no constant")
    size = int(size_operand.value)
    hinted = any("cache_hint" in m for m in instruction.modifiers)
    extra = instruction.operands[3 : len(instruction.operands) - hinted]
    wanted = _source_bytes(machine, extra[0], size) if extra else None

    def run(at: Selection) -> None:
        threads, addresses = geometry.select(at), source(at)
        offset = memory.locate(memory.shared_space, destination(at), size, at, store=True)
        data = np.zeros((threads.size, size), U8)  # what is not read is zero
        read = np.full(threads.size, size) if wanted is None else wanted(threads)
        if (read > size).any():
            i = int(np.argmax(read > size))
            what = f"asks cp.async to read {read[i]} bytes for {size}"
            machine.fault(EmulatorError, what, int(threads[i]))
        for count in np.unique(read[read > 0]):
            rows = np.flatnonzero(read == count)
            _check_aligned(machine, addresses[rows], size, threads[rows])
            data[rows, :count] = _fetch(machine, addresses[rows], int(count), threads[rows])
        machine.copies.issue(threads, offset, data)

    return Operation(run)


def _source_bytes(machine: Machine, operand: Operand, size: int) -> Callable[[Array], Array]:
    """Bytes that threads read: src-size, or none where the ignore-src predicate holds."""
    inner = operand.operand if isinstance(operand, Negated) else operand
    if isinstance(inner, Register) and inner.width == 1:
        ignore, negated = machine.registers.predicate(operand)
        return lambda threads: np.where(ignore[threads] ^ negated, 0, size)
    count = machine.registers.spread(operand, "u32")
    return lambda threads: count[threads].astype(np.int64)


def _check_aligned(machine: Machine, addresses: Array, size: int, threads: Array) -> None:
    low = addresses % size
    if low.any():
        i = int(np.argmax(low != 0))
        address = int(addresses[i])
        machine.fault(
            Misaligned,
            f"copies {size} bytes from global address {address:#x}, which is not a multiple of "
            f"{size} (misaligned)",
            int(threads[i]),
            address,
        )


def _fetch(machine: Machine, addresses: Array, count: int, threads: Array) -> Array:
    """The bytes at global addresses, whose number need not be a power of two."""
    memory = machine.memory
    space = memory.global_space
    offset = memory.locate(space, addresses, count, threads, align=1)
    if space.written is not None:
        memory.check_written(space, offset, count, threads)
    rows: Array = space.bytes[offset[:, None] + np.arange(count)]
    return rows


def _arrive_when_landed(machine: Machine, instruction: Instruction) -> Operation:
    """cp.async.mbarrier.arrive{.noinc}: the arrival comes when the thread's copies have landed."""
    copies, mbarriers = machine.copies, machine.mbarriers
    address = machine.memory.address(instruction.operands[0])
    counted = instruction.has("noinc")

    def run(at: Selection) -> None:
        threads = machine.geometry.select(at)
        targets = [
            mbarriers.find(int(t), int(a)) for t, a in zip(threads, address(at), strict=True)
        ]
        if not counted:
            for mbarrier in targets:
                mbarrier.pending += 1
        limits = copies.limits(threads, copies.committed[threads] + 1)
        clocks = machine.race.depart(np.unique(threads >> 5)) if machine.race else None

        def landed() -> None:
            copies.land_below(limits, clocks)
            for mbarrier, thread in zip(targets, threads, strict=True):
                clock = clocks[int(thread) >> 5] if clocks else None
                mbarriers.arrive(mbarrier, 1, clock, int(thread))

        machine.scheduler.events.append(landed)

    return Operation(run)
