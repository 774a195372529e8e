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
    ELU,
    GELU,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    BatchNorm2d,
    ChannelShuffle,
    Conv2d,
    Dropout,
    Flatten,
    Hardsigmoid,
    Hardswish,
    Identity,
    LayerNorm,
    LeakyReLU,
    Linear,
    LocalResponseNorm,
    LogSoftmax,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
    ZeroPad2d,
)
from .model import Model, Prediction, load
from .version import __version__

__all__ = [
    "ELU",
    "GELU",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "ChannelShuffle",
    "Conv2d",
    "DeviceError",
    "Dropout",
    "Error",
    "Flatten",
    "Hardsigmoid",
    "Hardswish",
    "Identity",
    "ImageError",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LocalResponseNorm",
    "LogSoftmax",
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
    "ZeroPad2d",
    "__version__",
    "load",
]

logging.getLogger("cnn").addHandler(logging.NullHandler())
