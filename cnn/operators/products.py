"""Matrix products."""
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
    """With a constant matrix a Linear layer, else a product of as many matrices as there are; a
    vector is a matrix of one row on the left, and of one column on the right."""
    if b in net.constants and net.constants[b].ndim == 2:
        weight = np.ascontiguousarray(net.weight(b, "right side").T)
        return net.emit(ops.Linear(), a, net.add_constant(f"{b}:linear:{net.name}", weight))
    gone = [axis for axis, value in ((-2, a), (-1, b)) if len(net.shape(value)) == 1]
    if -2 in gone:
        a = net.with_axes(a, [None, 0], suffix=":row")
    if -1 in gone:
        b = net.with_axes(b, [0, None], suffix=":column")
    y = net.emit(ops.MatMul(), a, b)
    rank = len(net.shape(y))
    return net.without_axes(y, [rank + axis for axis in gone], suffix=":vector") if gone else y


def Einsum(net: Importer, *inputs: Value, equation: str) -> Value:
    """Of two values, as a product of matrices: what both and the result have are its leading axes,
    what one alone has its rows or columns, and along what the result lacks it is summed up."""
    terms, _, result = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    refusal = net.error(f"Einsum {equation!r} of {len(inputs)} values is not supported: it is not "
                        f"written as a product of two matrices")
    if len(inputs) != 2 or not (left + right + result).isalpha():
        raise refusal
    a, b = inputs
    leading = [c for c in result if c in left and c in right]
    rows, columns = ([c for c in result if c in own and c not in other]
                     for own, other in ((left, right), (right, left)))
    depth = [c for c in left if c in right and c not in result]
    if any(len({*term}) < len(term) for term in (left, right, result)) or any(
            {*leading, *own, *depth} != {*term} for own, term in ((rows, left), (columns, right))):
        raise refusal
    sizes = {c: size for value, term in ((a, left), (b, right))
             for c, size in zip(term, net.shape(value), strict=True)}
    matrices = [_as_matrices(net, value, term, leading, *axes) for value, term, axes in (
        (a, left, (rows, depth)), (b, right, (depth, columns)))]
    y, made = net.emit(ops.MatMul(), *matrices, suffix=":product"), [*leading, *rows, *columns]
    if (len(rows), len(columns)) != (1, 1):
        target = (0 if c in leading else -1 if sizes[c] is None else sizes[c] or 0 for c in made)
        y = net.emit(ops.Reshape(tuple(target)), y, suffix=":split")
    return net.emit(ops.Transpose(tuple(made.index(c) for c in result)), y)


def _as_matrices(net: Importer, value: Value, term: str, leading: list[str], rows: list[str],
                 columns: list[str]) -> Value:
    """The axes that the letters name in this order, those of rows and of columns made one each."""
    order = tuple(term.index(c) for c in (*leading, *rows, *columns))
    moved = net.emit(ops.Transpose(order), value, suffix=f":{term}")
    if (len(rows), len(columns)) == (1, 1):
        return moved
    shape = net.shape(moved)[len(leading):]
    joined = (shape[:len(rows)], shape[len(rows):])
    target = tuple(-1 if None in sizes else ops.count(sizes) for sizes in joined)
    return net.emit(ops.Reshape((*[0] * len(leading), *target)), moved, suffix=f":{term}:joined")


def Attention(net: Importer, q: Value, k: Value, v: Value, attn_mask: Value | None = None,
              *others: Value | None, scale: float | None = None, q_num_heads: int = 0,
              kv_num_heads: int = 0, softmax_precision: int = 1, **more: float) -> Value:
    """Of 4 axes (batch, head, row, column), or of 3, in which columns are those of all heads."""
    values, rank = [q, k, v], len(net.shape(q))
    if rank == 3:
        heads = (q_num_heads, kv_num_heads, kv_num_heads)
        values = [net.emit(ops.Reshape((0, 0, number, -1)), value, suffix=f":{name}")
                  for value, number, name in zip(values, heads, "qkv", strict=True)]
    head_axis = 2 if rank == 3 else 1
    if any(more.values()) or net.outputs > 1 or any(other is not None for other in others) or len(
            {net.shape(value)[head_axis] for value in values}) > 1:
        raise net.error("Attention is supported only with as many heads of keys as of queries, and "
                        "without is_causal, softcap, windows, past keys and values, and further "
                        "outputs")
    (depth,) = ops.known(net.shape(values[0])[-1:])
    orders: tuple[ops.Order, ...] = ((0, 2, 1, 3),) * 4 if rank == 3 else ()
    op = ops.Attention(orders, scale=depth ** -0.5 if scale is None else scale)
    bias = [] if attn_mask is None else [_added(net, attn_mask)]
    y = net.emit(op, *values, *bias, suffix="" if rank == 4 else ":heads")
    return y if rank == 4 else net.emit(ops.Reshape((0, 0, -1)), y)


def _added(net: Importer, mask: Value) -> Value:
    """What a mask adds to scores: one of truth values minus infinity where it is false."""
    array = net.constants.get(mask)
    if array is None or array.dtype != bool:
        return mask
    if not array.any(-1).all():
        raise net.error("Attention with a mask that leaves no key to some query is not supported")
    return net.add_constant(f"{mask}:{net.name}",
                            np.where(array, 0, -np.inf).astype(np.float32))
