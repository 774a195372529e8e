"""Times our CUDA kernels against cuDNN, cuBLAS and the memory's bandwidth, layer by layer.

    python profiling/compare_kernels.py --dtype float16 --json kernels.json
    python profiling/compare_kernels.py gemm attention memory resnet50:256 --budget 60

What is measured, in this order: matrix products ("gemm"), attention as transformers have it
("attention"), ReLU and pooling against the bandwidth of a copy ("memory"), and the distinct
convolution, linear and pooling layers of networks at a batch size ("resnet50:256"), those first
that take longest by the roofline model.

Each rival does all of the layer: convolution or product, bias, residual, activation. Ours is one
kernel, or two where a sum is split or an image is laid out anew first. PyTorch's are channels_last,
with cudnn.benchmark and fp32 sums: plain, where conv2d is followed by kernels for what comes after
it, and cuDNN's fused operator where there is one; the ratio is to the faster of them. "conv2d
alone" leaves bias, residual and activation out, so it does less. All have the same inputs, are
compared with float64 on a sample of their outputs before they are timed, and run from CUDA graphs
with cold caches (gpu_timing.py).
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from charts import new_figure
from common import positive, write_json
from rich import box
from rich.console import Console
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
import gpu_timing
import torch_rivals
from gpu_timing import Rival, Times
from layer_cases import ROUNDOFF, Arrays, Case, attention, cases_of, check, gemm, to_gpu

from cnn.errors import Error
from kernels import ops
from kernels.cuda import gpu, tuned
from kernels.cuda.backend import DTYPES, prepare
from kernels.cuda.errors import CudaError
from kernels.cuda.launch import Choice, CudaOptions
from kernels.ops import TensorSpec

GEMM_SIZES = (8192, 4096, 2048, 1024)
ATTENTION = (       # images or windows, tokens, heads, columns, whether there is a bias
    (256, 197, 12, 64, False), (256, 197, 6, 64, False), (1, 197, 12, 64, False),
    (64 * 64, 49, 3, 32, True), (256, 49, 24, 32, True), (64, 1024, 8, 64, False))
MEMORY_BOUND = (                        # as ResNet-50 and VGG-16 have them
    (ops.Relu(), (256, 56, 56, 256)),
    (ops.MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)), (256, 112, 112, 64)),
    (ops.MaxPool2d((2, 2), (2, 2)), (128, 224, 224, 64)),
    (ops.AvgPool2d((2, 2), (2, 2)), (256, 56, 56, 256)),
    (ops.GlobalAvgPool2d(), (256, 7, 7, 2048)),
)
FIXED = ("gemm", "attention", "memory")
EVERYTHING = [*FIXED, "resnet50:256", "resnet50:1", "mobilenet_v2:256", "vgg16:128",
              "mobilenet_v2:1", "vgg16:1"]
OURS = "ours"


# ---- what is measured -------------------------------------------------------------------------

def check_group(group: str) -> None:
    """ValueError for what names no group."""
    network, _, batch = group.rpartition(":")
    if group not in FIXED and not (network and batch.isdecimal() and int(batch)):
        raise ValueError(f"{group!r} is nothing to measure; write {', '.join(FIXED)}, or a network "
                         f"and a batch size such as resnet50:256")


def cases_of_group(group: str, dtype: str) -> dict[Case, int]:
    """Those that take longest first, and how often each is there. ValueError or ModelError for a
    network that can not be had."""
    if group == "gemm":
        return {gemm(size, dtype): 1 for size in GEMM_SIZES}
    if group == "attention":
        return {attention(*sizes, dtype): 1 for sizes in ATTENTION}
    if group == "memory":
        return {Case(op, (shape,), dtype): 1 for op, shape in MEMORY_BOUND}
    network, _, batch = group.rpartition(":")
    found = cases_of(network, int(batch), dtype)
    return dict(sorted(found.items(), key=lambda item: -item[1] * weight(item[0])))


def weight(case: Case) -> float:
    """What a case is about to take, in some unit: only the order matters."""
    return max(case.cost.flops / 200, case.cost.bytes)


# ---- measuring --------------------------------------------------------------------------------

@dataclass
class Bench:
    """Where and how everything is measured.

    torch  None where ours is timed alone
    tuned  the tiles that `cnn tune` has found on this GPU, which a model would use, too
    """
    index: int
    stream: Any
    torch: torch_rivals.Torch | None
    rounds: int
    tuned: dict[str, Choice]

    def measure(self, case: Case, uses: dict[str, int]) -> dict[str, Any]:
        """A row: figures of each rival that is right, in "wrong" what is said of the others."""
        l2_bytes = gpu_timing.l2_bytes(self.index)
        arrays = Arrays(case, gpu_timing.copies(case.working_set, l2_bytes))
        rivals, wrong = [], {}
        kernel, mine, y = self.ours(arrays)
        candidates = [(mine, y, 0.0)]
        if self.torch is not None:
            try:
                # Winograd's algorithm rounds transformed images and weights to the storage type.
                candidates += [(rival, y, 2 * ROUNDOFF[case.stored])
                               for rival, y in self.torch.rivals(arrays)]
            except (ValueError, RuntimeError) as error:     # RuntimeError is what torch raises
                wrong["torch"] = str(error)
        for rival, y, term_roundoff in candidates:
            try:
                if rival.name != torch_rivals.ALONE:
                    check(arrays, y, term_roundoff)
                rivals.append(rival)
            except ValueError as error:
                wrong[rival.name] = str(error)
        times = gpu_timing.interleave(rivals, self.stream, self.rounds)
        named = {rival.name: found for rival, found in zip(rivals, times, strict=True)}
        return {**row(case, uses, kernel, named), "wrong": wrong,
                "cold": gpu_timing.is_cold(case.working_set, l2_bytes)}

    def ours(self, arrays: Arrays) -> tuple[str, Rival, Any]:
        """(kernel, our rival, its output for the first copy)"""
        case, here = arrays.case, gpu.gpu(self.index)
        packed: dict[Any, Any] = {}
        launches, outputs = [], []
        for inputs in arrays.copies:
            # Every copy has weights of its own, which need not be packed again.
            options = CudaOptions(
                packed={key: (source, array.copy()) for key, (source, array) in packed.items()},
                dtype=case.dtype, arch=here.arch, multiprocessors=here.multiprocessors,
                upload=to_gpu, tuned=self.tuned)
            step = prepare(case.op, arrays.specs, TensorSpec(case.output_shape, case.stored),
                           arrays.constants, options)
            packed = packed or options.packed
            outputs.append(arrays.empty_output())
            workspace = gpu.cupy().empty(step.workspace, np.uint8)
            launches += step.bind([constant if array is None else array for array, constant
                                   in zip(inputs, arrays.constants, strict=True)],
                                  outputs[-1], workspace)
        gpu.execute(launches)
        self.stream.synchronize()
        replay = gpu_timing.capture(self.stream, lambda: gpu.execute(launches))
        return step.kernel, Rival(OURS, replay, len(outputs)), outputs[0]


def row(case: Case, uses: dict[str, int], kernel: str, named: dict[str, Times]) -> dict[str, Any]:
    """Everything about one case, as it goes to JSON; "torch" is the fastest that does the same."""
    cost, mine = case.cost, named.get(OURS)
    same = {name: found for name, found in named.items() if name not in (OURS, torch_rivals.ALONE)}
    best = min(same, key=lambda name: same[name].median_ms, default=None)
    return {"layer": case.label, "uses": uses, "dtype": case.dtype, "kernel": kernel,
            "flops": cost.flops, "bytes": cost.bytes, "torch": best,
            "speedup": same[best].ratio(mine) if best and mine else None,
            "times": {name: {"min_ms": found.min_ms, "median_ms": found.median_ms,
                             "tflops": cost.flops / found.median_ms / 1e9,
                             "gb_per_s": cost.bytes / found.median_ms / 1e6,
                             "rounds_ms": found.rounds_ms} for name, found in named.items()}}


@dataclass
class Record:
    """rows: what was measured. layers: how many each group has. skipped: labels of what was left
    out. failed: by label, why."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(groups: Sequence[str], dtype: str, bench: Bench, deadline: float, console: Console
        ) -> Iterator[Record]:
    """The record as it is after each case, until time is up or the GPU reports an error, after
    which nothing it says counts; what is too large for its memory is passed over. A layer of
    several groups is measured once."""
    record = Record(skipped=[f"all of {group}" for group in groups])
    uses: dict[Case, dict[str, int]] = {}       # how often each group has the case
    with console.status("") as status:
        for group in groups:
            if time.monotonic() > deadline:
                break
            record.skipped.pop(0)
            try:
                cases = cases_of_group(group, dtype)
            except (Error, ValueError, OSError) as error:
                record.failed[group] = str(error)
                continue
            record.layers[group] = sum(cases.values())
            new = [case for case in cases if case not in uses]
            for case, count in cases.items():
                uses.setdefault(case, {})[group] = count
            record.skipped[:0] = [f"{group}: {case.label}" for case in new]
            for case in new:
                if time.monotonic() > deadline:
                    break
                status.update(record.skipped.pop(0))
                trusted = attempt(case, uses[case], bench, record)
                yield record
                if not trusted:
                    return
    yield record


def attempt(case: Case, uses: dict[str, int], bench: Bench, record: Record) -> bool:
    """Measure a case; False where the GPU can not be trusted any more."""
    try:
        record.rows.append(bench.measure(case, uses))
        gpu.cupy().get_default_memory_pool().free_all_blocks()
    except (MemoryError, ValueError) as error:
        record.failed[case.label] = str(error)
    except (CudaError, RuntimeError) as error:      # CuPy's and PyTorch's are of this kind
        record.failed[case.label] = str(error)
        return False
    return True


# ---- results ----------------------------------------------------------------------------------

def percent_of_copy(row: dict[str, Any], bandwidth: float) -> float:
    """Of the fastest rounds, which the bandwidth of a copy is of, too."""
    return 1e5 * row["bytes"] / row["times"][OURS]["min_ms"] / bandwidth


def headline(record: Record, bandwidth: float) -> dict[str, float]:
    """The few figures that matter, by what they are."""
    found: dict[str, float] = {}
    sums: dict[str, list[float]] = {}       # layers, ms of ours, ms of PyTorch's
    for each in record.rows:
        mine = each["times"].get(OURS)
        if mine and "memory" in each["uses"]:
            found[f"{each['layer']}: % of copy"] = percent_of_copy(each, bandwidth)
        if not mine or each["torch"] is None:
            continue
        if "gemm" in each["uses"]:
            found[f"{each['layer']}: % of cuBLAS"] = 100 * each["speedup"]
        theirs = each["times"][each["torch"]]
        for group, count in each["uses"].items():
            total = sums.setdefault(group, [0, 0.0, 0.0])
            for i, amount in enumerate((1, mine["median_ms"], theirs["median_ms"])):
                total[i] += count * amount
    return {**found, **{
        f"{group}, sum of {layers} of {record.layers[group]} layers: PyTorch's time / ours":
        theirs / ours for group, (layers, ours, theirs) in sums.items() if ":" in group}}


def table(result: dict[str, Any]) -> Table:
    bandwidth = result["copy_bytes_per_s"]
    shown = Table("layer", "in", Column("kernel", overflow="fold"), box=box.SIMPLE, padding=0,
                  title=f"{result['provenance']['gpu']['name']}, {result['settings']['dtype']}, "
                        f"copy {bandwidth / 1e9:,.0f} GB/s; medians of "
                        f"{result['settings']['rounds']} rounds")
    for heading in ("ours\nus", "TFLOP/s", "GB/s", "% of\ncopy"):
        shown.add_column(heading, justify="right")
    shown.add_column("fastest of\nPyTorch")
    for heading in ("us", "its time\n/ ours"):
        shown.add_column(heading, justify="right")
    for each in result["rows"]:
        mine, theirs = each["times"].get(OURS), each["times"].get(each["torch"])
        shown.add_row(
            each["layer"], ", ".join(each["uses"]), each["kernel"],
            *((f"{1e3 * mine['median_ms']:.1f}", f"{mine['tflops']:.1f}",
               f"{mine['gb_per_s']:,.0f}", f"{percent_of_copy(each, bandwidth):.0f}")
              if mine else ("WRONG", "", "", "")),
            *((each["torch"], f"{1e3 * theirs['median_ms']:.1f}",
               f"{each['speedup']:.2f}" if mine else "") if theirs else ("", "", "")))
    return shown


def plot(result: dict[str, Any], path: Path) -> None:
    """How much faster than PyTorch each layer is, over its FLOPs per byte."""
    figure = new_figure(9, 5)
    axes = figure.subplots()
    groups = dict.fromkeys(group for each in result["rows"] for group in each["uses"])
    for group in groups:
        rows = [each for each in result["rows"] if group in each["uses"] and each["speedup"]]
        axes.scatter([each["flops"] / each["bytes"] for each in rows],
                     [each["speedup"] for each in rows], alpha=0.6, label=group)
    axes.axhline(1, color="0.6", zorder=0)
    axes.set(title=f"{result['provenance']['gpu']['name']}, {result['settings']['dtype']}",
             xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="PyTorch's time / ours")
    figure.legend(loc="outside right center")
    figure.savefig(path)


# ---- command line -----------------------------------------------------------------------------

def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=EVERYTHING, metavar="WHAT",
                        help=f"default: {' '.join(EVERYTHING)}")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="which GPU, default 0")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="default float16")
    parser.add_argument("--no-torch", action="store_true", help="time our kernels alone")
    parser.add_argument("--rounds", type=positive, default=7, help="default 7")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="begin no new layer after this time; what is left out is listed")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write every figure, layer by layer")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw ratios: .svg or .png")
    settings = parser.parse_args(arguments)
    if settings.plot and settings.no_torch:
        parser.error("--plot draws ratios to PyTorch: leave out either --plot or --no-torch")
    return settings


def compare(settings: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything measured, as it goes to JSON, where it is written after each layer."""
    deadline = time.monotonic() + (math.inf if settings.budget is None else settings.budget)
    for group in settings.groups:
        check_group(group)
    choices = tuned.load(gpu.gpu(settings.gpu))
    options = {name: value for name, value in vars(settings).items() if name not in (
        "json", "plot")}
    cuda = gpu.cupy().cuda
    # A stream is of the device that is current when it is made.
    with cuda.Device(settings.gpu), cuda.Stream(non_blocking=True) as stream:
        torch = None if settings.no_torch else torch_rivals.Torch(
            settings.gpu, stream, settings.dtype)
        bandwidth = gpu_timing.copy_bandwidth(stream)
        result = {"kind": "measurement", "provenance": gpu_timing.provenance(settings.gpu),
                  "settings": options, "tuned_choices": len(choices), "copy_bytes_per_s": bandwidth}
        bench = Bench(settings.gpu, stream, torch, settings.rounds, choices)
        for record in run(settings.groups, settings.dtype, bench, deadline, console):
            result |= {"headline": headline(record, bandwidth), **asdict(record)}
            if settings.json:       # whoever ends this process keeps what there is so far
                write_json(settings.json, result)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where one of our kernels is wrong or the GPU reports an error."""
    settings = parse_arguments(arguments)
    console = Console(highlight=False)
    console.width = max(console.width, 180)     # a pipe's 80 columns would cut the numbers
    try:
        result = compare(settings, Console(stderr=True))
        console.print(table(result))
        if settings.plot:
            plot(result, settings.plot)
    except (Error, CudaError, ValueError, OSError) as error:
        sys.exit(f"compare_kernels: {error}")
    for name, value in result["headline"].items():
        print(f"{name}: {value:.3g}")
    for label in result["skipped"]:
        print(f"skipped: {label}")
    wrong = [(each, name) for each in result["rows"] for name in each["wrong"]]
    for each, name in wrong:
        print(f"WRONG, so not timed: {name}: {each['wrong'][name]}")
    for label, error in result["failed"].items():
        print(f"FAILED: {label}: {error}")
    if result["failed"] or any(name == OURS for _, name in wrong):
        sys.exit(1)


if __name__ == "__main__":
    main()
