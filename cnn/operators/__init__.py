"""What each ONNX operator becomes: one function an operator, named after it.

Each takes the importer, the names of its input values (None where one is left out), and the
operator's attributes by their own names; it returns the name of the resulting value, or the names
of several.
"""
from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction
from types import ModuleType

from ..importer import Value
from . import (
    elementwise,
    images,
    microsoft,
    norms,
    products,
    quantised,
    reductions,
    resize,
    shapes,
    transposed,
)

Operators = dict[str, Callable[..., Value | tuple[Value, ...]]]


def _of(*families: ModuleType) -> Operators:
    return {name: function for family in families for name, function in vars(family).items()
            if name[0].isupper() and isfunction(function)
            and function.__module__ == family.__name__}


QUANTISED = _of(quantised)
OPERATORS = _of(images, transposed, resize, products, reductions, elementwise, norms, shapes
                ) | QUANTISED
# Of the domain com.microsoft: what ONNX Runtime's quantiser writes.
MICROSOFT = _of(microsoft) | {name: QUANTISED[name]
                              for name in ("QuantizeLinear", "DequantizeLinear")}
TAKE_CODES = (QUANTISED.keys() | MICROSOFT.keys()) - {"QuantizeLinear"}
