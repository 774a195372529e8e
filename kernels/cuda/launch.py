"""What the host code gives to a device: kernels with their grids and arguments."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..step import Array, Options
from .compiler import Kernel
from .conv_cluster import MOST_OF_A_CLUSTER
from .conv_gemm import Tile

MOST_BLOCKS = (2 ** 31 - 1, 65535, 65535)      # of a grid (CUDA C++ Programming Guide, table 30)


@dataclass(frozen=True)
class Launch:
    """One launch; the block's size and its shared memory are the kernel's.

    args: an array per "pointer" (NumPy for the emulator, CuPy on a GPU), a number per scalar
    cluster: so many neighbouring blocks along y can read one another's shared memory
    """
    kernel: Kernel
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    cluster: int = 1

    def __post_init__(self) -> None:
        if len(self.args) != len(self.kernel.signature):
            raise TypeError(f"{self.kernel.name} takes {len(self.kernel.signature)} arguments, "
                            f"not {len(self.args)}")
        if not all(1 <= n <= most for n, most in zip(self.grid, MOST_BLOCKS, strict=True)):
            raise ValueError(f"{self.kernel.name}: the grid {self.grid} does not fit "
                             f"{MOST_BLOCKS}; use a smaller batch")
        if not 1 <= self.cluster <= MOST_OF_A_CLUSTER or self.grid[1] % self.cluster:
            raise ValueError(f"{self.kernel.name}: the {self.grid[1]} blocks along y of its grid "
                             f"can not be cut into clusters of {self.cluster}, of which every GPU "
                             f"with clusters admits {MOST_OF_A_CLUSTER}")


class Choice(NamedTuple):
    """How a convolution or a linear layer runs: in these tiles, its sum in so many splits, whose
    blocks form a cluster or leave planes; without a tile it is a matrix-vector product."""
    tile: Tile | None
    splits: int = 1
    cluster: bool = False

    def __str__(self) -> str:
        """ "128x64 tiles, 64 bytes deep, 4 splits in a cluster" """
        if self.tile is None:
            return "matrix-vector product"
        text = f"{self.tile.block_m}x{self.tile.block_n} tiles, {self.tile.row_bytes} bytes deep"
        if self.tile.wgmma:
            text += f", {self.tile.stages} stages of wgmma"
        if self.splits > 1:
            text += f", {self.splits} splits" + " in a cluster" * self.cluster
        return text


@dataclass
class CudaOptions(Options):
    """What all steps of one program on a GPU share.

    dtype            the compute type: "float32", "tf32", "float16" or "bfloat16"
    arch             the GPU's architecture, such as "sm_90a"
    multiprocessors  of the GPU: how many blocks can be at work at once
    upload           makes a constant an array of the device
    tuned            measured choices, by problem, that come before estimated ones: see tuned.py
    """
    dtype: str = "float32"
    arch: str = "sm_80"
    multiprocessors: int = 108
    upload: Callable[[Array], Array] = lambda array: array
    tuned: Mapping[str, Choice] = field(default_factory=dict)
