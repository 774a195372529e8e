"""wgmma in flight: groups, completion, and who may touch what meanwhile.

A wgmma is one operation of four warps: it is complete once all four have issued it and waited.
It reads its operands in shared memory and writes its registers as late as the program allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import AsyncNotWaited, Divergence
from .geometry import WARP
from .instruction import Instruction
from .operation import Operation
from .ptxtypes import U32, Array
from .shared import WRITTEN
from .tensorcore import decode

if TYPE_CHECKING:
    from .machine import Machine

CHUNK = 16


@dataclass(frozen=True)
class Tile:
    """An operand in shared memory: offsets of its 16-byte chunks [row, chunk]."""

    offset: Array
    transposed: bool


@dataclass(eq=False)
class Product:
    """One executed wgmma.mma_async of some warps; dicts are by warp."""

    instruction: Instruction
    kind: str
    accumulator: np.dtype[Any]
    destination: Array  # rows of 32-bit registers
    rows: Array  # of D, for [register, lane]
    columns: Array
    accumulate: dict[int, bool]  # scale-d: add to what the registers hold
    clocks: dict[int, Array]
    left: dict[int, Array] = field(default_factory=dict)  # A from registers
    tiles: dict[int, tuple[Tile | None, Tile]] = field(default_factory=dict)
    values: dict[int, Array] = field(default_factory=dict)  # A @ B.T, once it has been computed
    retired: set[int] = field(default_factory=set)  # warps whose registers have been written


Peers = dict[int, Product]  # of the up to four warps of one wgmma


class Warpgroups:
    """The products in flight, in the groups of each warp."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.registers: dict[int, int] = {}  # rows in flight -> by how many products
        self.reset()

    def reset(self) -> None:
        self.registers.clear()
        self.groups: dict[int, list[list[tuple[Product, Peers]]]] = {}  # by warp; the last is open
        self.executions: dict[tuple[int, int, int], Peers] = {}
        self.issued: Array = np.zeros(self.machine.geometry.warps, np.int64)

    def of(self, warp: int) -> list[list[tuple[Product, Peers]]]:
        return self.groups.setdefault(warp, [[]])

    def commit(self, threads: Array) -> None:
        for warp in np.unique(threads >> 5).tolist():
            self.of(warp).append([])

    def issue(self, product: Product, warps: Array) -> None:
        """The warps start a product, alone or together with others of their warpgroup."""
        machine, per_block = self.machine, self.machine.geometry.warps_per_block
        for warp in warps.tolist():
            for tile in product.tiles[warp]:
                if tile is not None:
                    self.start_reading(tile, warp)
            place = (warp // per_block, warp % per_block // 4, int(self.issued[warp]))
            peers = self.executions.setdefault(place, {})
            line = product.instruction.line
            if any(other.instruction.line != line for other in peers.values()):
                what = "issues another wgmma than the other warps of its warpgroup (divergence)"
                machine.fault(Divergence, what, warp * WARP)
            peers[warp] = product
            self.of(warp)[-1].append((product, peers))
        for row in product.destination.tolist():
            self.registers[row] = self.registers.get(row, 0) + 1
        self.issued[warps] += 1
        machine.scheduler.version += 1
        if machine.random is not None and machine.random.random() < 0.5:
            fetched: dict[int, Array] = {}
            for warp in warps.tolist():  # hardware may be as early as this
                self.compute(product, warp, fetched)

    def start_reading(self, tile: Tile, warp: int) -> None:
        """The bytes must be there now, and must stay until the product is complete."""
        offset, race = tile.offset.ravel(), self.machine.race
        warps = np.full(offset.size, warp)
        self.machine.shared.read(offset, CHUNK, warps)
        if race:
            race.check_proxy(offset, CHUNK, warps)
            race.keep_reading(offset, CHUNK, warp)

    def compute(self, product: Product, warp: int, fetched: dict[int, Array]) -> None:
        """Read the operands as they are now and multiply; fetched: B by id of its tile."""
        if warp in product.values or warp in product.retired:
            return
        left, right = product.tiles[warp]
        if id(right) not in fetched:
            fetched[id(right)] = self.fetch(right, product.kind)
        a = product.left[warp] if left is None else self.fetch(left, product.kind)
        product.values[warp] = a @ fetched[id(right)].T
        race = self.machine.race
        if race:
            epoch = int(product.clocks[warp][warp % self.machine.geometry.warps_per_cluster])
            for tile in (left, right):
                if tile is not None:
                    race.end_reading(tile.offset.ravel(), CHUNK, warp, epoch)

    def fetch(self, tile: Tile, kind: str) -> Array:
        """The operand as [row, k]."""
        shared = self.machine.shared
        state = shared.state[tile.offset.ravel()]
        if (state != WRITTEN).any():
            address = shared.address(int(tile.offset.ravel()[np.argmax(state != WRITTEN)]))
            what = f"let an operand of wgmma at shared address {address:#x} change before "
            self.machine.fault(AsyncNotWaited, f"{what}wgmma.wait_group", None, address)
        chunks = shared.chunks(CHUNK)[tile.offset // CHUNK]
        values = decode(chunks.reshape(len(tile.offset), -1), kind)
        return values.T if tile.transposed else values

    def wait(self, threads: Array, keep: int) -> Array:
        """wgmma.wait_group: whether each thread may pass: all but `keep` groups are complete."""
        warps = np.unique(threads >> 5)
        due = {
            warp: [entry for group in self.of(warp)[: self.surplus(warp, keep)] for entry in group]
            for warp in warps.tolist()
        }
        passes = np.array([all(len(peers) == 4 for _, peers in due[w]) for w in warps.tolist()])
        done: dict[Product, list[int]] = {}
        for warp in warps[passes].tolist():
            del self.of(warp)[: self.surplus(warp, keep)]
            for product, _ in due[warp]:
                done.setdefault(product, []).append(warp)
        self.complete(done, due)
        for product, of_warps in done.items():
            self.retire(product, of_warps)
        if self.machine.race:
            self.still_reading(warps[passes].tolist())
        self.machine.scheduler.detail = "the other warps of the warpgroup"
        allowed: Array = passes[np.searchsorted(warps, threads >> 5)]
        return allowed

    def surplus(self, warp: int, keep: int) -> int:
        """How many committed groups are older than the last `keep`."""
        return max(0, len(self.of(warp)) - 1 - keep)

    def complete(
        self, done: dict[Product, list[int]], due: dict[int, list[tuple[Product, Peers]]]
    ) -> None:
        """Compute the products of all four warps; learn what was before any of them."""
        fetched: dict[int, Array] = {}
        for warps in done.values():
            for warp in warps:
                for _, peers in due[warp]:
                    for peer, product in peers.items():
                        self.compute(product, peer, fetched)
                        if self.machine.race:
                            self.machine.race.learn(warp, product.clocks[peer])

    def retire(self, product: Product, warps: list[int]) -> None:
        """Write the registers of the warps."""
        file = self.machine.registers.files[32]
        threads = np.array(warps)[:, None] * WARP + np.arange(WARP)
        place = product.destination[:, None, None], threads[None]
        result = np.stack([product.values.pop(w)[product.rows, product.columns] for w in warps], 1)
        product.retired.update(warps)
        before = file[place].view(product.accumulator)
        keeps = np.array([product.accumulate[w] for w in warps])[None, :, None]
        total = np.where(keeps, before, 0) + result.astype(product.accumulator)
        file[place] = total.astype(product.accumulator).view(U32)
        if len(product.retired) == len(product.tiles):
            for row in product.destination.tolist():
                self.registers[row] -= 1
                if not self.registers[row]:
                    del self.registers[row]

    def still_reading(self, warps: list[int]) -> None:
        """Bytes that the completed products read may still be read by others in flight."""
        race = self.machine.race
        assert race is not None
        for warp in warps:
            for group in self.of(warp):
                for product, _ in group:
                    if warp in product.values:
                        continue
                    for tile in product.tiles[warp]:
                        if tile is not None:
                            race.keep_reading(tile.offset.ravel(), CHUNK, warp)

    def check_registers(self, operation: Operation, threads: Array) -> None:
        """An instruction names a register of some product in flight: of these warps?"""
        if operation.accumulates:  # products in flight may share their accumulators
            return
        for warp in np.unique(threads >> 5).tolist():
            for group in self.of(warp):
                for product, _ in group:
                    if not operation.rows.isdisjoint(product.destination.tolist()):
                        what = "uses a register of a wgmma in flight before wgmma.wait_group"
                        self.machine.fault(AsyncNotWaited, what, warp * WARP)

    def finish(self) -> None:
        """The wave is over."""
        warps = self.machine.geometry.warps_per_block
        issued = self.issued[: self.issued.size // 4 * 4].reshape(-1, 4)
        if warps % 4 == 0 and (issued != issued[:, :1]).any():
            what = "has warpgroups whose four warps issued different numbers of wgmma (divergence)"
            self.machine.fault(Divergence, what)
