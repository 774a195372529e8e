"""bar and barrier: sync, arrive, red (PTX ISA 9.7.13.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .cluster import cluster_barrier
from .errors import EmulatorError
from .instruction import Immediate, Instruction, Operand
from .operation import Kind, NotCovered, Operation, full_mask, nothing, opcode
from .ptxtypes import U32, Array

if TYPE_CHECKING:
    from .machine import Machine
    from .scheduler import Group

Reduction = Callable[[Array, Array], None]  # (threads that arrived, threads that wait)


@dataclass
class Barrier:
    """A barrier of one block between its first arrival and its completion."""

    expected: int | None  # threads; None: all live threads of the block
    reduction: Reduction | None
    arrived: list[Array] = field(default_factory=list)
    parked: list[Group] = field(default_factory=list)
    departed: list[Array] = field(default_factory=list)  # clocks of warps that did not wait

    @property
    def arrivals(self) -> int:
        return sum(threads.size for threads in self.arrived)


class Barriers:
    """The barriers in use, by block slot and number."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.open: dict[tuple[int, int], Barrier] = {}

    def reset(self) -> None:
        self.open = {}

    def arrive(
        self,
        group: Group,
        pc: int,
        number: int,
        expected: int | None,
        wait: bool,
        reduction: Reduction | None,
    ) -> bool:
        """The threads of a group reach a barrier; whether the group has been parked."""
        machine = self.machine
        scheduler, slots = machine.scheduler, machine.geometry.block_slot[group.threads]
        everyone = group.threads.size == scheduler.live.sum() and machine.random is None
        if wait and expected is None and not self.open and everyone:
            for slot in np.unique(slots):  # complete at once: the usual case, nothing to park
                threads = group.threads[slots == slot]
                self.complete(threads, threads, reduction)
            return False
        if wait:
            scheduler.groups.remove(group)
        for slot in np.unique(slots):
            key, threads = (int(slot), number), group.threads[slots == slot]
            barrier = self.open.setdefault(key, Barrier(expected, reduction))
            if barrier.expected != expected:
                machine.fault(
                    EmulatorError,
                    f"arrives at barrier {number} with thread count {expected or 'of the block'}, "
                    f"but others gave {barrier.expected or 'that of the block'}",
                    int(threads[0]),
                )
            barrier.arrived.append(threads)
            if wait:
                parked = type(group)(scheduler, pc, threads, group.turn)
                barrier.parked.append(parked.wait("barrier", None, f"barrier {number}"))
                scheduler.groups.append(parked)
            elif machine.race:
                barrier.departed += machine.race.depart(np.unique(threads >> 5)).values()
            self.try_to_complete(key)
        return wait

    def try_to_complete(self, key: tuple[int, int]) -> None:
        """Let the waiting threads go if all that are expected have arrived."""
        slot, number = key
        barrier = self.open[key]
        per_block = self.machine.geometry.warps_per_block
        live = self.machine.scheduler.live[slot * per_block : (slot + 1) * per_block]
        expected = barrier.expected or int(live.sum())
        arrivals = barrier.arrivals
        if arrivals < expected or not arrivals:
            return
        if arrivals > expected:
            self.machine.fault(
                EmulatorError,
                f"is one of {arrivals} threads at barrier {number}, which expects {expected}",
                int(barrier.arrived[-1][0]),
            )
        del self.open[key]
        waiting = [group.threads for group in barrier.parked]
        nobody = np.zeros(0, np.int64)
        self.complete(
            np.concatenate(barrier.arrived),
            np.concatenate(waiting) if waiting else nobody,
            barrier.reduction,
            barrier.departed,
        )
        for group in barrier.parked:
            group.waits_for = None
            group.pc += 1

    def complete(
        self,
        arrived: Array,
        waiting: Array,
        reduction: Reduction | None,
        departed: Sequence[Array] = (),
    ) -> None:
        """What a barrier does besides waiting: order accesses, and reduce."""
        if self.machine.race and waiting.size:
            warps = np.unique(waiting >> 5)
            for clock in departed:
                self.machine.race.learn(warps, clock)
            self.machine.race.join(warps)
        if reduction:
            reduction(arrived, waiting)

    def threads_ended(self) -> None:
        """Threads that have ended are not waited for."""
        for key in list(self.open):
            self.try_to_complete(key)


@opcode("bar", "barrier")
def bar(machine: Machine, instruction: Instruction) -> Operation:
    """bar{.warp}.sync, bar.arrive, bar.red.popc / .and / .or; barrier.cluster is in cluster.py

    bar, and barrier with .aligned, need whole warps; to barrier, threads may come one by one.
    """
    if instruction.modifiers[0] == "cluster":
        return cluster_barrier(machine, instruction)
    modifiers = [m for m in instruction.modifiers if m not in ("cta", "aligned")]
    if modifiers[0] == "warp":
        return Operation(nothing, together=full_mask(instruction.operands[0]))
    if modifiers[0] not in ("sync", "arrive", "red"):
        raise NotCovered(f"is bar.{modifiers[0]}, which the emulator does not know")
    operands, reduction = list(instruction.operands), None
    if modifiers[0] == "red":
        reduction = _reduction(machine, modifiers[1], operands.pop(0), operands.pop())
    number_of, *count_of = operands or [Immediate(0)]

    settings = [machine.registers.spread(operand, "u32") for operand in (number_of, *count_of)]
    wait = modifiers[0] != "arrive"

    def arrive(group: Group, pc: int) -> bool:
        number, *expected = (int(setting[group.threads[0]]) for setting in settings)
        count = expected[0] if expected else None
        return machine.barriers.arrive(group, pc, number, count, wait, reduction)

    def run(arrival: tuple[Group, int]) -> bool:
        group, pc = arrival
        values = np.stack([setting[group.threads] for setting in settings])
        if (values == values[:, :1]).all():
            return arrive(group, pc)
        kinds, kind = np.unique(values, axis=1, return_inverse=True)
        machine.scheduler.groups.remove(group)
        for i in range(kinds.shape[1]):  # warps at one instruction may come to several barriers
            part = type(group)(machine.scheduler, pc, group.threads[kind == i], group.turn)
            machine.scheduler.groups.append(part)
            if not arrive(part, pc):
                part.pc = pc + 1
        return True

    aligned = instruction.opcode == "bar" or instruction.has("aligned")
    return Operation(run, Kind.BARRIER, together=aligned)


def _reduction(machine: Machine, name: str, result: Operand, operand: Operand) -> Reduction:
    predicate, negated = machine.registers.predicate(operand)
    if name == "popc":
        destination = machine.registers.destination(result, "u32")
    else:
        destination = machine.registers.destination(result, "pred")
    reduce: Any = {"popc": lambda p: U32(p.sum()), "and": np.all, "or": np.any}[name]

    def reduction(arrived: Array, waiting: Array) -> None:
        destination[waiting] = reduce(predicate[arrived] ^ negated)

    return reduction
