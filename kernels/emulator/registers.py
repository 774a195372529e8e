"""The register file, and operands as NumPy arrays (PTX ISA 6, 10).

A register is a row of the file of its width; a column is a thread. An operand becomes an array over
the threads (a view of its row) or a NumPy scalar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .geometry import WARP, Geometry
from .instruction import Immediate, Negated, Operand, Register, Sink, Special, Symbol
from .operation import NotCovered
from .ptxtypes import U16, U32, U64, UINT, Array, bits, dtype_of

_WIDTHS: dict[int, Any] = {1: bool, 16: U16, 32: U32, 64: U64}


class Registers:
    """symbols: addresses of the variables by name."""

    def __init__(
        self,
        counts: Mapping[int, int],
        geometry: Geometry,
        symbols: Mapping[str, int],
        shared_bytes: int,
    ) -> None:
        self.geometry, self.symbols = geometry, symbols
        self.threads = geometry.threads
        self.files: dict[int, Array] = {
            width: np.zeros((max(1, counts.get(width, 0)), self.threads), dtype)
            for width, dtype in _WIDTHS.items()
        }
        self.carry = np.zeros(self.threads, bool)  # CC.CF of extended-precision arithmetic
        self.special = _special_registers(geometry, shared_bytes)

    def reset(self) -> None:
        """Zero everything. (Registers are not checked for reads before writes.)"""
        for file in self.files.values():
            file[:] = 0

    def row(self, operand: Operand) -> Array:
        """The row of a register, as unsigned integers or bool."""
        if not isinstance(operand, Register):
            raise NotCovered(f"takes {operand} where a register is expected")
        row: Array = self.files[operand.width][operand.row]
        return row

    def value(self, operand: Operand, type_name: str) -> Any:
        """A source operand of the type: an array over the threads, or a NumPy scalar."""
        if isinstance(operand, Register):
            return self._view(self.row(operand), type_name)
        if isinstance(operand, Negated):
            raise NotCovered("negates an operand")
        if isinstance(operand, Special):
            return self._special(operand.name, dtype_of(type_name))
        if isinstance(operand, Symbol):
            if operand.name == "WARP_SZ":
                return _constant(WARP, type_name)
            if operand.name not in self.symbols:
                raise NotCovered(f"refers to {operand.name!r}, which is no variable")
            return _constant(self.symbols[operand.name], type_name)
        if isinstance(operand, Immediate):
            return _constant(operand.value, type_name)
        raise NotCovered(f"takes {operand} as a source")

    def spread(self, operand: Operand, type_name: str) -> Array:
        """A source operand as an array over the threads, also when it is a constant."""
        spread: Array = np.broadcast_to(self.value(operand, type_name), self.threads)
        return spread

    def predicate(self, operand: Operand) -> tuple[Array, bool]:
        """A predicate over the threads, and whether it is negated."""
        if isinstance(operand, Negated):
            return self.spread(operand.operand, "pred"), True
        return self.spread(operand, "pred"), False

    def destination(self, operand: Operand, type_name: str) -> Array:
        """Where a result of the type goes; assignment converts to the width of the register.

        A register may be wider than the type: the value is then extended (PTX ISA 9.4.1).
        """
        if isinstance(operand, Sink):
            return np.zeros(self.threads, dtype_of(type_name))
        row = self.row(operand)
        width = operand.width if isinstance(operand, Register) else 0
        if type_name.endswith("x2") or bits(type_name) >= width:
            return self._view(row, type_name)
        return row.view(dtype_of(("s" if type_name[0] == "s" else "u") + str(width)))

    def scalar(self, operand: Operand, thread: int, type_name: str = "u32") -> int:
        """One thread's value of an integer operand."""
        value = self.value(operand, type_name)
        return int(value[thread] if isinstance(value, np.ndarray) else value)

    def _view(self, row: Array, type_name: str) -> Array:
        dtype = dtype_of(type_name)
        narrow = row.dtype.itemsize < (4 if type_name.endswith("x2") else dtype.itemsize)
        if narrow or (row.dtype.kind == "b") != (dtype.kind == "b"):
            word = (
                "predicate" if row.dtype.kind == "b" else f"{8 * row.dtype.itemsize}-bit register"
            )
            raise NotCovered(f"uses a {word} as .{type_name}")
        view = row.view(dtype)
        if type_name.endswith("x2"):
            return view.reshape(self.threads, 2)
        if view.size == self.threads:
            return view
        return view.reshape(self.threads, -1)[:, 0]  # the low bits of a wider register

    def _special(self, name: str, dtype: np.dtype[Any]) -> Any:
        if name not in self.special:
            raise NotCovered(f"reads the special register {name}")
        value = self.special[name]
        if value.dtype.itemsize == dtype.itemsize:
            return value.view(dtype)
        if name.startswith(("%ctaid", "%clusterid")):  # change with every wave: no copy will do
            raise NotCovered(f"reads {name} as {dtype.itemsize} bytes instead of 4")
        return value.astype(dtype)


def _constant(value: Any, type_name: str) -> Any:
    if type_name == "pred":
        return np.bool_(value)
    dtype = dtype_of(type_name)
    if type_name.endswith("x2"):  # a pair, given as 32 bits
        return np.array([int(value) % (1 << 32)], U32).view(dtype)
    if isinstance(value, np.floating):
        if dtype.kind == "f":
            return dtype.type(value)
        value = int(value.view(UINT[value.itemsize]))  # mov.b32 %r1, 0f3F800000
    if dtype.kind == "f":
        return dtype.type(value)
    return np.array([int(value) % (1 << 8 * dtype.itemsize)], UINT[dtype.itemsize]).view(dtype)[0]


def _special_registers(geometry: Geometry, shared_bytes: int) -> dict[str, Any]:
    """PTX ISA 10. The emulated processor is one multiprocessor whose clocks stand still."""
    thread = geometry.in_block.astype(U32)
    lane = thread % U32(WARP)
    width, height, _ = (U32(n) for n in geometry.block)
    one = U32(1)
    rank = (geometry.block_slot % geometry.blocks_per_cluster).astype(U32)
    special: dict[str, Any] = {
        "%tid.x": thread % width,
        "%tid.y": thread // width % height,
        "%tid.z": thread // (width * height),
        "%laneid": lane,
        "%warpid": thread // U32(WARP),
        "%nwarpid": U32(geometry.warps_per_block),
        "%lanemask_eq": one << lane,
        "%lanemask_lt": (one << lane) - one,
        "%lanemask_le": ((one << lane) - one) | (one << lane),
        "%lanemask_gt": ~(((one << lane) - one) | (one << lane)),
        "%lanemask_ge": ~((one << lane) - one),
        "%smid": U32(0),
        "%nsmid": U32(1),
        "%clock": U32(0),
        "%clock64": U64(0),
        "%globaltimer": U64(0),
        "%dynamic_smem_size": U32(shared_bytes),
        "%cluster_ctarank": rank,
        "%cluster_nctarank": U32(geometry.blocks_per_cluster),
        "%is_explicit_cluster": np.bool_(geometry.blocks_per_cluster > 1),
    }
    for axis, name in enumerate("xyz"):
        special[f"%ntid.{name}"] = U32(geometry.block[axis])
        special[f"%nctaid.{name}"] = U32(geometry.grid[axis])
        special[f"%ctaid.{name}"] = geometry.ctaid[axis]
        size = U32(geometry.cluster[axis])
        special[f"%nclusterid.{name}"] = U32(geometry.grid[axis]) // size
        special[f"%clusterid.{name}"] = geometry.clusterid[axis]
        special[f"%cluster_nctaid.{name}"] = size
        special[f"%cluster_ctaid.{name}"] = rank % size
        rank = rank // size
    return special
