"""Convolution on CUDA: which kernel, which grid, and how the weights are packed."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from ...axes import pixel_step
from ...groups import merge, merged
from ...ops import Conv2d, TensorSpec, Unary, known
from ...step import Array, Step, weight_and_bias
from .. import conv_gemm, conv_mma, conv_simt, conv_wgmma, vector
from ..activation import activation_of
from ..compiler import Kernel, number_of
from ..conv_gemm import CLUSTER, ENDINGS, PLANE, WHOLE, Tile
from ..launch import Choice, CudaOptions, Launch
from . import conv_halo, conv_image, depthwise
from .arguments import check_sizes, part_unit
from .conv_choice import TILES, choose
from .conv_shape import (
    Conv,
    Cut,
    Norm,
    arguments,
    fold_kernel,
    fold_launch,
    folded,
    pack,
    pack_bias,
    patched,
    problem,
)
from .splitk import reduction
from .weights import stored

NARROWEST = 32      # outputs of the narrowest tile, which several groups may share
MMA_DTYPES = ("float16", "bfloat16", "tf32")
logger = logging.getLogger("kernels")


def stored_as(dtype: str) -> str:
    """The storage of a compute type."""
    return conv_mma.STORED_AS.get(dtype, dtype)


def conv_kernel(dtype: str, tile: Tile, activation: str, end: str, before: str = "") -> Kernel:
    """end: one of conv_gemm.ENDINGS; before: one of conv_norm.BEFORE, of mma.sync alone."""
    depth = tile.row_bytes // vector.STORAGE[stored_as(dtype)].bytes
    shape = f"{tile.block_m}x{tile.block_n}x{depth}"
    does = {PLANE: "splitk", CLUSTER: f"cluster_{activation}"}.get(end, activation)
    if dtype == "float32":
        return _kernel(f"conv_simt_f32_{shape}_{does}", conv_simt.make, (tile, activation, end),
                       tile, end, "sm_75")
    name = f"{conv_mma.SHORT[dtype]}_{shape}_s{tile.stages}_{does}"
    config: tuple = dtype, tile, activation, end
    if tile.wgmma:
        return _kernel(f"conv_wgmma_{name}", conv_wgmma.make, config, tile, end, conv_wgmma.ARCH)
    if before:
        name, config = f"{before}_{name}", (*config, before)
    return _kernel(f"conv_mma_{name}", conv_mma.make, config, tile, end, "sm_80")


def _kernel(name: str, make: Callable, config: tuple, tile: Tile, end: str, arch: str) -> Kernel:
    shared = tile.shared_bytes
    if end == CLUSTER:
        shared, arch = tile.cluster_bytes, max(arch, "sm_90")
    return Kernel(name, make, config, conv_gemm.SIGNATURE, tile.threads, shared, arch, tile.blocks)


def kernels(dtype: str) -> list[Kernel]:
    """All tiles, whole and split, for the activations that are compiled in; SiLU for the rest."""
    return [*(conv_kernel(dtype, tile, "clip", end) for tile in TILES[dtype] for end in ENDINGS),
            *(conv_kernel(dtype, tile, "silu", WHOLE) for tile in TILES[dtype]),
            fold_kernel(vector.STORAGE[stored_as(dtype)].bytes),
            *(conv_image.kernels(dtype) if dtype in conv_image.DTYPES else ()),
            *(conv_halo.kernels(dtype) if dtype in conv_halo.DTYPES else ())]


def check_dtype(what: str, options: CudaOptions) -> None:
    """ValueError for a compute type that there is not, or not on this GPU."""
    if options.dtype not in TILES:
        raise ValueError(f"{what}: there is no compute type {options.dtype!r}; use one of "
                         f"{tuple(TILES)}")
    if options.dtype in MMA_DTYPES and number_of(options.arch) < 80:
        raise ValueError(f"{what}: dtype {options.dtype!r} needs the tensor cores of sm_80 or "
                         f"later, and this GPU is {options.arch}; use dtype 'float32'")


def prepare_conv2d(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec,
                   weights: list[Array | None], options: CudaOptions, tile: Tile | None = None,
                   splits: int | None = None, cluster: bool = False) -> Step:
    """Inputs x, weight (O, KH, KW, C / groups), [bias], [residual]; weight, bias are constants.

    tile, splits and cluster force the choice that `choose` makes otherwise. ValueError for tensors
    beyond 32-bit indices, weights that are not constant, kernels of more than 15 x 16 taps, and a
    compute type that the GPU is too old for.
    """
    if depthwise.fits(op, inputs):
        return depthwise.prepare_depthwise(op, inputs, output, weights, options)
    check_dtype("Conv2d", options)
    check_sizes(op.kind, inputs[0], output)
    own = own_kernel(op, inputs, output, options)
    if own is not None and tile is None:
        return own(op, inputs, output, weights, options)
    weight, bias = weight_and_bias(op.kind, weights)
    plain = as_gemm(op, inputs, output)
    if plain.groups < op.groups:
        together = op.groups // plain.groups
        weight = options.pack(weight, f"{together} groups together",
                              lambda w: merge(w, op.groups, together))
    return prepare_gemm(plain, op.activation, weight, bias, options,
                        decide(plain, options, tile, splits, cluster), inputs)


def own_kernel(op: Conv2d, inputs: list[TensorSpec], output: TensorSpec, options: CudaOptions
               ) -> Callable[..., Step] | None:
    """What prepares a layer for which there is a kernel of its own, without tiles to choose
    among; None for all others."""
    if depthwise.fits(op, inputs):
        return depthwise.prepare_depthwise
    if conv_image.fits(op, inputs, options.dtype):
        return conv_image.prepare_conv_image
    if conv_halo.serves(op, inputs, output, options):
        return conv_halo.prepare_conv_halo
    return None


def as_gemm(op: Conv2d, inputs: Sequence[TensorSpec], output: TensorSpec) -> Conv:
    """The convolution's sizes, narrow groups merged, patches as few pixels, before folding."""
    batch, height, width, channels = known(inputs[0].shape)
    _, out_height, out_width, out_channels = known(output.shape)
    _, *kernel, _ = known(inputs[1].shape)
    groups = op.groups // merged(out_channels, op.groups, NARROWEST)
    return patched(Conv(batch, height, width, channels, out_height, out_width, out_channels,
                        (kernel[0], kernel[1]), op.stride, *op.padding[:2], op.dilation, groups))


def decide(plain: Conv, options: CudaOptions, tile: Tile | None = None,
           splits: int | None = None, cluster: bool = False, vector_product: bool = False
           ) -> Choice:
    """What is given, else what was tuned, else a product of matrix and vector if that can be, else
    the least estimate."""
    name = problem(plain, options.dtype)
    tuned = options.tuned.get(name) if tile is splits is None else None
    if tuned is not None and (tuned.tile is not None or vector_product):
        choice, source = tuned, "tuned"
    elif vector_product and tile is splits is None:
        choice, source = Choice(None), "few samples"
    elif tile is not None and splits is not None:
        choice, source = Choice(tile, splits, cluster), "given"
    else:
        conv = folded(plain, vector.lanes(stored_as(options.dtype)))
        choice, source = choose(conv.pixels, conv.group_out, conv.depth, conv.groups,
                                options.dtype, options, tile, splits), "estimated"
    logger.debug("%s: %s (%s)", name, choice, source)
    return choice


def check_taps(plain: Conv, conv: Conv) -> None:
    """ValueError for more taps than the kernels' bit masks hold; plain: as it was before folding.
    """
    if any(k > most for k, most in zip(conv.kernel, conv_gemm.MOST_TAPS, strict=True)):
        raise ValueError(f"Conv2d: a kernel of {plain.kernel} is too large for the CUDA "
                         f"convolution, which takes {conv_gemm.MOST_TAPS}; run this network on "
                         f"the CPU")


def prepare_gemm(plain: Conv, activation: Unary | None, weight: Array, bias: Array | None,
                 options: CudaOptions, choice: Choice, inputs: Sequence[TensorSpec],
                 norm: Norm | None = None) -> Step:
    """The step of an implicit GEMM of a layer with these inputs; weight: any shape that OHWI can be
    reshaped to; norm: of x, which is not stored."""
    dtype, (tile, splits, cluster) = options.dtype, choice
    assert tile is not None
    lanes = vector.lanes(stored_as(dtype))
    conv = folded(plain, lanes)
    check_taps(plain, conv)
    cut = Cut.of(conv, tile, lanes, splits)
    end = WHOLE if cut.splits == 1 else CLUSTER if cluster else PLANE
    name, low, high = activation_of(activation)
    kernel = conv_kernel(dtype, tile, "clip" if end == PLANE else name, end,
                         norm.before if norm else "")

    def packing(w: Array) -> Array:
        packed = pack(w, plain, conv, tile, cut, lanes, tensor_cores=dtype != "float32")
        return options.upload(stored(packed, dtype))

    packed = options.pack(weight, f"conv_{dtype}_{tile.block_n}x{cut.row}_{plain.kernel}"
                                  f"_{conv.fold}", packing)
    packed_bias = options.upload(pack_bias(bias, conv, cut, padded=end != PLANE))
    packed_norm = options.upload(norm.packed(cut)) if norm else None
    grid = (-(-conv.pixels // tile.block_m) * cut.n_tiles, cut.splits, conv.groups)
    image_bytes = conv.batch * conv.height * conv.width * conv.channels // lanes * 16
    image_bytes = -(-image_bytes // 256) * 256 if conv.fold else 0
    plane_bytes = cut.splits * conv.pixels * conv.out_channels * 4 if end == PLANE else 0

    residual, same_pixels = len(inputs) > 3, known(inputs[0].shape)[-1] == conv.channels
    unit = part_unit(stored_as(dtype))
    reads = unit if same_pixels and not conv.fold else 0

    def bind(arrays: Sequence[Array], y: Array, workspace: Array) -> list[Launch]:
        launches = []
        x, last = arrays[0], arrays[3] if residual else None
        numbers = arguments(conv, lanes, cut, pixel_step(x) if reads else conv.channels)
        if conv.fold:
            image = workspace[:image_bytes]
            launches.append(fold_launch(plain, conv, lanes, x, image))
            x = image
        operands = x, x if packed_norm is None else packed_norm, packed, packed_bias
        if end != PLANE:
            added = (x, 0) if last is None else (last, 1)
            launches.append(Launch(kernel, grid, (*operands, *added, y, low, high, conv.pixels,
                                                  pixel_step(y), *numbers), cut.splits))
            return launches
        sums = workspace[image_bytes:image_bytes + plane_bytes].view(np.float32)
        launches.append(Launch(kernel, grid, (
            *operands, x, 0, sums, low, high, conv.pixels, conv.out_channels,
            *numbers)))     # the bias is not read here
        launches.append(reduction(stored_as(dtype), activation, sums, cut.splits, conv.pixels,
                                  conv.out_channels, packed_bias, last, y))
        return launches

    # The kernel walks through y and residual in the same steps.
    return Step(kernel.name, bind, image_bytes + plane_bytes, strided=0 if residual else unit,
                reads_strided=reads)
