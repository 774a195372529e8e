"""What the emulator's tests share: hand-written PTX becomes a kernel that runs on arrays.

No reference in these tests is computed by the emulator: they are written after the PTX ISA
(https://docs.nvidia.com/cuda/parallel-thread-execution/) in NumPy and in Python's own integers.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from kernels.emulator import Emulator, Stats

KERNEL = """.version 9.0
.target sm_90a
.address_size 64
{module}
.extern .shared .align 1024 .b8 memory[];
.visible .entry {name}({parameters})
{{
.reg .pred p, q, %p<8>;
.reg .b16 %h<16>;
.reg .b32 tid, shared, %r<64>;
.reg .f32 %f<160>;
.reg .b64 {pointers} %d<16>;
.reg .f64 %e<8>;
mov.u32 tid, %tid.x;
mov.u32 shared, memory;
{loads}
{body}
ret;
}}
"""

# %r1 becomes the number of the block in its grid, x first.
BLOCK_NUMBER = """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %ctaid.z;
    mov.u32 %r4, %nctaid.x;
    mov.u32 %r5, %nctaid.y;
    mad.lo.u32 %r2, %r3, %r5, %r2;
    mad.lo.u32 %r1, %r2, %r4, %r1;
"""

# Each test that synchronises runs in lock-step and in a random order, with and without race check.
every_schedule = pytest.mark.parametrize(
    "schedule", [{"race": False}, {}, {"seed": 5}, {"seed": 6, "race": False}],
    ids=["lockstep", "race", "random", "random-norace"])


def kernel(body: str, *names: str, module: str = "", name: str = "k") -> str:
    """A kernel whose pointer parameters are in 64-bit registers of these names.

    It starts with `tid`, the thread's number in x, and `shared`, the shared address of `memory`,
    the dynamic shared memory; %r, %f, %d, %e, %h and %p are there to be used.
    """
    return KERNEL.format(
        module=module, name=name, body=body,
        parameters=", ".join(f".param .u64 p_{x}" for x in names),
        pointers="".join(f"{x}, " for x in names),
        loads="\n".join(f"ld.param.u64 {x}, [p_{x}];" for x in names))


def launch(body: str, *, threads: Any = 32, blocks: Any = 1, shared_bytes: int = 0,
           module: str = "", schedule: dict[str, Any] | None = None, cluster: Any = 1,
           **arrays: Any) -> Stats:
    """Runs `kernel(body)`; each array is a pointer of its name."""
    return Emulator(**(schedule or {})).launch(
        kernel(body, *arrays, module=module), "k", blocks, threads, list(arrays.values()),
        shared_bytes, cluster)


def register_type(dtype: np.dtype) -> str:
    return f"{'f' if dtype.kind == 'f' and dtype.itemsize > 2 else 'b'}{8 * dtype.itemsize}"


def compute(instructions: str, dtype: Any, **inputs: np.ndarray) -> np.ndarray:
    """What `instructions` leave in register `d` of this dtype, one thread an element; each input
    is a register of its name."""
    threads = min(len(x) for x in inputs.values())
    result = np.zeros(threads, dtype)
    registers = {**inputs, "d": result}
    body = [f".reg .{register_type(x.dtype)} {name};" for name, x in registers.items()]
    for name, x in inputs.items():
        body += [f"mad.wide.u32 %d0, tid, {x.itemsize}, at_{name};",
                 f"ld.global.{register_type(x.dtype)} {name}, [%d0];"]
    body += [instructions, f"mad.wide.u32 %d0, tid, {result.itemsize}, at_d;",
             f"st.global.{register_type(result.dtype)} [%d0], d;"]
    launch("\n".join(body), threads=threads, schedule={"race": False},
           **{f"at_{name}": x for name, x in registers.items()})
    return result


def integers(bits: int, *, seed: int, count: int = 256) -> np.ndarray:
    """Unsigned numbers of every length, and those at which arithmetic changes its ways."""
    rng = np.random.default_rng(seed)
    edges = [0, 1, 2, bits - 1, bits, bits + 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2 ** bits - 1]
    drawn = [int(x) >> int(shift) for x, shift in zip(
        rng.integers(0, 2 ** bits - 1, count - len(edges), np.uint64, endpoint=True),
        rng.integers(0, bits, count - len(edges)), strict=True)]
    return rng.permutation(np.array(edges + drawn, np.uint64)).astype(f"u{bits // 8}")


def signed(x: int, bits: int) -> int:
    """The number whose two's complement is x."""
    return x - 2 ** bits if x >> (bits - 1) else x


def elementwise(function: Any, dtype: Any, *columns: np.ndarray) -> np.ndarray:
    """function(*Python numbers) for each element, wrapped to the width of an integer dtype."""
    dtype = np.dtype(dtype)
    values = [function(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]
    if dtype.kind == "u":
        return np.array([x % 2 ** (8 * dtype.itemsize) for x in values], dtype)
    return np.array(values, dtype)


# ------------------------------------------------------------------------------------ exact floats

# digits of the significand, least and greatest exponent of a normal number
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "tf32": (11, -126, 127),
           "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
STORAGE = {"f16": np.float16, "bf16": bfloat16, "tf32": np.float32, "f32": np.float32,
           "f64": np.float64}
ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "rn": round,                                                        # ties to even
    "rz": math.trunc,
    "rm": math.floor,
    "rp": math.ceil,
    "rna": lambda x: math.floor(abs(x) + Fraction(1, 2)) * (1 if x > 0 else -1),    # ties away
}


def rounded(x: Fraction, target: str, rounding: str = "rn") -> float:
    """The number of the format that IEEE 754 rounds x to."""
    if x == 0:
        return 0.0
    digits, least, greatest = FORMATS[target]
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    found = ROUNDINGS[rounding](x / unit) * unit
    largest = (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** greatest
    if abs(found) <= largest:
        return float(found)
    towards_zero = rounding == "rz" or rounding == ("rm" if x > 0 else "rp")
    return (float(largest) if towards_zero else math.inf) * (1 if x > 0 else -1)


def exactly(function: Callable[..., Any], target: str, *columns: np.ndarray,
            rounding: str = "rn") -> np.ndarray:
    """function(*numbers) computed without any error and rounded once; infinities and NaN by
    NumPy's float64, which follows IEEE 754 also."""
    rows = [row.tolist() for row in np.stack([x.astype(np.float64) for x in columns], 1)]
    with np.errstate(all="ignore"):
        return np.array([
            rounded(function(*map(Fraction, row)), target, rounding)
            if all(map(math.isfinite, row)) else function(*map(np.float64, row)) for row in rows])


def floats(source: str, *, seed: int, count: int = 256) -> np.ndarray:
    """Numbers of the format over many magnitudes, and the special ones."""
    rng = np.random.default_rng(seed)
    digits, least, greatest = FORMATS[source]
    spread = min(20, greatest)
    values = rng.standard_normal(count) * 2.0 ** rng.integers(-spread, spread, count)
    smallest, largest = 2.0 ** (least - digits + 1), (2 - 2.0 ** (1 - digits)) * 2.0 ** greatest
    edges = [0.0, -0.0, 1.0, -1.0, 1.5, 2.5, -2.5, np.inf, -np.inf, np.nan, largest, -largest,
             smallest, -3 * smallest, 2.0 ** least]
    values[:len(edges)] = edges
    with np.errstate(over="ignore"):
        found = rng.permutation(values).astype(STORAGE[source])
    return truncated(found) if source == "tf32" else found


def truncated(x: np.ndarray) -> np.ndarray:
    """What a tensor core sees of a float32 as tf32: its upper 19 bits."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def bits(x: np.ndarray) -> np.ndarray:
    """The same bytes as unsigned integers, which is how 16-bit floats travel in registers."""
    return x.view(f"u{x.itemsize}")


def packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two 16-bit columns as one of 32 bits."""
    return bits(low).astype(np.uint32) | bits(high).astype(np.uint32) << np.uint32(16)


# ------------------------------------------------------------------------------------------ faults

def mutated(body, found, new=""):
    """`body` with the only match of a text replaced."""
    assert body.count(found) == 1, found
    return body.replace(found, new)


def refused(error: type[Exception], body: str, *, offset: int | None = None, base: str = "x",
            block: tuple[int, int, int] | None = None, thread: tuple[int, int, int] | None = None,
            threads: Any = 64, blocks: Any = 1, shared_bytes: int = 0, module: str = "",
            schedule: dict[str, Any] | None = None, **arguments: Any) -> Exception:
    """The error that `body` raises: of this class, and it names the kernel, the PTX line whose
    comment is `// <-`, and the block, the thread and the address (`base` + `offset`) if given."""
    probe = np.zeros(2, np.uint64)
    arguments["probe"] = probe

    def launch(body: str) -> None:
        text = kernel(body, *arguments, module=module, name="faulty")
        Emulator(**(schedule or {})).launch(text, "faulty", blocks, threads,
                                            list(arguments.values()), shared_bytes)

    with pytest.raises(error) as caught:
        launch(body)
    found = caught.value
    assert type(found) is error
    message = str(found)
    assert found.kernel == "faulty"
    assert "faulty" in message
    if "// <-" in body:
        before, _ = kernel(body, *arguments, module=module, name="faulty").split("// <-")
        instruction = before.splitlines()[-1].strip().rstrip(";")
        assert found.line == before.count("\n") + 1
        assert str(found.line) in message
        assert found.instruction.rstrip(";") == instruction
        assert instruction[:60] in message
    if block is not None:
        assert found.block == block
        assert str(block) in message
    if thread is not None:
        assert found.thread == thread
        assert str(thread) in message
    if offset is not None:
        value = {"shared": "cvt.u64.u32 %d1, shared;",
                 "local": ".local .align 16 .b8 mine[16];\nmov.u64 %d1, mine;"}
        launch(value.get(base, f"mov.b64 %d1, {base};") + "\nst.global.u64 [probe], %d1;")
        assert found.address == int(probe[0]) + offset
        assert f"{found.address:#x}" in message or str(found.address) in message
    return found
