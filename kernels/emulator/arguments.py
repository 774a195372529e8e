"""Host arrays in emulated global memory: where each of them is, what may be written, what is empty.

Arrays that share host memory share emulated memory; separate buffers have guard gaps in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dependent import Late
from .empty import Empty, owner_of, unwrap
from .errors import ParseError
from .memory import GLOBAL_BASE
from .ptxtypes import U8, Array
from .space import Space
from .tensormap import TensorMap

PAGE = 256  # alignment of a buffer, as cudaMalloc gives it; also the least guard gap
DESCRIPTOR_BYTES = 128  # of a CUtensorMap


@dataclass(frozen=True)
class _Piece:
    """One object of global memory. host: the bytes of the array that it is, to be copied back."""

    offset: int
    size: int
    name: str
    writable: bool
    initial: Array | None = None
    host: Array | None = None
    wrapper: Empty | Late | None = None

    @property
    def empty(self) -> Empty | None:
        return self.wrapper if isinstance(self.wrapper, Empty) else None


class GlobalMemory:
    """Collects the objects of global memory, then makes the space and copies data in and out."""

    def __init__(self) -> None:
        self.end = PAGE
        self.pieces: list[_Piece] = []
        self.addresses: dict[tuple[int, int], int] = {}  # (host address, bytes) -> address
        self.maps: dict[int, tuple[TensorMap, int]] = {}  # descriptor -> map, address of its array

    def _take(self, size: int, low_bits: int = 0) -> int:
        offset = self.end + low_bits
        self.end = -(-(offset + size + PAGE) // PAGE) * PAGE
        return offset

    def variable(self, name: str, size: int, data: Array | None, writable: bool) -> int:
        offset = self._take(size)
        self.pieces.append(_Piece(offset, size, name, writable, data))
        return GLOBAL_BASE + offset

    def arrays(self, arguments: Iterable[Any]) -> None:
        """Place all array arguments; overlapping ones become one buffer."""
        found: list[_Found] = []
        for number, argument in enumerate(arguments):
            if isinstance(argument, TensorMap):
                argument = argument.source
            wrapper = argument if isinstance(argument, Empty | Late) else None
            array = unwrap(argument)
            if not isinstance(array, np.ndarray):
                continue
            if not array.flags.c_contiguous:
                raise ParseError(
                    f"Argument {number} is an array with strides {array.strides}; arrays must be "
                    "C-contiguous (numpy.ascontiguousarray makes one)."
                )
            found.append((array.ctypes.data, array, f"argument {number}", wrapper))
        found.sort(key=lambda item: item[0])
        start = end = offset = 0
        for host, array, name, wrapper in found:
            if array.nbytes == 0:
                self.addresses[host, 0] = self.variable(name, 0, None, writable=False)
                continue
            if host >= end:  # shares nothing with those before
                start, end = host, _reach(found, host)
                offset = self._take(end - start, _low_bits(array))
            place = offset + host - start
            self.addresses[host, array.nbytes] = GLOBAL_BASE + place
            raw = array.reshape(-1).view(U8)
            writable = array.flags.writeable
            self.pieces.append(_Piece(place, array.nbytes, name, writable, raw, raw, wrapper))

    def address_of(self, array: Array) -> int:
        return self.addresses[array.ctypes.data, array.nbytes]

    def tensor_map(self, tensor_map: TensorMap) -> int:
        """The address of a descriptor, which a kernel can only pass on."""
        address = self.variable("a tensor map", DESCRIPTOR_BYTES, None, writable=False)
        self.maps[address] = (tensor_map, self.address_of(tensor_map.array))
        return address

    def space(self) -> Space:
        """The memory with the arrays copied in."""
        space = Space("global", GLOBAL_BASE, self.end + PAGE)
        for piece in self.pieces:
            space.add(piece.offset, piece.size, piece.name, piece.writable)
            if piece.initial is not None:
                space.bytes[piece.offset : piece.offset + piece.initial.size] = piece.initial
        if any(piece.empty for piece in self.pieces):
            space.written = np.ones(space.size, bool)
            for piece in self.pieces:
                if piece.empty:
                    space.written[piece.offset : piece.offset + piece.size] = piece.empty.written
            for piece in self.pieces:  # what another argument gives content has content
                if piece.host is not None and not piece.empty:
                    space.written[piece.offset : piece.offset + piece.size] = True
        late = [piece for piece in self.pieces if isinstance(piece.wrapper, Late)]
        if late:
            space.late = np.zeros(space.size, bool)
            for piece in late:
                space.late[piece.offset : piece.offset + piece.size] = True
        return space

    def copy_back(self, space: Space) -> None:
        """Store the results in the host arrays; nothing else ever changes them."""
        for piece in self.pieces:
            part = slice(piece.offset, piece.offset + piece.size)
            if piece.host is not None and piece.writable:
                piece.host[:] = space.bytes[part]
            if piece.empty and space.written is not None:
                piece.empty.written[:] = space.written[part]


_Found = tuple[int, Array, str, Empty | Late | None]  # host address, array, name, wrapper


def _reach(found: list[_Found], start: int) -> int:
    """Where the chain of overlapping arrays that begins at `start` ends."""
    end = start + 1
    for host, array, *_ in found:
        if start <= host < end:
            end = max(end, host + array.nbytes)
    return end


def _low_bits(array: Array) -> int:
    """Address modulo PAGE, so that a view is as aligned as it would be on a device.

    Its distance from the owner of the memory decides, as device allocations are aligned; or its
    host address if that is more aligned (a view made to start at an aligned address).
    """
    host = array.ctypes.data % PAGE
    own = (array.ctypes.data - owner_of(array).ctypes.data) % PAGE
    return max(host, own, key=lambda low: PAGE if low == 0 else low & -low)
