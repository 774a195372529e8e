"""mbarrier: barriers in shared memory that count arrivals and bytes (PTX ISA 9.7.13.15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError, Misaligned
from .geometry import Selection
from .instruction import Address, Instruction, Operand, Register
from .operation import Kind, NotCovered, Operation, opcode
from .ptxtypes import Array
from .race import MBARRIERS

if TYPE_CHECKING:
    from .machine import Machine

SIZE = 8  # bytes


class MBarrier:
    """The hardware packs this into 64 bits; a program must not look inside.

    `arriving` collects the clocks of the arrivals of the present phase, `clock` is what a thread
    that saw the last phase complete has learnt, `actor` whom copies that complete here write as.
    """

    def __init__(self, count: int, actor: int, actors: int) -> None:
        self.count = self.pending = count
        self.bytes = 0  # still expected
        self.phase = 0  # number of completed phases
        self.actor = actor
        self.arriving = np.zeros(actors, np.int32)
        self.clock = np.zeros(actors, np.int32)


class MBarriers:
    """The mbarriers of a wave, by block slot and shared address."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.initialised: dict[tuple[int, int], MBarrier] = {}

    def reset(self) -> None:
        self.initialised = {}

    def init(self, thread: int, address: int, count: int) -> None:
        """A phase takes `count` arrivals."""
        machine = self.machine
        if address % SIZE:
            what = f"initialises an mbarrier at shared address {address:#x}, which is misaligned"
            machine.fault(Misaligned, what, thread, address)
        # A write, as far as races go: without a barrier after it, other threads race with it.
        space, where = machine.memory.shared_space, np.array([address])
        machine.memory.write(space, where, SIZE, np.array([thread]))
        slot = int(machine.geometry.block_slot[thread])
        key = (slot, address)
        index = sum(1 for other in self.initialised if other[0] == slot and other != key)
        if index >= MBARRIERS:
            machine.fault(EmulatorError, f"initialises more than {MBARRIERS} mbarriers", thread)
        geometry = machine.geometry
        in_cluster = slot % geometry.blocks_per_cluster
        actor = geometry.warps_per_cluster + in_cluster * MBARRIERS + index
        actors = machine.race.actors if machine.race else 0
        self.initialised[key] = MBarrier(count, actor, actors)

    def invalidate(self, thread: int, address: int) -> None:
        self.find(thread, address)
        del self.initialised[int(self.machine.geometry.block_slot[thread]), address]

    def find(self, thread: int, address: int) -> MBarrier:
        """The mbarrier that a thread uses, which it must know to be initialised."""
        machine = self.machine
        slot = int(machine.geometry.block_slot[thread])
        mbarrier = self.initialised.get((slot, address))
        if mbarrier is None:
            machine.distributed.refuse("an mbarrier", address, thread)
            what = f"uses an mbarrier at shared address {address:#x}, which was not initialised"
            machine.fault(EmulatorError, what, thread, address)
        if machine.race:
            space = machine.memory.shared_space
            offset = np.array([address - space.base + slot * space.size])
            machine.race.read(offset, SIZE, np.array([thread >> 5]))
        return mbarrier

    def arrive(
        self, mbarrier: MBarrier, count: int, clock: Array | None, thread: int | None = None
    ) -> None:
        """`count` arrivals, 0 to look only whether the phase is complete now."""
        if clock is not None:
            mbarrier.arriving = np.maximum(mbarrier.arriving, clock)
        mbarrier.pending -= count
        if mbarrier.pending < 0:
            what = f"arrives at an mbarrier more often than its count of {mbarrier.count}"
            self.machine.fault(EmulatorError, what, thread)
        if mbarrier.pending == 0 and mbarrier.bytes == 0:
            mbarrier.phase += 1
            mbarrier.pending = mbarrier.count
            self.machine.scheduler.version += 1
            if self.machine.race:
                mbarrier.clock = mbarrier.arriving.copy()
                mbarrier.clock[mbarrier.actor] = mbarrier.phase

    def report(self) -> list[str]:
        """For a deadlock: what every mbarrier still misses."""
        return [
            f"\n  the mbarrier at shared address {address:#x} (block slot {slot}) has completed "
            f"{m.phase} phases and misses {m.pending} of {m.count} arrivals and {m.bytes} bytes"
            for (slot, address), m in self.initialised.items()
        ]


@opcode("mbarrier")
def mbarrier(machine: Machine, instruction: Instruction) -> Operation:
    kind, operands = instruction.modifiers[0], instruction.operands
    if kind == "arrive_drop" or instruction.has("noComplete"):
        raise NotCovered("drops arrivals or does not complete, which the emulator does not know")
    place = next(i for i, o in enumerate(operands) if isinstance(o, Address))
    if kind in ("test_wait", "try_wait"):
        return _wait(machine, instruction, operands[0], operands[place], operands[place + 1])
    if kind not in ("init", "inval", "expect_tx", "complete_tx", "arrive"):
        raise NotCovered(f"is mbarrier.{kind}, which the emulator does not know")
    address = machine.memory.address(operands[place])
    count = operands[place + 1] if place + 1 < len(operands) else None
    step = _step(machine, instruction, operands[0], count)

    def run(at: Selection) -> None:
        for thread, where in zip(machine.geometry.select(at), address(at), strict=True):
            step(int(thread), int(where))

    return Operation(run)


def _step(
    machine: Machine, instruction: Instruction, result: Operand, count: Operand | None
) -> Callable[[int, int], None]:
    """What one thread does at one address."""
    kind, mbarriers, registers = instruction.modifiers[0], machine.mbarriers, machine.registers
    expects = kind == "expect_tx" or instruction.has("expect_tx")

    def number(thread: int, default: int = 1) -> int:
        return default if count is None else registers.scalar(count, thread)

    def step(thread: int, address: int) -> None:
        if kind == "init":
            mbarriers.init(thread, address, number(thread))
            return
        if kind == "inval":
            mbarriers.invalidate(thread, address)
            return
        target = mbarriers.find(thread, address)
        if expects:
            target.bytes += number(thread)
        elif kind == "complete_tx":
            target.bytes -= number(thread)
            mbarriers.arrive(target, 0, None, thread)
        if kind == "arrive":
            if isinstance(result, Register):  # the state token: the phase that is awaited
                registers.row(result)[thread] = target.phase
            clock = None
            if machine.race:
                clock = machine.race.depart(np.array([thread >> 5]))[thread >> 5]
            mbarriers.arrive(target, 1 if expects else number(thread), clock, thread)

    return step


def _wait(
    machine: Machine, instruction: Instruction, result: Operand, place: Operand, phase: Operand
) -> Operation:
    """test_wait looks once. try_wait suspends the thread; with a seed it now and then gives up."""
    parity, once = instruction.has("parity"), instruction.modifiers[0] == "test_wait"
    address = machine.memory.address(place)
    destination = machine.registers.destination(result, "pred")
    awaited = machine.registers.spread(phase, "u32" if parity else "u64")
    geometry, random = machine.geometry, machine.random

    def run(at: Selection) -> Array:
        threads, where = geometry.select(at), address(at)
        key = geometry.block_slot[threads] * (1 << 32) + where
        done = np.zeros(threads.size, bool)
        for same in np.unique(key):
            these = np.flatnonzero(key == same)
            _, first = np.unique(threads[these] >> 5, return_index=True)
            for i in these[first]:  # every warp must know that it was initialised
                target = machine.mbarriers.find(int(threads[i]), int(where[i]))
            wanted = awaited[threads[these]]
            done[these] = (target.phase & 1) != wanted if parity else target.phase > wanted
            if machine.race and done[these].any():
                machine.race.learn(np.unique(threads[these][done[these]] >> 5), target.clock)
        destination[threads] = done
        if once or (random is not None and random.random() < 0.05):
            return np.ones(threads.size, bool)
        if not done.all():
            i = int(np.argmin(done))
            word = f" with parity {int(awaited[threads[i]])}" if parity else ""
            machine.scheduler.detail = f"the mbarrier at shared address {int(where[i]):#x}{word}"
        return done

    return Operation(run, Kind.WAIT)
