"""Times every tile of our convolutions and matrix products on a GPU, layer by layer.

    python profiling/tiles.py gemm resnet50:256 --json tiles.json

Of each tile the number of splits whose estimate is least is run, from a CUDA graph with a cold L2
cache, all of them in turn. Values are small whole numbers, so that every right kernel gives the
bits of the present choice: what differs is "wrong", and the script exits with 1. Nothing is saved:
what chooses is `cnn tune`. Kernels are compiled where they are needed, one after the other;
`python -m kernels.cuda.build` has them ready before.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import write_json
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
import gpu_timing
from compare_kernels import cases_of_group, check_group
from layer_cases import Case, to_gpu

from kernels import ops
from kernels.cuda import gpu, tune
from kernels.cuda.backend import DTYPES
from kernels.cuda.launch import Choice, CudaOptions
from kernels.ops import TensorSpec


def problem_of(case: Case, options: CudaOptions) -> tune.Problem | None:
    """The case's choices; None where there is none."""
    specs = [TensorSpec(shape, case.stored) for shape in case.shapes]
    layer = tune.Layer(case.label, case.op, specs, TensorSpec(case.output_shape, case.stored))
    return next(iter(tune.problems_of([layer], options)), None)


def one_of_each_tile(choices: Sequence[Choice]) -> list[Choice]:
    """Those of the least estimate, which come first."""
    first: dict[Any, Choice] = {}
    for choice in choices:
        first.setdefault(choice.tile, choice)
    return list(first.values())


def poisoned(size: int) -> Any:
    array = gpu.cupy().empty(size, np.uint8)
    array.fill(tune.POISON)
    return array


def result(problem: tune.Problem, choice: Choice, data: tune.Data) -> Any:
    """Bytes of the output, left on the GPU, where nothing is left of what other choices wrote."""
    y = poisoned(data.output.nbytes)
    there = y.view(data.output.dtype).reshape(data.output.shape)
    gpu.execute(problem.bind(choice, replace(data, output=there, allocate=poisoned,
                                             workspace=None)))
    gpu.cupy().cuda.get_current_stream().synchronize()
    return y


def measure(case: Case, problem: tune.Problem, options: CudaOptions, clock: tune.Clock
            ) -> dict[str, Any]:
    """A row, as it goes to JSON; of each choice its microseconds, "wrong" if its bits differ.

    sizes: as conv_choice.py takes them.
    """
    choices = one_of_each_tile(problem.choices)
    data = tune.Data.random(problem, options)
    right = result(problem, problem.present, data)
    wrong = {choice for choice in choices if (result(problem, choice, data) != right).any()}
    launches = {choice: problem.bind(choice, data) for choice in choices}
    timers = {choice: clock.timer(launches[choice]) for choice in choices}
    times = tune.race(timers, choices)
    cost = case.cost
    return {"layer": case.label, "sizes": problem.sizes, "flops": cost.flops,
            "bytes": cost.bytes, "choices": [
        {"choice": str(choice), "tile": choice.tile, "splits": choice.splits,
         "kernels": [launch.kernel.name for launch in launches[choice]],
         "microseconds": statistics.median(times[choice]),
         "present": choice == problem.present, "wrong": choice in wrong}
        for choice in sorted(choices, key=lambda one: statistics.median(times[one]))]}


def text(row: dict[str, Any]) -> str:
    """The row's choices, the fastest first."""
    lines = [row["layer"]]
    for one in row["choices"]:
        seconds = one["microseconds"] / 1e6
        notes = [word for word in ("present", "wrong") if one[word]]
        lines.append(f"    {one['microseconds']:9.1f} us {row['flops'] / seconds / 1e12:6.0f} "
                     f"TFLOP/s {row['bytes'] / seconds / 1e9:6.0f} GB/s  {one['choice']}"
                     + (f"  ({', '.join(notes)})" if notes else ""))
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=["gemm", "resnet50:256"], metavar="WHAT",
                        help="as of compare_kernels.py; default: gemm resnet50:256")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="which GPU, default 0")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="default float16")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS",
                        help="begin no new layer after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, clock: tune.Clock | None = None) -> None:
    """Exits with 1 where a kernel is wrong."""
    settings, console = parse_arguments(arguments), Console(highlight=False, soft_wrap=True)
    deadline = time.monotonic() + settings.budget
    for group in settings.groups:
        check_group(group)
    here, cuda = gpu.gpu(settings.gpu), gpu.cupy().cuda
    options = CudaOptions(dtype=settings.dtype, arch=here.arch,
                          multiprocessors=here.multiprocessors, upload=to_gpu)
    rows = []
    with cuda.Device(settings.gpu), cuda.Stream(non_blocking=True):
        clock = clock or tune.GpuClock(here)
        for case in dict.fromkeys(case for group in settings.groups
                                  for case in cases_of_group(group, settings.dtype)):
            problem = None
            if isinstance(case.op, (ops.Conv2d, ops.Linear)) and time.monotonic() < deadline:
                problem = problem_of(case, options)
            if problem is not None:
                rows.append(measure(case, problem, options, clock))
                console.print(text(rows[-1]))
        provenance = gpu_timing.provenance(settings.gpu)
    if settings.json:
        record = {"kind": "measurement", "provenance": provenance, "rows": rows}
        write_json(settings.json, record, indent=None)
    if any(one["wrong"] for row in rows for one in row["choices"]):
        sys.exit("a kernel gives other results than the present choice: see above")


if __name__ == "__main__":
    main()
