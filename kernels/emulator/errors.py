"""What the emulator refuses: one class for each kind of fault, its place as attributes."""

from __future__ import annotations

Index = tuple[int, int, int]


class EmulatorError(Exception):
    """A kernel did something that the PTX ISA does not allow.

    The message is a sentence that holds everything below. The attributes: `kernel` (name of the
    entry), `line` (line number in the PTX text), `instruction` (its text), `block` and `thread`
    (as x, y, z), `address` (in the memory space that the message names). Each is None when it is
    not known.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str | None = None,
        line: int | None = None,
        instruction: str | None = None,
        block: Index | None = None,
        thread: Index | None = None,
        address: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kernel = kernel
        self.line = line
        self.instruction = instruction
        self.block = block
        self.thread = thread
        self.address = address


class OutOfBounds(EmulatorError):
    """An access outside of every object, or a store to a read-only array or constant."""


class Misaligned(EmulatorError):
    """An address that is not a multiple of what the instruction asks for."""


class UninitialisedRead(EmulatorError):
    """A read of bytes that nothing has written."""


class TooEarly(EmulatorError):
    """An access to a `Late` array by a thread that has not waited for the kernel before."""


class Race(EmulatorError):
    """Two accesses to shared memory, one of them a write, that no barrier or fence orders."""


class AsyncNotWaited(EmulatorError):
    """A use of bytes or registers that an asynchronous operation in flight still owns."""


class Deadlock(EmulatorError):
    """No thread can go on: the message lists where each of them waits."""


class Divergence(EmulatorError):
    """A warp-wide instruction that the threads of a warp do not execute together."""


class UnknownInstruction(EmulatorError):
    """An instruction, or a variant of one, that the emulator does not implement.

    Raised when it would execute: code that never runs may hold anything.
    """


class ParseError(EmulatorError):
    """PTX text that cannot be read, or a launch that does not fit the kernel."""
