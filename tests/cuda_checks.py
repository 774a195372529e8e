"""What all tests of CUDA kernels share; the same tests run in the emulator and on a GPU.

As on the CPU (checks.py): guard zones, poisoned outputs, integer inputs compared exactly, computed
bounds. Arrays are given as float32 or float64 and rounded to the dtype under test before the
reference sees them.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import ml_dtypes
import numpy as np
import pytest

from kernels import ops, reference
from kernels.cuda import backend, sass
from kernels.cuda.compiler import Kernel, cubin, number_of, resources
from kernels.cuda.emulate import emulate
from kernels.cuda.launch import CudaOptions
from kernels.ops import Op, TensorSpec
from kernels.step import Step

DTYPES = ["float32", "float16", "bfloat16"]
# bfloat16 differs from float16 in how an access is converted: its machine code waits for test-full.
COMPILED_DTYPES = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
STORED = {"float32": np.float32, "tf32": np.float32, "float16": np.float16,
          "bfloat16": ml_dtypes.bfloat16}
ROUNDOFF = {"float32": 2.0 ** -24, "tf32": 2.0 ** -24, "float16": 2.0 ** -11,
            "bfloat16": 2.0 ** -8}
TINY = {"float32": 2.0 ** -126, "tf32": 2.0 ** -126, "float16": 2.0 ** -24,
        "bfloat16": 2.0 ** -126}
POISON = {4: 0x7FA5A5A5, 2: 0x7FA5}     # NaNs that no arithmetic makes
GUARD = 256                             # bytes before and after an output
GARBAGE = 0xFB                          # of a workspace: large negative numbers in any dtype


def storage(dtype: str) -> str:
    """The dtype that a tensor of this compute type is stored in."""
    return "float32" if dtype == "tf32" else dtype


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(np.asarray(array).astype(STORED[dtype]))


def bits(array: np.ndarray) -> np.ndarray:
    words = {4: np.uint32, 2: np.uint16, 1: np.uint8}[array.itemsize]
    return np.ascontiguousarray(array).view(words)


def guarded(shape, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(poisoned array, the block of bits around it), the array 256-byte aligned in the block."""
    itemsize = np.dtype(STORED[dtype]).itemsize
    size, guard = int(np.prod(shape)), GUARD // itemsize
    block = np.full(size + 2 * guard, POISON[itemsize], bits(np.zeros(1, STORED[dtype])).dtype)
    return block[guard:guard + size].view(STORED[dtype]).reshape(shape), block


def execute(step: Step, arrays, wide: np.ndarray, part: slice, block: np.ndarray, runner: str
            ) -> None:
    """Run a step whose output is these channels of `wide`, a view of `block`."""
    workspace = np.full(step.workspace, GARBAGE, np.uint8)
    if runner == "gpu":
        import gpu_checks
        gpu_checks.execute(step, arrays, wide, part, block, workspace)
    else:
        emulate(step.bind(arrays, wide[..., part], workspace), late=[*arrays, block, workspace])


def run_step(step: Step, arrays, output: TensorSpec, runner: str = "emulator",
             channels_before: int = 0) -> np.ndarray:
    """The step's output, checked on the way: every element was written, nothing beside it was,
    and inputs are as before.

    channels_before: of a wider array, of which the output is a part; as many follow.
    """
    before = [bits(array).copy() for array in arrays]
    *places, channels = ops.known(output.shape) or (1,)
    part = slice(channels_before, channels_before + channels)
    wide, block = guarded((*places, channels + 2 * channels_before), output.dtype)
    execute(step, arrays, wide, part, block, runner)
    poison, guard = POISON[wide.itemsize], GUARD // wide.itemsize
    assert (block[:guard] == poison).all(), "written before the output"
    assert (block[guard + wide.size:] == poison).all(), "written after the output"
    written = bits(wide) != poison
    assert written[..., part].all(), "not every element was written"
    written[..., part] = False
    assert not written.any(), "written between the output's pixels"
    assert all(np.array_equal(old, bits(new)) for old, new in zip(before, arrays, strict=True)), (
        "an input was changed")
    return wide[..., part].reshape(output.shape).copy()


def assert_in_place(op: Op, *arrays: np.ndarray, dtype: str = "float32", weights=()) -> None:
    """The op gives the same bits when its output is its first input's memory."""
    given = [np.asarray(array, np.float32) if i in weights else rounded(array, dtype)
             for i, array in enumerate(arrays)]
    step = prepare(op, given, dtype, weights, CudaOptions(dtype=dtype))
    apart = run_step(step, given, TensorSpec(given[0].shape, storage(dtype)))
    emulate(step.bind(given, given[0], np.full(step.workspace, GARBAGE, np.uint8)))
    np.testing.assert_array_equal(bits(given[0]), bits(apart))


def prepare(op: Op, given, dtype: str, weights, options: CudaOptions, **choice) -> Step:
    """The step for arrays as they are stored."""
    stored = storage(dtype)
    output = TensorSpec(ops.known(op.output_shape(*(array.shape for array in given))), stored)
    constants = [array if i in weights else None for i, array in enumerate(given)]
    specs = [TensorSpec(array.shape, stored) for array in given]
    return backend.PREPARE[type(op)](op, specs, output, constants, options, **choice)


def run(op: Op, *arrays: np.ndarray, dtype: str = "float32", weights=(), kernel: str | None = None,
        runner: str = "emulator", multiprocessors: int = 4, arch: str = "sm_90a", **choice
        ) -> np.ndarray:
    """The op's output by the kernel whose name starts with `kernel`.

    weights   positions of constant inputs, which stay float32
    choice    a tile or number of splits that is forced on the family's `prepare`
    """
    given = [np.asarray(array, np.float32) if i in weights else rounded(array, dtype)
             for i, array in enumerate(arrays)]
    options = CudaOptions(dtype=dtype, arch=arch, multiprocessors=multiprocessors,
                          upload=uploader(runner))
    step = prepare(op, given, dtype, weights, options, **choice)
    if kernel is not None:
        assert step.kernel.startswith(kernel), step.kernel
    shape = ops.known(op.output_shape(*(array.shape for array in given)))
    return run_step(step, given, TensorSpec(shape, storage(dtype)), runner)


def skip_on_others(runner: str, needs: str, runs: Callable[[str], bool]) -> None:
    """Skips a test on a GPU whose architecture does not run what it tests; needs: a sentence."""
    if runner == "gpu":
        from kernels.cuda import gpu
        arch = gpu.gpu(gpu.cupy().cuda.runtime.getDevice()).arch
        if not runs(arch):
            pytest.skip(f"{needs}, and this GPU is {arch}")


def uploader(runner: str):
    if runner == "gpu":
        import gpu_checks
        return gpu_checks.upload
    return lambda array: array


def expected(op: Op, arrays, dtype: str, weights) -> np.ndarray:
    """The reference for inputs as they are after rounding to the dtype."""
    return reference.run(op, *(np.asarray(array, np.float64) if i in weights
                               else rounded(array, dtype).astype(np.float64)
                               for i, array in enumerate(arrays)))


def assert_exact(op: Op, *arrays: np.ndarray, dtype: str = "float32", weights=(), **options
                 ) -> None:
    """Integer inputs: the very numbers of the reference, rounded once to the dtype."""
    found = run(op, *arrays, dtype=dtype, weights=weights, **options)
    right = expected(op, arrays, dtype, weights)
    assert np.abs(right[np.isfinite(right)]).max(initial=0) < 1 << 24
    np.testing.assert_array_equal(found.astype(np.float64),
                                  rounded(right, dtype).astype(np.float64))


def assert_within(bound: np.ndarray | float, op: Op, *arrays: np.ndarray, dtype: str = "float32",
                  weights=(), **options) -> None:
    """Each element within its bound, and the rounding of storing it, of the reference."""
    found = run(op, *arrays, dtype=dtype, weights=weights, **options).astype(np.float64)
    right = expected(op, arrays, dtype, weights)
    finite = np.isfinite(right)
    np.testing.assert_array_equal(found[~finite], right[~finite])
    found, right = (np.where(finite, values, 0.0) for values in (found, right))
    allowed = np.broadcast_to(bound, right.shape) + ROUNDOFF[dtype] * np.abs(right) + TINY[dtype]
    excess = np.where(finite, np.abs(found - right) / allowed, 0.0)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 1, (
        f"at {worst}: {found[worst]} instead of {right[worst]}, {excess[worst]:.2f} x the bound")


@dataclass(frozen=True)
class Found:
    """A kernel's machine code: registers a thread, and how often each opcode stands in it (read
    only when asked for: disassembling takes most of a resource test)."""
    registers: int
    cubin: bytes

    @cached_property
    def counts(self) -> Counter:
        return sass.opcodes(self.cubin)


@cache
def assert_resources(kernel: Kernel, arch: str) -> Found:
    """No spill, no local memory; what was found otherwise. Skips the test where the architecture
    is too old for the kernel."""
    if number_of(arch) < number_of(kernel.arch):
        pytest.skip(f"{kernel.name} needs {kernel.arch}")
    used = resources(kernel, arch)
    assert used.stack == used.spill_stores == used.spill_loads == 0, (kernel.name, arch, used)
    assert used.static_shared + kernel.shared_bytes <= 227 * 1024, (kernel.name, arch, used)
    return Found(used.registers, cubin(kernel, arch))
