"""Matrix products."""
from __future__ import annotations

import numpy as np

from kernels import ops

from ..importer import Importer, Value
from .reductions import sum_along


def Gemm(net: Importer, a: Value, b: Value, c: Value | None = None, *, alpha: float = 1.0,
         beta: float = 1.0, transA: int = 0, transB: int = 0) -> Value:
    if transA:
        raise net.error("Gemm with transA=1 is not supported")
    matrix = net.weight(b, "second input", rank=2)
    weight = np.float32(alpha) * (matrix if transB else matrix.T)
    inputs = [net.add_constant(f"{b}:linear:{net.name}", np.ascontiguousarray(weight))]
    if c is not None:
        bias = net.weight(c, "bias")
        if bias.size not in (1, len(weight)) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
            raise net.error(f"its bias has shape {bias.shape}; one number for each of the "
                            f"{len(weight)} outputs is needed")
        full = np.broadcast_to(np.float32(beta) * bias.reshape(-1), len(weight))
        inputs.append(net.add_constant(f"{c}:linear:{net.name}", np.ascontiguousarray(full)))
    return net.emit(ops.Linear(), a, *inputs)


def MatMul(net: Importer, a: Value, b: Value) -> Value:
    """With a constant matrix, or of computed values one of which is a vector: a weighted sum."""
    if b not in net.constants:
        return _weighted_sum(net, a, b)
    weight = np.ascontiguousarray(net.weight(b, "right side", rank=2).T)
    return net.emit(ops.Linear(), a, net.add_constant(f"{b}:linear:{net.name}", weight))


def _weighted_sum(net: Importer, a: Value, b: Value) -> Value:
    """(.., M, K) x (.., K, 1) or (.., 1, K) x (.., K, N), as products that are broadcast, and added
    up along K."""
    left, right = net.shape(a), net.shape(b)
    if min(len(left), len(right)) < 2 or 1 not in (left[-2], right[-1]):
        raise net.error(f"MatMul of two computed values, of shapes {left} and {right}, is "
                        f"supported only if one of them is a vector; attention is not")
    if right[-1] == 1:
        b, axis = _turned(net, b), -1
    else:
        a, axis = _turned(net, a), -2
    return sum_along(net, net.emit(ops.Mul(), a, b, suffix=":products"), [axis], keepdims=1)


def _turned(net: Importer, vector: Value) -> Value:
    """The other of (.., K, 1) and (.., 1, K), for which no element moves."""
    *first, last, end = range(len(net.shape(vector)))
    return net.with_axes(vector, [*first, end, last], suffix=":turned")
