"""Which threads execute next: groups of threads at one instruction, divergence, time.

Threads of a warp may be at different instructions; the group with the lowest program counter runs
first, so that the others catch up with it (reconvergence). Groups at the same instruction merge,
also across warps and blocks: one NumPy call then serves them all. With a seed, warps run one at a
time instead, in random order and for random numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Deadlock, Divergence, EmulatorError
from .geometry import Selection
from .operation import Kind, Operation
from .ptxtypes import Array

if TYPE_CHECKING:
    from .machine import Machine

QUANTUM = 100_000  # steps after which a group lets others run: spin loops must not starve them
FOREVER = 1 << 60

# Names looked up in every step.
PLAIN, BRANCH = Kind.PLAIN, Kind.BRANCH
count_nonzero = np.count_nonzero


class Group:
    """Threads at the same instruction.

    `at` is the selection that NumPy indexes with: a slice where possible, which copies nothing.
    `waits_for` is None for a group that can run; else the kind of thing it waits for ("barrier",
    "converge", or an opcode), with `since`, the scheduler's version when it last tried (None if
    trying again is pointless), and `detail` for the report of a deadlock.
    `turn` counts the quanta that the group used up.
    """

    __slots__ = ("at", "complete", "detail", "pc", "since", "threads", "turn", "waits_for", "warps")

    def __init__(self, scheduler: Scheduler, pc: int, threads: Array, turn: int = 0) -> None:
        self.pc, self.threads, self.turn = pc, threads, turn
        self.waits_for: str | None = None
        self.since: int | None = None
        self.detail = ""
        first, last = int(threads[0]), int(threads[-1])
        self.at: Selection = threads
        if threads.size == scheduler.machine.geometry.threads:
            self.at = None
        elif last - first + 1 == threads.size:
            self.at = slice(first, last + 1)
        self.count(scheduler)

    def count(self, scheduler: Scheduler) -> None:
        """How many warps are here, and whether each is here with all of its live threads."""
        here = np.bincount(self.threads >> 5, minlength=scheduler.live.size)
        some = here > 0
        self.warps = int(np.count_nonzero(some))
        self.complete = not (some & (here != scheduler.live)).any()

    def wait(self, kind: str, since: int | None, detail: str) -> Group:
        """Park the group."""
        self.waits_for, self.since, self.detail = kind, since, detail
        return self

    @property
    def warp(self) -> int:
        """The warp, where groups are of one warp (with a seed)."""
        return int(self.threads[0]) >> 5


class Scheduler:
    """Runs the decoded code, one wave of blocks after the other."""

    def __init__(self, machine: Machine, code: list[Operation], max_steps: int) -> None:
        self.machine, self.code, self.max_steps = machine, code, max_steps
        self.random = machine.random
        self.steps = self.warp_instructions = 0
        self.groups: list[Group] = []
        self.live: Array = np.zeros(machine.geometry.warps, np.int64)  # live threads of each warp
        self.events: list[Callable[[], None]] = []  # completions of asynchronous copies
        self.version = 0  # changes when a wait may have come true
        self.detail = ""  # what an operation that did not let all threads pass is waiting for

    # -- a wave

    def run_wave(self, alive: Array) -> None:
        """Run the threads until all have ended and all asynchronous copies have landed."""
        self.live = np.bincount(alive >> 5, minlength=self.machine.geometry.warps)
        self.events, self.version = [], 0
        parts = [alive]
        if self.random is not None:
            parts = [alive[alive >> 5 == warp] for warp in np.unique(alive >> 5)]
        self.groups = [Group(self, 0, part) for part in parts]
        while self.groups:
            if len(self.groups) > 1 or self.groups[0].waits_for:
                self.merge()
            ready = [
                g
                for g in self.groups
                if g.waits_for is None or (g.since is not None and g.since != self.version)
            ]
            if self.events and (not ready or self._now_and_then(0.1)):
                self.complete_one()
            elif ready:
                self.run_one(ready)
            else:
                self.deadlock()
        while self.events:
            self.complete_one()
        self.machine.current = None

    def _now_and_then(self, probability: float) -> bool:
        return self.random is not None and self.random.random() < probability

    def complete_one(self) -> None:
        """An asynchronous copy lands, as late as possible (with a seed: any of them, any time)."""
        index = 0 if self.random is None else int(self.random.integers(len(self.events)))
        self.events.pop(index)()

    def run_one(self, ready: list[Group]) -> None:
        """Choose a ready group and run it until it meets another one."""
        candidates = ready
        if self.random is not None:
            warp = ready[int(self.random.integers(len(ready)))].warp
            candidates = [g for g in ready if g.warp == warp]
        group = min(candidates, key=lambda g: (g.turn, g.pc))
        ahead = [g.pc for g in candidates if g is not group and g.pc > group.pc]
        group.waits_for = None
        self.run(group, min(ahead, default=FOREVER))

    def merge(self) -> None:
        """Join the groups at the same instruction; let waiting warps go that are complete again."""
        by_place: dict[Any, list[Group]] = {}
        for g in self.groups:
            key: Any = id(g)
            if g.waits_for in (None, "converge"):
                key = (g.pc, g.waits_for, 0 if self.random is None else g.warp)
            by_place.setdefault(key, []).append(g)
        self.groups = []
        for same in by_place.values():
            group = same[0]
            waits_for = group.waits_for
            if len(same) > 1:
                threads = np.sort(np.concatenate([g.threads for g in same]))
                group = Group(self, group.pc, threads, max(g.turn for g in same))
            if waits_for == "converge":
                self.split_warps(group)
            else:
                self.groups.append(group)

    def split_warps(self, group: Group) -> None:
        """Complete warps of a group may go on; the others wait for the rest of their threads."""
        warp = group.threads >> 5
        complete = (np.bincount(warp, minlength=self.live.size) == self.live)[warp]
        if complete.any():
            self.groups.append(Group(self, group.pc, group.threads[complete], group.turn))
        if not complete.all():
            rest = Group(self, group.pc, group.threads[~complete], group.turn)
            detail = "the other live threads of the warp, which has diverged"
            self.groups.append(rest.wait("converge", None, detail))

    # -- a group

    def run(self, group: Group, stop: int) -> None:
        """Execute the group from its instruction on, up to instruction `stop` at most."""
        code, machine, at, pc = self.code, self.machine, group.at, group.pc
        in_flight = machine.warpgroups.registers
        quantum = QUANTUM if self.random is None else int(self.random.integers(1, 40))
        steps = 0
        while steps < quantum:
            op = code[pc]
            machine.current = op.instruction
            steps += 1
            selected = at
            if op.predicate is not None:
                holds = op.predicate if at is None else op.predicate[at]
                if op.negated:
                    holds = ~holds
                count = count_nonzero(holds)
                if count < holds.size:
                    if not count:
                        pc += 1
                        group.pc = pc
                        continue
                    if op.kind is BRANCH:
                        self.fork(group, {pc + 1: ~holds, op.target: holds})
                        break
                    if op.together or op.kind is Kind.BARRIER:
                        self.fork_warps(op, group, pc, holds)
                        break
                    selected = group.threads[holds]
            if op.together and not group.complete:
                self.groups.remove(group)
                group.pc = pc
                self.split_warps(group)
                break
            if in_flight and not in_flight.keys().isdisjoint(op.rows):
                machine.warpgroups.check_registers(op, group.threads)
            if op.kind is PLAIN:
                op.run(selected)
                pc += 1
            elif op.kind is BRANCH:
                pc = op.target
            elif self.special(op, group, pc, selected):
                break
            else:
                pc += 1
            group.pc = pc
            if pc >= stop:
                break
        else:
            group.turn += self.random is None
        self.steps += steps
        self.warp_instructions += steps * group.warps
        if self.steps > self.max_steps:
            machine.fault(
                EmulatorError,
                f"has run for more than {self.max_steps} steps; is this loop endless? "
                "(max_steps of the Emulator sets the limit)",
            )

    def special(self, op: Operation, group: Group, pc: int, selected: Selection) -> bool:
        """The kinds of operation that can end or park threads; whether the group is gone."""
        if op.kind is Kind.WAIT:
            return self.try_to_pass(op, group, pc, selected)
        if op.kind is Kind.EXIT:
            self.exit(group, pc, self.machine.geometry.select(selected))
            return True
        if op.kind is Kind.JUMP:
            targets = np.full(self.machine.geometry.threads, pc + 1)
            targets[self.machine.geometry.select(selected)] = op.run(selected)
            here = targets[group.threads]
            self.fork(group, {int(target): here == target for target in np.unique(here)})
            return True
        return bool(op.run((group, pc)))  # a barrier

    def fork(self, group: Group, parts: dict[int, Array]) -> None:
        """The group splits: program counter -> which of its threads go there."""
        self.groups.remove(group)
        self.groups += [
            Group(self, pc, group.threads[part], group.turn) for pc, part in parts.items()
        ]

    def fork_warps(self, op: Operation, group: Group, pc: int, holds: Array) -> None:
        """An instruction that only some warps execute: they come back to it by themselves."""
        here, chosen = (
            np.bincount(threads >> 5, minlength=self.live.size)
            for threads in (group.threads, group.threads[holds])
        )
        if op.together and ((chosen > 0) & (chosen < here)).any():
            self.diverged(group.threads[holds])
        self.fork(group, {pc + 1: ~holds, pc: holds})

    def try_to_pass(self, op: Operation, group: Group, pc: int, selected: Selection) -> bool:
        """A wait: the threads whose condition holds go on, the others try again later."""
        passes = op.run(selected)
        if passes.all():
            return False
        threads = self.machine.geometry.select(selected)
        waiting = threads[~passes]
        going = np.setdiff1d(group.threads, waiting)
        self.groups.remove(group)
        if going.size:
            self.groups.append(Group(self, pc + 1, going, group.turn))
        parked = Group(self, pc, waiting, group.turn)
        self.groups.append(parked.wait(op.instruction.opcode, self.version, self.detail))
        return True

    def exit(self, group: Group, pc: int, ending: Array) -> None:
        """Threads end: nobody waits for them any more."""
        self.live -= np.bincount(ending >> 5, minlength=self.live.size)
        self.groups.remove(group)
        rest = np.setdiff1d(group.threads, ending)
        if rest.size:
            self.groups.append(Group(self, pc + 1, rest, group.turn))
        for other in self.groups:
            other.count(self)
        self.machine.barriers.threads_ended()
        self.machine.cluster_barriers.threads_ended(ending)

    # -- reports

    def diverged(self, threads: Array) -> None:
        self.machine.fault(
            Divergence,
            "executes a warp-wide instruction under a predicate that does not hold in all threads "
            "of its warp (divergence)",
            int(threads[0]),
        )

    def deadlock(self) -> None:
        """Nothing can run. A warp that waits for its own other threads is a divergence fault."""
        geometry, lines = self.machine.geometry, []
        for group in self.groups[:12]:
            instruction = self.code[group.pc].instruction
            thread = int(group.threads[0])
            warps = np.unique(geometry.in_block[group.threads] >> 5)[:8].tolist()
            lines.append(
                f"\n  {group.threads.size} threads, among them {geometry.thread_index(thread)} of "
                f"block {geometry.block_index(thread)}, in warps {warps}, wait for {group.detail} "
                f"at PTX line {instruction.line}: `{instruction.text}`"
            )
        lines += self.machine.mbarriers.report()
        diverged = [g for g in self.groups if g.waits_for == "converge"]
        culprit = (diverged or self.groups)[0]
        self.machine.current = self.code[culprit.pc].instruction
        self.machine.fault(
            Divergence if diverged else Deadlock,
            f"is in a deadlock: no thread can go on.{''.join(lines)}\n ",
            int(culprit.threads[0]),
        )
