"""An .onnx file as data that nobody vouches for: every size is checked before it is believed."""
from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from .errors import ModelError

MAX_FILE_BYTES = (1 << 31) - 1      # what a protobuf message can hold
MAX_ELEMENTS = (1 << 31) - 1        # of one tensor: kernels count in 32 bits
OPSETS = range(7, onnx.defs.onnx_opset_version() + 1)


def read_model(path: Path) -> onnx.ModelProto:
    """The file's content; ModelError where it is missing, empty, too large or no ONNX."""
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise ModelError(f"{path}: the file has {size} bytes; a model has 1 to {MAX_FILE_BYTES}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ModelError(f"{path}: the file is no ONNX model, or is damaged") from None
    if not model.opset_import or not model.graph.output:
        raise ModelError(f"{path}: the file is no ONNX model: it names no opset or no output")
    if model.graph.sparse_initializer:
        raise ModelError(f"{path}: sparse initializers are not supported")
    return model


def opset(model: onnx.ModelProto, path: Path) -> int:
    """Version of the standard operators; ModelError for one that is not understood."""
    version = next((entry.version for entry in model.opset_import
                    if entry.domain in ("", "ai.onnx")), None)
    if version is None or version not in OPSETS:
        raise ModelError(f"{path}: it uses opset {version}; supported are {OPSETS[0]} to "
                         f"{OPSETS[-1]}")
    return version


def read_tensor(tensor: TensorProto, path: Path) -> np.ndarray:
    """Values of a tensor stored in the model, or in a file beside it; always a private copy.

    External data is read only from a regular file in the model's own folder.
    """
    what = f"{path}: tensor {tensor.name!r}"
    elements = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims) or elements > MAX_ELEMENTS:
        raise ModelError(f"{what} has shape {list(tensor.dims)}, which can not be loaded")
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError:
        dtype = np.dtype(object)
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ModelError(f"{what} has the data type {tensor.data_type}, which is no number")
    if tensor.data_location == TensorProto.EXTERNAL:
        data = _external(tensor, elements * dtype.itemsize, path, what)
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(tensor.dims)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != elements * dtype.itemsize:
        raise ModelError(f"{what} has shape {list(tensor.dims)} and {len(tensor.raw_data)} bytes; "
                         f"{elements * dtype.itemsize} are needed")
    try:
        return np.array(numpy_helper.to_array(tensor)).reshape(tensor.dims)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{what} can not be read: {error}") from None


def read_attribute(attribute: onnx.AttributeProto, path: Path) -> Any:
    """The value as Python has it: tensors as arrays, a data type to make as NumPy's dtype."""
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return read_tensor(value, path)
    if attribute.name in ("to", "output_dtype") and value != TensorProto.UNDEFINED:
        try:
            return helper.tensor_dtype_to_np_dtype(value)
        except KeyError:
            raise ModelError(f"{path}: there is no data type {value} to cast to") from None
    return value.decode() if isinstance(value, bytes) else value


def _external(tensor: TensorProto, size: int, path: Path, what: str) -> bytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location or Path(location).name != location or "\\" in location or location == "..":
        raise ModelError(f"{what} lies in {location!r}; only a plain file name beside the model is "
                         f"read")
    beside = path.parent / location
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        status = beside.lstat()
    except (ValueError, OSError) as error:
        raise ModelError(f"{what} lies in {beside}, which can not be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{what} lies in {beside}, which is no regular file")
    if length != size or offset < 0 or offset + length > status.st_size:
        raise ModelError(f"{what} is said to be bytes {offset} to {offset + length} of {beside}, "
                         f"which has {status.st_size}; {size} bytes are needed")
    with beside.open("rb") as file:
        file.seek(offset)
        return file.read(length)
