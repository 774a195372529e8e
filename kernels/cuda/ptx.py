"""PTX instructions that Numba does not expose, as functions that a kernel can call.

Kernel files import everything of CUDA from here (`from .ptx import cuda, uint32, ...`); this and
compiler.py are the only files that know numba.cuda.

Each instruction is one line of inline PTX, which `asm_op` makes a device function of. Conventions:

* shared-memory addresses are uint32 byte addresses in the shared window (`dynamic_smem`), global
  ones uint64;
* register groups (matrix fragments, accumulators, 16-byte vectors) are tuples;
* a pair of 16-bit floats is one uint32.

The LLVM IR is in the typed-pointer dialect of LLVM 7, which libNVVM reads for every architecture
before sm_100. Source of the instructions: the PTX ISA, section 9.7, under the names given there.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from llvmlite import ir
from numba import float32, int32, int64, types, uint32, uint64
from numba.core import cgutils

from .errors import CompilerMissing
from .overlap import LAUNCH_DEPENDENTS, WAIT

if find_spec("numba_cuda") is None:
    raise CompilerMissing(
        "the CUDA kernels are compiled by numba-cuda, which is not installed here: "
        "pip install 'numba-cnn[cuda13]', or 'numba-cnn[compiler]' on a machine without a GPU")

from numba import cuda
from numba.cuda.extending import intrinsic

__all__ = ["Regs", "asm_op", "cp_async_16", "cp_async_16_zfill", "cp_async_commit",
           "cp_async_wait", "cuda", "dynamic_smem", "float32", "int32", "int64", "intrinsic",
           "ld_shared_v4_f32", "ldmatrix_x4", "let_next_begin", "mma_bf16", "mma_f16", "mma_tf32",
           "st_shared_v4_f32", "uint32", "uint64", "wait_for_inputs"]

# Numba scalar type -> (LLVM type, register letter of inline PTX).
_OPERAND = {
    types.int32: (ir.IntType(32), "r"), types.uint32: (ir.IntType(32), "r"),
    types.int64: (ir.IntType(64), "l"), types.uint64: (ir.IntType(64), "l"),
    types.float32: (ir.FloatType(), "f"),
}


@dataclass(frozen=True)
class Regs:
    """`count` registers of one scalar type; to a kernel a tuple."""
    scalar: types.Type
    count: int


Operand = Any       # a Numba scalar type, or Regs


def _numba_type(spec: Operand | None) -> types.Type:
    if spec is None:
        return types.void
    return types.UniTuple(spec.scalar, spec.count) if isinstance(spec, Regs) else spec


def _registers(spec: Operand | None) -> list[tuple[ir.Type, str]]:
    if spec is None:
        return []
    return [_OPERAND[spec.scalar]] * spec.count if isinstance(spec, Regs) else [_OPERAND[spec]]


def _llvm_result(outputs: list[tuple[ir.Type, str]]) -> ir.Type:
    if not outputs:
        return ir.VoidType()
    return outputs[0][0] if len(outputs) == 1 else ir.LiteralStructType([t for t, _ in outputs])


def asm_op(name: str, template: str, returns: Operand | None = None,
           args: Sequence[Operand] = (), *, memory: bool = False, pure: bool = False,
           tied: int = 0) -> Callable:
    """A device function of one inline-PTX template.

    template  $0, $1 ... number the registers of the result first, then those of the arguments
    memory    the instruction touches memory: the compiler moves no load or store across it
    pure      the compiler may reorder, merge or drop it
    tied      the first `tied` argument registers are also the first result registers

    A kernel casts each argument (`uint32(...)`), for Numba widens integers.
    """
    outputs = _registers(returns)
    inputs = [register for spec in args for register in _registers(spec)]
    constraints = ["=" + letter for _, letter in outputs]
    constraints += [str(i) if i < tied else letter for i, (_, letter) in enumerate(inputs)]
    constraints += ["~{memory}"] * memory
    asm = ir.InlineAsm(ir.FunctionType(_llvm_result(outputs), [kind for kind, _ in inputs]),
                       template, ",".join(constraints), side_effect=not pure)

    def codegen(context, builder, sig, values):
        flat = []
        for spec, value in zip(args, values, strict=True):
            flat += ([builder.extract_value(value, i) for i in range(spec.count)]
                     if isinstance(spec, Regs) else [value])
        result = builder.call(asm, flat)
        if not outputs:
            return context.get_dummy_value()
        if not isinstance(returns, Regs):
            return result
        return cgutils.pack_array(
            builder, [builder.extract_value(result, i) for i in range(returns.count)])

    signature = _numba_type(returns)(*map(_numba_type, args))

    def typing(typingctx, *arg_types):
        return signature, codegen

    # Numba reads how many arguments there are from the Python signature.
    names = ["typingctx", *(f"a{i}" for i in range(len(args)))]
    typing.__name__ = typing.__qualname__ = name
    typing.__signature__ = inspect.Signature(       # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
    return intrinsic(typing)


def _list(first: int, count: int) -> str:
    """The operand {$first, ...} of `count` registers."""
    return "{" + ",".join(f"${i}" for i in range(first, first + count)) + "}"


@intrinsic
def dynamic_smem(typingctx):
    """() -> uint32: address of the dynamic shared memory, aligned to 1024 bytes.

    128 bytes are one row of all 32 banks, and 8 such rows what swizzles go round in.
    """
    def codegen(context, builder, sig, args):
        module, name = builder.module, "dynamic_smem"
        base = module.globals.get(name)
        if base is None:
            base = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 0), name, addrspace=3)
            base.linkage, base.align = "external", 1024
        return builder.ptrtoint(base, ir.IntType(32))
    return uint32(), codegen


# Numba reads a vector as so many single elements; this stays one 16-byte access.
ld_shared_v4_f32 = asm_op("ld_shared_v4_f32", f"ld.shared.v4.f32 {_list(0, 4)}, [$4];",
                          Regs(float32, 4), [uint32], memory=True)
st_shared_v4_f32 = asm_op("st_shared_v4_f32", "st.shared.v4.f32 [$0], {$1, $2, $3, $4};", None,
                          [uint32, float32, float32, float32, float32], memory=True)

# Asynchronous copies, sm_80 and later. Both addresses are multiples of 16.
# cp_async_16(shared, global) copies 16 bytes past the registers and past L1.
cp_async_16 = asm_op("cp_async_16", "cp.async.cg.shared.global [$0], [$1], 16;",
                     None, [uint32, uint64], memory=True)
# cp_async_16_zfill(shared, global, n): n bytes (0 or 16), zeros for the rest. With n = 0 nothing
# is read: so a convolution loads its padding.
cp_async_16_zfill = asm_op("cp_async_16_zfill", "cp.async.cg.shared.global [$0], [$1], 16, $2;",
                           None, [uint32, uint64, uint32], memory=True)
cp_async_commit = asm_op("cp_async_commit", "cp.async.commit_group;", memory=True)


def cp_async_wait(pending: int) -> Callable:
    """The op that waits until at most `pending` of this thread's committed groups are in flight."""
    return asm_op(f"cp_async_wait_{pending}", f"cp.async.wait_group {pending};", memory=True)


# Before the first a kernel touches nothing but constants; after the second the next kernel's blocks
# may come: see overlap.py.
wait_for_inputs = asm_op("wait_for_inputs", WAIT, memory=True)
let_next_begin = asm_op("let_next_begin", LAUNCH_DEPENDENTS, memory=True)

# Four 8x8 matrices of 16-bit values for one warp: lane i supplies the shared address of row i % 8
# of matrix i // 8, and receives elements (lane // 4, 2 * (lane % 4) + {0, 1}) of each matrix.
ldmatrix_x4 = asm_op("ldmatrix_x4",
                     f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {_list(0, 4)}, [$4];",
                     Regs(uint32, 4), [uint32], memory=True)


def _mma(name: str, instruction: str) -> Callable:
    """(acc of 4 float32, a of 4 uint32, b of 2 uint32) -> acc: one m16n8 tile of a warp."""
    template = f"{instruction} {_list(0, 4)}, {_list(8, 4)}, {_list(12, 2)}, {_list(0, 4)};"
    return asm_op(name, template, Regs(float32, 4),
                  [Regs(float32, 4), Regs(uint32, 4), Regs(uint32, 2)], pure=True, tied=4)


mma_f16 = _mma("mma_f16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
mma_bf16 = _mma("mma_bf16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
mma_tf32 = _mma("mma_tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
