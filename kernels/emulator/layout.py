"""Places the parameters and variables of a launch in the three memories (PTX ISA 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arguments import DESCRIPTOR_BYTES, GlobalMemory
from .empty import unwrap
from .errors import ParseError
from .geometry import Geometry
from .instruction import Kernel, Variable
from .memory import SHARED_BASE
from .ptxtypes import dtype_of
from .space import Space
from .tensormap import TensorMap

MAX_SHARED = 232448  # 227 KiB: what a block may have on sm_90
SHARED_GAP = 16  # guard bytes between static shared variables


@dataclass
class Layout:
    """spaces: global, shared, local. parameters: bytes by name, or the tensor map of one."""

    memory: GlobalMemory
    spaces: tuple[Space, Space, Space]
    symbols: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, bytes | TensorMap] = field(default_factory=dict)


def lay_out(
    kernel: Kernel,
    module_variables: list[Variable],
    arguments: Sequence[Any],
    shared_bytes: int,
    geometry: Geometry,
) -> Layout:
    """Give everything an address, and copy the arguments in."""
    symbols: dict[str, int] = {}
    variables = module_variables + kernel.variables
    memory = GlobalMemory()
    for v in variables:
        if v.space in ("global", "const"):
            symbols[v.name] = memory.variable(
                f"the variable {v.name}", v.size, v.data, writable=v.space == "global"
            )
    memory.arrays(arguments)
    parameters = _parameters(kernel, arguments, memory, symbols)

    offset, extents = _place(variables, "shared", SHARED_BASE, SHARED_GAP, shared_bytes, symbols)
    if sum(size for _, size, _ in extents) > MAX_SHARED:
        used = sum(size for _, size, _ in extents)
        raise ParseError(
            f"Kernel {kernel.name!r} asks for {used} bytes of shared memory; a block has at most "
            f"{MAX_SHARED}."
        )
    size = -(-(offset - SHARED_BASE + 64) // 1024) * 1024
    origin = geometry.block_slot * size
    shared = Space("shared", SHARED_BASE, size, geometry.slots, origin)
    for start, length, name in extents:
        shared.add(start - SHARED_BASE, length, name)

    offset, extents = _place(variables, "local", 64, 0, 0, symbols)  # address 0 stays invalid
    size = -(-offset // 64) * 64
    local = Space("local", 0, size, geometry.threads, geometry.all * size)
    for start, length, name in extents:
        local.add(start, length, name)
    return Layout(memory, (memory.space(), shared, local), symbols, parameters)


def _place(
    variables: list[Variable],
    space: str,
    start: int,
    gap: int,
    dynamic_bytes: int,
    symbols: dict[str, int],
) -> tuple[int, list[tuple[int, int, str]]]:
    """Addresses of the variables of a space -> (end, [(address, size, name)]).

    Dynamic variables (extern, of size 0) go last and are all the same bytes.
    """
    offset = start
    extents = []
    for v in variables:
        if v.space == space and v.size:
            offset = -(-offset // v.align) * v.align
            symbols[v.name] = offset
            extents.append((offset, v.size, f"the {space} variable {v.name}"))
            offset += v.size + gap
    dynamic = [v for v in variables if v.space == space and not v.size]
    if dynamic:
        align = max(v.align for v in dynamic)
        offset = -(-offset // align) * align
        symbols.update({v.name: offset for v in dynamic})
        extents.append((offset, dynamic_bytes, f"the dynamic {space} memory"))
        offset += dynamic_bytes
    return offset, extents


def _parameters(
    kernel: Kernel,
    arguments: Sequence[Any],
    memory: GlobalMemory,
    symbols: dict[str, int],
) -> dict[str, bytes | TensorMap]:
    values: list[Any] = [unwrap(a) for a in arguments]
    if len(values) != len(kernel.parameters):
        values = [scalar for value in values for scalar in _as_numba_passes(value)]
    if len(values) != len(kernel.parameters):
        raise ParseError(
            f"Kernel {kernel.name!r} takes {len(kernel.parameters)} parameters, but "
            f"{len(arguments)} arguments were given ({len(values)} if arrays are passed as Numba "
            "passes them).",
            kernel=kernel.name,
        )
    parameters: dict[str, bytes | TensorMap] = {}
    for variable, value in zip(kernel.parameters, values, strict=True):
        if isinstance(value, TensorMap) and variable.size == DESCRIPTOR_BYTES:  # passed by value
            symbols[variable.name] = memory.tensor_map(value)
            parameters[variable.name] = value
        else:
            parameters[variable.name] = _parameter_bytes(kernel, variable, value, memory)
    return parameters


def _as_numba_passes(value: Any) -> tuple[Any, ...]:
    """An array is meminfo, parent, size, item size, data, shape and strides (5 + 2 * ndim)."""
    if not isinstance(value, np.ndarray):
        return (value,)
    return (0, 0, value.size, value.itemsize, value, *value.shape, *value.strides)


def _parameter_bytes(kernel: Kernel, variable: Variable, value: Any, memory: GlobalMemory) -> bytes:
    if isinstance(value, np.ndarray | TensorMap):
        if variable.size != 8:
            raise ParseError(
                f"Kernel {kernel.name!r}, parameter {variable.name}: a {type(value).__name__} "
                f"needs a 64-bit parameter, and this one is .{variable.type}.",
                kernel=kernel.name,
            )
        if isinstance(value, TensorMap):
            value = memory.tensor_map(value)
        else:
            value = memory.address_of(value)
    dtype = dtype_of(variable.type)
    try:
        if dtype.kind == "f":
            return np.array(value, dtype).tobytes()
        whole = int(value)
    except (TypeError, ValueError):
        whole = None
    limit = 1 << 8 * variable.size
    if whole is None or whole != value or not -limit // 2 <= whole < limit:
        raise ParseError(
            f"Kernel {kernel.name!r}, parameter {variable.name} (.{variable.type}): {value!r} is "
            "no value for it; pass an int in its range, a float, an array, Empty(array) or a "
            "TensorMap.",
            kernel=kernel.name,
        )
    return (whole % limit).to_bytes(variable.size, "little")
