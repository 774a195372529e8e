"""Which tile and how many splits a convolution gets: a model of its time in cycles.

The model knows four things. A block's products take block_m * block_n * depth / rate cycles, depth
in whole slices, at a rate that falls with the warp's tile, for a smaller one reads more shared
memory per product. A multiprocessor with few warps does not reach that rate. A small tile reads
more from L2 per product, and L2 delivers only so much. And time passes in whole waves of blocks,
each with a prologue and an epilogue, which only another block at work there can hide. Short sums
are mostly that: what decides them is how many sums are on a multiprocessor at once.

All numbers are rough; only their order decides. They are fitted to what each tile took on an H200
of the layers of ResNet-50, MobileNetV2 and VGG-16 in float16: what is chosen is 1 % slower than the
fastest tile in the mean (profiling/NOTES.md). Nothing else is measured. What measures is tune.py.
"""
from __future__ import annotations

from ..conv_gemm import Tile
from ..conv_wgmma import ARCH as WGMMA_ARCH
from ..launch import MOST_OF_A_CLUSTER, Choice, CudaOptions

# 64x64 is the largest warp tile without spills (205 registers). Four stages of 64-byte rows hide
# about 3 slices of latency; the deep small tiles halve the number of barriers for the long sums of
# late layers; 128x256 reads the image least often, where an image is large enough to fill it; of
# 64x128 and 128x64 with equal estimates the first was faster on an H200, and so it comes first;
# 128x32 serves the narrow first layers, whose time goes into memory: two deep slots take little
# shared memory, so that four blocks share a multiprocessor.
MMA_TILES = (
    Tile(128, 256, 128, 3, 64, 64, 1),
    Tile(128, 128, 64, 4, 64, 64, 2),
    Tile(64, 128, 64, 4, 32, 64, 4),
    Tile(128, 64, 64, 4, 64, 32, 4),
    Tile(64, 64, 128, 3, 32, 32, 4),
    Tile(128, 32, 128, 2, 32, 32, 4),
)
# The first two read the least of L2, and alone on a multiprocessor they keep a product in flight;
# 192x256 is all that fits the registers. (256x128 was never the fastest.) Few stages leave room for
# several of the smaller ones. The deep ring of 64x64 is for grids that do not fill the GPU: there
# estimates are equal, and so it comes first.
WGMMA_TILES = (
    Tile(192, 256, 128, 4, 16, 256, 1, True),
    Tile(128, 256, 128, 4, 16, 256, 1, True),
    Tile(128, 128, 128, 3, 16, 128, 2, True),
    Tile(64, 128, 128, 2, 16, 128, 4, True),
    Tile(128, 64, 128, 3, 16, 64, 3, True),
    Tile(64, 64, 128, 4, 16, 64, 3, True),
    Tile(64, 64, 128, 2, 16, 64, 6, True),
)
# On CUDA cores a warp of 32x64 gives each thread 8x8 sums, the most that leaves two blocks of 256
# threads their registers. Its loop is 8 k long: 16 would no longer fit the first instruction
# cache. The narrow tiles have 8x4 sums a thread, so that they still have four warps, and 16 k.
SIMT_TILES = (
    Tile(128, 128, 32, 2, 32, 64, 2),
    Tile(128, 64, 32, 2, 32, 64, 3),
    Tile(64, 64, 64, 2, 32, 32, 4),
    Tile(128, 32, 64, 2, 32, 32, 4),
)
# Of equal estimates the first counts, and those by wgmma were the faster ones.
TILES = {"float32": SIMT_TILES, "tf32": MMA_TILES, "float16": (*WGMMA_TILES, *MMA_TILES),
         "bfloat16": (*WGMMA_TILES, *MMA_TILES)}
ITEMSIZE = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
RATE = {"float32": 128, "tf32": 512, "float16": 1024, "bfloat16": 1024}     # products a cycle,
FEWER_CORES = {"sm_75": 64, "sm_80": 64}        # of one multiprocessor; float32 on these
MMA_EFFICIENCY = {(64, 64): 1.0, (64, 32): 0.85, (32, 64): 0.85, (32, 32): 0.7}     # by warp tile
SIMT_EFFICIENCY = {(32, 64): 1.0, (32, 32): 0.85}
WGMMA_RATE = 1770           # by wgmma,
SHARED_BYTES_PER_CYCLE = 128    # if shared memory delivers both operands of each product
WARPS_FOR_FULL_RATE = 8
WAVE_CYCLES = 800           # until the first block multiplies, and after the last one did
SETUP_CYCLES = 200          # of a block, on instructions outside of its loop, if others hide waits;
BLOCK_CYCLES = 3600         # if nobody does, until its first product and after its last,
WARP_CYCLES = 1.3           # and this for each of a warp's outputs
REDUCTION_CYCLES = 4000     # one more launch, to add up planes of splits
CLUSTER_CYCLES = 1500       # of a block in a cluster, which waits for the others twice, and reads
MEETING_BYTES_PER_CYCLE = 20    # as many of their sums as it has itself
# One multiprocessor's share, in bytes a cycle: of y into device memory, of partial sums out of L2,
STORE_BYTES_PER_CYCLE = 19
SUMS_BYTES_PER_CYCLE = 29
L2_BYTES_PER_CYCLE = 44     # of all that L2 delivers, for the loop
LEAST_SLICES = 4            # of a split: as many as stages
MOST_SPLITS = 16
CLUSTER_ARCHS = ("sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103", "sm_103a")
# Shared memory of one multiprocessor, KiB; a block may have all but one of them.
SHARED_KIB = {"sm_75": 64, "sm_80": 164, "sm_87": 164, "sm_90": 228, "sm_90a": 228, "sm_100": 228,
              "sm_100a": 228, "sm_103": 228, "sm_103a": 228}
OTHER_SHARED_KIB = 100


def most_blocks(tile: Tile, arch: str) -> int:
    """That are at work on a multiprocessor at once, each with 1 KiB for the system."""
    shared = SHARED_KIB.get(arch, OTHER_SHARED_KIB) * 1024
    return min(tile.blocks, shared // (tile.shared_bytes + 1024))


def fits(tile: Tile, arch: str) -> bool:
    """Whether this architecture has the tile's instructions, and shared memory for a block."""
    return most_blocks(tile, arch) > 0 and (not tile.wgmma or arch == WGMMA_ARCH)


def full_rate(tile: Tile, dtype: str, arch: str) -> float:
    """Products a cycle of a multiprocessor that has warps enough."""
    if tile.wgmma:
        copied = tile.block_m + tile.block_n            # rows of a slice
        read = tile.block_m // 64 * (64 + tile.block_n)     # by all warpgroups
        products = tile.block_m * tile.block_n * tile.row_bytes // ITEMSIZE[dtype]
        cycles = (copied + read) * tile.row_bytes / SHARED_BYTES_PER_CYCLE
        return min(WGMMA_RATE, products / cycles)
    warp = tile.warp_m, tile.warp_n
    if dtype == "float32":
        return FEWER_CORES.get(arch, RATE[dtype]) * SIMT_EFFICIENCY[warp]
    return RATE[dtype] * MMA_EFFICIENCY[warp]


def has_clusters(arch: str) -> bool:
    return arch in CLUSTER_ARCHS


def clusters(choice: Choice, pixels: int, out_channels: int, groups: int, options: CudaOptions
             ) -> bool:
    """Whether the splits can form a cluster, and each block has a multiprocessor of its own: where
    several shared one, a product of 1024x1024 matrices took half as long again on an H200."""
    return (has_clusters(options.arch) and 1 < choice.splits <= MOST_OF_A_CLUSTER
            and blocks_of(choice, pixels, out_channels, groups) <= options.multiprocessors)


def blocks_of(choice: Choice, pixels: int, out_channels: int, groups: int) -> int:
    """Of the grid; out_channels are those of one group."""
    tile, splits, _ = choice
    assert tile is not None
    return -(-pixels // tile.block_m) * -(-out_channels // tile.block_n) * groups * splits


def cycles(choice: Choice, pixels: int, out_channels: int, depth: int, groups: int,
           dtype: str, options: CudaOptions) -> float:
    """Estimated time of one convolution; out_channels are those of one group."""
    tile, splits, cluster = choice
    assert tile is not None
    processors, size = max(1, options.multiprocessors), ITEMSIZE[dtype]
    slices = -(-depth * size // tile.row_bytes)
    block_depth = -(-slices // splits) * tile.row_bytes // size     # zeros are multiplied, too
    work = blocks_of(choice, pixels, out_channels, groups)
    waves = -(-work // processors)              # blocks that the busiest multiprocessor gets
    resident = min(waves, most_blocks(tile, options.arch))      # and those that are there at once

    def products(blocks: int) -> float:
        """Cycles of a block's products where so many are at work."""
        warps = blocks * tile.threads / 32
        rate = full_rate(tile, dtype, options.arch) * min(1.0, warps / WARPS_FOR_FULL_RATE) ** 0.5
        return tile.block_m * tile.block_n * block_depth / rate
    # Weights are packed with their zeros; of the image no more is read than there is.
    read = (tile.block_m * min(block_depth, depth) + tile.block_n * block_depth) * size
    copies = read / L2_BYTES_PER_CYCLE
    outputs = pixels * out_channels * groups
    planes = splits > 1 and not cluster
    stores = outputs * (4 * splits if planes else size) / work / STORE_BYTES_PER_CYCLE
    loop = max(products(resident), copies)
    meeting = CLUSTER_CYCLES + 4 * tile.block_m * tile.block_n / MEETING_BYTES_PER_CYCLE
    # Either something is always at work, once it has begun and until it ends, or each block waits
    # for itself.
    busy = SETUP_CYCLES + max(loop, stores) + meeting * cluster
    alone = (BLOCK_CYCLES + WARP_CYCLES * tile.warp_m * tile.warp_n
             + max(products(1), copies) + meeting * cluster)
    total = max(waves * busy + WAVE_CYCLES + min(loop, stores), waves * alone / resident)
    if planes:
        total += REDUCTION_CYCLES + 4 * splits * outputs / (SUMS_BYTES_PER_CYCLE * processors)
    return total


def candidates(pixels: int, out_channels: int, depth: int, groups: int, dtype: str,
               options: CudaOptions, tile: Tile | None = None, splits: int | None = None
               ) -> list[tuple[float, Choice]]:
    """All choices with their estimates, the least first; a tile or splits that is given is kept."""
    found = []
    for t in TILES[dtype] if tile is None else (tile,):
        slices = -(-depth * ITEMSIZE[dtype] // t.row_bytes)
        most = max(1, min(MOST_SPLITS, slices // LEAST_SLICES))
        counts = range(1, most + 1) if splits is None else (splits,)
        if fits(t, options.arch):
            choices = [Choice(t, s) for s in counts]
            choices += [choice._replace(cluster=True) for choice in choices
                        if clusters(choice, pixels, out_channels, groups, options)]
            found += [(cycles(choice, pixels, out_channels, depth, groups, dtype, options), choice)
                      for choice in choices]
    return sorted(found, key=lambda candidate: candidate[0])


def choose(pixels: int, out_channels: int, depth: int, groups: int, dtype: str,
           options: CudaOptions, tile: Tile | None = None, splits: int | None = None) -> Choice:
    """The one of the least estimate; a tile or splits that is given is kept."""
    found = candidates(pixels, out_channels, depth, groups, dtype, options, tile, splits)
    if not found:
        raise ValueError(f"Conv2d: tile {tile} needs instructions or more shared memory than "
                         f"{options.arch} has; "
                         f"choose one of {[t for t in TILES[dtype] if fits(t, options.arch)]}")
    return found[0][1]
