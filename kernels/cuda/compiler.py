"""Python kernel -> PTX -> cubin, with no GPU present, and a disk cache of both.

PTX is compiled once a kernel, for the least architecture that it needs, and assembled for each
architecture: what the emulator runs is the PTX that every GPU gets. This and ptx.py are the only
files that know numba.cuda.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import overlap, store
from .assembler import HINT, assemble
from .errors import CompilerMissing, CudaError
from .sources import source_hash

PTX_VERSION = "9.0"     # of CUDA 13.0. NVVM stamps its own, which an older assembler would refuse
NUMBA_TYPES = {"pointer": "uint64", "uint64": "uint64", "int32": "int32", "uint32": "uint32",
               "float32": "float32"}


@dataclass(frozen=True)
class Kernel:
    """A kernel and everything that decides its machine code.

    name          dtype, tile, strategy; also the name of the entry point
    make, config  `make(*config)` is the plain Python function
    signature     "pointer" (to the kernel a uint64 address) or a scalar type per parameter
    threads       of a block
    shared_bytes  of dynamic shared memory
    arch          the least architecture that runs it, "sm_75" or "sm_80"; or the only one, "sm_90a"
    blocks        that shall fit a multiprocessor, which caps the registers of a thread; 0: any
    """
    name: str
    make: Callable[..., Callable]
    config: tuple[Any, ...]
    signature: tuple[str, ...]
    threads: int
    shared_bytes: int = 0
    arch: str = "sm_75"
    blocks: int = 0

    @property
    def key(self) -> str:
        """Differs between kernels that differ in anything, sources and compilation included."""
        text = (f"{source_hash(self.make.__module__)}{source_hash(__name__)}"
                f"{self.make.__qualname__}{self.config!r}"
                f"{self.signature}{self.threads} {self.shared_bytes} {self.arch} {self.blocks}")
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor: registers a thread; bytes of the rest."""
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


def ptx(kernel: Kernel) -> str:
    """The kernel's PTX. CompilerMissing where it is neither cached nor can be compiled."""
    name = file_name(kernel, "ptx")
    found = store.get(name)
    if found is not None:
        return found.decode()
    text = compile_ptx(kernel)
    store.put(name, text.encode())
    return text


def cubin(kernel: Kernel, arch: str) -> bytes:
    """The kernel's machine code for an architecture such as "sm_90a".

    CudaError for one that is too old for the kernel, CompilerMissing where the cubin is neither
    in $CNN_CUBINS nor cached nor can be compiled.
    """
    check_arch(kernel, arch)
    return store.get(file_name(kernel, f"{arch}.cubin")) or _assembled(kernel, arch)[0]


def resources(kernel: Kernel, arch: str) -> Resources:
    """The assembler's own account of the kernel; errors as of `cubin`."""
    check_arch(kernel, arch)
    kept = store.get(file_name(kernel, f"{arch}.log"))
    log = _assembled(kernel, arch)[1] if kept is None else kept.decode()

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found.group(1)) if found else 0
    return Resources(number(r"[Uu]sed (\d+) registers"), number(r"(\d+) bytes stack frame"),
                     number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads"),
                     number(r"(\d+) bytes smem"))


def _assembled(kernel: Kernel, arch: str) -> tuple[bytes, str]:
    text = ptx(kernel)
    code, log = assemble(overlap.hopper(text) if overlaps(arch) else text, arch)
    store.put(file_name(kernel, f"{arch}.cubin"), code)
    store.put(file_name(kernel, f"{arch}.log"), log.encode())
    return code, log


def file_name(kernel: Kernel, suffix: str) -> str:
    """The kernel's file in the cache: suffix "ptx", "sm_90a.cubin" or "sm_90a.log"."""
    return f"{kernel.name}-{kernel.key}.{suffix}"


def check_arch(kernel: Kernel, arch: str) -> None:
    """CudaError for an architecture that can not run the kernel."""
    check_name(arch)
    if not runs_on(kernel, arch):
        if kernel.arch.endswith("a"):
            raise CudaError(f"{kernel.name} runs on GPUs of {kernel.arch} alone and this one is "
                            f"{arch}; leave out tile=, and a kernel that runs here is chosen")
        raise CudaError(f"{kernel.name} needs a GPU of {kernel.arch} or newer and this one is "
                        f"{arch}; use dtype='float32', which runs on any from sm_75")


def check_name(arch: str) -> None:
    """CudaError for what is no name of an architecture."""
    if not re.fullmatch(r"sm_\d+a?", arch):
        raise CudaError(f"arch={arch!r} is not an architecture; write it as sm_80 or sm_90a")


def runs_on(kernel: Kernel, arch: str) -> bool:
    """An "a" stands for instructions that neither older nor newer architectures have."""
    if kernel.arch.endswith("a"):
        return arch == kernel.arch
    return number_of(arch) >= number_of(kernel.arch)


def overlaps(arch: str) -> bool:
    """Whether kernels can begin before those before them have ended: see overlap.py."""
    return number_of(arch) >= overlap.LEAST


def number_of(arch: str) -> int:
    """75 of "sm_75", to compare architectures by."""
    return int(arch.removeprefix("sm_").rstrip("a"))


def compile_ptx(kernel: Kernel) -> str:
    """Compile with Numba and NVVM, all loops of constant length unrolled.

    NVVM by itself leaves some of them rolled, and then keeps in local memory what should be
    registers. The metadata that asks for it goes into the LLVM IR, for which Numba has no public
    interface.
    """
    from numba import types
    try:
        from numba.cuda import compiler
        from numba.cuda.cudadrv import nvrtc, nvvm
        nvvm.NVVM()
    except Exception as error:
        raise CompilerMissing(f"{kernel.name} must be compiled, and the CUDA compiler can not be "
                              f"loaded ({error}); {HINT}") from error
    function = kernel.make(*kernel.config)
    signature = types.void(*(getattr(types, NUMBA_TYPES[kind]) for kind in kernel.signature))
    capability = (*divmod(number_of(kernel.arch), 10), *("a" * kernel.arch.endswith("a")))
    library, _ = compiler._compile_pyfunc_with_fixup(
        function, signature, device=False, abi="numba", cc=capability,
        launch_bounds=(kernel.threads, kernel.blocks) if kernel.blocks else kernel.threads)
    modules = [unroll_loops(text) for text in library.llvm_strs]
    code = nvvm.compile_ir(modules, arch=nvrtc.get_arch_option(*capability), opt=3)
    text = code.decode().strip("\0").strip() + "\n"
    text = re.sub(r"^\.version [\d.]+", f".version {PTX_VERSION}", text, flags=re.M)
    entry = re.search(r"\.entry\s+(\S+?)\(", text)
    assert entry is not None
    return overlap.complete(text.replace(entry.group(1), kernel.name))


def unroll_loops(llvm_ir: str) -> str:
    """Attach `llvm.loop.unroll.full` to every back edge of an LLVM module.

    It takes effect on loops whose trip count is a constant. Numba closes each loop by a branch
    without a condition to a block that was printed before.
    """
    used = [int(n) for n in re.findall(r"^!(\d+) =", llvm_ir, flags=re.M)]
    number = max(used, default=-1) + 1
    lines: list[str] = []
    metadata: list[str] = []
    seen: set[str] = set()
    for line in llvm_ir.splitlines():
        label = re.match(r'"?([\w.$]+)"?:', line)
        branch = re.match(r'\s+br label %"?([\w.$]+)"?\s*$', line)
        if line.startswith("define"):
            seen = set()
        elif label:
            seen.add(label.group(1))
        elif branch and branch.group(1) in seen:
            line += f", !llvm.loop !{number}"
            metadata += [f"!{number} = distinct !{{ !{number}, !{number + 1} }}",
                         f'!{number + 1} = !{{ !"llvm.loop.unroll.full" }}']
            number += 2
        lines.append(line)
    return "\n".join(lines + metadata) + "\n"
