"""PTX -> cubin, by ptxas where it is installed, else by nvJitLink, and the tools' places."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .errors import CompilerMissing, CudaError

HINT = ("pip install 'numba-cnn[compiler]', or compile ahead with `python -m kernels.cuda.build` "
        "and set CNN_CUBINS to the folder that it fills")

# What a ptxas says of PTX, or of a GPU, that is newer than itself.
TOO_OLD = re.compile(r"Unsupported \.version|is not defined for option 'gpu-name'")


@cache
def find_tool(name: str) -> str | None:
    """Path of a CUDA command-line tool, or None: from the nvidia-* wheels, whose versions fit
    the compiler's, else from $CUDA_HOME, $CUDA_PATH or PATH."""
    folders = [folder for entry in sys.path for folder in sorted(Path(entry).glob("nvidia/*/bin"))]
    folders += [Path(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    found = (shutil.which(name, path=str(folder)) for folder in folders)
    return next(filter(None, found), None) or shutil.which(name)


def name_and_version() -> str:
    """ "ptxas 13.0, /usr/local/cuda/bin/ptxas", or what takes its place."""
    tool = find_tool("ptxas")
    if tool is None:
        return "no ptxas, so that nvJitLink assembles, which makes slower code"
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    return f"ptxas {release.group(1) if release else 'of an unknown version'}, {tool}"


def assemble(text: str, arch: str) -> tuple[bytes, str]:
    """(cubin, log) of PTX, by ptxas where it is installed, else by nvJitLink, a library."""
    tool = find_tool("ptxas")
    return _by_ptxas(tool, text, arch) if tool else _by_nvjitlink(text, arch)


def _by_ptxas(tool: str, text: str, arch: str) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        done = subprocess.run([tool, f"-arch={arch}", "-O3", "-v", source, "-o", target],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip()
            advice = f". It is too old for these kernels: {HINT}" if TOO_OLD.search(said) else ""
            raise CudaError(f"{name_and_version()}, refused a kernel for {arch}: {said}{advice}")
        return target.read_bytes(), done.stderr


def _by_nvjitlink(text: str, arch: str) -> tuple[bytes, str]:
    try:
        from cuda.bindings import nvjitlink
        options = [f"-arch={arch}", "-O3", "-verbose"]
        handle = nvjitlink.create(len(options), options)
    except Exception as error:      # a missing library is a plain RuntimeError
        raise CompilerMissing(f"a kernel must be assembled for {arch}, and neither ptxas nor "
                              f"nvJitLink can be found ({error}); {HINT}") from error

    def read(size: Callable, get: Callable) -> str:
        buffer = bytearray(size(handle))
        get(handle, buffer)
        return buffer.decode(errors="replace").strip("\0")

    try:
        data = text.encode()
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel.ptx")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = read(nvjitlink.get_error_log_size, nvjitlink.get_error_log)
            raise CudaError(f"nvJitLink refused a kernel for {arch}: {log}") from error
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        return bytes(code), read(nvjitlink.get_info_log_size, nvjitlink.get_info_log)
    finally:
        nvjitlink.destroy(handle)
