"""Every byte of shared memory is never written, written, or owned by a copy in flight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import AsyncNotWaited, UninitialisedRead
from .geometry import WARP
from .ptxtypes import U8, UINT, Array
from .race import RaceDetector
from .space import Space

if TYPE_CHECKING:
    from .machine import Machine

UNWRITTEN, WRITTEN, CP_ASYNC, TMA = 0, 1, 2, 3
EACH_BYTE = 0x0101010101010101
_IN_FLIGHT = {
    CP_ASYNC: "bytes of a cp.async that was not waited for",
    TMA: "bytes of a TMA copy still in flight",
}


class SharedMemory:
    """The shared space of all blocks of a wave, with its shadow state and race detector.

    Offsets are into the bytes of the whole wave; a warp is named by its number in the wave.
    """

    def __init__(self, machine: Machine, space: Space, race: RaceDetector | None) -> None:
        self.machine, self.space, self.race = machine, space, race
        self.state = np.zeros(space.bytes.size, U8)
        self.words: dict[int, Array] = {n: self.state.view(t) for n, t in UINT.items()}
        self.in_flight = 0  # accesses of copies that have not landed

    def reset(self) -> None:
        self.state[:] = UNWRITTEN
        self.space.bytes[:] = 0xAA
        self.in_flight = 0
        if self.race:
            self.race.reset()

    def chunks(self, size: int) -> Array:
        """The memory in rows of `size` bytes."""
        return self.space.bytes.reshape(-1, size)

    def address(self, offset: int) -> int:
        """The address, within its block, of an offset."""
        return offset % self.space.size + self.space.base

    def place(self, offset: int, warp: int) -> str:
        """The same in words for a warp, which may be one of another block of the cluster."""
        geometry, slot = self.machine.geometry, offset // self.space.size
        name = f"shared address {self.address(offset):#x}"
        if slot == warp // geometry.warps_per_block:
            return name
        return f"{name} of block {geometry.block_index(slot * geometry.slot)}"

    def read(self, offset: Array, size: int, warps: Array) -> None:
        """Check reads of `size` bytes by the warps."""
        if size <= 8:
            fine = self.words[size][offset // size] == UINT[size](EACH_BYTE & (256**size - 1))
        else:
            rows = self.words[8].reshape(-1, size // 8)
            fine = (rows[offset // size] == np.uint64(EACH_BYTE)).all(-1)
        if np.count_nonzero(fine) < fine.size:
            i = int(np.argmin(fine))
            self._bad_read(int(offset[i]), size, int(warps[i]))
        if self.race:
            self.race.read(offset, size, warps)

    def _bad_read(self, offset: int, size: int, warp: int) -> None:
        state = self.state[offset : offset + size]
        first = int(np.argmax(state != WRITTEN))
        place = self.place(offset + first, warp)
        if state[first] == UNWRITTEN:
            error: Any = UninitialisedRead
            what = f"reads {place}, which was never written"
        else:
            error = AsyncNotWaited
            what = f"reads {place}: {_IN_FLIGHT[int(state[first])]}"
        self.machine.fault(error, what, warp * WARP, self.address(offset + first))

    def write(
        self, offset: Array, size: int, warps: Array, state: int = WRITTEN, **race: int
    ) -> None:
        """Check and record writes of `size` bytes by the warps."""
        index = offset // size
        if self.in_flight:
            before = self.state.reshape(-1, size)[index]
            owned = (before > WRITTEN).any(1)
            if owned.any():
                i = int(np.argmax(owned))
                warp, address = int(warps[i]), self.address(int(offset[i]))
                place = self.place(int(offset[i]), warp)
                what = f"writes {place}: {_IN_FLIGHT[int(before[i].max())]}"
                self.machine.fault(AsyncNotWaited, what, warp * WARP, address)
        if size <= 8:
            self.words[size][index] = UINT[size](EACH_BYTE * state & (256**size - 1))
        else:
            self.words[8].reshape(-1, size // 8)[index] = np.uint64(EACH_BYTE * state)
        if self.race:
            self.race.write(offset, size, warps, **race)

    def update(self, offset: Array, size: int, warps: Array) -> None:
        """Check and record atomic operations, which read and write in one."""
        state = self.state[offset]
        if (state != WRITTEN).any():
            i = int(np.argmax(state != WRITTEN))
            self._bad_read(int(offset[i]), size, int(warps[i]))
        if self.race:
            self.race.update(offset, size, warps)

    def land(self, offset: Array, data: Array) -> None:
        """An asynchronous copy is done: rows of data become visible at the offsets."""
        size = data.shape[1]
        self.chunks(size)[offset // size] = data
        self.state.reshape(-1, size)[offset // size] = WRITTEN
