"""What each op IS: its attributes, the shape it gives, the arithmetic and the bytes it costs.

Images are NHWC, convolution weights OHWI (out, height, width, in / groups), Linear weights
(out, in). A dimension that is not known yet, usually the batch, is None and travels as None.
What each op MEANS is in `reference.py`.
"""
from .base import Dim, Grid, Op, Padding, Pair, Shape, TensorSpec, count, known, normal_axis
from .elementwise import (
    Add,
    AddFakeQuantize,
    Binary,
    Clip,
    Div,
    Elu,
    Erf,
    FakeQuantize,
    Gelu,
    HardSigmoid,
    HardSwish,
    LeakyRelu,
    Mul,
    Relu,
    Sigmoid,
    Silu,
    Sqrt,
    StarRelu,
    Tanh,
    Unary,
    broadcast_shapes,
)
from .image import (
    AvgPool2d,
    Conv2d,
    GlobalAvgPool2d,
    GlobalL2Pool2d,
    GlobalMaxPool2d,
    GlobalPool2d,
    Linear,
    MaxPool2d,
    NormConv2d,
    Pool2d,
    window_extent,
)
from .matrices import Attention, MatMul, Matrices, Order, Window
from .movement import Concat, Flatten, Pad, PadMode, Reshape, Slice, Transpose
from .norm import BatchNorm, LayerNorm, LocalResponseNorm, Softmax

__all__ = ["Add", "AddFakeQuantize", "Attention", "AvgPool2d", "BatchNorm", "Binary", "Clip",
           "Concat", "Conv2d", "Dim", "Div", "Elu", "Erf", "FakeQuantize", "Flatten", "Gelu",
           "GlobalAvgPool2d", "GlobalL2Pool2d", "GlobalMaxPool2d", "GlobalPool2d", "Grid",
           "HardSigmoid", "HardSwish", "LayerNorm", "LeakyRelu", "Linear", "LocalResponseNorm",
           "MatMul", "Matrices", "MaxPool2d", "Mul", "NormConv2d", "Op", "Order", "Pad", "PadMode",
           "Padding", "Pair", "Pool2d", "Relu", "Reshape", "Shape", "Sigmoid", "Silu", "Slice",
           "Softmax", "Sqrt", "StarRelu", "Tanh", "TensorSpec", "Transpose", "Unary", "Window",
           "broadcast_shapes", "count", "known", "normal_axis", "window_extent"]
