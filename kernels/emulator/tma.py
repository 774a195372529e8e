"""cp.async.bulk and cp.async.bulk.tensor: the TMA (PTX ISA 9.7.9.25.4, 9.7.9.27).

A load lands when nothing else can run (with a seed: at any time) and then completes its bytes at
its mbarrier. A store reads shared memory as late as the program allows: at its wait_group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError, Misaligned, OutOfBounds
from .geometry import Selection
from .instruction import Address, Instruction, Operand, Vector
from .operation import NotCovered, Operation, opcode
from .ptxtypes import U8, UINT, Array
from .shared import TMA
from .tensormap import TensorMap, swizzle

if TYPE_CHECKING:
    from .machine import Machine

CHUNK = 16  # bytes; what a swizzle moves


@dataclass
class _Store:
    """thread issued it; group is None until committed, then the number of younger groups."""

    thread: int
    complete: Callable[[], None]
    group: int | None = None


class BulkStores:
    """Stores from shared to global memory that have not read their source yet."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: list[_Store] = []

    def reset(self) -> None:
        self.pending = []

    def add(self, thread: int, complete: Callable[[], None]) -> None:
        self.pending.append(_Store(thread, complete))

    def commit(self, threads: Array) -> None:
        """What the threads have issued since their last commit becomes a group."""
        for store in self.pending:
            if store.thread in threads:
                store.group = 0 if store.group is None else store.group + 1

    def wait(self, threads: Array, keep: int) -> None:
        """All but the last `keep` groups of the threads complete."""

        def due(store: _Store) -> bool:
            return store.thread in threads and store.group is not None and store.group >= keep

        for store in [s for s in self.pending if due(s)]:
            store.complete()
            self.pending.remove(store)

    def finish(self) -> None:
        """The wave is over."""
        for store in self.pending:
            store.complete()
        self.pending = []


def bulk(machine: Machine, instruction: Instruction) -> Operation:
    """cp.async.bulk and all that follows the word bulk"""
    modifiers, select = instruction.modifiers, machine.geometry.select
    form = modifiers[2]
    if form == "commit_group":
        return Operation(lambda at: machine.stores.commit(select(at)))
    if form == "wait_group":
        keep = machine.registers.scalar(instruction.operands[0], 0)
        return Operation(lambda at: machine.stores.wait(select(at), keep))
    if instruction.has("multicast::cluster", "reduce", "prefetch"):
        raise NotCovered("multicasts, reduces or prefetches, which the emulator does not know")
    if all(m.startswith("shared") for m in modifiers[2:4]):
        raise NotCovered("copies within shared memory, which the emulator does not know")
    copy = _BulkCopy(machine, instruction)

    def run(at: Selection) -> None:
        for thread in select(at):
            copy.issue(int(thread))

    return Operation(run)


class _BulkCopy:
    """One bulk instruction, executed thread by thread (it is usually one thread that does)."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine, operands = machine, instruction.operands
        self.tensor = instruction.has("tensor")
        kinds = instruction.modifiers[4 if self.tensor else 2 :]
        self.loads = kinds[0].startswith("shared")
        shared, outside = operands[:2] if self.loads else operands[1::-1]
        self.shared = machine.memory.address(shared)
        self.outside = machine.memory.address(outside)
        self.size: Operand | None = None if self.tensor else operands[2]
        self.coordinates: tuple[Operand, ...] = ()
        if isinstance(outside, Address) and outside.coordinates:
            vector = outside.coordinates[0]
            self.coordinates = vector.items if isinstance(vector, Vector) else ()
        self.im2col_offsets: tuple[Operand, ...] = ()
        if self.tensor and len(operands) > 3 and isinstance(operands[3], Vector):
            self.im2col_offsets = operands[3].items
        if self.loads:
            self.mbarrier = machine.memory.address(operands[2 if self.tensor else 3])

    def issue(self, thread: int) -> None:
        """Work out and check both ends, then start the copy."""
        one = np.array([thread])
        address = int(self.outside(one)[0])
        if self.tensor:
            tensor_map, elements, values = self.tensor_elements(thread, address)
        else:
            tensor_map, elements, values = None, *self.linear_elements(thread, address)
        size = elements.size * values.itemsize
        chunks = self.chunks(thread, int(self.shared(one)[0]), size, tensor_map)
        if self.loads:
            self.load(thread, chunks, elements, values, size)
        else:
            self.store(thread, chunks, elements, values)

    def tensor_elements(self, thread: int, address: int) -> tuple[TensorMap, Array, Array]:
        """The map, the element numbers of the box (-1: outside) and the elements themselves."""
        machine, scalar = self.machine, self.machine.registers.scalar
        maps = machine.layout.memory.maps
        if address not in maps:
            what = f"uses address {address:#x} as a tensor map, which it is not"
            machine.fault(EmulatorError, what, thread, address)
        tensor_map, base = maps[address]
        rank = len(self.coordinates)
        if rank != len(tensor_map.extents):
            what = f"gives {rank} coordinates to a tensor map of rank {len(tensor_map.extents)}"
            machine.fault(EmulatorError, what, thread)
        if tensor_map.swizzle and tensor_map.inner_bytes > tensor_map.swizzle:
            machine.fault(
                EmulatorError,
                f"uses a tensor map whose box is {tensor_map.inner_bytes} bytes wide, more than "
                f"its swizzle span of {tensor_map.swizzle}",
                thread,
            )
        if not (self.loads or tensor_map.array.flags.writeable):
            machine.fault(OutOfBounds, "stores to a tensor map of a read-only array", thread)
        coordinates = [scalar(c, thread, "s32") for c in self.coordinates]
        offsets = [scalar(o, thread, "u16") for o in self.im2col_offsets]
        space, array = machine.memory.global_space, tensor_map.array
        start = base - space.base
        values = space.bytes[start : start + array.nbytes].view(UINT[array.itemsize])
        elements = tensor_map.elements(coordinates, offsets)
        self.record(start + elements[elements >= 0] * array.itemsize, array.itemsize, thread)
        return tensor_map, elements, values

    def linear_elements(self, thread: int, address: int) -> tuple[Array, Array]:
        """The bytes of a copy without a tensor map."""
        machine, space = self.machine, self.machine.memory.global_space
        assert self.size is not None
        size = machine.registers.scalar(self.size, thread)
        start, one = address - space.base, np.array([thread])
        machine.memory.locate(space, np.array([address]), 1, one, not self.loads, align=CHUNK)
        allowed = space.valid if self.loads else space.writable
        inside = allowed[start : start + size]
        if inside.size < size or not inside.all():
            what = f"copies {size} bytes at global address {address:#x}, of which not all are in "
            what += f"{space.nearest(start)} (out of bounds)"
            machine.fault(OutOfBounds, what, thread, address)
        elements = start + np.arange(size)
        self.record(elements, 1, thread)
        return elements, space.bytes

    def record(self, offset: Array, size: int, thread: int) -> None:
        """What is read must have been written; what is written is so from now on."""
        memory = self.machine.memory
        space = memory.global_space
        if space.written is None:
            return
        if self.loads:
            memory.check_written(space, offset, size, np.full(offset.size, thread))
        else:
            space.written[offset[:, None] + np.arange(size)] = True

    def chunks(self, thread: int, address: int, size: int, tensor_map: TensorMap | None) -> Array:
        """Offsets of the 16-byte chunks in shared memory, swizzled."""
        machine, space = self.machine, self.machine.memory.shared_space
        machine.distributed.refuse("a bulk copy", address, thread)
        align = 128 if tensor_map else CHUNK
        if address % align:
            what = f"gives shared address {address:#x} to a bulk copy, which needs a multiple of "
            machine.fault(Misaligned, f"{what}{align} (misaligned)", thread, address)
        if size % CHUNK:
            what = f"copies {size} bytes, which is not a multiple of {CHUNK}"
            machine.fault(EmulatorError, what, thread)
        span = tensor_map.swizzle if tensor_map else 0
        offset = swizzle(address + np.arange(0, size, CHUNK), span) - space.base
        inside = (offset >= 0) & (offset <= space.size - CHUNK)
        if inside.all():
            inside = space.valid[offset] & space.valid[offset + CHUNK - 1]
        if not inside.all():
            what = f"copies {size} bytes at shared address {address:#x}, of which not all are in "
            what += f"{space.nearest(address - space.base)} (out of bounds)"
            machine.fault(OutOfBounds, what, thread, address)
        chunks: Array = offset + int(machine.geometry.block_slot[thread]) * space.size
        return chunks

    def load(self, thread: int, chunks: Array, elements: Array, values: Array, size: int) -> None:
        machine = self.machine
        mbarriers, shared = machine.mbarriers, machine.shared
        target = mbarriers.find(thread, int(self.mbarrier(np.array([thread]))[0]))
        copier = {}
        if machine.race:  # the copy writes in its own name, in the coming phase of its mbarrier
            copier = {"actor": target.actor, "epoch": target.phase + 1}
        shared.write(chunks, CHUNK, np.full(chunks.size, thread >> 5), TMA, **copier)
        shared.in_flight += 1

        def complete() -> None:
            data = np.where(elements >= 0, values[elements], 0).astype(values.dtype)
            shared.land(chunks, data.view(U8).reshape(-1, CHUNK))
            shared.in_flight -= 1
            target.bytes -= size
            mbarriers.arrive(target, 0, None)

        machine.scheduler.events.append(complete)

    def store(self, thread: int, chunks: Array, elements: Array, values: Array) -> None:
        machine, warp = self.machine, thread >> 5
        shared, race = machine.shared, machine.race
        warps = np.full(chunks.size, warp)
        shared.read(chunks, CHUNK, warps)
        if race:
            race.check_proxy(chunks, CHUNK, warps)
            race.keep_reading(chunks, CHUNK, warp)

        def complete() -> None:
            data = shared.chunks(CHUNK)[chunks // CHUNK].ravel().view(values.dtype)
            values[elements[elements >= 0]] = data[elements >= 0]
            if race:
                race.end_reading(chunks, CHUNK, warp, int(race.now(np.array([warp]))[0]))

        machine.stores.add(thread, complete)


@opcode("fence", "membar")
def fence(machine: Machine, instruction: Instruction) -> Operation:
    """Only fence.proxy.async has an effect: memory is sequentially consistent here."""
    race = machine.race
    proxy = instruction.modifiers[:1] == ("proxy",) and instruction.modifiers[1].startswith("async")

    def run(at: Selection) -> None:
        if race and proxy:
            race.fence_proxy(np.unique(machine.geometry.select(at) >> 5))

    return Operation(run)
