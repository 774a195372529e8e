"""The command line: cnn classify, cnn summary, cnn quantize, cnn tune, cnn doctor."""
from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .errors import Error, ImageError, ModelError
from .version import __version__

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BAR = 24            # characters of a full probability bar

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def _debug(function: Callable) -> Callable:
    """The option --debug, on every command."""
    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.find_root().obj = {"debug": True}
    return click.option("--debug", is_flag=True, expose_value=False, callback=remember,
                        help="Show the traceback of an error.")(function)


def _input_shape(function: Callable) -> Callable:
    """The option --input-shape, where a model is loaded."""
    def read(context: click.Context, _: click.Parameter, text: str | None) -> Any:
        sizes = [] if text is None else text.lower().split("x")
        if not all(size.isdecimal() for size in sizes) or len(sizes) not in (0, 3, 4):
            raise click.BadParameter(f"{text!r} is not HxWxC or NxHxWxC, such as 224x224x3")
        return tuple(int(size) for size in sizes) or None
    return click.option("--input-shape", metavar="HxWxC", callback=read,
                        help="Size of the images, where the file leaves it open.")(function)


_dtype_option = click.option("--dtype", default="float32", show_default=True,
                             help="Compute type.")
_preprocess_option = click.option(
    "--preprocess", metavar="HOW", default=None,
    help="Where the file does not say how a photo becomes an input: imagenet (as torchvision's "
         "networks), keras-tf, keras-caffe, keras-torch or keras-none (as Keras's) or a JSON "
         "object (fields of cnn.Preprocess).")
_labels_option = click.option(
    "--labels", metavar="FILE", default=None,
    help="Names of the classes: a text file with one a line, or imagenet.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog="""\b
Examples:
  cnn classify cat.jpg
  cnn classify photos/ --top 1 --csv > labels.csv
  cnn summary efficientnet_lite0
  cnn quantize net.onnx photos/ --output net_int8.onnx
  cnn tune net.onnx --dtype float16 --batch 64
  cnn doctor""")
@click.version_option(__version__, prog_name="cnn")
def cli() -> None:
    """Classify images on kernels that you can read."""


@cli.command(epilog="""\b
Examples:
  cnn classify cat.jpg
  cnn classify cat.jpg dog.png --model net.onnx --top 3
  cnn classify cat.jpg --model resnet50.onnx --preprocess imagenet --labels imagenet
  cnn classify photos/ --batch 8 --json > labels.json""")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE_OR_FOLDER...")
@click.option("--model", "source", metavar="MODEL", default=None,
              help="Zoo name or path (.onnx, .safetensors).  [default: efficientnet_lite0]")
@_preprocess_option
@_labels_option
@_input_shape
@click.option("--device", default="auto", show_default=True,
              help="auto, cpu, cuda, cuda:N, emulator or emulator:sm_90a.")
@_dtype_option
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: all cores]")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True,
              help="Classes to list for each image.")
@click.option("--batch", type=click.IntRange(1), default=None,
              help="Images to run at once.  [default: 8, on a GPU 64, if there are so many]")
@click.option("--json", "form", flag_value="json", help="Print JSON instead of a table.")
@click.option("--csv", "form", flag_value="csv", help="Print CSV instead of a table.")
@_debug
def classify(images: Sequence[str], source: str | None, preprocess: str | None,
             labels: str | None, input_shape: Any, device: str, dtype: str, threads: int | None,
             top: int, batch: int | None, form: str | None) -> None:
    """Say what the images show.

    A folder stands for all pictures in it and below. Among several, a file that can not be read is
    reported and the others go on; the exit status is then 1.
    """
    from .model import load
    files = list(_expand(images))
    begin = time.perf_counter()
    model = load(source, device=device, dtype=dtype, threads=threads, input_shape=input_shape,
                 labels=_read_labels(labels), preprocess=_read_preprocess(preprocess))
    batch = batch or _batch_for(model, len(files))
    _warm(model, batch)
    ready = time.perf_counter()
    results: list[dict[str, Any]] = []
    for path, answer in _classify(model, files, top, batch):
        results.append({"file": str(path), **answer})
        if form is None and "predictions" in answer:
            _show(path, answer["predictions"], several=len(files) > 1)
    seconds = time.perf_counter() - ready
    failed = sum("error" in result for result in results)
    if form == "json":
        click.echo(_json(results))
    elif form == "csv":
        _write_csv(results)
    else:
        count = len(files) - failed
        how = f"{model.threads} threads, {model.dtype}" if model.threads else model.dtype
        out.print(f"{count} image{'' if count == 1 else 's'} in {seconds * 1e3:.0f} ms on "
                  f"{model.device} ({how}) with {model.name}; "
                  f"loaded in {ready - begin:.2f} s", style="dim", soft_wrap=True)
    if failed:
        raise SystemExit(1)


def _read_labels(source: str | None) -> Any:
    """The lines of a text file; "imagenet" and None as they are."""
    if source is None or source == "imagenet":
        return source
    try:
        return Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ModelError(f"--labels {source}: can not be read: {reason}") from None


def _read_preprocess(text: str | None) -> Any:
    """A Preprocess from JSON; names and None as they are."""
    from .image import PRESETS, Preprocess
    if text is None or text in PRESETS:
        return text
    try:
        return Preprocess.from_json(text)
    except ValueError as error:
        raise ModelError(f"--preprocess {text}: neither one of {', '.join(PRESETS)} nor what "
                         f"cnn.Preprocess takes: {error}") from None


def _expand(images: Sequence[str]) -> Iterator[Path]:
    """Files as given, folders as the pictures below them."""
    for image in images:
        path = Path(image)
        if not path.is_dir():
            yield path
            continue
        inside = sorted(p for p in path.rglob("*")
                        if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not inside:
            raise ImageError(f"{path}: the folder holds no picture "
                             f"({', '.join(sorted(IMAGE_SUFFIXES))})")
        yield from inside


def _batch_for(model: Any, images: int) -> int:
    """How many to run at once, where nobody says: enough for all threads, or to fill a GPU."""
    fixed = model.input_shape[0]
    if fixed is not None:
        return int(fixed)
    if model.device.startswith("emulator"):
        return 1
    return min(images, max(8, model.threads) if model.threads else 64)


def _warm(model: Any, batch: int) -> None:
    """Get the kernels ready, saying so when they must be compiled first."""
    if model.device.startswith("emulator"):      # compiling is little beside running there
        return
    notice = ("Preparing the kernels for this GPU. The first time they are compiled, which takes "
              "up to a few minutes.")
    if model.device == "cpu":
        from kernels.cpu import store
        if not store.is_cold():
            model.warmup([batch])
            return
        notice = ("Compiling the kernels for this CPU. This happens once and takes up to half a "
                  "minute.")
    if not err.is_terminal and model.device == "cpu":
        err.print(notice, soft_wrap=True)
    with err.status(notice):
        model.warmup([batch])


def _classify(model: Any, files: Sequence[Path], top: int,
              batch: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, {"predictions": [...]} or {"error": sentence}) for each file, in order."""
    from .image import Photos, read, stack
    columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    settings = model.photo_settings()
    begun: deque[list[tuple[Path, ImageError | None]]] = deque()

    def batches() -> Iterator[Photos]:
        for i in range(0, len(files), batch):
            chunk = files[i:i + batch]
            found = read(chunk, settings)
            begun.append([(path, one if isinstance(one, ImageError) else None)
                          for path, one in zip(chunk, found, strict=True)])
            photos = stack([one for one in found if not isinstance(one, ImageError)], settings)
            yield photos.padded(batch) if len(photos.pixels) else photos

    with Progress(*columns, console=err, transient=True, disable=len(files) == 1) as progress:
        task = progress.add_task("", total=len(files))
        for probabilities in model.predict_batches(batches()):
            best, answers = iter(model.top(probabilities, top)), begun.popleft()
            progress.update(task, advance=len(answers))
            for path, error in answers:
                if error is None:
                    yield path, {"predictions": next(best)}
                    continue
                if len(files) == 1:
                    raise error
                progress.console.print(f"cnn: {error}", style="red", soft_wrap=True, markup=False)
                yield path, {"error": str(error)}


def _show(path: Path, predictions: Sequence[Any], several: bool) -> None:
    table = Table(title=str(path) if several else None, title_justify="left", box=None,
                  show_header=False, pad_edge=False)
    for prediction in predictions:
        filled = round(prediction.probability * BAR)
        bar = f"[green]{'█' * filled}[/][dim]{'░' * (BAR - filled)}[/]"
        table.add_row(prediction.label, bar, f"{prediction.probability:7.2%}")
    out.print(table)


def _json(results: Sequence[dict[str, Any]]) -> str:
    plain = [{**result, "predictions": [asdict(one) for one in result["predictions"]]}
             if "predictions" in result else result for result in results]
    return json.dumps(plain, indent=2, ensure_ascii=False)


def _write_csv(results: Sequence[dict[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "rank", "index", "label", "probability"])
    for result in results:
        for rank, one in enumerate(result.get("predictions", []), 1):
            writer.writerow([result["file"], rank, one.index, one.label,
                             f"{one.probability:.6f}"])


@cli.command(epilog="""\b
Examples:
  cnn summary
  cnn summary net.onnx --batch 8
  cnn summary net.onnx --device emulator:sm_90a --dtype float16""")
@click.argument("source", metavar="MODEL", required=False)
@_input_shape
@click.option("--device", default="auto", show_default=True,
              help="auto, cpu, cuda, cuda:N, emulator or emulator:sm_90a.")
@_dtype_option
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True,
              help="Images to run at once.")
@_debug
def summary(source: str | None, input_shape: Any, device: str, dtype: str, batch: int) -> None:
    """List a model's layers: kernel, output shape, parameters, MACs, bytes."""
    from .model import load
    model = load(source, device=device, dtype=dtype, input_shape=input_shape)
    result = model.summary(batch)
    table = Table(title=result.model, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(result.HEADER):
        table.add_column(name, justify="left" if i < 3 else "right", overflow="fold")
    for row in result.cells():
        table.add_row(*row)
    out.print(table)
    out.print(result.footer(), soft_wrap=True)


@cli.command(epilog="""\b
Examples:
  cnn quantize efficientnet_lite0 photos/ --output lite0_int8.onnx
  cnn quantize resnet50.onnx photos/ -o int8.onnx --preprocess imagenet --labels imagenet""")
@click.argument("source", metavar="MODEL")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE_OR_FOLDER...")
@click.option("--output", "-o", "target", required=True, metavar="FILE",
              help="The .onnx file to write.")
@_preprocess_option
@_labels_option
@_input_shape
@_debug
def quantize(source: str, images: Sequence[str], target: str, preprocess: str | None,
             labels: str | None, input_shape: Any) -> None:
    """Make a file of 8 bits of a float one, with the ranges of these photos; CPUs that multiply 8
    bits run it faster.

    A hundred photos of what the network is meant for are enough. Then both classify them, and how
    they agree is printed. It needs ONNX Runtime: pip install 'numba-cnn[quantize]'.
    """
    from .quantize import quantize as make
    files = list(_expand(images))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=len(files))
        agreement = make(source, target, files, preprocess=_read_preprocess(preprocess),
                         labels=_read_labels(labels), input_shape=input_shape,
                         progress=lambda what, done: bar.update(
                             task, description=what, completed=done))
    out.print(f"{target}: {agreement}", soft_wrap=True, markup=False)


@cli.command(epilog="""\b
Examples:
  cnn tune --dtype float16
  cnn tune resnet50.onnx --dtype float16 --batch 256 --budget 120""")
@click.argument("source", metavar="MODEL", required=False)
@_input_shape
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@_dtype_option
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True,
              help="Images to run at once.")
@click.option("--budget", type=click.FloatRange(0), default=60.0, show_default=True,
              help="Seconds to search for, compiling included.")
@_debug
def tune(source: str | None, input_shape: Any, device: str, dtype: str, batch: int,
         budget: float) -> None:
    """Measure which kernels run a model fastest on this GPU, and save the choice.

    Ctrl-C ends the search and keeps what it found.
    """
    from .model import load
    model = load(source, device=device, dtype=dtype, input_shape=input_shape)
    columns = (TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        report = model.tune(batch, budget, lambda done, total, layer: bar.update(
            task, completed=done, total=total, description=layer))
    if report.changed:
        table = Table("layers", "before", "now", title=model.name, title_justify="left", box=None,
                      pad_edge=False)
        table.add_column("before, us", justify="right")
        table.add_column("now, us", justify="right")
        for one in report.changed:
            table.add_row(", ".join(one.layers), str(one.before), str(one.after),
                          f"{one.before_microseconds:.1f}", f"{one.after_microseconds:.1f}")
        out.print(table)
    out.print(str(report), style="dim", soft_wrap=True)
    if report.interrupted:
        raise SystemExit(130)


@cli.command()
@_debug
def doctor() -> None:
    """Print what a bug report needs: versions, CPU, threads, GPU, cache."""
    from .doctor import report
    width = max(len(name) for name, _ in report())
    for name, value in report():
        click.echo(f"{name.ljust(width)}  {value}")


def entry() -> NoReturn:
    """Entry point: `main` in a process of its own, which ends at once. Python would first take all
    down that it has set up, for a tenth of the time of classifying one photo."""
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """The command: errors are one sentence on stderr and a non-zero exit status."""
    context: click.Context | None = None
    try:
        with cli.make_context("cnn", sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, click.Abort):
        raise SystemExit(130) from None
    except Error as error:
        if context is not None and context.obj:
            raise
        err.print(f"cnn: {error}", style="red", soft_wrap=True, markup=False)
        raise SystemExit(1) from None
