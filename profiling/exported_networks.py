"""Which networks of torchvision and timm run as they are exported, and whether they give what ONNX
Runtime gives for the same file.

    python profiling/exported_networks.py --json exported.json
    python profiling/exported_networks.py torchvision/mobilenet_v3_small timm/ghostnet_100

Needs torch, torchvision, timm and onnxruntime. A network has random weights, and the statistics of
its batch norms are those of random images, so that values keep their size from layer to layer. It
is exported by torch.onnx with a free batch, and run on two random images by ONNX Runtime and by us,
on the CPU in float32. What counts is the largest difference of the logits over the largest logit.
Times are medians of calls in turns on one image, and rough: compare_cpu.py measures.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import cores, positive, provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
import cnn

TORCHVISION = [
    "alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "googlenet", "inception_v3", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf",
    "regnet_x_400mf", "shufflenet_v2_x1_0", "squeezenet1_1", "convnext_tiny"]
TIMM = [
    "resnet50d", "tf_efficientnet_lite0", "tf_efficientnet_b0", "mobilenetv3_large_100",
    "regnety_002", "ghostnet_100", "repvgg_a0", "dla34", "hardcorenas_a", "seresnet50",
    "ecaresnet26t", "resnest14d", "res2net50_26w_4s", "darknet53", "cspresnet50", "nf_resnet50",
    "xception41", "inception_v4", "skresnet18", "hrnet_w18_small", "mobileone_s0",
    "convmixer_768_32", "selecsls42", "vovnet39a", "fbnetc_100", "mixnet_s", "dpn68", "lcnet_050",
    "rexnet_100"]
NETWORKS = [*(f"torchvision/{name}" for name in TORCHVISION), *(f"timm/{name}" for name in TIMM)]
AGREES = 1e-4       # more than what float32 rounds in any of them, less than what a mistake makes
CALLS = 7


@dataclass(frozen=True)
class Outcome:
    """of: largest difference of a logit over the largest logit; ms of one image; or what our error
    says."""
    network: str
    of: float | None = None
    ours_ms: float | None = None
    onnxruntime_ms: float | None = None
    error: str = ""

    @property
    def agrees(self) -> bool:
        return self.of is not None and self.of <= AGREES


def build(network: str) -> tuple[Any, int]:
    """(torch's module in eval mode, side of its images)."""
    import torch
    library, name = network.split("/")
    torch.manual_seed(0)
    if library == "timm":
        import timm
        module = timm.create_model(name, pretrained=False)
        side = module.default_cfg["input_size"][-1]
    else:
        import torchvision
        options = {"aux_logits": False, "init_weights": True} if name in (
            "googlenet", "inception_v3") else {}
        module = torchvision.models.get_model(name, weights=None, **options)
        side = 299 if name == "inception_v3" else 224
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None        # the mean over all batches that come
    with torch.no_grad():
        module.train()(torch.randn(4, 3, side, side))
    return module.eval(), side


def export(network: str, path: Path) -> int:
    """Write the file; the side of its images."""
    import torch
    module, side = build(network)
    torch.onnx.export(module, torch.randn(2, 3, side, side), path, dynamo=False,
                      input_names=["images"], output_names=["logits"],
                      dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}})
    return side


def check(network: str, folder: Path, threads: int) -> Outcome:
    """Export it, run it here and there, compare and time."""
    import onnxruntime
    path = folder / f"{network.replace('/', '_')}.onnx"
    side = export(network, path)
    images = np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    theirs, = session.run(None, {"images": images})
    try:
        model = cnn.load(path, device="cpu", threads=threads)
        ours = model.run({"images": images})["logits"]
    except cnn.ModelError as error:
        return Outcome(network, error=str(error).removeprefix(f"{path}: "))
    finally:
        path.unlink()
    one = {"images": images[:1]}
    ours_ms, theirs_ms = in_turns(lambda: model.run(one), lambda: session.run(None, one))
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return Outcome(network, difference, ours_ms, theirs_ms)


def in_turns(*functions: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(CALLS + 1):
        for function, of_function in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:        # the first warms up
                of_function.append(1e3 * (time.perf_counter() - start))
    return [median(of_function) for of_function in times]


def table(outcomes: list[Outcome]) -> Table:
    found = Table("network", "difference", "ms", "ONNX Runtime, ms", "why not")
    for outcome in outcomes:
        if outcome.of is None:
            found.add_row(outcome.network, "", "", "", outcome.error[:200])
        else:
            found.add_row(outcome.network, f"{outcome.of:.1e}{'' if outcome.agrees else '  WRONG'}",
                          f"{outcome.ours_ms:.1f}", f"{outcome.onnxruntime_ms:.1f}", "")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("networks", nargs="*", help="torchvision/NAME or timm/NAME; all of the "
                                                    "list by default")
    parser.add_argument("--threads", type=positive, default=cores())
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [check(network, Path(folder), options.threads)
                    for network in track(options.networks or NETWORKS, "networks",
                                         console=Console(stderr=True))]
    Console().print(table(outcomes))
    right = sum(outcome.agrees for outcome in outcomes)
    print(f"{right} of {len(outcomes)} run and agree with ONNX Runtime")
    if options.json:
        options.json.write_text(json.dumps({
            "provenance": provenance(), "threads": options.threads,
            "networks": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")
    return 0 if all(outcome.agrees for outcome in outcomes if outcome.of is not None) else 1


if __name__ == "__main__":
    sys.exit(main())
