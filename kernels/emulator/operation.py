"""A decoded instruction, and the table of functions that decode.

An instruction family is a module of functions `name(machine, instruction) -> Operation`, entered in
the table under their opcodes. They look everything up once, so that running costs only the NumPy
calls: `run(at)` executes the instruction for the threads `at` (see geometry.Selection).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np

from .geometry import Selection
from .instruction import Immediate, Instruction, Operand
from .ptxtypes import Array

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[[Any], Any]  # of a Selection; of a barrier, see Kind.BARRIER


class Kind(Enum):
    """What the scheduler does after an operation."""

    PLAIN = auto()  # go to the next instruction
    BRANCH = auto()  # go to the target; run is not called
    JUMP = auto()  # run gives each thread's target
    EXIT = auto()  # the threads end
    BARRIER = auto()  # run gets (group, its program counter); whether it parked the group
    WAIT = auto()  # run gives, for each thread, whether it may go on


@dataclass(slots=True, eq=False)
class Operation:
    """`together`: the live threads of a warp execute it as one (.aligned or full member mask)."""

    run: Run
    kind: Kind = Kind.PLAIN
    together: bool = False
    accumulates: bool = False  # a wgmma: its registers may be in flight
    # filled in by Machine.decode:
    instruction: Instruction = field(init=False)
    predicate: Array | None = None
    negated: bool = False
    target: int = 0
    rows: frozenset[int] = frozenset()  # rows of 32-bit registers that it names


Decoder = Callable[["Machine", Instruction], Operation]
DECODERS: dict[str, Decoder] = {}


class NotCovered(Exception):
    """Raised while decoding; becomes UnknownInstruction when the instruction executes."""


def opcode(*names: str) -> Callable[[Decoder], Decoder]:
    """Enter a decoder in the table."""

    def enter(decoder: Decoder) -> Decoder:
        for name in names:
            DECODERS[name] = decoder
        return decoder

    return enter


def full_mask(mask: Operand) -> bool:
    """Whether a member mask is the constant of all lanes: the warp must then be together."""
    return isinstance(mask, Immediate) and int(mask.value) & 0xFFFFFFFF == 0xFFFFFFFF


def nothing(at: Selection) -> None:
    """Executes an instruction that has no effect here."""


def elementwise(f: Callable[..., Any], destination: Array, *sources: Any) -> Run:
    """destination = f(*sources), thread by thread.

    destination is a register (a view of a row of the register file); sources are registers or
    NumPy scalars. A ufunc on matching dtypes writes into the register without a temporary.
    """
    is_register = [isinstance(s, np.ndarray) and s.shape == destination.shape for s in sources]
    pairs = list(zip(sources, is_register, strict=True))
    in_place = isinstance(f, np.ufunc) and all(s.dtype == destination.dtype for s in sources)

    def run(at: Selection) -> None:
        if at is not None:
            destination[at] = f(*[s[at] if register else s for s, register in pairs])
        elif in_place:
            f(*sources, out=destination)
        else:
            destination[...] = f(*sources)

    return run


def sequence(*runs: Run) -> Run:
    """One after the other."""

    def run(at: Selection) -> None:
        for step in runs:
            step(at)

    return run
