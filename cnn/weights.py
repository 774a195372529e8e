"""Weights that fit a network of cnn.layers, and such networks in .safetensors files: weights as
tensors, layers as JSON in the file's metadata."""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from kernels.ops import Shape

from . import arguments, layers
from .errors import ModelError
from .image import Preprocess

Array = np.ndarray

VERSION = 1
SUFFIX = ".safetensors"
MAX_FILE_BYTES = 4 << 30
MAX_DEPTH = 50      # of Sequentials in Sequentials, in a file
KINDS: dict[str, type[layers.Layer]] = {
    name: getattr(layers, name) for name in layers.__all__ if name not in ("Layer", "Sequential")}


# ---- what fits --------------------------------------------------------------------------------

def fitting(state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
            ignored: set[str]) -> dict[str, Array]:
    """Float32 copies of the values, which must have just these names and shapes.

    ModelError lists all that is missing, unexpected (unless ignored), misshapen or no float.
    """
    if not isinstance(state_dict, Mapping):
        raise ModelError(f"load_state_dict takes a mapping of names to arrays, not "
                         f"{type(state_dict).__name__}")
    arrays: dict[str, Array] = {}
    problems: dict[str, list[str]] = {
        "missing": [f"{key!r} {shape}" for key, shape in shapes.items() if key not in state_dict],
        "unexpected": [repr(key) for key in state_dict if key not in shapes.keys() | ignored],
        "misshapen": [], "no floats": []}
    for key, shape in shapes.items():
        if key not in state_dict:
            continue
        try:
            arrays[key] = array = _float32(state_dict[key])
        except (TypeError, ValueError, RuntimeError) as error:
            problems["no floats"].append(f"{key!r} ({error})")
            continue
        if array.shape != shape:
            problems["misshapen"].append(f"{key!r} is {array.shape}, {shape} is needed")
    if any(problems.values()):
        raise ModelError("the state_dict does not fit the network; " + "; ".join(
            f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys))
    return arrays


def _float32(value: Any) -> Array:
    """A float32 copy of an array or a torch tensor; TypeError where it holds no floats."""
    if hasattr(value, "detach"):        # a tensor, that may need a gradient or lie on a GPU
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.float()       # NumPy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise TypeError(f"its dtype is {array.dtype}")
    return np.array(array, np.float32, order="C")


# ---- writing ----------------------------------------------------------------------------------

def save_layers(net: layers.Sequential, path: str | os.PathLike, *,
                labels: Sequence[str] | None = None, preprocess: Preprocess | None = None,
                input_shape: Shape | None = None) -> None:
    """Write the file whole or not at all: the same network always gives the same bytes.

    labels, preprocess, input_shape: as in `cnn.Model`. ModelError for a path that does not end in
    .safetensors or can not be written, and for an input_shape that the network does not take.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ModelError(f"{path}: the file's name must end in {SUFFIX}")
    content: dict[str, Any] = {"version": VERSION, "layers": _describe(net)}
    if input_shape is not None:
        image = arguments.shape(input_shape, "input_shape")[-3:]
        net.graph((None, *image))
        content["input_shape"] = image
    if labels is not None:
        content["labels"] = _checked_labels(labels)
    if preprocess is not None:
        if not isinstance(preprocess, Preprocess):
            raise ModelError(f"preprocess={preprocess!r} must be a cnn.Preprocess")
        content["preprocess"] = preprocess.to_json()
    data = to_bytes(net.state_dict(), {"cnn": json.dumps(content)})
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise ModelError(f"{path}: can not be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _describe(net: layers.Sequential) -> list[Any]:
    """[name, kind, arguments] of each layer; of a Sequential the arguments are such a list."""
    described: list[Any] = []
    for name, layer in net.layers.items():
        if isinstance(layer, layers.Sequential):
            described.append([name, "Sequential", _describe(layer)])
        elif KINDS.get(type(layer).__name__) is not type(layer):
            raise ModelError(f"layer {name!r} is a {type(layer).__name__}, which a file can not "
                             f"hold; it can hold {sorted(KINDS)}")
        else:
            given = {field.name: getattr(layer, field.name)
                     for field in fields(layer)}        # type: ignore[arg-type]
            described.append([name, type(layer).__name__, given])
    return described


def _checked_labels(labels: Any) -> list[str]:
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(
            isinstance(label, str) for label in labels):
        raise ModelError(f"labels={labels!r:.80} must be a list of strings")
    return list(labels)


# ---- reading ----------------------------------------------------------------------------------

def load_layers(path: str | os.PathLike) -> tuple[layers.Sequential, dict[str, Any]]:
    """The network in a file, and what goes with it: input_shape and, where they were saved,
    labels and preprocess. Without a saved input_shape it is (None, None, None), any image.

    ModelError, naming the file, for one that is broken or was not written by `save`.
    """
    path = Path(path)
    text, state = _read(path)
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"version {VERSION} of the description is understood, not "
                             f"{text[:80]!r}")
        net = _build(content.get("layers"))
        net.load_state_dict(state)
        return net, _extras(content)
    except RecursionError:
        raise ModelError(f"{path}: its layers are nested too deeply") from None
    except (ValueError, ModelError) as error:
        raise ModelError(f"{path}: its network can not be rebuilt: {error}") from None


def _read(path: Path) -> tuple[str, dict[str, Array]]:
    """The description of the layers, and the tensors by name."""
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelError(f"{path}: the file has {size} bytes; the limit is {MAX_FILE_BYTES}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "cnn" not in metadata:
                raise ModelError(f"{path}: the file holds weights but no layers; build the network "
                                 f"with cnn.Sequential and give it the weights by load_state_dict")
            return metadata["cnn"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: the file is no safetensors file, or is damaged: {error}"
                         ) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: it holds a tensor that NumPy can not: {error}") from None


def _build(description: Any, depth: int = 0) -> layers.Sequential:
    """The network that `_describe` described; its weights are not drawn, whatever their size."""
    made: dict[str, layers.Layer | layers.Sequential] = {}
    if depth > MAX_DEPTH:
        raise RecursionError
    if not isinstance(description, list):
        raise ValueError(f"{description!r:.80} is no list of layers")
    for entry in description:
        if not isinstance(entry, list) or len(entry) != 3 or not all(
                isinstance(part, str) for part in entry[:2]):
            raise ValueError(f"{entry!r:.80} is not [name, kind, arguments]")
        name, kind, given = entry
        if kind == "Sequential":
            made[name] = _build(given, depth + 1)
        elif kind not in KINDS:
            raise ValueError(f"layer {name!r} is of the unknown kind {kind!r}; known are "
                             f"{sorted(KINDS)}")
        elif not isinstance(given, dict):
            raise ValueError(f"layer {name!r} has the arguments {given!r:.80}")
        else:
            try:
                made[name] = KINDS[kind](**given)
            except TypeError as error:      # an argument too many or too few
                raise ValueError(f"layer {name!r}: {error}") from None
    return layers.Sequential(made)


def _extras(content: dict[str, Any]) -> dict[str, Any]:
    shape = content.get("input_shape", (None, None, None))
    extras: dict[str, Any] = {"input_shape": arguments.shape(shape, "input_shape")}
    if "labels" in content:
        extras["labels"] = _checked_labels(content["labels"])
    if "preprocess" in content:
        if not isinstance(content["preprocess"], str):
            raise ValueError(f"preprocess {content['preprocess']!r:.80} is no text")
        extras["preprocess"] = Preprocess.from_json(content["preprocess"])
    return extras
