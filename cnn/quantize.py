"""Makes an ONNX file of 8 bits of one in floating point, by ONNX Runtime's quantiser, with the
ranges that values have for your photos."""
from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from . import zoo
from .errors import Error, ModelError
from .image import Preprocess
from .importer import TO_NCHW
from .model import Model, load

CALLS = 20          # that are timed
PRODUCTS = ("Conv", "Gemm", "MatMul")
QUANTISED = {"QuantizeLinear", "QLinearConv", "DynamicQuantizeLinear"}
Tell = Callable[[str, int], object]


@dataclass(frozen=True)
class Agreement:
    """How a float network and the one quantised from it agree.

    photos      that both were shown
    same        how many of these both took for the same
    difference  the greatest of a probability
    float_ms, int8_ms
                medians of a call with one image each, in turns, on the CPU
    """
    photos: int
    same: int
    difference: float
    float_ms: float
    int8_ms: float

    def __str__(self) -> str:
        return (f"{self.same} of {self.photos} photo{'' if self.photos == 1 else 's'} "
                f"{'is' if self.photos == 1 else 'are'} taken for the same, probabilities differ "
                f"by up to {self.difference:.3f}; an image took {self.float_ms:.2f} ms and takes "
                f"{self.int8_ms:.2f}")


def quantize(source: str | os.PathLike | None, target: str | os.PathLike, photos: Sequence[Any], *,
             preprocess: Preprocess | str | None = None, labels: Sequence[str] | str | None = None,
             input_shape: tuple[int, ...] | None = None,
             progress: Tell = lambda what, done: None) -> Agreement:
    """Write `target`, the network of `source` in 8 bits, and say how both agree on the photos.

    What convolutions and products with constant weights read becomes uint8, and their weights int8
    by channel, in the format QDQ; all else stays as it is, for it gains nothing and rounding it
    again would cost accuracy. A value's range is the one that it has over all photos: a hundred of
    those that the network is meant for are enough.
    preprocess, labels and input_shape are as for `load`; the first two are written into the file.
    progress is told what is done, and with how many photos so far.

    Error where ONNX Runtime is not installed, ModelError for a file that it or we can not take,
    ImageError for a photo that can not be read.
    """
    path, target = zoo.find(source), Path(target)
    if path.suffix != ".onnx" or target.suffix != ".onnx":
        raise ModelError(f"quantizing makes an .onnx file of an .onnx file, not {target} of {path}")
    if target.exists() and target.samefile(path):
        raise ModelError(f"{target}: the quantized network needs a file of its own")
    if not target.absolute().parent.is_dir():
        raise ModelError(f"{target}: there is no such folder")
    if not photos:
        raise ModelError("quantizing needs photos, for the ranges of what is computed from them")
    settings: dict[str, Any] = {"device": "cpu", "input_shape": input_shape,
                                "preprocess": preprocess, "labels": labels}
    model = load(path, **settings)      # says what is wrong with it
    network = onnx.load(path)           # with weights that lie in a file beside it
    if any(node.op_type in QUANTISED for node in network.graph.node):
        raise ModelError(f"{path}: it is quantized already")
    result = quantize_static(path, network, _images(model, photos, progress))
    _describe(result, model)
    _save(result, target)
    return _compare(model, load(target, device="cpu", input_shape=input_shape), photos, progress)


def _save(network: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.save(network, path)
    except (OSError, ValueError) as error:      # the latter of 2 GB and more
        raise ModelError(f"{path}: the network can not be written: {error}") from None


def _images(model: Model, photos: Sequence[Any], progress: Tell) -> Iterator[np.ndarray]:
    """Each photo as an input of the file, one after the other."""
    batch = model.input_shape[0] or 1
    for done, photo in enumerate(photos):
        progress("measuring ranges", done)
        image = np.repeat(model.preprocess(photo), batch, axis=0)
        yield np.ascontiguousarray(image.transpose(TO_NCHW) if model._channels_first else image)


def quantize_static(path: Path, network: onnx.ModelProto, inputs: Iterable[np.ndarray],
                    everything: bool = False) -> onnx.ModelProto:
    """The network, of the file `path`, in 8 bits, with the ranges that values have for these
    inputs, which are as the file has its only one. everything: what lies between products, too,
    which is the quantiser's own way.

    ModelError where there is nothing to quantise.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantType
        from onnxruntime.quantization import quantize_static as quantize_file
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise Error(f"quantizing is done by ONNX Runtime, which can not be imported ({error}): "
                    f"pip install 'numba-cnn[quantize]'") from None
    weights = {weight.name for weight in network.graph.initializer}
    name = next(value.name for value in network.graph.input if value.name not in weights)
    given = iter(inputs)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(given, None)
            return None if image is None else {name: image}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        whole, prepared, made = (Path(folder) / f"{what}.onnx"
                                 for what in ("float", "prepared", "int8"))
        _save(network, whole)
        try:
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            options = {} if everything else _products(path, prepared)
            quantize_file(prepared, made, Reader(), per_channel=True,
                          activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, **options)
        except Error:
            raise
        except Exception as error:      # of any kind: it is a program of its own
            raise ModelError(f"{path}: ONNX Runtime does not quantize it: {error}") from None
        return onnx.load(made)


def _products(path: Path, prepared: Path) -> dict[str, Any]:
    """Options by which the quantiser takes the inputs of PRODUCTS with constant weights alone. It
    knows nodes by name: in the prepared file all get one."""
    network = onnx.load(prepared)
    graph = network.graph
    for i, node in enumerate(graph.node):
        node.name = node.name or f"node {i}"
    _save(network, prepared)
    constants = {weight.name for weight in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    products = [node for node in graph.node
                if node.op_type in PRODUCTS and node.input[1] in constants]
    if not products:
        raise ModelError(f"{path}: there is nothing to quantize: it has no {', '.join(PRODUCTS)} "
                         f"with constant weights")
    return {"op_types_to_quantize": list(PRODUCTS),
            "nodes_to_quantize": [node.name for node in products],
            "extra_options": {"OpTypesToExcludeOutputQuantization": list(PRODUCTS)}}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that the quantiser writes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _describe(network: onnx.ModelProto, model: Model) -> None:
    """Write into the file how photos become its input, and the names of its classes."""
    metadata = {entry.key: entry.value for entry in network.metadata_props}
    if model.preprocessing is not None:
        metadata["cnn.preprocess"] = model.preprocessing.to_json()
    if model.labels is not None:
        metadata["cnn.labels"] = zoo.as_metadata(model.labels)
    onnx.helper.set_model_props(network, metadata)


def _compare(ours: Model, quantised: Model, photos: Sequence[Any], progress: Tell) -> Agreement:
    same, difference = 0, 0.0
    for done, photo in enumerate(photos):
        progress("comparing", done)
        batch = np.repeat(ours.preprocess(photo), ours.input_shape[0] or 1, axis=0)
        before, after = ours.predict(batch)[0], quantised.predict(batch)[0]
        same += int(before.argmax() == after.argmax())
        difference = max(difference, float(np.abs(before - after).max()))
    times = np.array([[_seconds(model, batch) for model in (ours, quantised)]
                      for _ in range(CALLS)])
    float_ms, int8_ms = 1e3 / len(batch) * np.median(times, axis=0)
    return Agreement(len(photos), same, difference, float(float_ms), float(int8_ms))


def _seconds(model: Model, batch: np.ndarray) -> float:
    start = time.perf_counter()
    model.predict(batch)
    return time.perf_counter() - start
