"""Model: load, preprocess, predict, classify, run, trace, summary. What people call."""
from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import ops
from kernels.device import on_gpu
from kernels.ops import Shape
from kernels.step import Array

from . import image as images_module
from . import passes, zoo
from .by_image import ByImage, prepare
from .devices import open_device
from .errors import DeviceError, ModelError, OutOfMemory
from .executor import PROBABILITIES, Program, open_batch, specialise
from .graph import Graph
from .image import Photos, Preprocess
from .layers import Sequential
from .summary import Summary, summarise

if TYPE_CHECKING:
    from kernels.cuda.tune import TuneReport

# What makes probabilities of an output, by its name for people.
ACTIVATIONS: dict[str, ops.Op | None] = {"softmax": ops.Softmax(-1), "sigmoid": ops.Sigmoid(),
                                         "none": None}
HOST_DTYPES: frozenset[np.dtype] = frozenset({np.dtype(np.float32)})
GPU_DTYPES = HOST_DTYPES | {np.dtype(np.float16)}
MAX_PROGRAMS = 8
MAX_SHARE = 1 / 4       # of the device's memory, which the programs of a model may hold


@dataclass(frozen=True)
class Prediction:
    """One of the classes that a picture may show."""
    label: str
    index: int
    probability: float


class Model:
    """A network on a device, with its labels and its way to look at pictures.

    network      a `cnn.Sequential`, a `cnn.graph.Graph`, or what `cnn.onnx_import` returns
    input_shape  (H, W, C) or (N, H, W, C) with None for N; a Sequential needs it
    labels       names of the classes, in the order of the output; "imagenet" for its 1000
    preprocess   how a photo becomes an input: a Preprocess, or a name as in `load`
    device, dtype, threads, activation   as in `load`
    """

    def __init__(self, network: Any, *, input_shape: Shape | None = None,
                 labels: Sequence[str] | None = None,
                 preprocess: Preprocess | str | None = None, device: str = "auto",
                 dtype: str = "float32", threads: int | None = None, activation: str = "auto",
                 name: str = "model") -> None:
        if activation not in ("auto", *ACTIVATIONS):
            raise ModelError(f"activation={activation!r}; it can be one of "
                             f"{('auto', *ACTIVATIONS)}")
        self._device = open_device(device, dtype, threads)
        self.name, self.device, self.dtype = name, self._device.name, dtype
        if isinstance(network, Sequential):
            if input_shape is None:
                raise ModelError("Model(net) needs input_shape=(H, W, C), the size of its images")
            network = network.graph((None, *input_shape[-3:]))
        elif input_shape is not None:
            raise ModelError(f"input_shape={input_shape!r} is for a Sequential, this network has "
                             f"its own; for a file, give it to cnn.load")
        # The file's own inputs, for `run`: an image of a file may be NCHW, ours are NHWC.
        self._channels_first: frozenset[str] = getattr(network, "channels_first", frozenset())
        self._source: Graph = network if isinstance(network, Graph) else network.graph
        self._graph = passes.optimise(self._source)
        self._options: Any = self._device.options()
        self.labels = _labels(labels)
        self.preprocessing = self._preprocessing(preprocess)
        self.activation = self._activation(activation)
        self._programs: OrderedDict[tuple, Program | ByImage] = OrderedDict()
        self._lock = threading.Lock()
        classes = self._classes()
        if self.labels is not None and classes is not None and len(self.labels) != classes:
            raise ModelError(f"{name}: {len(self.labels)} labels for {classes} classes")

    def __repr__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return (f"<cnn.Model {self.name!r} {self.input_shape} on {self.device}, "
                f"{self.dtype}{threads}>")

    # ---- what it is ---------------------------------------------------------------------------

    @property
    def input_shape(self) -> Shape:
        """(N, H, W, C) of the one input that is an image; None stands for any size."""
        return self._image_input[1]

    @property
    def threads(self) -> int | None:
        """CPU threads; None where kernels run elsewhere."""
        return self._device.threads

    @cached_property
    def _image_input(self) -> tuple[str, Shape]:
        inputs = [(name, spec.shape) for name, spec in self._graph.inputs.items()]
        if len(inputs) != 1 or len(inputs[0][1]) != 4:
            raise ModelError(f"{self.name}: its inputs are {dict(inputs)}, not one batch of "
                             f"images; use model.run({{name: array}})")
        return inputs[0]

    def _classes(self) -> int | None:
        spec = self._graph.infer()[self._graph.outputs[0]]
        return None if spec is None or len(spec.shape) < 2 else spec.shape[1]

    def _activation(self, wanted: str) -> str:
        """What turns the output into probabilities; "none" where the network ends in that."""
        if wanted != "auto":
            return wanted
        producer, value = self._graph.producer(), self._graph.outputs[0]
        no_function = (ops.Reshape, ops.Flatten, ops.Transpose, ops.FakeQuantize)
        while value in producer and isinstance(producer[value].op, no_function):
            value = producer[value].inputs[0]
        last = producer[value].op if value in producer else None
        last = getattr(last, "activation", None) or last
        if isinstance(last, ops.Softmax) and last.log:
            return "softmax"        # exp(x) / sum(exp(x)) of logarithms of probabilities is these
        return "none" if isinstance(last, (ops.Softmax, ops.Sigmoid)) else "softmax"

    def _preprocessing(self, wanted: Preprocess | str | None) -> Preprocess | None:
        if wanted is None or isinstance(wanted, Preprocess):
            return wanted
        _, height, width, _ = self.input_shape
        try:
            return Preprocess.named(wanted, (height or 224, width or 224))
        except ValueError as error:
            raise ModelError(f"preprocess={wanted!r}: {error}, nor a cnn.Preprocess") from None

    # ---- running ------------------------------------------------------------------------------

    def preprocess(self, images: Any) -> Array:
        """Photos -> (N, H, W, C) float32, as the network wants them.

        images: one of, or a list of: path, bytes, PIL image, uint8 (H, W, 3) array. ImageError
        for one that can not be read.
        """
        many = [images] if images_module.is_one(images) else list(images)
        return images_module.photos(many, self.photo_settings()).normalised()

    def photo_settings(self) -> Preprocess:
        """How a photo becomes the input; ModelError where nothing says so."""
        if self.preprocessing is None:
            raise ModelError(f"{self.name}: nothing says how a photo becomes its input "
                             f"{self.input_shape}; give preprocess='imagenet' if it is like "
                             f"torchvision's, 'keras-tf' and so on for Keras's, or a Preprocess")
        return self.preprocessing

    def predict(self, batch: Any) -> Any:
        """(N, H, W, C) float32, preprocessed -> (N, classes) float32 probabilities.

        A batch may lie on the model's GPU: an array of CuPy, or one that speaks
        `__cuda_array_interface__` or DLPack, also of float16. The answer is then a CuPy array
        there, on CuPy's current stream, and nothing is copied to the host.

        ModelError for another rank, size, channel count or dtype, DeviceError for an array of
        another GPU, and while that stream captures a CUDA graph of yours.
        """
        return self._start(batch)()

    def predict_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """What `predict` gives for each batch, in order.

        On a GPU the next batch is taken and uploaded while this one is computed.
        """
        ahead = 1 if self.threads is None else 0
        begun: deque[Callable[[], Any]] = deque()
        for batch in batches:
            begun.append(self._start(batch))
            if len(begun) > ahead:
                yield begun.popleft()()
        while begun:
            yield begun.popleft()()

    def _start(self, batch: Any) -> Callable[[], Any]:
        """Begin to `predict`; what is returned waits for the probabilities."""
        name, shape = self._image_input
        output = self._graph.outputs[0]
        wait = self._begin({name: self._checked(batch, f"{self.name}: batch", shape)},
                           probabilities=True)

        def finish() -> Any:
            found = wait()
            if PROBABILITIES in found:
                return found[PROBABILITIES]
            logits = found[output]
            return _probabilities(logits.reshape(len(logits), math.prod(logits.shape[1:])),
                                  self.activation)
        return finish

    def classify(self, images: Any, top: int = 5, batch_size: int = 1) -> Any:
        """What a photo shows: the `top` likeliest Predictions, likeliest first.

        images: as for `preprocess`. One image gives a list of Prediction, a list gives a list of
        those, an iterator (a camera, a video) gives an iterator that reads batch_size images
        ahead and no more.
        """
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise ModelError(f"top={top!r} must be a whole number of at least 1")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ModelError(f"batch_size={batch_size!r} must be a whole number of at least 1")
        if images_module.is_one(images):
            return next(self._classify([images], top, 1))
        if isinstance(images, (Sequence, np.ndarray)):
            return list(self._classify(images, top, batch_size))
        return self._classify_lazily(images, top, batch_size)

    def _classify_lazily(self, images: Iterable[Any], top: int,
                         batch_size: int) -> Iterator[list[Prediction]]:
        """No image is taken before the answers to those before its batch are out."""
        source = iter(images)
        while chunk := list(islice(source, batch_size)):
            yield from self._classify(chunk, top, batch_size)

    def _classify(self, images: Any, top: int,
                  batch_size: int) -> Iterator[list[Prediction]]:
        chunks = [images[i:i + batch_size] for i in range(0, len(images), batch_size)]
        # The last ones run in the shape already prepared.
        batches = (images_module.photos(chunk, self.photo_settings()).padded(batch_size)
                   for chunk in chunks)
        for chunk, found in zip(chunks, self.predict_batches(batches), strict=True):
            yield from self.top(found[:len(chunk)], top)

    def top(self, probabilities: Array, count: int = 5) -> list[list[Prediction]]:
        """The `count` likeliest Predictions, likeliest first, of each row of (N, classes)."""
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
        return [[Prediction(self._label(i), int(i), float(row[i])) for i in best]
                for row, best in zip(probabilities, order, strict=True)]

    def _label(self, index: int) -> str:
        return f"class {index}" if self.labels is None else self.labels[index]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The network as its file has it: own input names, layouts and outputs, no softmax.

        inputs: name -> float32 array; images are as in the ONNX file, NHWC for a network of
        cnn.layers. If one of them lies on the GPU, outputs do, too (see `predict`). ModelError
        where names, shapes or dtypes do not fit.
        """
        specs = self._source.inputs
        if set(inputs) != set(specs):
            raise ModelError(f"{self.name}: its inputs are {sorted(specs)}, not {sorted(inputs)}")
        arrays = {}
        for name, spec in specs.items():
            nchw = name in self._channels_first
            shape = tuple(spec.shape[i] for i in (0, 3, 1, 2)) if nchw else spec.shape
            array = self._checked(inputs[name], f"{self.name}: input {name!r}", shape)
            arrays[name] = array.transpose(0, 2, 3, 1) if nchw else array
        return self._begin(arrays)()

    def _checked(self, array: Any, what: str, shape: Shape) -> Any:
        """The array, one of a GPU as CuPy's, if dtype and shape fit; ModelError otherwise."""
        kinds, dtypes = "a float32 NumPy array", HOST_DTYPES
        if on_gpu(array):
            array, kinds, dtypes = self._device.adopt(array), "float32 or float16", GPU_DTYPES
            if not array.flags.c_contiguous:
                raise ModelError(f"{what} must be C-contiguous on the GPU, it has strides "
                                 f"{array.strides}; convert it with cupy.ascontiguousarray(x)")
        elif not isinstance(array, np.ndarray | Photos):
            raise ModelError(f"{what} must be {kinds}, it is {type(array).__name__}")
        if not isinstance(array, Photos) and array.dtype not in dtypes:
            raise ModelError(f"{what} must be {kinds}, it is {array.dtype}")
        if not _fits(array.shape, shape):
            raise ModelError(f"{what} has shape {array.shape}; {shape} is needed, None being any "
                             f"size")
        return array

    def _begin(self, arrays: Mapping[str, Any],
               probabilities: bool = False) -> Callable[[], dict[str, Any]]:
        """Begin to compute all outputs, on the GPU if an input lies there.

        probabilities: these instead, where the program makes them. Those of an empty batch are
        empty, and nothing runs for them.
        """
        shapes = {name: array.shape for name, array in arrays.items()}
        if 0 not in chain.from_iterable(shapes.values()):
            try:
                return self._begin_in(self._program(shapes), arrays, probabilities)
            except OutOfMemory as error:
                if not self._make_room(shapes):
                    # Whoever catches it shall not hold on, by its traceback, to what had room.
                    raise error.with_traceback(None) from None
            return self._begin(arrays, probabilities)
        specs = specialise(self._graph, shapes).infer()
        found = {name: np.empty(ops.known(spec.shape), np.float32)
                 for name, spec in specs.items() if spec and name in self._graph.outputs}
        if any(array.size for array in found.values()):
            raise ModelError(f"{self.name}: there is nothing to run in inputs of shapes {shapes}")
        return lambda: found

    def _begin_in(self, program: Program | ByImage, arrays: Mapping[str, Any],
                  probabilities: bool) -> Callable[[], dict[str, Any]]:
        there = any(map(on_gpu, arrays.values()))
        if probabilities and isinstance(program, Program) and program.activated:
            return program.start(arrays, (PROBABILITIES,), there)
        return program.start(arrays, on_gpu=there)

    def _program(self, shapes: Mapping[str, tuple[int, ...]]) -> Program | ByImage:
        """The program for these shapes: one of the few used last, or a new one."""
        key = tuple(shapes.values())
        with self._lock:
            if key not in self._programs:
                self._programs[key] = prepare(self._graph, shapes, self._device, self._options,
                                              ACTIVATIONS[self.activation])
                while len(self._programs) > 1 and (
                        len(self._programs) > MAX_PROGRAMS
                        or sum(program.bytes for program in self._programs.values())
                        > MAX_SHARE * self._device.memory):
                    self._drop(1)
            self._programs.move_to_end(key)
            return self._programs[key]

    def _make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Drop all programs; whether one was for other shapes, which had been in the way."""
        with self._lock:
            others = self._programs.keys() - {tuple(shapes.values())}
            self._drop(len(self._programs))
        return bool(others)

    def _drop(self, count: int) -> None:
        """Forget as many programs, those used longest ago."""
        self._device.synchronize()      # something may still run in their memory
        for _ in range(count):
            self._programs.popitem(last=False)

    def release(self) -> None:
        """Free the memory that this model takes on its device. The next call prepares it anew."""
        with self._lock:
            try:
                self._drop(len(self._programs))
            finally:
                self._programs.clear()
                self._options = self._device.options()
            self._device.release()

    def warmup(self, batch_sizes: Iterable[int] = (1,)) -> None:
        """Compile and prepare for these batch sizes now, so that no later call waits for it."""
        _, shape = self._image_input
        size, settings = self._image_size(shape), self.preprocessing
        fits = settings is not None and size == (*settings.size, settings.channels)
        for batch_size in batch_sizes:
            pixels = np.zeros((batch_size, *size), np.uint8)
            if settings is not None and fits:
                self.predict(Photos(pixels, settings))
            if not fits or self.threads is None:    # on the CPU an array needs no kernel of its own
                self.predict(pixels.astype(np.float32))

    def _image_size(self, shape: Shape) -> tuple[int, ...]:
        if None not in shape[1:]:
            return ops.known(shape[1:])
        settings = self.photo_settings()
        return (*settings.size, settings.channels)

    # ---- looking inside -----------------------------------------------------------------------

    def trace(self, image: Any, layers: Iterable[str] | None = None) -> dict[str, Array]:
        """Every layer's output by the layer's name, NHWC, for a photo or a preprocessed batch.

        layers: only these; ModelError for a name that is not one. A batch norm that is folded
        into its convolution is listed, the convolution's value before it is never computed.
        """
        name, shape = self._image_input
        given = isinstance(image, np.ndarray) and image.ndim == 4 and image.dtype == np.float32
        batch = self._checked(image if given else self.preprocess(image), f"{self.name}: batch",
                              shape)
        graph = passes.arrange(self._source)
        hidden = {node.inputs[0] for node in graph.nodes if isinstance(node.op, ops.BatchNorm)}
        values = {node.name: node.output for node in graph.nodes
                  if node.output not in hidden and not isinstance(node.op, ops.Transpose)}
        wanted = list(values) if layers is None else list(layers)
        unknown = [layer for layer in wanted if layer not in values]
        if unknown:
            raise ModelError(f"{self.name}: no layer is named {unknown}; they are {sorted(values)}")
        keep = frozenset(values[layer] for layer in wanted)
        fixed = specialise(passes.combine(graph, keep), {name: batch.shape}, keep)
        program = Program(fixed, self._device, self._options, keep,
                          batch=open_batch(self._graph, {name: batch.shape}))
        found = program.run({name: batch}, tuple(keep))
        return {layer: found[values[layer]] for layer in wanted}

    def summary(self, batch_size: int = 1) -> Summary:
        """Layer, kernel, output shape, parameters, MACs and bytes, for this batch size."""
        program = prepare(self._graph, self._at_batch(batch_size), self._device, self._options)
        return summarise(self, program, self._source)

    def _at_batch(self, batch_size: int) -> dict[str, Shape]:
        """The shapes of all inputs."""
        shapes = {}
        for name, spec in self._graph.inputs.items():
            rest = spec.shape[1:]
            rest = self._image_size(spec.shape) if len(rest) == 3 else rest
            shapes[name] = (batch_size, *rest)
        return shapes

    def tune(self, batch_size: int = 1, budget: float = 60.0,
             progress: Callable[[int, int, str], None] | None = None) -> TuneReport:
        """Measure on this GPU which tiles its convolutions and linear layers run fastest in.

        Searches for `budget` seconds, compiling included, those layers first that take most of
        the time, and tells `progress(done, total, layer)`. Choices are saved, for this model of
        GPU, as they are found, and serve every model loaded from then on; what a second call
        searches first is what the first one did not come to. Ctrl-C ends the search and keeps
        what it found. No other call ever searches: without a measured choice an estimate decides.

        DeviceError where the model does not run on a GPU, or a kernel can not be compiled.
        """
        if not self.device.startswith("cuda"):
            raise DeviceError(f"tuning measures kernels on a GPU and {self.name} runs on "
                              f"{self.device!r}; load it with device='cuda'")
        from .tuning import search  # the CUDA kernels are imported only when asked for
        graph = specialise(self._graph, self._at_batch(batch_size))
        self.release()      # makes room; all that was prepared is of the old choices, too
        try:
            report = search(graph, self._device, self._options, budget, progress)
        finally:
            self.release()
        self._options.tuned = {**self._options.tuned, **report.choices}
        return report


def load(source: str | os.PathLike | None = None, *, device: str = "auto",
         dtype: str = "float32", threads: int | None = None, activation: str = "auto",
         labels: Sequence[str] | None = None,
         preprocess: Preprocess | str | None = None,
         input_shape: Shape | None = None) -> Model:
    """A Model from the embedded default (None), a zoo name, or a path (.onnx, .safetensors).

    device      "auto", "cpu", "cuda", "cuda:N"; "emulator" (the CUDA kernels on the CPU, slowly),
                or "emulator:sm_90a", those of an H100; DeviceError where it can not be had
    dtype       the compute type: "float32"; "bfloat16" on a GPU, in the emulator, and on a CPU with
                AMX or AVX512_BF16; but for the CPU also "tf32", "float16"
    threads     number of CPU threads; None takes one for each core that this process may use, and
                no more than a container's quota of time has cores for
    activation  "softmax", "sigmoid" or "none" makes probabilities of the output; "auto" takes
                softmax unless the network already ends in softmax or sigmoid
    labels      names of the classes, instead of those in the file; "imagenet" for its 1000
    preprocess  how a photo becomes an input, instead of what the file says: a Preprocess, or
                "imagenet" for what torchvision's networks expect (centre 87.5%, bilinear,
                ImageNet's mean and std), "keras-tf", "keras-caffe", "keras-torch" or "keras-none"
                for what Keras's do, by the mode of their preprocess_input
    input_shape (H, W, C) or (N, H, W, C) of the one image that the network takes, for sizes that
                the file leaves open; some networks can only be understood when they are known

    ModelError for a file that is missing, broken, or holds an operator that we lack.
    """
    path = zoo.find(source)
    common: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads,
                              "activation": activation, "name": path.name}
    open_device(device, dtype, threads)     # say what is wrong before a large file is read
    if path.suffix == ".safetensors":
        from .weights import load_layers
        net, stored = load_layers(path)
        return Model(net, input_shape=input_shape or stored.get("input_shape"),
                     labels=labels or stored.get("labels"),
                     preprocess=preprocess or stored.get("preprocess"), **common)
    from .onnx_import import load_onnx
    imported = load_onnx(path, input_shape)
    return Model(imported, labels=labels or zoo.labels_of(imported.metadata, path),
                 preprocess=preprocess or zoo.preprocess_of(imported.metadata, path), **common)


@lru_cache(256)     # of what calls give again and again
def _fits(given: Shape, wanted: Shape) -> bool:
    """Whether a shape is as wanted, where None stands for any size."""
    return len(given) == len(wanted) and all(
        want is None or want == size for size, want in zip(given, wanted, strict=True))


def _labels(wanted: Sequence[str] | None) -> list[str] | None:
    """The names as a list; "imagenet" stands for its 1000."""
    if not isinstance(wanted, str):
        return None if wanted is None else list(wanted)
    if wanted != "imagenet":
        raise ModelError(f"labels={wanted!r}; it can be 'imagenet' or a list of names")
    return zoo.imagenet_labels()


def _probabilities(logits: Array, activation: str) -> Array:
    """Softmax or sigmoid along the classes, in float32."""
    if activation == "none":
        return logits
    if activation == "softmax":
        exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponent / exponent.sum(axis=1, keepdims=True)
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * logits))
