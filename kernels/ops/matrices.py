"""Products of matrices that are both computed, and attention, which is two of them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from .base import Dim, Op, Pair, Shape, count

Order = tuple[int, ...]


class Window(NamedTuple):
    """Elements start .. stop of an axis; gone: of the one element that they are, without the axis,
    as of the queries among a layer's queries, keys and values."""
    axis: int
    start: int
    stop: int
    gone: bool = False

    def of(self, sizes: Sequence[Dim], replacement: int) -> Shape:
        """A number for each axis, with this one for the window's."""
        return (*sizes[:self.axis], *[replacement] * (not self.gone), *sizes[self.axis + 1:])


@dataclass(frozen=True)
class Matrices(Op):
    """Ops on the last two axes, for as many matrices as the axes before them count. Along these
    the inputs are alike, or 1 where one matrix serves all.

    orders  how the inputs and, last, the output lie in memory, where that is not as they are
            meant: axis i of what is meant is axis order[i] of what is there. Empty: all as meant.
            So the op does transposes before it and after it, but columns of the output stay last
    windows what of an input it reads, before any order, or None for all. Empty: all of each
    """
    orders: tuple[Order, ...] = ()
    windows: tuple[Window | None, ...] = ()

    def order(self, index: int, rank: int) -> Order:
        """Of an input, or, with -1, of the output."""
        return self.orders[index] if self.orders else tuple(range(rank))

    def seen(self, index: int, shape: Shape) -> Shape:
        """What an input's window shows of this shape."""
        window = self.windows[index] if self.windows else None
        return shape if window is None else window.of(shape, window.stop - window.start)

    def meant(self, *shapes: Shape) -> list[Shape]:
        """The shapes of inputs as they are meant, with as many axes as the one that has most."""
        shapes = tuple(self.seen(i, shape) for i, shape in enumerate(shapes))
        rank = max(len(shape) for shape in shapes)
        full = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        if rank < 2:
            raise ValueError(f"{self.kind} takes matrices, not shapes {shapes}")
        return [tuple(shape[axis] for axis in self.order(i, rank))
                for i, shape in enumerate(full)]

    def written(self, shape: Shape) -> Shape:
        """The shape of the output as it lies, for that which is meant."""
        order = self.order(-1, len(shape))
        if sorted(order) != list(range(len(shape))) or order[-1] != len(shape) - 1:
            raise ValueError(f"{self.kind}: an output of {shape} can not lie in order {order}")
        return tuple(shape[order.index(axis)] for axis in range(len(shape)))

    def bytes(self, *shapes: Shape, itemsize: int = 4) -> int:
        """Of what windows show."""
        seen = [self.seen(i, shape) for i, shape in enumerate(shapes[:3])]
        return itemsize * (sum(map(count, (*seen, *shapes[3:])))
                           + count(self.output_shape(*shapes)))

    def leading(self, shapes: Sequence[Shape]) -> Shape:
        """The axes before the last two, for all of these."""
        result: list[Dim] = []
        for sizes in zip(*(shape[:-2] for shape in shapes), strict=True):
            wanted = {size for size in sizes if size not in (1, None)}
            if len(wanted) > 1:
                raise ValueError(f"{self.kind}: the leading axes of {tuple(shapes)} differ")
            result.append(wanted.pop() if wanted else None if None in sizes else 1)
        return tuple(result)


@dataclass(frozen=True)
class MatMul(Matrices):
    """y = scale * a @ b: a (..., M, K), b (..., K, N)."""
    scale: float = 1.0
    arity: ClassVar[Pair] = (2, 2)

    def output_shape(self, *shapes: Shape) -> Shape:
        a, b = self.meant(*shapes)
        if None not in (a[-1], b[-2]) and a[-1] != b[-2]:
            raise ValueError(f"MatMul of {a} and {b}: rows of {a[-1]} and columns of {b[-2]}")
        return self.written((*self.leading((a, b)), a[-2], b[-1]))

    def macs(self, *shapes: Shape) -> int:
        a, _ = self.meant(*shapes)
        return count(self.output_shape(*shapes)) * count(a[-1:])


@dataclass(frozen=True)
class Attention(Matrices):
    """y = softmax(scale * q @ k.T + bias) @ v, along rows (Vaswani et al. 2017, arXiv:1706.03762).

    Inputs: q (..., M, D), k (..., N, D), v (..., N, V), and maybe a bias that is broadcast to
    (..., M, N), which has no order of its own; the output is (..., M, V).
    """
    scale: float = 1.0
    arity: ClassVar[Pair] = (3, 4)

    def output_shape(self, *shapes: Shape) -> Shape:
        q, k, v = self.meant(*shapes[:3])
        if q[-1] != k[-1] or k[-2] != v[-2]:
            raise ValueError(f"Attention: q {q}, k {k} and v {v} are not (..., M, D), (..., N, D) "
                             f"and (..., N, V)")
        leading = self.leading((q, k, v))
        scores = (*leading, q[-2], k[-2])
        if len(shapes) > 3 and not _repeats(shapes[3], scores):
            raise ValueError(f"Attention: a bias of {shapes[3]} is not broadcast to {scores}")
        return self.written((*leading, q[-2], v[-1]))

    def macs(self, *shapes: Shape) -> int:
        q, k, v = self.meant(*shapes[:3])
        return count((*self.leading((q, k, v)), q[-2], k[-2])) * (count(q[-1:]) + count(v[-1:]))


def _repeats(shape: Shape, target: Shape) -> bool:
    """Whether a shape is broadcast to the target, as far as is known."""
    full = (1,) * (len(target) - len(shape)) + shape
    return len(full) == len(target) and all(
        size in (1, None, wanted) or wanted is None
        for size, wanted in zip(full, target, strict=True))
