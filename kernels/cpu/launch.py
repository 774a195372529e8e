"""Kernels with their arguments, and their machine code: from the cache, or compiled where it is
not there yet. Only then is Numba imported, which takes longer than all else of a start.

A kernel's arguments are written down once, as words of 64 bits; its entry, which compiler.py adds
to it, reads them. So that a launch is the call of an address with an address.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from . import store
from .state import make_known

ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)     # releases Python's lock


@dataclass(frozen=True)
class Constant:
    """An argument that a kernel is compiled for: a name in a module of this package."""
    module: str
    name: str


@dataclass(frozen=True)
class Kernel:
    """A function that a module of this package marks as `@kernel`."""
    module: str
    name: str

    def bind(self, *arguments: Any) -> Launch:
        """This kernel with these arguments. TypeError for what no kernel can take.

        Each is a C-contiguous array, a whole number, a float32, a tuple of whole numbers, or a
        Constant.
        """
        described = [describe(argument) for argument in arguments]
        signature = " ".join(code for code, _ in described)
        words = np.array([word for _, words in described for word in words], np.int64)
        return Launch(words, _function(self, signature), arguments)


RUN_ALL = Kernel("program", "run_all")


class Launch:
    """What `Kernel.bind` gives; calling it runs the kernel. It keeps its arrays alive."""

    def __init__(self, words: np.ndarray, function: Any, arguments: tuple[Any, ...]) -> None:
        self.arguments, self.words = arguments, words
        self._function, self._address = function, words.ctypes.data

    def __call__(self) -> None:
        self._function(self._address)

    @property
    def call(self) -> tuple[int, int]:
        """Addresses of the function and of its argument."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0, self._address


class Exchange:
    """An array that launches read, in whose place they can be given another of its shape."""

    def __init__(self, array: np.ndarray, launches: Sequence[Launch]) -> None:
        start, self._places, self.possible = address(array), [], True
        for launch in launches:
            place = 0
            for argument in launch.arguments:
                _, words = describe(argument)
                if isinstance(argument, np.ndarray) and argument.nbytes and (
                        start <= words[0] < start + array.nbytes):
                    self._places.append((launch.words, place))
                    self.possible &= words[0] == start      # and not somewhere within it
                place += len(words)
        self.possible &= bool(self._places)

    def give(self, array: np.ndarray) -> None:
        """From now on they read this one, which must live as long as they run."""
        for words, place in self._places:
            words[place] = address(array)


def address(array: np.ndarray) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


def calls(launches: Sequence[Launch]) -> np.ndarray:
    """[.., 2]: the `call` of each, for a kernel of program.py."""
    return np.array([launch.call for launch in launches], np.int64).reshape(-1, 2)


def together(launches: Sequence[Launch]) -> Callable[[], None]:
    """One call that runs these one after the other."""
    run_all, kept = RUN_ALL.bind(calls(launches)), tuple(launches)

    def run() -> None:
        if kept:                # which thereby live as long as this does
            run_all()
    return run


def describe(argument: Any) -> tuple[str, Sequence[int]]:
    """(type, words) of an argument: an array is its address and shape."""
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise TypeError(f"kernels take C-contiguous arrays, not one of shape {argument.shape} "
                            f"and strides {argument.strides}")
        return (_array(argument.dtype, argument.ndim),
                (address(argument), *argument.shape))
    if isinstance(argument, np.float32):
        return "float32", (int.from_bytes(argument.tobytes(), sys.byteorder, signed=True),)
    if isinstance(argument, tuple):
        return f"int64*{len(argument)}", argument
    if isinstance(argument, Constant):
        return f"{argument.module}.{argument.name}", ()
    if isinstance(argument, (int, np.integer)):
        return "int64", (int(argument),)
    raise TypeError(f"kernels take no {type(argument).__name__}: {argument!r}")


def flat_bits(array: np.ndarray) -> np.ndarray:
    """Of rank 1, and bfloat16 as its bits, for kernels know no such number."""
    flat = array.reshape(-1)
    return flat if flat.dtype in (np.float32, np.uint8) else flat.view(np.uint16)


@cache
def _array(dtype: np.dtype, rank: int) -> str:
    """The type of an array: "float32[1]"."""
    return f"{dtype}[{rank}]"


# ---- machine code -----------------------------------------------------------------------------

_lock = threading.Lock()        # guards what follows, and the engine
_loaded: dict[tuple[Kernel, str], Any] = {}


def _in_child() -> None:
    """A forked child has the lock as it was, but not the thread that holds it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_in_child)


def _function(kernel: Kernel, signature: str) -> Any:
    """The entry of a kernel for arguments of these types."""
    with _lock:
        if (kernel, signature) not in _loaded:
            _loaded[kernel, signature] = _load(kernel, signature)
        return _loaded[kernel, signature]


def _load(kernel: Kernel, signature: str) -> Any:
    import llvmlite.binding as llvm  # not before it is needed, nor Numba
    symbol = symbol_of(kernel, signature)
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(_code(kernel, signature, symbol)))
    engine.finalize_object()
    return ENTRY(engine.get_function_address(symbol))


def _code(kernel: Kernel, signature: str, symbol: str) -> bytes:
    """The object file, kept where the cache can be written."""
    code = store.get(f"{symbol}.o")
    if code is None:
        from . import compiler
        code = compiler.compile_kernel(kernel, signature, symbol)
        store.put(f"{symbol}.o", code)
    return code


def symbol_of(kernel: Kernel, signature: str) -> str:
    """Name of an entry, and of its file."""
    return f"{kernel.module}_{kernel.name}_{hashlib.sha256(signature.encode()).hexdigest()[:8]}"


@cache
def _engine() -> Any:
    """LLVM's loader of machine code."""
    import llvmlite.binding as llvm
    make_known()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
