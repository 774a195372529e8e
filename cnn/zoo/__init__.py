"""Models that come with the package, and what a model file says about its labels and photos."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ModelError
from ..image import Preprocess

FOLDER = Path(__file__).parent
DEFAULT = "efficientnet_lite0"
SUFFIXES = (".onnx", ".safetensors")


def names() -> list[str]:
    """Names of the embedded models."""
    return sorted(path.stem for path in FOLDER.glob("*.onnx"))


def find(source: str | os.PathLike | None) -> Path:
    """Path of a model: the default (None), a zoo name (no suffix, no folder), or a file.

    ModelError where there is none.
    """
    if source is None:
        return FOLDER / f"{DEFAULT}.onnx"
    path = Path(source)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file")
        return path
    if isinstance(source, str) and path.name == source and not path.suffix:
        if source not in names():
            raise ModelError(f"{source!r} is no model of the zoo; it has {names()}. A path ends "
                             f"in {' or '.join(SUFFIXES)}")
        return FOLDER / f"{source}.onnx"
    raise ModelError(f"{path}: a model file ends in {' or '.join(SUFFIXES)}")


def imagenet_labels() -> list[str]:
    """The 1000 classes of ImageNet-1k, in the usual order; the first is tench."""
    return (FOLDER / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines()


def labels_of(metadata: Mapping[str, str], path: Path) -> list[str] | None:
    """Labels that a file's metadata names: "imagenet-1k" or a JSON list; None without any."""
    text = metadata.get("cnn.labels")
    if text is None:
        return None
    if text == "imagenet-1k":
        return imagenet_labels()
    try:
        labels = json.loads(text)
    except json.JSONDecodeError:
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"{path}: its metadata 'cnn.labels' is {text[:80]!r}, neither "
                         f"'imagenet-1k' nor a JSON list of strings")
    return labels


def as_metadata(labels: Sequence[str]) -> str:
    """What `labels_of` reads."""
    return "imagenet-1k" if list(labels) == imagenet_labels() else json.dumps(list(labels))


def preprocess_of(metadata: Mapping[str, str], path: Path) -> Preprocess | None:
    """What a file's metadata says about photos; None where it says nothing."""
    text = metadata.get("cnn.preprocess")
    if text is None:
        return None
    try:
        return Preprocess.from_json(text)
    except ValueError as error:
        raise ModelError(f"{path}: its metadata 'cnn.preprocess' is wrong: {error}") from None
