"""How the threads of a launch are laid out in the columns of the register file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import ParseError
from .ptxtypes import U32, Array

Selection = None | slice | Array
"""Which threads execute an instruction, as NumPy indexes columns: None means all of them."""

WARP = 32
MAX_CLUSTER = 8  # blocks: what every device of sm_90 can hold


def three(name: str, size: int | Sequence[int]) -> tuple[int, int, int]:
    """A grid, block or cluster as a launch is given it: an int, or one to three ints."""
    sizes = tuple(np.atleast_1d(size).tolist())
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ParseError(f"{name} must be one to three positive integers, not {size!r}.")
    x, y, z = sizes + (1,) * (3 - len(sizes))
    return x, y, z


class Geometry:
    """A wave is some blocks that run at the same time, each in a slot of whole warps.

    The blocks of a cluster are in neighbouring slots, in the order of their ranks.
    A thread is named by its column. The last warp of a block may have columns that never run.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        threads_per_wave: int,
    ) -> None:
        self.grid, self.block, self.cluster = grid, block, cluster
        _check_cluster(cluster, grid)
        self.block_threads = block[0] * block[1] * block[2]
        if self.block_threads > 1024:
            raise ParseError(f"A block has at most 1024 threads, not {self.block_threads}.")
        self.blocks = grid[0] * grid[1] * grid[2]
        self.warps_per_block = -(-self.block_threads // WARP)
        self.slot = self.warps_per_block * WARP  # columns of one block
        self.blocks_per_cluster = cluster[0] * cluster[1] * cluster[2]
        self.warps_per_cluster = self.blocks_per_cluster * self.warps_per_block
        whole = threads_per_wave // (self.slot * self.blocks_per_cluster)
        self.clusters = max(1, min(self.blocks // self.blocks_per_cluster, whole))  # of a wave
        self.slots = self.clusters * self.blocks_per_cluster
        self.threads = self.slots * self.slot
        self.warps = self.slots * self.warps_per_block
        self.all = np.arange(self.threads)
        self.block_slot = self.all // self.slot
        self.in_block = self.all % self.slot  # number of the thread in its block
        self.ctaid = np.zeros((3, self.threads), U32)
        self.clusterid = np.zeros((3, self.threads), U32)

    def select(self, at: Selection) -> Array:
        """The threads of a selection."""
        selected: Array = self.all if at is None else self.all[at]
        return selected

    def order(self, random: np.random.Generator | None) -> Array:
        """The numbers of all blocks as they run: cluster by cluster, perhaps shuffled."""
        numbers = np.arange(self.blocks)
        axes = zip(self.grid[::-1], self.cluster[::-1], strict=True)
        split = numbers.reshape([n for size, cut in axes for n in (size // cut, cut)])
        clusters = split.transpose(0, 2, 4, 1, 3, 5).reshape(-1, self.blocks_per_cluster)
        sequence = np.arange(len(clusters))
        if random is not None:
            random.shuffle(sequence)
        order: Array = clusters[sequence].ravel()
        return order

    def place(self, numbers: Array) -> Array:
        """Put blocks into the slots of a wave; returns the threads that run."""
        full = np.zeros(self.slots, np.int64)
        full[: numbers.size] = numbers
        width, height, _ = self.grid
        indices = full % width, full // width % height, full // (width * height)
        for axis, index in enumerate(indices):
            self.ctaid[axis] = np.repeat(index, self.slot)
            self.clusterid[axis] = self.ctaid[axis] // U32(self.cluster[axis])
        runs = (self.block_slot < numbers.size) & (self.in_block < self.block_threads)
        alive: Array = self.all[runs]
        return alive

    def block_index(self, thread: int) -> tuple[int, int, int]:
        x, y, z = (int(i) for i in self.ctaid[:, thread])
        return x, y, z

    def thread_index(self, thread: int) -> tuple[int, int, int]:
        width, height, _ = self.block
        n = int(self.in_block[thread])
        return n % width, n // width % height, n // (width * height)


def _check_cluster(cluster: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
    blocks = cluster[0] * cluster[1] * cluster[2]
    if blocks > MAX_CLUSTER:
        raise ParseError(f"A cluster has at most {MAX_CLUSTER} blocks, not {blocks}.")
    if any(size % cut for size, cut in zip(grid, cluster, strict=True)):
        raise ParseError(
            f"The grid {grid} cannot be cut into clusters of {cluster} blocks: along each axis "
            "the cluster's size must divide the grid's."
        )
