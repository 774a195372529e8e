"""Image classification on kernels that you can read.

    import cnn
    model = cnn.load()
    model.classify("cat.jpg")
"""
import logging

import kernels as _kernels

if getattr(_kernels, "PROJECT", None) != "numba-cnn":
    raise ImportError(f"the package 'kernels' found at {_kernels.__file__} is not the one that "
                      f"comes with numba-cnn, but another of the same name; uninstall it (pip "
                      f"uninstall kernels) and reinstall numba-cnn")

from .errors import DeviceError, Error, ImageError, ModelError
from .image import Preprocess
from .layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Hardswish,
    Identity,
    Linear,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
)
from .model import Model, Prediction, load
from .version import __version__

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "DeviceError",
    "Dropout",
    "Error",
    "Flatten",
    "Hardswish",
    "Identity",
    "ImageError",
    "Linear",
    "MaxPool2d",
    "Model",
    "ModelError",
    "Prediction",
    "Preprocess",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "__version__",
    "load",
]

logging.getLogger("cnn").addHandler(logging.NullHandler())
