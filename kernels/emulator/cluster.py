"""barrier.cluster: the barrier of all blocks of a cluster (PTX ISA 9.7.13.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .geometry import WARP, Selection
from .instruction import Instruction
from .operation import Kind, NotCovered, Operation
from .ptxtypes import Array

if TYPE_CHECKING:
    from .machine import Machine


class ClusterBarriers:
    """The barriers of the clusters of a wave.

    A phase ends when all live threads of the cluster have arrived. `awaited` is the phase of a
    thread's last arrival until the thread has waited for it, and else 0; `completed` counts the
    phases of each cluster. `arriving` collects the clocks of the arrivals of the present phase,
    `clock` is what a thread that saw the last one complete has learnt; `reaching` and `reached`
    are the same with relaxed arrivals, which order nothing, but come after what a warp has read.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        geometry = machine.geometry
        self.columns = geometry.slot * geometry.blocks_per_cluster
        self.awaited = np.zeros(geometry.threads, np.int64)
        self.completed = np.zeros(geometry.clusters, np.int64)
        self.met = np.zeros(geometry.warps, bool)  # warps that have seen a phase end
        actors = machine.race.actors if machine.race else 0
        self.arriving = np.zeros((geometry.clusters, actors), np.int32)
        self.clock = np.zeros((geometry.clusters, actors), np.int32)
        self.reaching, self.reached = np.zeros_like(self.arriving), np.zeros_like(self.clock)

    def reset(self) -> None:
        for state in (self.awaited, self.completed, self.met, self.arriving, self.clock,
                      self.reaching, self.reached):
            state[:] = 0

    def arrive(self, threads: Array, releases: bool) -> None:
        """releases: what the threads did so far is before what those do that wait."""
        again = self.awaited[threads] > 0
        if again.any():
            what = "arrives at the barrier of its cluster again, with no wait between the two"
            self.machine.fault(EmulatorError, what, int(threads[np.argmax(again)]))
        cluster = threads // self.columns
        self.awaited[threads] = self.completed[cluster] + 1
        if self.machine.race:
            for warp, clock in self.machine.race.depart(np.unique(threads >> 5)).items():
                for arriving in (self.arriving, self.reaching) if releases else (self.reaching,):
                    phase = arriving[warp * WARP // self.columns]
                    np.maximum(phase, clock, out=phase)
        for number in np.unique(cluster).tolist():
            self.try_to_complete(number)

    def arrivals(self, cluster: int) -> tuple[int, int]:
        """How many threads of the cluster are at its barrier, and how many are alive."""
        part = slice(cluster * self.columns, (cluster + 1) * self.columns)
        arrived = np.count_nonzero(self.awaited[part] > self.completed[cluster])
        warps = slice(part.start // WARP, part.stop // WARP)
        return int(arrived), int(self.machine.scheduler.live[warps].sum())

    def try_to_complete(self, cluster: int) -> None:
        """The phase ends if all live threads have arrived."""
        arrived, live = self.arrivals(cluster)
        if arrived and arrived == live:
            self.completed[cluster] += 1
            self.clock[cluster] = self.arriving[cluster]
            self.reached[cluster] = self.reaching[cluster]
            self.machine.scheduler.version += 1

    def wait(self, threads: Array) -> Array:
        """Whether each thread may pass."""
        absent = self.awaited[threads] == 0
        if absent.any():
            what = "waits at the barrier of its cluster, at which it has not arrived"
            self.machine.fault(EmulatorError, what, int(threads[np.argmax(absent)]))
        cluster = threads // self.columns
        passes: Array = self.awaited[threads] <= self.completed[cluster]
        self.awaited[threads[passes]] = 0
        warps = np.unique(threads[passes] >> 5)
        self.met[warps] = True  # so that all blocks have started
        if self.machine.race:
            for warp in warps.tolist():
                number = warp * WARP // self.columns
                self.machine.race.learn(warp, self.clock[number])
                self.machine.race.outlive(warp, self.reached[number])
        if not passes.all():
            arrived, live = self.arrivals(int(cluster[np.argmin(passes)]))
            self.machine.scheduler.detail = (
                f"the barrier of the cluster, at which {arrived} of {live} live threads are"
            )
        return passes

    def threads_ended(self, threads: Array) -> None:
        """Threads that have ended are not waited for; the last of a block ends its memory."""
        if self.machine.geometry.blocks_per_cluster == 1 and not self.awaited.any():
            return
        self.awaited[threads] = 0
        if self.machine.race:
            for slot in np.unique(self.machine.geometry.block_slot[threads]).tolist():
                if self.has_ended(slot):
                    self.machine.race.end_block(slot)
        for number in np.unique(threads // self.columns).tolist():
            self.try_to_complete(number)

    def has_ended(self, slot: int) -> bool:
        """Whether all threads of a block have."""
        per_block = self.machine.geometry.warps_per_block
        live = self.machine.scheduler.live[slot * per_block : (slot + 1) * per_block]
        return not live.any()


def cluster_barrier(machine: Machine, instruction: Instruction) -> Operation:
    """barrier.cluster.arrive{.release, .relaxed}{.aligned}, .wait{.acquire}{.aligned}"""
    kind, *modifiers = instruction.modifiers[1:]
    orders = {"arrive": ("release", "relaxed"), "wait": ("acquire",)}
    if kind not in orders or not set(modifiers) <= {*orders[kind], "aligned"}:
        raise NotCovered("is a barrier.cluster that the emulator does not know")
    barriers, select = machine.cluster_barriers, machine.geometry.select
    aligned = "aligned" in modifiers
    if kind == "wait":
        return Operation(lambda at: barriers.wait(select(at)), Kind.WAIT, together=aligned)

    def arrive(at: Selection) -> None:
        barriers.arrive(select(at), releases="relaxed" not in modifiers)

    return Operation(arrive, together=aligned)
