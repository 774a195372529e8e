"""Matrix products with constants."""
from __future__ import annotations

import numpy as np

from kernels import ops

from ..importer import Importer, Value


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
    weight = np.ascontiguousarray(net.weight(b, "right side", rank=2).T)
    return net.emit(ops.Linear(), a, net.add_constant(f"{b}:linear:{net.name}", weight))
