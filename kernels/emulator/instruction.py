"""What a kernel is after parsing: operands, instructions, variables, the kernel, the module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .ptxtypes import Array


@dataclass(frozen=True, slots=True)
class Register:
    """A register: a row of the register file of its width (1 for predicates, 16, 32 or 64 bits)."""

    width: int
    row: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant: a Python int, or a NumPy float for 0f and 0d literals and decimals."""

    value: Any


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as %tid.x (PTX ISA 10)."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a variable, a parameter, a label or a function."""

    name: str


@dataclass(frozen=True, slots=True)
class Vector:
    """{a, b, c, d}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor copy."""

    base: Operand
    offset: int
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """a|b: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Negated:
    """!p"""

    operand: Operand


@dataclass(frozen=True, slots=True)
class Sink:
    """_: a result that nobody wants."""


Operand = Register | Immediate | Special | Symbol | Vector | Address | Pair | Negated | Sink


@dataclass(slots=True)
class Instruction:
    """One instruction of the text. `ld.global.v2.f32` has opcode `ld` and three modifiers."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str
    line: int
    predicate: Register | None = None
    negated: bool = False  # @!p
    targets: tuple[int, ...] = ()  # of a branch: indices into Kernel.instructions

    @property
    def type(self) -> str:
        """The last modifier, which for most instructions is the type."""
        return self.modifiers[-1] if self.modifiers else ""

    def has(self, *modifiers: str) -> bool:
        """Whether any of the modifiers is there."""
        return any(m in self.modifiers for m in modifiers)

    def vector_length(self) -> int:
        """2, 4 or 8 for .v2, .v4, .v8; 1 without."""
        return next((int(m[1:]) for m in self.modifiers if m in ("v2", "v4", "v8")), 1)


@dataclass(frozen=True)
class Variable:
    """A declared variable or parameter; size 0 is the dynamic shared memory."""

    space: str
    name: str
    align: int
    size: int
    type: str
    data: Array | None = None  # the initial bytes


@dataclass
class Kernel:
    """One .entry, with the functions that it calls; or the body of one .func."""

    name: str
    parameters: list[Variable]
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    registers: dict[int, int] = field(default_factory=dict)  # how many of each width
    most_threads: int = 1024  # in a block
    cluster: tuple[int, int, int] | None = None  # which the text asks for
    linked: dict[str, Linked] = field(default_factory=dict)  # functions among the instructions


@dataclass(frozen=True)
class Function:
    """One .func; its parameters and results are local variables."""

    body: Kernel
    results: list[Variable]
    parameters: list[Variable]


@dataclass(frozen=True)
class Linked:
    """A function in a kernel: where it begins, and the register that holds where to return."""

    function: Function
    entry: int
    return_to: Register


@dataclass(frozen=True)
class Module:
    """One PTX text: its kernels by name and its module-level variables."""

    kernels: dict[str, Kernel]
    variables: list[Variable]
