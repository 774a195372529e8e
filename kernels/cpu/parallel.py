"""`parallel_for`: the units of a kernel, shared among threads that are already awake.

A job is a function of (thread, first unit, end unit) with its arguments. The thread that calls
opens it, and does units until none is left; workers (threads.py) join in while they find it open.
So nobody who comes late, or whom the system has put aside, is waited for, unless in the middle of
units that it took. OpenMP, which numba would use, waits for every thread of a team: with one
process more than cores, calls of 9 ms were seen to take 400.

Each thread begins with an equal share of units that lie together, and takes it in bites; when its
own are gone it goes on with those of the others. Which thread computes a unit never changes
a bit of it.

All that threads share is STATE, an array of words: see state.py. A caller that finds
the pool busy, for another thread of Python is in a kernel, does its units alone.
"""
from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import kernel, njit
from .sizes import ARM
from .state import (
    ARGUMENTS,
    BUSY,
    CALLS,
    FUNCTION,
    GATE,
    INSIDE,
    JOB,
    LINE,
    MOST_THREADS,
    OPEN,
    SHARES,
    STATE,
    SYMBOL,
    THREADS,
    make_known,
)

BITE = 4                    # this part of what is left of a share is taken at once: much at first,
                            # and single units at last, so that all threads end together
PATIENCE = 100_000          # cycles that a thread waits before it offers its core to others,
LINGER = 300_000            # that a worker looks for the next call before it goes to sleep,
DROWSY = 5_000_000          # and that it looks for a job before it naps in between: a first call
NAP = 50                    # compiles for seconds. Microseconds
ARM_CYCLES = 3_000_000_000  # of a second

make_known()        # to Numba, where it calls kernels itself, as tests do
llvm.initialize_native_asmparser()      # for the instruction in `cycles`

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
FUNCTION_TYPE = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I64, I64, I64])


# ---- words of STATE, atomically ---------------------------------------------------------------

def _address(b: ir.IRBuilder, word: ir.Value) -> ir.Value:
    state = b.module.globals.get(SYMBOL)
    if state is None:
        state = ir.GlobalVariable(b.module, ir.ArrayType(I64, len(STATE)), SYMBOL)
    return b.gep(state, [ir.Constant(I64, 0), word])


@intrinsic
def load(typingctx, word):
    def codegen(context, b, sig, args):
        return b.load_atomic(_address(b, args[0]), "seq_cst", 8)
    return types.int64(types.int64), codegen


@intrinsic
def store(typingctx, word, value):
    def codegen(context, b, sig, args):
        b.store_atomic(args[1], _address(b, args[0]), "seq_cst", 8)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen


@intrinsic
def add(typingctx, word, value):
    def codegen(context, b, sig, args):
        b.atomic_rmw("add", _address(b, args[0]), args[1], "seq_cst")
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen


@intrinsic
def replace(typingctx, word, expected, value):
    """Write value where `expected` is; whether it was."""
    def codegen(context, b, sig, args):
        pair = b.cmpxchg(_address(b, args[0]), args[1], args[2], "seq_cst")
        return b.extract_value(pair, 1)
    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def cycles(typingctx):
    """A clock that every core reads alike. ARM's has 24 MHz to 1 GHz, as it says itself, and is
    brought to those of a CPU."""
    def codegen(context, b, sig, args):
        function = ir.FunctionType(I64, [])
        ticks = b.call(cgutils.get_or_insert_function(b.module, function,
                                                      "llvm.readcyclecounter"), [])
        if not ARM:
            return ticks
        frequency = b.call(ir.InlineAsm(function, "mrs $0, cntfrq_el0", "=r"), [])
        return b.mul(ticks, b.udiv(ir.Constant(I64, ARM_CYCLES), frequency))
    return types.int64(), codegen


@intrinsic
def offer_core(typingctx):
    """Let another thread have this core, if one waits for it."""
    def codegen(context, b, sig, args):
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []),
                                              "sched_yield"), [])
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def nap(typingctx, microseconds):
    def codegen(context, b, sig, args):
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [I32]), "usleep"),
               [b.trunc(args[0], I32)])
        return context.get_dummy_value()
    return types.void(types.int64), codegen


# ---- jobs -------------------------------------------------------------------------------------

@intrinsic
def as_job(typingctx, body, arguments):
    """(function, arguments) as `call` takes them; these live as long as the caller's frame."""
    kinds = tuple(types.unliteral(kind) for kind in arguments.types)
    signature = typingctx.resolve_function_type(body, (types.int64,) * 3 + kinds, {})

    def codegen(context, b, sig, args):
        compiled = body.dispatcher.overloads[signature.args]
        context.add_linking_libs([compiled.library])
        name = b.module.get_unique_name(f"{b.function.name}.units")
        function = ir.Function(b.module, FUNCTION_TYPE, name)
        function.linkage = "internal"
        inner = ir.IRBuilder(function.append_basic_block())
        pointer, *numbers = function.args
        packed = inner.load(inner.bitcast(pointer, args[1].type.as_pointer()))
        context.call_internal_no_propagate(inner, compiled.fndesc, signature,
                                           [*numbers, *cgutils.unpack_tuple(inner, packed)])
        inner.ret_void()
        address = b.ptrtoint(cgutils.alloca_once_value(b, args[1]), I64)
        return context.make_tuple(b, sig.return_type, [b.ptrtoint(function, I64), address])

    return types.UniTuple(types.int64, 2)(body, types.Tuple(kinds)), codegen


@intrinsic
def call(typingctx, function, arguments, thread, first, end):
    def codegen(context, b, sig, args):
        callee = b.inttoptr(args[0], FUNCTION_TYPE.as_pointer())
        b.call(callee, [b.inttoptr(args[1], I8.as_pointer()), *args[2:]])
        return context.get_dummy_value()
    return types.void(*(types.int64,) * 5), codegen


@njit(inline="always")      # the arguments lie in the frame of the kernel that calls this
def parallel_for(body, units, threads, arguments):
    """body(thread, first, end, *arguments) until all of range(units) is done, by at most `threads`
    threads, numbered from 0. body: an njit function that does not raise; arguments: a tuple."""
    function, packed = as_job(body, arguments)
    run_units(function, packed, units, threads)


@njit()
def run_units(function, arguments, units, threads):
    """Open a job, work on it, and wait for those who are inside to finish what they took."""
    threads = min(threads, units, MOST_THREADS)
    if threads < 2 or not replace(BUSY, 0, 1):
        if units > 0:
            call(function, arguments, 0, 0, units)
        return
    store(FUNCTION, function)
    store(ARGUMENTS, arguments)
    store(THREADS, threads)
    for thread in range(threads):
        store(SHARES + thread * LINE, thread * units // threads)
        store(SHARES + thread * LINE + 1, (thread + 1) * units // threads)
    store(GATE, load(GATE) + JOB + OPEN)        # nobody else writes to a closed gate
    work(0)
    add(GATE, -OPEN)
    since = cycles()
    while load(GATE) & INSIDE:
        wait(since)
    store(BUSY, 0)


@njit()
def work(thread):
    """Take units until none is left of the open job: of the thread's own share, then of others'."""
    function, arguments, threads = load(FUNCTION), load(ARGUMENTS), load(THREADS)
    for i in range(threads):
        share = SHARES + (thread + i) % threads * LINE
        first, end = load(share), load(share + 1)
        while first < end:
            taken = first + max(1, (end - first) // BITE)
            if replace(share, first, taken):
                call(function, arguments, thread, first, taken)
            first = load(share)


@njit()
def wait(since):
    """For what another thread is about to do: at first without leaving the core."""
    waited = cycles() - since
    if waited > DROWSY:
        nap(NAP)
    elif waited > PATIENCE:
        offer_core()


@kernel
def serve(thread):
    """A worker's time awake: join every job that opens, until no call has been open for a while."""
    joined, since = -1, cycles()
    while load(CALLS) > 0 or cycles() - since < LINGER:
        gate = load(GATE)
        if gate & OPEN and gate // JOB != joined and replace(GATE, gate, gate + 1):
            joined = gate // JOB
            if thread < load(THREADS):
                work(thread)
            add(GATE, -1)
            since = cycles()
        wait(since)
