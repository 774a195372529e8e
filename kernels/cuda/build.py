"""Compiles kernels ahead of time, in parallel and with no GPU present.

    python -m kernels.cuda.build --arch sm_90a --model net.onnx --dtype float16 --output cubins

The folder can be taken to a machine without a compiler: CNN_CUBINS=cubins. `--report` prints what
each kernel takes of a multiprocessor, as a Markdown table.
"""
from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.progress import Progress

from ..cache import write
from . import backend, compiler, sass, store
from .compiler import Kernel, Resources
from .errors import CudaError
from .launch import CudaOptions

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a")
# Of the GPU of that architecture that servers have most: T4, A100, A10, L4, H100 and H200.
MULTIPROCESSORS = {"sm_75": 40, "sm_80": 108, "sm_86": 72, "sm_89": 58, "sm_90a": 132}

console = Console(stderr=True, highlight=False)


class Built(NamedTuple):
    """A kernel's machine code for one architecture; density: "64 HMMA of 147" in a main loop."""
    kernel: Kernel
    arch: str
    cubin: bytes
    resources: Resources
    density: str = ""


def build(kernels: Iterable[Kernel], archs: Iterable[str], jobs: int,
          reports: bool = False) -> list[Built]:
    """Compile each kernel for each architecture that can run it, in `jobs` processes.

    reports: also look into the machine code of convolutions' main loops.
    """
    wanted = [(kernel, [arch for arch in archs if compiler.runs_on(kernel, arch)])
              for kernel in kernels]
    # A forked child would inherit whatever state NVVM and numba's threads are in.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    done: dict[Kernel, list[Built]] = {}
    with pool, Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        running = {pool.submit(_build_one, *each, reports): each[0] for each in wanted}
        for future in as_completed(running):
            done[running[future]] = future.result()
            progress.advance(task)
    return [built for kernel, _ in wanted for built in done[kernel]]


def _build_one(kernel: Kernel, archs: Sequence[str], reports: bool) -> list[Built]:
    return [Built(kernel, arch, code := compiler.cubin(kernel, arch),
                  compiler.resources(kernel, arch), density(kernel, code) if reports else "")
            for arch in archs]


def density(kernel: Kernel, code: bytes) -> str:
    """How many instructions of a convolution's main loop multiply: FFMA, or HMMA and HGMMA for a
    tile."""
    units = {"conv_simt": "FFMA", "conv_mma": "HMMA", "conv_wgmma": "HGMMA"}
    unit = next((units[family] for family in units if kernel.name.startswith(family)), None)
    if unit is None:
        return ""
    counts = sass.loop_opcodes(code, unit)
    return f"{sass.number(counts, unit)} {unit} of {counts.total()}"


def ship(built: Iterable[Built], folder: Path) -> None:
    """Put cubins where $CNN_CUBINS may point."""
    for one in built:
        write(folder / compiler.file_name(one.kernel, f"{one.arch}.cubin"), one.cubin)


def report(built: Sequence[Built]) -> str:
    """A Markdown table, a row a kernel: registers and main loop by architecture."""
    archs = list(dict.fromkeys(one.arch for one in built))
    rows: dict[Kernel, dict[str, str]] = {}
    for one in built:
        rows.setdefault(one.kernel, {})[one.arch] = _cell(one)
    lines = ["| kernel | threads | shared KiB | " + " | ".join(archs) + " |",
             "|---|---|---|" + "---|" * len(archs)]
    shared = {one.kernel: one.kernel.shared_bytes + one.resources.static_shared for one in built}
    lines += [f"| {kernel.name} | {kernel.threads} | {shared[kernel] / 1024:g} | "
              + " | ".join(cells.get(arch, "") for arch in archs) + " |"
              for kernel, cells in rows.items()]
    return "\n".join(lines)


def _cell(one: Built) -> str:
    """Registers; bytes of spills if there are any; the main loop's density."""
    used = one.resources
    text = f"{used.registers}"
    if used.spill_stores or used.spill_loads or used.stack:
        text += f", {used.spill_stores} + {used.spill_loads} B spilled"
    return ", ".join(filter(None, (text, one.density)))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--arch", "archs", multiple=True, metavar="ARCH", default=("sm_90a",),
              show_default=True, help="Such as sm_80 or sm_90a; may be given several times.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(backend.DTYPES),
              default=("float16",), show_default=True, help="Compute type; several times, too.")
@click.option("--model", metavar="MODEL", help="Only what this file or zoo model needs.  "
                                               "[default: all kernels]")
@click.option("--skip", "skipped", multiple=True, metavar="PREFIX",
              help="No kernels whose names begin so; several times, too.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1,),
              show_default=True, help="With --model: its batch sizes.")
@click.option("--multiprocessors", type=click.IntRange(1), default=None,
              help="With --model: of the GPU, for they decide how work is split.  "
                   "[default: those of the most common GPU of the architecture]")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path),
              help="Folder for the cubins.  [default: the cache of this machine]")
@click.option("--jobs", type=click.IntRange(1), default=len(os.sched_getaffinity(0)),
              show_default=True, help="Processes.")
@click.option("--report", "reports", is_flag=True, help="Print a table of registers and spills.")
def main(archs: Sequence[str], dtypes: Sequence[str], model: str | None, skipped: Sequence[str],
         batches: Sequence[int], multiprocessors: int | None, output: Path | None, jobs: int,
         reports: bool) -> None:
    """Compile CUDA kernels ahead of time, on a machine that needs no GPU."""
    try:
        kernels: dict[Kernel, None] = {}
        for dtype in dtypes:
            found = backend.all_kernels(dtype) if model is None else [
                kernel for arch in archs
                for kernel in _of_model(model, dtype, arch, batches, multiprocessors)]
            kernels.update((kernel, None) for kernel in found
                           if not kernel.name.startswith(tuple(skipped)))
        for arch in archs:
            compiler.check_name(arch)
        built = build(kernels, archs, jobs, reports)
        if output is not None:
            ship(built, output)
    except (CudaError, OSError) as error:
        raise click.ClickException(str(error)) from None
    place = f"{output}; use it with CNN_CUBINS={output}" if output else store.folder()
    console.print(f"{len(built)} cubins of {len(kernels)} kernels are in {place}", soft_wrap=True)
    if reports:
        click.echo(report(built))


def _of_model(source: str, dtype: str, arch: str, batches: Sequence[int],
              multiprocessors: int | None) -> list[Kernel]:
    # The one place where kernels/ knows cnn/: only a network tells which kernels it needs.
    from cnn.ahead import kernels_of
    from cnn.errors import Error
    options = CudaOptions(dtype=dtype, arch=arch,
                          multiprocessors=multiprocessors or MULTIPROCESSORS.get(arch, 108))
    try:
        return kernels_of(source, options, batches)
    except Error as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
