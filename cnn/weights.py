"""Networks of cnn.layers in .safetensors files: weights as tensors, layers as JSON metadata."""
from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from kernels.ops import Shape

from . import layers
from .errors import ModelError
from .image import Preprocess

VERSION = 1
KINDS = {kind.__name__: kind for kind in (
    layers.Conv2d, layers.Linear, layers.BatchNorm2d, layers.ReLU, layers.ReLU6, layers.Sigmoid,
    layers.Tanh, layers.Softmax, layers.MaxPool2d, layers.AvgPool2d, layers.AdaptiveAvgPool2d,
    layers.Flatten, layers.Identity, layers.Dropout)}
MAX_BYTES = 16 << 30


def save_layers(net: layers.Sequential, path: str | os.PathLike, input_shape: Shape | None,
                labels: Sequence[str] | None, preprocess: Preprocess | None) -> None:
    """Write the file whole or not at all; ModelError for a path that is no .safetensors."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: the file's name must end in .safetensors")
    content: dict[str, Any] = {"version": VERSION, "layers": _describe(net)}
    if input_shape is not None:
        content["input_shape"] = list(input_shape[-3:])
    if labels is not None:
        content["labels"] = list(labels)
    if preprocess is not None:
        content["preprocess"] = preprocess.to_json()
    data = to_bytes(net.state_dict(), {"cnn": json.dumps(content)})
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ModelError(f"{path}: can not be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _describe(net: layers.Sequential) -> list[Any]:
    """[name, kind, arguments] of each layer; of a Sequential the arguments are such a list."""
    return [[name, "Sequential", _describe(layer)] if isinstance(layer, layers.Sequential)
            else [name, type(layer).__name__, layer.arguments]
            for name, layer in net.layers.items()]


def load_layers(path: str | os.PathLike) -> tuple[layers.Sequential, dict[str, Any]]:
    """The network in a file, and what went with it: input_shape, labels, preprocess.

    ModelError, with the file, for one that is broken or was not written by `save`.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path}: the file has {path.stat().st_size} bytes; the limit is "
                         f"{MAX_BYTES}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}   # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: the file is no safetensors file, or is damaged: {error}"
                         ) from None
    if "cnn" not in metadata:
        raise ModelError(f"{path}: the file holds weights but no layers; build the network with "
                         f"cnn.Sequential and give it these weights with load_state_dict")
    try:
        content = json.loads(metadata["cnn"])
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r} is not {VERSION}")
        net = _build(content["layers"])
        net.load_state_dict(state)
        return net, _extras(content)
    except (ValueError, TypeError, KeyError, RecursionError, ModelError) as error:
        raise ModelError(f"{path}: its layers can not be rebuilt: {error}") from None


def _build(description: list[Any]) -> layers.Sequential:
    made: dict[str, layers.Layer] = {}
    for name, kind, arguments in description:
        if kind == "Sequential":
            made[name] = _build(arguments)
        elif kind in KINDS:
            made[name] = KINDS[kind](**arguments)
        else:
            raise ValueError(f"layer {name!r} is of the unknown kind {kind!r}")
    return layers.Sequential(made)


def _extras(content: dict[str, Any]) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if "input_shape" in content:
        shape = tuple(content["input_shape"])
        if len(shape) != 3 or not all(size is None or isinstance(size, int) for size in shape):
            raise ValueError(f"input_shape {shape} is not (H, W, C)")
        extras["input_shape"] = shape
    if "labels" in content:
        extras["labels"] = [str(label) for label in content["labels"]]
    if "preprocess" in content:
        extras["preprocess"] = Preprocess.from_json(content["preprocess"])
    return extras
