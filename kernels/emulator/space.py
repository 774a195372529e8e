"""A byte-addressed memory and the objects in it."""

from __future__ import annotations

import numpy as np

from .ptxtypes import U8, UINT, Array


class Space:
    """A memory with one copy for each block (shared), for each thread (local), or for all (global).

    `valid` and `writable` say of each byte whether it belongs to an object. The bytes between
    objects are guards. Addresses start at `base`; `origin` is the offset of each thread's copy.
    """

    def __init__(
        self, name: str, base: int, size: int, copies: int = 1, origin: Array | None = None
    ) -> None:
        self.name, self.base, self.size, self.origin = name, base, size, origin
        self.bytes = np.zeros(size * copies, U8)
        self.words: dict[int, Array] = {n: self.bytes.view(t) for n, t in UINT.items()}
        self.valid = np.zeros(size, bool)
        self.writable = np.zeros(size, bool)
        self.written: Array | None = None  # of global memory, when some of it counts as empty
        self.late: Array | None = None  # of global memory, when some of it must be waited for
        self.distributed = False  # addresses may name blocks of the cluster
        self.objects: list[tuple[int, int, str]] = []

    def add(self, offset: int, size: int, name: str, writable: bool = True) -> None:
        """An object of `size` bytes may be accessed. Objects may overlap (aliased arrays)."""
        self.objects.append((offset, size, name))
        self.valid[offset : offset + size] = True
        if writable:
            self.writable[offset : offset + size] = True

    def rows(self, element: int, length: int) -> Array:
        """The memory as vectors of `length` elements of `element` bytes."""
        words = self.words[element]
        return words.reshape(-1, length) if length > 1 else words

    def nearest(self, offset: int) -> str:
        """Where an offset lies, seen from the object nearest to it."""

        def distance(item: tuple[int, int, str]) -> int:
            start, size, _ = item
            return max(start - offset, offset - (start + size) + 1, 0)

        if not self.objects:
            return f"and there is no {self.name} memory"
        start, size, name = min(self.objects, key=distance)
        if offset < start:
            return f"{start - offset} bytes before {name} ({size} bytes)"
        if offset >= start + size:
            return f"{offset - start - size} bytes past the end of {name} ({size} bytes)"
        return f"{offset - start} bytes into {name} ({size} bytes)"
