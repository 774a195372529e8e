"""Python kernel -> machine code with an entry that needs no Numba to be called.

The entry is a function of one address, that of its arguments' words (see launch.py): it makes of
them what Numba passes to compiled functions, and calls the kernel.
"""
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.np.arrayobj import make_array, populate_array

from .launch import Kernel
from .state import SYMBOL

I64 = ir.IntType(64)
# What machine code may ask of the process: all else would be Numba's.
KNOWN = {SYMBOL, "memcpy", "memset", "memmove", "sched_yield", "usleep"}


def compile_kernel(kernel: Kernel, signature: str, symbol: str) -> bytes:
    """An object file whose function `symbol` is the kernel's entry."""
    dispatcher = _named(kernel.module, kernel.name)
    codes = signature.split()
    kinds = tuple(_type(code) for code in codes)
    dispatcher.compile(kinds)
    compiled = dispatcher.overloads[kinds]
    module = llvm.parse_assembly(compiled.library.get_llvm_str())
    module.link_in(llvm.parse_assembly(_entry(compiled, codes, kinds, symbol, module.triple)))
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != symbol:
            value.linkage = "internal"
    machine = _machine()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(1))
    remove = llvm.create_new_module_pass_manager()
    remove.add_global_dead_code_eliminate_pass()
    remove.run(module, passes)
    unknown = {function.name for function in module.functions if function.is_declaration
               and not function.name.startswith("llvm.")} - KNOWN
    if unknown:
        raise RuntimeError(f"{kernel.module}.{kernel.name} calls {sorted(unknown)}, which are not "
                           f"there without Numba; a kernel can not use Python")
    return machine.emit_object(module)


def _named(module: str, name: str) -> Any:
    return getattr(import_module(f"{__package__}.{module}"), name)


def _type(code: str) -> Any:
    """Numba's type of what `launch.describe` calls so."""
    if code.endswith("]"):
        dtype, _, rank = code[:-1].partition("[")
        return types.Array(numba.from_dtype(np.dtype(dtype)), int(rank), "C")
    if code.startswith("int64*"):
        return types.UniTuple(types.int64, int(code.removeprefix("int64*")))
    if "." in code:
        return numba.typeof(_named(*code.split(".")))
    return getattr(types, code)


def _entry(compiled: Any, codes: Sequence[str], kinds: tuple[Any, ...], symbol: str,
           triple: str) -> str:
    """LLVM IR of the entry."""
    context = cpu_target.target_context
    module = ir.Module(symbol)
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), symbol)
    b = ir.IRBuilder(function.append_basic_block())
    words = Words(context, b, function.args[0])
    arguments = [words.take(code, kind) for code, kind in zip(codes, kinds, strict=True)]
    callee = context.declare_function(module, compiled.fndesc)
    context.call_conv.call_function(b, callee, types.none, kinds, arguments)
    b.ret_void()
    return str(module)


class Words:
    """A kernel's arguments, taken one after the other from where the host wrote them down."""

    def __init__(self, context: Any, b: ir.IRBuilder, pointer: ir.Value) -> None:
        self.context, self.b, self.pointer, self.taken = context, b, pointer, 0

    def word(self) -> ir.Value:
        value = self.b.load(self.b.gep(self.pointer, [ir.Constant(I64, self.taken)]))
        self.taken += 1
        return value

    def take(self, code: str, kind: Any) -> ir.Value:
        if "." in code:
            return self.context.get_constant_generic(self.b, kind, _named(*code.split(".")))
        if isinstance(kind, types.Array):
            return self.array(kind)
        if isinstance(kind, types.UniTuple):
            return self.context.make_tuple(self.b, kind, [self.word() for _ in range(kind.count)])
        if kind == types.float32:
            return self.b.bitcast(self.b.trunc(self.word(), ir.IntType(32)), ir.FloatType())
        return self.word()

    def array(self, kind: Any) -> ir.Value:
        array = make_array(kind)(self.context, self.b)
        itemsize = ir.Constant(I64, kind.dtype.bitwidth // 8)
        data = self.b.inttoptr(self.word(), array.data.type)
        shape = [self.word() for _ in range(kind.ndim)]
        strides = [itemsize]
        for size in shape[:0:-1]:
            strides.insert(0, self.b.mul(strides[0], size))
        populate_array(array, data, shape, strides, itemsize, meminfo=None)
        return array._getvalue()


def _machine() -> Any:
    """The target that Numba compiles for."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="static", codemodel="jitdefault", jit=True)
