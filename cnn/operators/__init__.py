"""What each ONNX operator becomes: one function an operator, named after it.

Each takes the importer, the names of its input values (None where one is left out), and the
operator's attributes by their own names; it returns the name of the resulting value, or the names
of several.
"""
from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction

from ..importer import Value
from . import elementwise, images, norms, products, reductions, resize, shapes, transposed

OPERATORS: dict[str, Callable[..., Value | tuple[Value, ...]]] = {
    name: function for family in (images, transposed, resize, products, reductions, elementwise,
                                    norms, shapes)
    for name, function in vars(family).items()
    if name[0].isupper() and isfunction(function) and function.__module__ == family.__name__}
