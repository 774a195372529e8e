"""Addresses: state spaces, bounds, alignment, generic addressing (PTX ISA 5.1, 6.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Misaligned, OutOfBounds, UninitialisedRead
from .geometry import Selection
from .instruction import Address, Immediate, Instruction, Operand, Register, Symbol
from .operation import NotCovered
from .ptxtypes import U64, Array
from .space import Space

if TYPE_CHECKING:
    from .machine import Machine
    from .shared import SharedMemory

# Generic addresses: global memory as it is, the shared and local spaces in windows above it.
GLOBAL_BASE = 1 << 40
SHARED_WINDOW, LOCAL_WINDOW = 1 << 44, 1 << 45
SHARED_BASE = 1024  # the hardware reserves the first KiB of shared memory (sm_90)
RANK_SHIFT = 24  # bits of a shared address, above which mapa puts the rank of a block

# In calls this small, the method any() costs more than the counting.
count_nonzero = np.count_nonzero

Access = Callable[[Space, Array, Selection], None]


class Memory:
    """The three memories of a launch and the checks of every access to them."""

    def __init__(
        self,
        machine: Machine,
        spaces: tuple[Space, Space, Space],
        symbols: Mapping[str, int],
        shared: SharedMemory,
    ) -> None:
        self.machine, self.symbols = machine, symbols
        self.global_space, self.shared_space, self.local_space = spaces
        self.shared = shared
        self.cluster_space = self.shared_space  # what .shared::cluster and generic addresses mean
        if machine.geometry.blocks_per_cluster > 1:
            self.cluster_space = copy(self.shared_space)
            self.cluster_space.distributed = True
        self.shared_spaces = self.shared_space, self.cluster_space

    # -- operands

    def address(self, operand: Operand) -> Callable[[Selection], Array]:
        """The addresses (int64) of the threads of a selection."""
        if not isinstance(operand, Address):
            raise NotCovered(f"takes {operand} where an address is expected")
        base, offset = operand.base, operand.offset
        geometry = self.machine.geometry
        if isinstance(base, Register):
            row = self.machine.registers.row(base)
            if base.width == 64:
                row = row.view(np.int64)
                if not offset:
                    return lambda at: row if at is None else row[at]
                return lambda at: (row if at is None else row[at]) + offset
            return lambda at: (row if at is None else row[at]).astype(np.int64) + offset
        if isinstance(base, Symbol) and base.name in self.symbols:
            fixed = self.symbols[base.name] + offset
        elif isinstance(base, Immediate):
            fixed = int(base.value) + offset
        else:
            raise NotCovered(f"takes the address of {base}, which is no variable")
        return lambda at: np.full(geometry.select(at).size, fixed, np.int64)

    def space_of(self, instruction: Instruction, operand: Operand) -> Space | None:
        """The state space that the modifiers name; None for generic addressing.

        A parameter is in global memory, if it is the kernel's (a tensor map), or, if it is the
        parameter of a call, in local memory.
        """
        named = {
            "global": self.global_space,
            "const": self.global_space,
            "shared": self.shared_space,
            "local": self.local_space,
        }
        for modifier in instruction.modifiers:
            if modifier == "shared::cluster":
                return self.cluster_space
            if modifier.startswith("param"):
                base = operand.base if isinstance(operand, Address) else None
                symbol = base.name if isinstance(base, Symbol) else ""
                is_global = self.symbols.get(symbol, GLOBAL_BASE) >= GLOBAL_BASE
                return self.global_space if is_global else self.local_space
            space = named.get(modifier.split("::")[0])
            if space is not None:
                return space
        return None

    def accessor(self, instruction: Instruction, operand: Operand, access: Access) -> Any:
        """run(at) that calls access(space, addresses, at), generic addresses window by window."""
        address = self.address(operand)
        space = self.space_of(instruction, operand)
        if space is not None:
            return lambda at: access(space, address(at), at)
        windows = (
            (self.global_space, 0),
            (self.cluster_space, SHARED_WINDOW),
            (self.local_space, LOCAL_WINDOW),
        )

        def generic(at: Selection) -> None:
            addresses, threads = address(at), self.machine.geometry.select(at)
            shared_or_local = addresses >= SHARED_WINDOW
            window = shared_or_local.astype(np.int8) + (addresses >= LOCAL_WINDOW)
            for number in np.unique(window):
                inside = np.flatnonzero(window == number)
                target, start = windows[number]
                access(target, addresses[inside] - start, threads[inside])

        return generic

    # -- checks

    def locate(
        self,
        space: Space,
        address: Array,
        size: int,
        at: Selection,
        store: bool = False,
        align: int | None = None,
    ) -> Array:
        """Check bounds, alignment (of the size if not given), order; addresses -> offsets."""
        owner = at  # threads of the blocks whose memory it is
        if space.distributed:
            address, owner = self.machine.distributed.owners(address, at)
        offset = address - space.base
        allowed = space.writable if store else space.valid
        bad = offset.view(U64) > space.size - size
        if not count_nonzero(bad):
            bad = ~(allowed[offset] & allowed[offset + (size - 1)])
        if count_nonzero(bad):
            self._out_of_bounds(space, address, size, at, owner, store, int(np.argmax(bad)))
        low = offset & ((align or size) - 1)
        if count_nonzero(low):
            i = int(np.argmax(low != 0))
            self.machine.fault(
                Misaligned,
                f"{'writes' if store else 'reads'} {size} bytes at "
                f"{self._place(space, address, at, owner, i)}, which is not a multiple of "
                f"{align or size} (misaligned)",
                self.machine.geometry.select(at)[i],
                int(address[i]),
            )
        if space.late is not None:
            self.machine.dependence.check(space, offset, at)
        if space.origin is None:
            return offset
        return offset + (space.origin if owner is None else space.origin[owner])

    def _place(self, space: Space, address: Array, at: Selection, owner: Selection, i: int) -> str:
        """The i-th address in words."""
        place = f"{space.name} address {int(address[i]):#x}"
        if owner is at:
            return place
        block = self.machine.geometry.block_index(self.machine.geometry.select(owner)[i])
        return f"{place} of block {block}"

    def _out_of_bounds(
        self,
        space: Space,
        address: Array,
        size: int,
        at: Selection,
        owner: Selection,
        store: bool,
        i: int,
    ) -> None:
        offset = int(address[i]) - space.base
        place = self._place(space, address, at, owner, i)
        what = f"{'writes' if store else 'reads'} {size} bytes at {place}, "
        inside = 0 <= offset <= space.size - size
        if store and inside and space.valid[offset : offset + size].all():
            what += f"which is read-only, {space.nearest(offset)}"
        elif space is not self.cluster_space and space.name == "shared" and offset >> RANK_SHIFT:
            what += "which only .shared::cluster can use, if it is from mapa (out of bounds)"
        else:
            last = offset + size - 1
            if inside and space.valid[offset]:  # it starts inside: the end is what is wrong
                what += f"and the last of them is {space.nearest(last)} (out of bounds)"
            else:
                what += f"{space.nearest(offset)} (out of bounds)"
        thread = self.machine.geometry.select(at)[i]
        self.machine.fault(OutOfBounds, what, thread, int(address[i]))

    def read(self, space: Space, address: Array, size: int, at: Selection) -> Array:
        """All checks of a read by the threads; gives the offsets."""
        offset = self.locate(space, address, size, at)
        if space in self.shared_spaces:
            self.shared.read(offset, size, self.machine.geometry.select(at) >> 5)
        elif space.written is not None:
            self.check_written(space, offset, size, at)
        return offset

    def write(self, space: Space, address: Array, size: int, at: Selection) -> Array:
        """All checks and records of a write by the threads; gives the offsets."""
        offset = self.locate(space, address, size, at, store=True)
        if space in self.shared_spaces:
            self.shared.write(offset, size, self.machine.geometry.select(at) >> 5)
        elif space.written is not None:
            space.written.reshape(-1, size)[offset // size] = True
        return offset

    def check_written(self, space: Space, offset: Array, size: int, at: Selection) -> None:
        """Reads of global memory while some array counts as empty."""
        assert space.written is not None
        if offset.size and not (offset % size).any():
            fine = space.written.reshape(-1, size)[offset // size].all(-1)
        else:
            fine = space.written[offset[:, None] + np.arange(size)].all(-1)
        if not fine.all():
            i = int(np.argmin(fine))
            first = int(offset[i]) + int(np.argmin(space.written[offset[i] : offset[i] + size]))
            self.machine.fault(
                UninitialisedRead,
                f"reads {space.name} address {first + space.base:#x}, {space.nearest(first)}, "
                "which was never written",
                self.machine.geometry.select(at)[i],
                first + space.base,
            )


def window_of(space: str) -> np.uint64:
    """Where a state space starts among the generic addresses (cvta)."""
    return U64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0))
