"""Joins what torch.onnx writes out as several nodes into one, where PyTorch has a layer for it.

    x @ W + b, of constants                         Gemm, of any number of axes
    x * (1 + erf(x / sqrt(2))) / 2, in any order    Gelu
    softmax(scale * q @ k.T) @ v                    Attention
    a token expanded to as many as there are images ExpandToBatch

Gelu and Attention are operators of newer versions of ONNX. Whoever wants speed folds one thing
more: a layer scale becomes part of the Gemm before it.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper

NEAR = 1e-6                 # relative: what float32 rounds
TO_NCHW = [0, 3, 1, 2]
SWAPPED = [0, 1, 3, 2]      # rows and columns of each head's matrix


def join(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], output: str, fold: bool
         ) -> list[onnx.NodeProto]:
    """The nodes that the output needs, one for each pattern; scaled weights join the constants.

    fold: whether a layer scale is folded
    """
    search = Search(constants)
    rules = [linear, gelu, attention, expand_to_batch, *[layer_scale] * fold]
    for node in nodes:
        for each in next((found for rule in rules if (found := rule(search, node))), [node]):
            search.nodes[each.output[0]] = each
    needed, kept = {output}, []
    for node in reversed(search.nodes.values()):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


class Search:
    """The nodes so far by their output, and what is asked about them."""

    def __init__(self, constants: dict[str, np.ndarray]) -> None:
        self.constants = constants
        self.nodes: dict[str, onnx.NodeProto] = {}

    def maker(self, value: str, operator: str) -> onnx.NodeProto | None:
        """The node that gives a value, if it is of this operator."""
        node = self.nodes.get(value)
        return node if node is not None and node.op_type == operator else None

    def rank(self, value: str) -> int | None:
        """Of a constant."""
        return self.constants[value].ndim if value in self.constants else None

    def number(self, value: str) -> float | None:
        array = self.constants.get(value)
        return array.item() if array is not None and array.size == 1 else None

    def apart(self, value: str, operator: str) -> tuple[str, float] | None:
        """(x, number) of a value that the operator makes of them."""
        if (node := self.maker(value, operator)) is not None:
            for x, other in orders(node)[:1 if operator == "Div" else 2]:
                if (number := self.number(other)) is not None:
                    return x, number
        return None

    def scaled(self, value: str) -> tuple[str, float]:
        """(x, factor) of a value that is x times that."""
        if (found := self.apart(value, "Div")) is not None:
            return found[0], 1 / found[1]
        return self.apart(value, "Mul") or (value, 1.0)

    def factors(self, value: str) -> list[str]:
        """Of a product of products."""
        node = self.maker(value, "Mul")
        return [value] if node is None else [each for x in node.input for each in self.factors(x)]


def orders(node: onnx.NodeProto) -> list[list[str]]:
    """Its two inputs, and the other way round."""
    return [list(node.input), list(node.input)[::-1]]


# ---- rules: what takes a node's place; nothing where it stays ---------------------------------

def instead(node: onnx.NodeProto, operator: str, inputs: list[str], **attributes: Any
            ) -> list[onnx.NodeProto]:
    return [helper.make_node(operator, inputs, node.output, name=node.name, **attributes)]


def linear(search: Search, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if node.op_type == "MatMul" and search.rank(node.input[1]) == 2:
        return instead(node, "Gemm", list(node.input))
    if node.op_type == "Add":
        for product, bias in orders(node):
            gemm = search.maker(product, "Gemm")
            if gemm is not None and len(gemm.input) == 2 and search.rank(bias) == 1:
                return instead(node, "Gemm", [*gemm.input, bias], **attributes_of(gemm))
    return []


def gelu(search: Search, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if node.op_type == "Mul":
        factors = [each for x in node.input for each in search.factors(x)]
        for gate in factors:
            x = input_of_gate(search, gate)
            rest = [search.number(each) for each in factors if each not in (x, gate)]
            if x in factors and rest == [0.5]:
                return instead(node, "Gelu", [x])
    return []


def input_of_gate(search: Search, value: str) -> str | None:
    """x of a value that is 1 + erf(x / sqrt(2))."""
    y, number = search.apart(value, "Add") or ("", 0.0)
    erf = search.maker(y, "Erf")
    if erf is None or number != 1:
        return None
    x, factor = search.scaled(erf.input[0])
    return x if math.isclose(factor, math.sqrt(0.5), rel_tol=NEAR) else None


def attention(search: Search, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The scale may be that of q, of k, of both or of their products."""
    softmax = search.maker(node.input[0], "Softmax") if node.op_type == "MatMul" else None
    if softmax is None or attributes_of(softmax).get("axis", -1) not in (-1, 3):
        return []
    scores, scale = search.scaled(softmax.input[0])
    if (product := search.maker(scores, "MatMul")) is None:
        return []
    (q, of_q), (turned, of_k) = map(search.scaled, product.input)
    k = search.maker(turned, "Transpose")
    if k is None or attributes_of(k).get("perm") != SWAPPED:
        return []
    return instead(node, "Attention", [q, k.input[0], node.input[1]], scale=scale * of_q * of_k)


def expand_to_batch(search: Search, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Of Shape, which gives the number of images, Concat with the token's other axes, Expand."""
    token = search.constants.get(node.input[0]) if node.op_type == "Expand" else None
    shape = None if token is None else search.maker(node.input[1], "Concat")
    if shape is None:
        return []
    images = search.maker(shape.input[0], "Shape")
    tail = [search.constants.get(name) for name in shape.input[1:]]
    if images is None or attributes_of(images) != {"start": 0, "end": 1} or any(
            sizes is None for sizes in tail):
        return []
    same = token.shape == (1, *np.concatenate(tail))
    return instead(node, "ExpandToBatch", [images.input[0], node.input[0]]) if same else []


def layer_scale(search: Search, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Of the channels of NCHW images that a Gemm has made in NHWC."""
    for value, factor in orders(node) if node.op_type == "Mul" else ():
        turned, scale = search.maker(value, "Transpose"), search.constants.get(factor)
        gemm = None if turned is None else search.maker(turned.input[0], "Gemm")
        if (gemm is None or gemm.attribute or attributes_of(turned).get("perm") != TO_NCHW
                or scale is None or scale.shape[-3:] != (scale.size, 1, 1)):
            continue
        scaled = [f"{name} in {node.output[0]}" for name in gemm.input[1:]]
        for name, new in zip(gemm.input[1:], scaled, strict=True):
            search.constants[new] = search.constants[name] * scale.reshape(-1)
        nhwc = helper.make_node("Gemm", [gemm.input[0], *scaled], [f"{node.output[0]}.nhwc"],
                                name=gemm.name)
        return [nhwc, *instead(node, "Transpose", list(nhwc.output), perm=TO_NCHW)]
    return []
