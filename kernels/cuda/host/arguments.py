"""What the host code of several kernels shares: grids, sizes, dtypes and axes as arguments."""
from __future__ import annotations

from collections.abc import Sequence

from ...ops import TensorSpec, count
from .. import vector
from ..index import divisor

Grid = tuple[int, int, int]
MOST_ELEMENTS = (1 << 31) - 1
MOST_AXES = 4       # that kernels walk over
SECTOR = 32         # bytes, the least that L1 and L2 fetch


def check_sizes(what: str, *specs: TensorSpec) -> None:
    """ValueError for a tensor too large for the kernels' 32-bit indices."""
    for spec in specs:
        if count(spec.shape) > MOST_ELEMENTS:
            raise ValueError(f"{what}: a tensor of shape {spec.shape} has {count(spec.shape):,} "
                             f"elements; the CUDA kernels index at most {MOST_ELEMENTS:,}. Use a "
                             f"smaller batch")


def part_unit(dtype: str) -> int:
    """Step's number for kernels that take parts: channels of a sector. Then every access of theirs
    is aligned. And no sector has two parts, of which a kernel might read one and write the other:
    the kernel after it may be on that multiprocessor already, and would find in L1 what was there
    before (overlap.py; reads are ld.global.nc)."""
    return SECTOR // vector.STORAGE[dtype].bytes


def blocks(items: int, per_block: int) -> Grid:
    """The one-dimensional grid in which each item has its thread, or each tile its block."""
    return (-(-items // per_block), 1, 1)


def four_axes(what: str, sizes: Sequence[int], *steps: Sequence[int]) -> tuple[int, ...]:
    """Arguments of a kernel with strided operands: divisors of the last three of four axes, then
    four steps an operand. ValueError where more than four axes are left after merging."""
    missing = MOST_AXES - len(sizes)
    if missing < 0:
        raise ValueError(f"{what}: {len(sizes)} axes of sizes {tuple(sizes)} are left after "
                         f"merging; the CUDA kernels walk over at most {MOST_AXES}. Split the op "
                         f"in two")
    padded = [1] * missing + list(sizes)
    return (*(number for size in padded[1:] for number in divisor(size)),
            *(number for step in steps for number in [0] * missing + list(step)))
