"""Photo -> pixels -> normalised batch: what a network sees.

One contract: upright by EXIF, 16-bit scaled to 8, alpha over white, first frame; cropped in the
middle, THEN resized, both as Pillow does them on 8-bit pixels; then normalised.
"""
from __future__ import annotations

import io
import json
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kernels.cpu.quota import usable_cores

from .errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
WORKERS = usable_cores()        # threads that read photos: Pillow lets others run
MAX_PIXELS = 178_956_970        # where Pillow itself calls a picture a decompression bomb
FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
           "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
           "box": Image.Resampling.BOX, "hamming": Image.Resampling.HAMMING}
# What families of networks were trained on: torchvision's, and Keras's by the mode of their
# preprocess_input, or none of these; Keras takes the whole photo and the nearest pixels.
WHOLE: dict[str, Any] = {"crop": None, "interpolation": "nearest"}
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "keras-tf": {**WHOLE, "mean": (127.5,) * 3, "std": (127.5,) * 3},
    "keras-caffe": {**WHOLE, "mean": (103.939, 116.779, 123.68), "std": (1.0,) * 3, "order": "BGR"},
    "keras-torch": WHOLE,
    "keras-none": {**WHOLE, "mean": (0.0,) * 3, "std": (1.0,) * 3}}


@dataclass(frozen=True)
class Preprocess:
    """How a photo becomes an input of a network.

    size           (height, width) of the input
    crop           side of the centre square that is taken, as a fraction of the photo's shorter
                   side; None takes the whole photo
    interpolation  "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming"
    mean, std      the input is (pixel - mean) / std with pixels 0 to 255; three numbers, or one for
                   a network that looks at grey pictures
    order          of the channels, and of mean and std: "RGB" or "BGR"
    """
    size: tuple[int, int]
    crop: float | None = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    order: str = "RGB"

    def __post_init__(self) -> None:
        """ValueError, naming the field, for a value that makes no sense."""
        for name in ("size", "mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}={value!r} must be a list of numbers")
            object.__setattr__(self, name, tuple(value))
        if len(self.size) != 2 or not all(_is_int(n) and 1 <= n <= 1 << 14 for n in self.size):
            raise ValueError(f"size={self.size!r} must be (height, width), each 1 to {1 << 14}")
        if self.crop is not None and not (_is_number(self.crop) and 0 < self.crop <= 1):
            raise ValueError(f"crop={self.crop!r} must be above 0 and at most 1, or None")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation={self.interpolation!r} must be one of "
                             f"{sorted(FILTERS)}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not all(
                _is_number(n) for n in (*self.mean, *self.std)) or 0 in self.std:
            raise ValueError(f"mean={self.mean!r} and std={self.std!r} must be 1 or 3 numbers "
                             f"each, std without 0")
        if self.order not in ("RGB", "BGR"):
            raise ValueError(f"order={self.order!r} must be 'RGB' or 'BGR'")

    @property
    def channels(self) -> int:
        """3, or 1 (grey)."""
        return len(self.mean)

    @classmethod
    def named(cls, name: str, size: tuple[int, int]) -> Preprocess:
        """One of PRESETS for images of (height, width); ValueError for any other name."""
        if name not in PRESETS:
            raise ValueError(f"{name!r} is none of {', '.join(PRESETS)}")
        return cls(size, **PRESETS[name])

    def to_json(self) -> str:
        """One line of JSON, as it stands in a model file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Preprocess:
        """The inverse of to_json; ValueError for anything else."""
        content = json.loads(text)      # JSONDecodeError is a ValueError
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or "size" not in content or not set(content) <= names:
            raise ValueError(f"{text[:80]!r} is not an object with 'size' and at most "
                             f"{sorted(names)}")
        return cls(**content)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and bool(np.isfinite(value))


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Upright RGB pixels, uint8 (H, W, 3).

    source: a path, bytes, a PIL image, or a uint8 (H, W, 3) array. ImageError, naming it, for
    what is missing, no picture (JPEG, PNG, WebP, BMP, GIF, TIFF), cut off or too large.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    if isinstance(source, Image.Image):
        return _pixels(source, "the PIL image", max_pixels)
    if isinstance(source, (bytes, bytearray)):
        what, stream = f"the {len(source)} bytes given", io.BytesIO(source)
        return _decode(stream, what, max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"an image is a path, bytes, a PIL image or a uint8 (H, W, 3) array, not "
                         f"{type(source).__name__}")
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _decode(file, str(path), max_pixels)
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: this is a folder; give the files in it") from None
    except OSError as error:
        raise ImageError(f"{path}: can not be read: {error.strerror or error}") from None


class _Quiet:
    """No warnings while any thread is inside: our own limit of pixels is the one that counts.

    `warnings.catch_warnings` by itself must not be entered by two threads at once.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


def _checked_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ImageError(f"an image array must be uint8 of shape (H, W, 3), it is {array.dtype} "
                         f"of shape {array.shape}")
    return array


def _decode(stream: Any, what: str, max_pixels: int) -> np.ndarray:
    try:
        with _quiet, Image.open(stream, formats=FORMATS) as picture:
            return _pixels(picture, what, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{what}: this is no picture that can be read ({', '.join(FORMATS)})"
                         ) from None
    except Image.DecompressionBombError:
        raise ImageError(f"{what}: the picture has more pixels than the limit of {max_pixels:,}"
                         ) from None
    except Exception as error:      # Pillow's decoders raise almost anything on broken data
        raise ImageError(f"{what}: the picture is damaged or cut off: {error}") from None


def _pixels(picture: Image.Image, what: str, max_pixels: int) -> np.ndarray:
    """Check the size before anything is decoded, then turn every mode into upright RGB."""
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(f"{what}: the picture has {width} x {height} pixels; the limit is "
                         f"{max_pixels:,} pixels")
    if width * height == 0:
        raise ImageError(f"{what}: the picture has no pixels")
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_8_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey keeps its upper byte; Pillow's own conversion would clip at 255."""
    values = np.asarray(picture)
    if picture.mode == "F":
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return Image.fromarray((np.clip(values, 0, 65535).astype(np.uint32) >> 8).astype(np.uint8))


@dataclass(frozen=True)
class Photos:
    """A batch of pictures in a network's size, before its normalisation.

    pixels    uint8 (N, height, width, channels)
    settings  what they were resized for
    """
    pixels: np.ndarray
    settings: Preprocess

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pixels.shape

    def normalised(self) -> np.ndarray:
        """(pixel - mean) / std, float32."""
        mean, std = (np.array(row, np.float32) for row in (self.settings.mean, self.settings.std))
        return (self.pixels.astype(np.float32) - mean) / std

    def padded(self, count: int) -> Photos:
        """As many as `count`, the new ones black."""
        if len(self.pixels) == count:
            return self
        missing = [(0, count - len(self.pixels)), (0, 0), (0, 0), (0, 0)]
        return Photos(np.pad(self.pixels, missing), self.settings)


def is_one(candidate: Any) -> bool:
    """Whether it is one picture rather than several."""
    if isinstance(candidate, np.ndarray):
        return candidate.ndim != 4
    return (isinstance(candidate, (str, os.PathLike, bytes, bytearray))
            or hasattr(candidate, "getexif"))


def photos(sources: Sequence[Any], settings: Preprocess) -> Photos:
    """Load and resize; ImageError for one that can not be read."""
    pictures = []
    for one in read(sources, settings):
        if isinstance(one, ImageError):
            raise one
        pictures.append(one)
    return stack(pictures, settings)


def read(sources: Sequence[Any], settings: Preprocess) -> list[np.ndarray | ImageError]:
    """Load and resize, several at a time: what `resize` gives, or why a source can not be read."""
    def one(source: Any) -> np.ndarray | ImageError:
        try:
            return resize(load_image(source), settings)
        except ImageError as error:
            return error

    if len(sources) <= 1:
        return [one(source) for source in sources]
    with ThreadPoolExecutor(min(len(sources), WORKERS)) as pool:
        return list(pool.map(one, sources))


def stack(pictures: Sequence[np.ndarray], settings: Preprocess) -> Photos:
    """Photos of what `resize` gave; there may be none."""
    none = np.empty((0, *settings.size, settings.channels), np.uint8)
    return Photos(np.stack(pictures) if pictures else none, settings)


def resize(pixels: np.ndarray, settings: Preprocess) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, channels): cropped, grey if so wanted, resized."""
    picture = Image.fromarray(pixels)
    if settings.crop is not None:
        width, height = picture.size
        side = max(1, int(settings.crop * min(width, height)))
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    if settings.channels == 1:
        picture = picture.convert("L")
    picture = picture.resize(settings.size[::-1], FILTERS[settings.interpolation])
    array = np.asarray(picture).reshape(*settings.size, settings.channels)
    return array[..., ::-1] if settings.order == "BGR" else array
