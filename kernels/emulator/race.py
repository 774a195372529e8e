"""Race detection in shared memory with vector clocks.

Every warp counts its own epochs and knows, of every other warp, the last epoch that a barrier has
ordered before its own present: row w of `clock`. A granule of shared memory remembers who wrote it
and when, and when each warp last read it. An access is a race when the other access is later than
what the accessing warp knows of the other warp. Asynchronous copies are actors of their own, one
for each mbarrier, whose epochs are the phases of the mbarrier. The warps and mbarriers that can
meet are those of one cluster, which is one block where a launch has no clusters.

(FastTrack: Flanagan and Freund, PLDI 2009, with epochs for writes and full clocks for reads.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import Race
from .geometry import WARP, Geometry
from .ptxtypes import Array

if TYPE_CHECKING:
    from .machine import Machine

MBARRIERS = 64  # per block
UNTIL_FURTHER_NOTICE = np.int32(2**31 - 1)  # an epoch that nobody knows: the read goes on


class RaceDetector:
    """granule: bytes that share one record, the smallest access that the kernel makes.

    Granule numbers run over the shared memory of all blocks of the wave; warps likewise.
    size: of the shared memory of a block.
    """

    def __init__(self, machine: Machine, geometry: Geometry, granule: int, size: int) -> None:
        self.machine, self.granule = machine, granule
        self.warps_per_block = geometry.warps_per_block
        self.warps_per_cluster = geometry.warps_per_cluster
        self.warps = geometry.warps
        self.granules_per_block = size // granule
        self.granules_per_cluster = self.granules_per_block * geometry.blocks_per_cluster
        count = self.granules_per_block * geometry.slots
        self.actors = self.warps_per_cluster + MBARRIERS * geometry.blocks_per_cluster
        self.clock = np.zeros((self.warps, self.actors), np.int32)
        self.over = np.zeros_like(self.clock)  # as clock, of reads in a memory that may now end
        self.writer = np.zeros(count, np.int16)
        self.written = np.zeros(count, np.int32)
        self.read_by = np.zeros((count, self.warps_per_cluster), np.int32)
        self.updated_by: Array | None = None  # like read_by, of atomics; made by the first of them
        self.generic = np.zeros(count, bool)  # written through the generic proxy, not fenced since

    def reset(self) -> None:
        self.clock[:] = 0
        self.clock[np.arange(self.warps), np.arange(self.warps) % self.warps_per_cluster] = 1
        for record in (self.over, self.writer, self.written, self.read_by, self.generic):
            record[:] = 0
        self.updated_by = None

    # -- order between warps

    def now(self, warps: Array) -> Array:
        """The present epochs of the warps."""
        epochs: Array = self.clock[warps, warps % self.warps_per_cluster]
        return epochs

    def join(self, warps: Array) -> None:
        """A barrier: what each of the warps did is before what the others will do."""
        self.clock[warps] = self.clock[warps].max(0)
        self.clock[warps, warps % self.warps_per_cluster] += 1

    def depart(self, warps: Array) -> dict[int, Array]:
        """The clocks of warps that announce what they did so far, and go on."""
        clocks = {int(w): self.clock[w].copy() for w in warps}
        self.clock[warps, warps % self.warps_per_cluster] += 1
        return clocks

    def learn(self, warps: Array | int, clock: Array) -> None:
        """What happened before `clock` is before what the warps will do."""
        self.clock[warps] = np.maximum(self.clock[warps], clock)

    def outlive(self, warp: int, clock: Array) -> None:
        """What was read before `clock` is over: its values were there."""
        self.over[warp] = np.maximum(self.over[warp], clock)

    # -- accesses

    def granules(self, offset: Array, size: int) -> Array:
        """The granules [access, k] of accesses of `size` bytes."""
        first: Array = (offset // self.granule)[:, None]
        return first + np.arange(size // self.granule) if size > self.granule else first

    def read(self, offset: Array, size: int, warps: Array) -> None:
        granules, warp = self.granules(offset, size), warps[:, None]
        self._after_writes(granules, warp, "reads")
        if self.updated_by is not None:
            self._after(self.updated_by, granules, warp, "reads", "updated")
        self.read_by[granules, warp % self.warps_per_cluster] = self.now(warp)

    def update(self, offset: Array, size: int, warps: Array) -> None:
        """An atomic operation: ordered among its like, but not with reads and writes."""
        granules, warp = self.granules(offset, size), warps[:, None]
        self._after_writes(granules, warp, "updates")
        self._after(self.read_by, granules, warp, "updates", "read")
        if self.updated_by is None:
            self.updated_by = np.zeros_like(self.read_by)
        self.updated_by[granules, warp % self.warps_per_cluster] = self.now(warp)
        self.generic[granules] = True

    def write(
        self,
        offset: Array,
        size: int,
        warps: Array,
        actor: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """actor and epoch: of the asynchronous copy that writes in the name of the warps."""
        granules, warp = self.granules(offset, size), warps[:, None]
        self._after_writes(granules, warp, "writes")
        self._after(self.read_by, granules, warp, "writes", "read")
        if self.updated_by is not None:
            self._after(self.updated_by, granules, warp, "writes", "updated")
            self.updated_by[granules] = 0
        writer = warp % self.warps_per_cluster if actor is None else actor
        self.writer[granules] = writer
        self.written[granules] = self.now(warp) if epoch is None else epoch
        unknown = self.writer[granules] != writer  # two warps of this very instruction
        if np.count_nonzero(unknown):
            actor = int(self.writer[granules[unknown][0]])
            self._report(granules, warp, unknown, "writes", "written", actor)
        self.read_by[granules] = 0
        self.generic[granules] = actor is None

    def rewrite(self, offset: Array, size: int, epochs: Array) -> None:
        """A write made earlier takes effect now: its epoch is a later one."""
        self.written[self.granules(offset, size)] = epochs[:, None]

    def keep_reading(self, offset: Array, size: int, warp: int) -> None:
        """An asynchronous operation of the warp reads from now on."""
        granules = self.granules(offset, size)
        self.read_by[granules, warp % self.warps_per_cluster] = UNTIL_FURTHER_NOTICE

    def end_reading(self, offset: Array, size: int, warp: int, epoch: int) -> None:
        """That operation is over, and counts as a read of this epoch."""
        self.read_by[self.granules(offset, size), warp % self.warps_per_cluster] = epoch

    def _after_writes(self, granules: Array, warp: Array, does: str) -> None:
        """The last write must be before what the warps do now."""
        unknown = self.written[granules] > self.clock[warp, self.writer[granules]]
        if np.count_nonzero(unknown):
            actor = int(self.writer[granules[unknown][0]])
            self._report(granules, warp, unknown, does, "written", actor)

    def _after(self, record: Array, granules: Array, warp: Array, does: str, was: str) -> None:
        """So must be the accesses of every warp in the record."""
        later: Array = record[granules] > self.clock[warp, : self.warps_per_cluster]
        if np.count_nonzero(later):
            actor = int(np.argwhere(later)[0][-1])
            self._report(granules, warp, np.any(later, -1), does, was, actor)

    def _report(
        self, granules: Array, warps: Array, unknown: Array, does: str, was: str, actor: int
    ) -> None:
        """The first access that is marked unknown is a race with the actor."""
        i, j = np.argwhere(unknown)[0]
        offset, warp = int(granules[i, j]) * self.granule, int(warps[i, 0])
        place = self.machine.shared.place(offset, warp)
        self.machine.fault(
            Race,
            f"{does} {place} in warp {warp % self.warps_per_block}: {self._name(actor, warp)} "
            f"has {was} it, and no barrier orders the two (race)",
            warp * WARP,
            self.machine.shared.address(offset),
        )

    def _name(self, actor: int, warp: int) -> str:
        """An actor of the warp's cluster, as the warp's block would call it."""
        if actor >= self.warps_per_cluster:
            return "an asynchronous copy"
        other = warp - warp % self.warps_per_cluster + actor
        name = f"warp {other % self.warps_per_block}"
        if other // self.warps_per_block == warp // self.warps_per_block:
            return name
        return f"{name} of block {self.machine.geometry.block_index(other * WARP)}"

    # -- the end of a block of a cluster

    def end_block(self, slot: int) -> None:
        """The shared memory of a block ends with it: what other blocks do there comes before."""
        warps = np.arange(self.warps_per_block) + slot * self.warps_per_block
        known = self.clock[warps].max(0)[: self.warps_per_cluster]  # by any of the threads
        known[warps % self.warps_per_cluster] = UNTIL_FURTHER_NOTICE
        part = slice(slot * self.granules_per_block, (slot + 1) * self.granules_per_block)
        over = np.maximum(known, self.over[warps].max(0)[: self.warps_per_cluster])
        self._before_the_end(self.read_by[part] > over, slot, "read")
        if self.updated_by is not None:
            self._before_the_end(self.updated_by[part] > known, slot, "updated")
        by_warp = self.writer[part, None] == np.arange(self.warps_per_cluster)
        self._before_the_end(by_warp & (self.written[part, None] > known), slot, "written")

    def _before_the_end(self, later: Array, slot: int, was: str) -> None:
        """later: [granule, warp], accesses that the block does not know of."""
        if not later.any():
            return
        granule, actor = np.argwhere(later)[0].tolist()
        warp = slot * self.warps_per_block
        address = self.machine.shared.address(granule * self.granule)
        self.machine.fault(
            Race,
            f"is of a block that ends: {self._name(actor, warp)} has {was} its shared address "
            f"{address:#x}, and no barrier orders the two (race)",
            warp * WARP,
            address,
        )

    # -- the asynchronous proxy (PTX ISA 8.6, fence.proxy.async)

    def check_proxy(self, offset: Array, size: int, warps: Array) -> None:
        """wgmma and TMA stores see generic writes only after fence.proxy.async."""
        unfenced = self.generic[self.granules(offset, size)].any(1)
        if unfenced.any():
            i = int(np.argmax(unfenced))
            address = self.machine.shared.address(int(offset[i]))
            self.machine.fault(
                Race,
                f"reads shared address {address:#x} through the asynchronous proxy, but the last "
                "write was an ordinary one with no fence.proxy.async after it (race)",
                int(warps[i]) * WARP,
                address,
            )

    def fence_proxy(self, warps: Array) -> None:
        """Writes that the fencing warp knows of are fenced."""
        for warp in warps:
            start = int(warp) // self.warps_per_cluster * self.granules_per_cluster
            part = slice(start, start + self.granules_per_cluster)
            self.generic[part] &= self.written[part] > self.clock[warp, self.writer[part]]
