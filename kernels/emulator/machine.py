"""One launch: its memories, registers and decoded code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from .asynccopy import AsyncCopies
from .barrier import Barriers
from .cluster import ClusterBarriers
from .dependent import Dependence
from .distributed import DistributedMemory
from .errors import EmulatorError, UnknownInstruction
from .geometry import Geometry
from .instruction import Address, Instruction, Kernel, Operand, Register, Variable, Vector
from .layout import lay_out
from .mbarrier import MBarriers
from .memory import Memory
from .operation import DECODERS, Kind, NotCovered, Operation
from .ptxtypes import bits, is_type
from .race import RaceDetector
from .registers import Registers
from .scheduler import Scheduler
from .shared import SharedMemory
from .tma import BulkStores
from .warpgroup import Warpgroups


class Machine:
    """The parts of a launch. The instruction families get at each other's state through it."""

    def __init__(
        self,
        kernel: Kernel,
        module_variables: list[Variable],
        geometry: Geometry,
        arguments: Sequence[Any],
        shared_bytes: int,
        *,
        race: bool,
        seed: int | None,
        max_steps: int,
    ) -> None:
        self.kernel, self.geometry = kernel, geometry
        self.random = None if seed is None else np.random.default_rng(seed)
        self.current: Instruction | None = None
        self.layout = lay_out(kernel, module_variables, arguments, shared_bytes, geometry)
        _, shared_space, local_space = self.layout.spaces
        self.race = None
        if race:
            self.race = RaceDetector(self, geometry, _granule(kernel), shared_space.size)
        self.shared = SharedMemory(self, shared_space, self.race)
        self.local_space = local_space
        self.memory = Memory(self, self.layout.spaces, self.layout.symbols, self.shared)
        self.registers = Registers(kernel.registers, geometry, self.layout.symbols, shared_bytes)
        self.dependence = Dependence(self)
        self.barriers = Barriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.distributed = DistributedMemory(self)
        self.mbarriers = MBarriers(self)
        self.copies = AsyncCopies(self)
        self.stores = BulkStores(self)
        self.warpgroups = Warpgroups(self)
        code = [self.decode(i) for i in kernel.instructions]
        self.scheduler = Scheduler(self, code, max_steps)

    def run(self) -> int:
        """Run all blocks, wave by wave, and copy the results back; gives the number of waves."""
        numbers = self.geometry.order(self.random)
        starts = range(0, numbers.size, self.geometry.slots)
        for start in starts:
            alive = self.geometry.place(numbers[start : start + self.geometry.slots])
            self.local_space.bytes[:] = 0xAA
            for part in (
                self.registers,
                self.shared,
                self.dependence,
                self.barriers,
                self.cluster_barriers,
                self.mbarriers,
                self.copies,
                self.stores,
                self.warpgroups,
            ):
                part.reset()
            self.scheduler.run_wave(alive)
            self.stores.finish()
            self.warpgroups.finish()
        self.layout.memory.copy_back(self.memory.global_space)
        return len(starts)

    def decode(self, instruction: Instruction) -> Operation:
        """Look up everything that the instruction names; see operation.py."""
        self.current = instruction
        decoder = DECODERS.get(instruction.opcode)
        try:
            if decoder is None:
                raise NotCovered("is not known to the emulator")
            operation = decoder(self, instruction)
        except NotCovered as reason:
            operation = self._not_covered(str(reason))
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            operation = self._not_covered(f"cannot be decoded ({type(error).__name__}: {error})")
        operation.instruction = instruction
        operation.negated = instruction.negated
        if instruction.predicate is not None:
            operation.predicate = self.registers.row(instruction.predicate)
        if operation.kind is Kind.BRANCH:
            operation.target = instruction.targets[0]
        operation.rows = frozenset(_rows(instruction.operands))
        self.current = None
        return operation

    def _not_covered(self, reason: str) -> Operation:
        def run(at: Any) -> None:
            thread = int(self.geometry.select(at)[0])
            self.fault(UnknownInstruction, f"executes an instruction that {reason}", thread)

        return Operation(run)

    def fault(
        self,
        error: type[EmulatorError],
        what: str,
        thread: int | None = None,
        address: int | None = None,
    ) -> NoReturn:
        """Raise an error: "Thread (0, 0, 0) of block (0, 0, 0) of kernel 'k' <what> (PTX line 9)".

        what: a verb and the rest of the sentence. thread: the column of the thread at fault.
        """
        name, current = self.kernel.name, self.current
        block = index = None
        who = f"Kernel {name!r}"
        if thread is not None:
            block = self.geometry.block_index(int(thread))
            index = self.geometry.thread_index(int(thread))
            who = f"Thread {index} of block {block} of kernel {name!r}"
        where = f" (PTX line {current.line}: `{current.text}`)" if current else ""
        raise error(
            f"{who} {what}{where}.",
            kernel=name,
            line=current.line if current else None,
            instruction=current.text if current else None,
            block=block,
            thread=index,
            address=address,
        )


def _rows(operands: Sequence[Operand]) -> list[int]:
    """Rows of the 32-bit registers among the operands."""
    rows: list[int] = []
    for operand in operands:
        if isinstance(operand, Register):
            if operand.width == 32:
                rows.append(operand.row)
        elif isinstance(operand, Vector):
            rows += _rows(operand.items)
        elif isinstance(operand, Address):
            rows += _rows([operand.base, *operand.coordinates])
    return rows


def _granule(kernel: Kernel) -> int:
    """Bytes of the smallest access to shared memory that the kernel makes: of 1, 2, 4, 8, 16."""
    sizes = [16]
    for i in kernel.instructions:
        if i.opcode == "mbarrier":
            sizes.append(8)
        elif i.opcode in ("ld", "st", "atom", "red"):
            elsewhere = i.has("global", "const", "param", "local")
            if is_type(i.type) and not elsewhere:  # shared, or generic
                sizes.append(bits(i.type) // 8 * i.vector_length())
        elif i.opcode == "cp" and i.modifiers[:1] == ("async",) and len(i.operands) > 2:
            sizes.append(getattr(i.operands[2], "value", 16))
    return min(sizes)
