"""What Numba compiles kernels for: LLVM modules, of which compiler.py makes machine code.

Numba itself makes machine code of every function, and of wrappers by which Python calls it: of what
a kernel calls once by itself, and once more within each function that calls it.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numba
from numba.core.codegen import AOTCodeLibrary, JITCPUCodegen
from numba.core.registry import CPUDispatcher, CPUTarget, cpu_target


class Library(AOTCodeLibrary):
    """A function and what it calls, as a module."""

    serialize_using_object_code = AOTCodeLibrary.serialize_using_bitcode

    def get_pointer_to_function(self, name: str) -> int:
        """Of none: only at its end there is machine code."""
        self._ensure_finalized()
        return 0


class Codegen(JITCPUCodegen):
    """Makes modules for this CPU."""
    _library_class = Library

    def _add_module(self, module: Any) -> None:
        pass

    def set_env(self, name: str, env: Any) -> None:
        pass


class Options(CPUTarget.options):
    """What functions are compiled with: without wrappers for Python."""

    def finalize(self, flags: Any, options: Any) -> None:
        super().finalize(flags, options)
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True


class Target(CPUTarget):
    """The CPU as Numba knows it, but for what makes machine code. Both know each other's functions,
    so that what Numba compiles can call those of kernels."""
    options = Options
    typing_context = cpu_target.typing_context

    @cached_property
    def target_context(self) -> Any:
        return cpu_target.target_context.subtarget(_internal_codegen=Codegen("kernels"))


class Dispatcher(CPUDispatcher):
    """A function of kernels."""
    targetdescr = Target("cpu")

    def add_overload(self, compiled: Any) -> None:
        """Not for calls of Python's."""
        self.overloads[compiled.signature.args] = compiled

    def _compile_for_args(self, *arguments: Any, **named: Any) -> Callable:
        """What Python calls instead: the same function as Numba compiles it."""
        return self._for_python

    @cached_property
    def _for_python(self) -> Callable:
        compiled: Callable = numba.jit(**self.targetoptions)(self.py_func)
        return compiled
