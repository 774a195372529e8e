"""Functions of one element, or of two."""
from __future__ import annotations

import numpy as np

from kernels import ops

from ..importer import Importer, Value


def Relu(net: Importer, x: Value) -> Value:
    return net.emit(ops.Relu(), x)


def Clip(net: Importer, x: Value, low: Value | None = None, high: Value | None = None, *,
         min: float | None = None, max: float | None = None) -> Value:
    bounds = [attribute if value is None else float(net.array(value, "bound").reshape(()))
              for value, attribute in ((low, min), (high, max))]
    if x in net.coded:
        bounds = [None if code is None else net.coded[x].real(code) for code in bounds]
    return net.emit(ops.Clip(-np.inf if bounds[0] is None else bounds[0],
                             np.inf if bounds[1] is None else bounds[1]), x)


def Sigmoid(net: Importer, x: Value) -> Value:
    return net.emit(ops.Sigmoid(), x)


def Tanh(net: Importer, x: Value) -> Value:
    return net.emit(ops.Tanh(), x)


def Swish(net: Importer, x: Value, *, alpha: float = 1.0) -> Value:
    if alpha != 1:
        raise net.error(f"Swish with alpha={alpha} is not supported, only 1")
    return net.emit(ops.Silu(), x)


def HardSwish(net: Importer, x: Value) -> Value:
    return net.emit(ops.HardSwish(), x)


def HardSigmoid(net: Importer, x: Value, *, alpha: float = 0.2, beta: float = 0.5) -> Value:
    return net.emit(ops.HardSigmoid(alpha, beta), x)


def LeakyRelu(net: Importer, x: Value, *, alpha: float = 0.01) -> Value:
    return net.emit(ops.LeakyRelu(alpha), x)


def PRelu(net: Importer, x: Value, slope: Value) -> Value:
    """One slope for all: LeakyRelu. Else max(x, 0) + slope * min(x, 0), each in its broadcast."""
    slopes = net.weight(slope, "slope")
    if slopes.size == 1:
        return net.emit(ops.LeakyRelu(float(slopes.reshape(()))), x)
    below = net.emit(ops.Clip(high=0.0), x, suffix=":below")
    scaled = net.emit(ops.Mul(), below, slope, suffix=":scaled")
    return net.emit(ops.Add(), net.emit(ops.Relu(), x, suffix=":above"), scaled)


def Elu(net: Importer, x: Value, *, alpha: float = 1.0) -> Value:
    return net.emit(ops.Elu(alpha), x)


def Gelu(net: Importer, x: Value, *, approximate: str = "none") -> Value:
    if approximate not in ("none", "tanh"):
        raise net.error(f"Gelu with approximate={approximate!r}; it can be 'none' or 'tanh'")
    return net.emit(ops.Gelu(approximate == "tanh"), x)


def Erf(net: Importer, x: Value) -> Value:
    return net.emit(ops.Erf(), x)


def Neg(net: Importer, x: Value) -> Value:
    minus_one = net.add_constant(f"{net.name}:-1", np.array(-1, np.float32))
    return net.emit(ops.Mul(), x, minus_one, suffix=":negated")


def Add(net: Importer, a: Value, b: Value) -> Value:
    return net.emit(ops.Add(), a, b)


def Sub(net: Importer, a: Value, b: Value) -> Value:
    """a + -b, which rounds as a - b does."""
    minus_b = (net.add_constant(f"{b}:negated:{net.name}", -net.weight(b, "second input"))
               if b in net.constants else Neg(net, b))
    return net.emit(ops.Add(), a, minus_b)


def Mul(net: Importer, a: Value, b: Value) -> Value:
    return net.emit(ops.Mul(), a, b)


def Div(net: Importer, a: Value, b: Value) -> Value:
    """a * (1 / b) for a constant b: within one rounding more of a / b."""
    if b not in net.constants:
        return net.emit(ops.Div(), a, b)
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / net.weight(b, "divisor")
    return net.emit(ops.Mul(), a, net.add_constant(f"{b}:inverse:{net.name}", inverse))


def Reciprocal(net: Importer, x: Value) -> Value:
    return net.emit(ops.Div(), net.add_constant(f"{net.name}:1", np.array(1, np.float32)), x)


def Sqrt(net: Importer, x: Value) -> Value:
    return net.emit(ops.Sqrt(), x)


def Pow(net: Importer, x: Value, exponent: Value) -> Value:
    """To 1, 2 or 3 by products, to 1/2 by a root."""
    powers = net.array(exponent, "exponent")
    power = float(powers.reshape(-1)[0]) if powers.size == 1 else 0.0
    if power == 0.5:
        return net.emit(ops.Sqrt(), x)
    if power not in (1, 2, 3):
        raise net.error(f"Pow to {powers.tolist()} is not supported, only to 1/2, 1, 2 or 3")
    y = x
    for i in range(1, int(power)):
        y = net.emit(ops.Mul(), y, x, suffix="" if i == power - 1 else ":square")
    return y


def Sum(net: Importer, first: Value, *others: Value) -> Value:
    for other in others:
        first = net.emit(ops.Add(), first, other)
    return first
