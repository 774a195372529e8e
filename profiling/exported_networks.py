"""Which networks run as they are exported, and whether they are right.

    python profiling/exported_networks.py --json exported.json
    python profiling/exported_networks.py torchvision/mobilenet_v3_small timm/ghostnet_100
    python profiling/exported_networks.py --device emulator --dtype float16 --side 64 timm/dpn68
    python profiling/exported_networks.py my_network.onnx files_of_keras/*.onnx

Networks of torchvision and timm need torch, torchvision, timm, onnxscript and onnxruntime. One has
random weights, and the statistics of its batch norms are those of random images, so that values
keep their size from layer to layer. It is exported with a free batch by either of torch.onnx's
exporters, and run on two random images by ONNX Runtime, in float32 on the CPU, and by us. Both are
compared with PyTorch's network in float64: the largest error of a logit over the largest logit.
Ours is right if it is not much more than ONNX Runtime's, for some networks make more of a rounding
than others. Times are medians of calls in turns on one image, with idle time between, and rough:
compare_cpu.py measures.

Files, which export_keras.py and export_paddle.py write, need onnxruntime alone. Both are compared
with the file's nodes in float64 as our importer reads them (graph_reference.py): were these read
wrongly, it would be ONNX Runtime's error that is large.
"""
from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from common import cores, positive, provenance, write_json
from cpu_engines import onnx_runtime
from graph_reference import float64_logits
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # this checkout, installed or not
import cnn
from cnn.onnx_import import is_nchw

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
    "rexnet_100", "convnextv2_atto", "convformer_s18", "poolformerv2_s12", "ghostnetv2_100",
    "mobilenetv4_conv_small", "fastvit_t8", "hgnetv2_b0", "repvit_m0_9", "starnet_s1",
    "fasternet_t0", "mambaout_femto", "inception_next_atto", "tresnet_m", "resnetblur18",
    "gcresnext26ts", "focalnet_tiny_srf", "efficientnet_b0_gn", "tf_efficientnetv2_b0"]
ATTENTION = [       # transformers, networks with attention in part, and mixers
    "torchvision/vit_b_16", "torchvision/swin_t", "torchvision/swin_v2_t", "torchvision/maxvit_t",
    *(f"timm/{name}" for name in (
        "vit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224",
        "eva02_tiny_patch14_224", "cait_xxs24_224", "convit_tiny", "tnt_s_patch16_224",
        "xcit_nano_12_p16_224", "davit_tiny", "gcvit_xxtiny", "mvitv2_tiny", "pvt_v2_b0",
        "coatnet_0_rw_224", "caformer_s18", "mobilevit_s", "mobilevitv2_100", "edgenext_small",
        "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0",
        "fastvit_sa12", "levit_128s", "mobilenetv4_hybrid_medium", "nextvit_small", "shvit_s1",
        "swiftformer_xs", "tiny_vit_5m_224", "visformer_tiny", "botnet26t_256", "mixer_s32_224",
        "resmlp_12_224"))]
NETWORKS = [*(f"torchvision/{name}" for name in TORCHVISION), *(f"timm/{name}" for name in TIMM),
            *ATTENTION]
TORCHSCRIPT, DYNAMO = EXPORTERS = ("torchscript", "dynamo")   # the second is PyTorch's default now
# An error that is no matter, for a network may make a hundred of one rounding, and how many of ONNX
# Runtime's are none: Winograd's algorithm rounds more (CNN_WINOGRAD=0 turns it off).
LEAST = {"float32": 1e-5, "tf32": 0.05, "float16": 0.05, "bfloat16": 0.4}
# Of a dtype with fewer bits as many times as its rounding is larger than float32's.
TIMES = {"float32": 16, "tf32": 1 << 13, "float16": 1 << 13, "bfloat16": 1 << 16}
CALLS, IDLE = 9, 0.2        # seconds before a call: ONNX Runtime's threads spin for more than 0.05


@dataclass(frozen=True)
class Outcome:
    """Errors over the largest logit, and milliseconds of one image; or what our refusal says."""
    network: str
    error: float = math.inf
    onnxruntime_error: float = math.inf
    ms: float = math.inf
    onnxruntime_ms: float = math.inf
    refusal: str = ""
    dtype: str = "float32"

    @property
    def right(self) -> bool:
        return not self.refusal and self.error <= max(
            LEAST[self.dtype], TIMES[self.dtype] * self.onnxruntime_error)


@dataclass(frozen=True)
class How:
    """What a network is exported by, and runs on; side: of its images, None for its own."""
    exporter: str
    device: str
    dtype: str
    threads: int
    side: int | None


def build(network: str, wanted: int | None = None) -> tuple[Any, int]:
    """(torch's module in eval mode, side of its images, its own if none is wanted)."""
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
    side = wanted or side
    for norm in module.modules():
        if isinstance(norm, torch.nn.Linear) and not norm.weight.any():
            torch.nn.init.normal_(norm.weight, std=0.02)    # a head, which would give zeros
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None        # the mean over all batches that come
            if norm.affine:             # or exporters would find some of them to be the same
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
                torch.nn.init.normal_(norm.bias, std=0.1)
    with torch.no_grad():
        module.train()(torch.randn(4, 3, side, side))
    return module.eval(), side


def export(module: Any, side: int, path: Path, exporter: str) -> None:
    import torch
    images, names = torch.randn(2, 3, side, side), {"input_names": ["images"],
                                                    "output_names": ["logits"]}
    if exporter == DYNAMO:
        batch = torch.export.Dim("N")
        torch.onnx.export(module, (images,), path, dynamo=True, verbose=False,
                          dynamic_shapes=({0: batch},), **names)
    else:
        torch.onnx.export(module, images, path, dynamo=False, **names,
                          dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}})


@dataclass(frozen=True)
class Exported:
    """A file, images in its own layout, the input that takes them, the float64 logits of these,
    and the size of the images (H, W, C) where the file leaves it open."""
    path: Path
    input: str
    images: np.ndarray
    logits: Callable[[], np.ndarray]
    input_shape: tuple[int, ...] | None = None


def of_torch(network: str, path: Path, how: How) -> Exported:
    """The network of a library, exported to the file."""
    import torch
    module, side = build(network, how.side)
    export(module, side, path, how.exporter)
    images = np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)

    def logits() -> np.ndarray:
        with torch.no_grad():
            return module.double()(torch.from_numpy(images).double()).numpy()
    return Exported(path, "images", images, logits)


def of_file(path: Path, how: How) -> Exported:
    """Two images, or the file's batch of them; ModelError for one that takes something else."""
    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    first, *more = [info for info in model.graph.input if info.name not in constants]
    sizes = [dim.dim_value for dim in first.type.tensor_type.shape.dim]
    if more or len(sizes) != 4:
        raise cnn.ModelError(f"its inputs are {[info.name for info in (first, *more)]}, the first "
                             f"of shape {sizes}; one batch of images is needed")
    to_nhwc = (0, 2, 3, 1) if is_nchw(sizes) else (0, 1, 2, 3)
    full = [size or least for size, least in zip(sizes, (2, *[how.side or 224] * 3), strict=True)]
    images = np.random.default_rng(0).standard_normal(full).astype(np.float32)
    ours = images.transpose(to_nhwc)
    shape = ours.shape[1:] if 0 in sizes[1:] else None
    return Exported(path, first.name, images, lambda: float64_logits(path, ours, shape), shape)


def check(network: str, folder: Path, how: How) -> Outcome:
    """Run it here and there, compare and, on the CPU, time."""
    is_file = network.endswith(".onnx")
    name = Path(network).stem if is_file else network
    try:
        exported = (of_file(Path(network), how) if is_file else
                    of_torch(network, folder / "network.onnx", how))
        path, images = exported.path, exported.images
        model = cnn.load(path, device=how.device, dtype=how.dtype, input_shape=exported.input_shape,
                         threads=how.threads if how.device == "cpu" else None)
        ours, *_ = model.run({exported.input: images}).values()
    except cnn.ModelError as error:
        return Outcome(name, refusal=str(error).partition(".onnx: ")[2] or str(error))
    theirs, exact = onnx_runtime(str(path), images, how.threads)(), exported.logits()
    errors = [float(np.abs(found - exact).max() / np.abs(exact).max()) for found in (ours, theirs)]
    one = images if model.input_shape[0] else images[:1]
    times = [math.inf] * 2 if how.device != "cpu" else in_turns(
        lambda: model.run({exported.input: one}), onnx_runtime(str(path), one, how.threads))
    return Outcome(name, *errors, *times, dtype=how.dtype)


def in_turns(*functions: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(CALLS + 1):
        for function, of_function in zip(functions, times, strict=True):
            time.sleep(IDLE)
            start = time.perf_counter()
            function()
            if turn:        # the first warms up
                of_function.append(1e3 * (time.perf_counter() - start))
    return [median(of_function) for of_function in times]


def table(outcomes: list[Outcome]) -> Table:
    found = Table("network", "error", "ONNX Runtime's", "ms", "ONNX Runtime's", "refused")
    for outcome in outcomes:
        if outcome.refusal:
            found.add_row(outcome.network, *[""] * 4, outcome.refusal[:200])
        else:
            wrong = "" if outcome.right else " WRONG"
            found.add_row(outcome.network, f"{outcome.error:.1e}{wrong}",
                          f"{outcome.onnxruntime_error:.1e}", *(
                              "" if ms == math.inf else f"{ms:.1f}"
                              for ms in (outcome.ms, outcome.onnxruntime_ms)))
    return found


def known(outcome: Outcome) -> dict[str, Any]:
    """What JSON can hold: not what there is none of, nor NaN."""
    return {name: value for name, value in asdict(outcome).items() if name != "dtype"
            and value != "" and (isinstance(value, str) or math.isfinite(value))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("networks", nargs="*", help="torchvision/NAME, timm/NAME or .onnx "
                                                    "files; all of the list by default")
    parser.add_argument("--threads", type=positive, default=cores())
    parser.add_argument("--exporter", choices=EXPORTERS, default=TORCHSCRIPT,
                        help="of torch.onnx, default: %(default)s")
    parser.add_argument("--device", default="cpu",
                        help="default: %(default)s; nothing is timed on another")
    parser.add_argument("--dtype", choices=LEAST, default="float32", help="default: %(default)s")
    parser.add_argument("--side", type=positive, help="of the images, instead of a network's own "
                                                        "or where a file leaves it open")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args(arguments)
    how = How(options.exporter, options.device, options.dtype, options.threads, options.side)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [check(network, Path(folder), how)
                    for network in track(options.networks or NETWORKS, "networks",
                                         console=Console(stderr=True))]
    Console().print(table(outcomes))
    print(f"{sum(outcome.right for outcome in outcomes)} of {len(outcomes)} run and are right; "
          f"{sum(bool(outcome.refusal) for outcome in outcomes)} are refused")
    if options.json:
        write_json(options.json, {"provenance": provenance(), **asdict(how),
                                  "networks": [known(outcome) for outcome in outcomes]})
    return 0 if all(outcome.right or outcome.refusal for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
