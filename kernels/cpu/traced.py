"""Functions of scalar.py as vector code: their own Python, called with stand-ins for numbers, which
emit an instruction for each operation. So an activation is written once, for loops over arrays and
for registers."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, SupportsFloat

from numba import types
from numba.core.dispatcher import Dispatcher

from .simd import Builder, Value, invert, raise_two, root, splat, vector_call

CONTRACT = ("contract",)        # products and sums may be fused, as in the loops of elementwise.py


def activate(b: Builder, function: Dispatcher | None, value: Value, *numbers: Value) -> Value:
    """function(value, *numbers), if there is one."""
    return value if function is None else traced(b, function, value, *numbers)


def function_of(kind: Any) -> Dispatcher | None:
    """The function that an argument of this type is; None of a number."""
    return kind.dispatcher if isinstance(kind, types.Dispatcher) else None


def traced(b: Builder, function: Dispatcher, *vectors: Value) -> Value:
    """function(*vectors), of float32."""
    return _on_stand_ins(function)(*(Numbers(b, vector) for vector in vectors)).value


class Numbers:
    """A vector of float32, or of what a comparison gives; the other operand may be a number."""
    __array_ufunc__ = None      # operators of NumPy's numbers leave it to those below

    def __init__(self, b: Builder, value: Value) -> None:
        self.b, self.value = b, value

    def _value(self, other: Numbers | SupportsFloat) -> Value:
        return other.value if isinstance(other, Numbers) else splat(other)

    def __add__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fadd(self.value, self._value(other), flags=CONTRACT))

    def __sub__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fsub(self.value, self._value(other), flags=CONTRACT))

    def __rsub__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fsub(self._value(other), self.value, flags=CONTRACT))

    def __mul__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fmul(self.value, self._value(other), flags=CONTRACT))

    def __truediv__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fdiv(self.value, self._value(other)))

    def __rtruediv__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fdiv(self._value(other), self.value))

    def __neg__(self) -> Numbers:
        return Numbers(self.b, self.b.fneg(self.value))

    def __abs__(self) -> Numbers:
        return Numbers(self.b, vector_call(self.b, "fabs", self.value))

    def __lt__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fcmp_ordered("<", self.value, self._value(other)))

    def __gt__(self, other: Any) -> Numbers:
        return Numbers(self.b, self.b.fcmp_ordered(">", self.value, self._value(other)))

    def __ne__(self, other: Any) -> Any:
        return Numbers(self.b, self.b.fcmp_unordered("!=", self.value, self._value(other)))

    __radd__, __rmul__, __hash__ = __add__, __mul__, None       # type: ignore[assignment]


def where(condition: Numbers, x: Any, y: Any) -> Numbers:
    return Numbers(condition.b, condition.b.select(condition.value, *map(condition._value, (x, y))))


def of_each(emit: Callable[[Builder, Value], Value]) -> Callable[[Numbers], Numbers]:
    return lambda x: Numbers(x.b, emit(x.b, x.value))


# What stands for functions of scalar.py that are no arithmetic.
STAND_INS = {"where": where, "power_of_two": of_each(raise_two), "reciprocal": of_each(invert),
             "square_root": of_each(root)}


@cache
def _on_stand_ins(function: Dispatcher) -> Callable[..., Numbers]:
    """The Python of a compiled function, which calls that of others in their place."""
    plain = function.py_func
    names = {name: plain.__globals__[name] for name in plain.__code__.co_names
             if name in plain.__globals__}
    names = {name: STAND_INS.get(name) or (
        _on_stand_ins(value) if isinstance(value, Dispatcher) else value)
        for name, value in names.items()}
    return FunctionType(plain.__code__, names)
