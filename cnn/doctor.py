"""What a bug report needs to know about the machine and the installation."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import llvmlite.binding as llvm

from kernels.cache import cache_root
from kernels.cpu import sizes, store, threads
from kernels.cpu.host import unit_choice
from kernels.cuda.assembler import name_and_version
from kernels.cuda.errors import CudaError

from . import zoo
from .errors import in_words
from .version import __version__

LIBRARIES = ("numba", "llvmlite", "numpy", "onnx", "pillow", "safetensors", "click", "rich")
CUDA = ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvcc", "cuda-bindings")
DRIVER = Path("/proc/driver/nvidia/version")
FEATURES = ("neon", "dotprod", "bf16", "i8mm", "sve") if sizes.ARM else (
    "fma", "avx", "avx2", "avx512f", "avx512bf16", "avx512vnni", "avxvnni", "amx-bf16", "amx-int8")


def report() -> list[tuple[str, str]]:
    """(what, value) lines."""
    features = llvm.get_host_cpu_features()
    libraries = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    root = cache_root()
    state = "compiled kernels are there" if not store.is_cold() else "first use will compile"
    return [
        ("cnn", f"{__version__} at {Path(__file__).parent}"),
        ("kernels", str(Path(store.__file__).parent.parent)),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("libraries", libraries),
        ("cpu", f"{_cpu_model()} ({llvm.get_host_cpu_name()})"),
        ("cpu features", ", ".join(name for name in FEATURES if features.get(name)) or "none"),
        ("vectors", f"{sizes.REGISTERS} registers of {sizes.LANES} float32 lanes"),
        ("bfloat16", _bfloat16()),
        ("int8", _int8()),
        ("threads", f"{threads.default_threads()} by default; this process may use "
                    f"{threads.available_threads()} of {os.cpu_count()} cores"),
        *_gpus(),
        ("cuda libraries", ", ".join(f"{name} {_version(name)}" for name in (*CUDA, *_cupy()))),
        ("cuda assembler", name_and_version()),
        ("settings", ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items())
                               if name.startswith(("CNN_", "NUMBA_"))) or "none"),
        ("cache", f"{root}, {_size(root) / 1e6:.1f} MB; {state}"),
        ("zoo", ", ".join(zoo.names())),
    ]


def _bfloat16() -> str:
    """What multiplies it on the CPU, or why nothing does."""
    try:
        return unit_choice.choose().name
    except ValueError as error:
        return f"none: {error}"


def _int8() -> str:
    """What multiplies files that are quantised to 8 bits on the CPU, or why float32 does."""
    try:
        unit = unit_choice.choose_int8()
    except ValueError as error:
        return f"none: {error}"
    return unit.name if unit else "none: quantised files are multiplied in float32"


def _gpus() -> list[tuple[str, str]]:
    """The driver and every GPU, or why none can be used."""
    try:
        from kernels.cuda import gpu  # needs the compiler
        runtime = gpu.cupy().cuda.runtime
    except CudaError as error:
        return [("gpu", f"none: {error}")]
    supported = gpu.cuda_version(runtime.driverGetVersion())
    return [("gpu driver", f"{_driver()}, which supports CUDA {supported}"),
            *((f"gpu {i}", _gpu(i)) for i in range(runtime.getDeviceCount()))]


def _driver() -> str:
    """ "580.126.20", as the kernel module says it."""
    try:
        said = DRIVER.read_text(encoding="utf-8")
    except OSError:
        said = ""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)", said)
    return found[1] if found else "of an unknown version"


def _gpu(index: int) -> str:
    """What a GPU is and the memory that is left on it, or why it can not be used."""
    from kernels.cuda import gpu
    cuda = gpu.cupy().cuda
    try:
        found = gpu.gpu(index)
        with cuda.Device(index):
            free, total = cuda.runtime.memGetInfo()
    except CudaError as error:
        return f"can not be used: {error}"
    except gpu.faults() as error:
        return f"can not be used: {gpu.no_answer(error, index)}"
    return (f"{found.name} ({found.arch}, {found.multiprocessors} multiprocessors), "
            f"{in_words(free)} of {in_words(total)} free")


def _cupy() -> list[str]:
    """The distributions of CuPy, of which one should be installed."""
    found = importlib.metadata.packages_distributions().get("cupy", [])
    return sorted(set(found)) or ["cupy-cuda13x"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines
                 if line.startswith("model name")), platform.processor() or platform.machine())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
