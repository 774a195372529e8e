"""Ops that move data on CUDA: nothing may be lost, doubled or changed."""
import itertools

import ml_dtypes
import numpy as np
import pytest
from cuda_checks import COMPILED_DTYPES, DTYPES, assert_exact, assert_resources, run, run_step

from kernels import ops
from kernels.cuda import vector
from kernels.cuda.host import copy
from kernels.ops import TensorSpec


def numbered(*shape):
    """Whole numbers that float16 and bfloat16 can hold, neighbours differing."""
    return (np.arange(np.prod(shape)) % 251).astype(np.float32).reshape(shape)


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4))))
def test_every_permutation_of_four_axes(permutation, runner):
    assert_exact(ops.Transpose(permutation), numbered(2, 3, 4, 5), kernel="transpose_",
                 runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "permutation", "kernel"), [
    ((2, 33, 31, 8), (0, 3, 1, 2), "transpose_b{}_"),       # image layouts, tiles cut off
    ((2, 40, 6, 11), (0, 2, 3, 1), "transpose_b{}_"),
    ((1, 130, 66), (0, 2, 1), "transpose_b{}_"),            # several tiles each way
    ((2, 3, 9, 7), (0, 2, 3, 1), "transpose_copy_b{}x1"),   # the planes of a photo
    ((2, 3, 4, 16), (0, 2, 1, 3), "transpose_copy_b{}x"),   # whole vectors move
    ((2, 2, 3, 2, 3), (0, 2, 1, 3, 4), "transpose_copy_b{}x2"),    # five axes, three of them left
])
def test_transposes_by_dtype(shape, permutation, kernel, dtype, runner):
    bits = 32 if dtype == "float32" else 16
    assert_exact(ops.Transpose(permutation), numbered(*shape), dtype=dtype,
                 kernel=kernel.format(bits), runner=runner)


@pytest.mark.parametrize(("shape", "permutation"), [
    ((3, 2, 4, 3, 5), (4, 3, 2, 1, 0)), ((3, 4, 2, 2, 8), (0, 3, 1, 4, 2)),
    ((2, 3, 2, 3, 2, 3), (5, 3, 1, 4, 2, 0))])
def test_more_axes_than_a_kernel_walks_over(shape, permutation, runner):
    """A launch for each step along the shortest."""
    assert_exact(ops.Transpose(permutation), numbered(*shape), kernel="transpose_copy_",
                 runner=runner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("sizes", [(4,), (1, 2), (8, 16, 24)])
def test_concat_along_every_axis(axis, sizes, dtype, runner):
    parts = []
    for size in sizes:
        shape = [2, 3, 4, 8]
        shape[axis] = size
        parts.append(numbered(*shape) + len(parts))
    assert_exact(ops.Concat(axis), *parts, dtype=dtype, kernel="concat_copy_b", runner=runner)


def test_concat_takes_the_widest_vector_that_every_part_allows():
    step = copy.prepare_concat(ops.Concat(), [TensorSpec((2, 8), "float16")] * 2,
                               TensorSpec((2, 16), "float16"), [None, None], None)
    assert step.kernel == "concat_copy_b16x8"
    narrow = copy.prepare_concat(ops.Concat(), [TensorSpec((2, 6), "float16")] * 2,
                                 TensorSpec((2, 12), "float16"), [None, None], None)
    assert narrow.kernel == "concat_copy_b16x2"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "lanes"), [
    (ops.Slice(3, 16, 32), 8), (ops.Slice(-1, 4, 28), 4),   # channels, by vectors of 8 and of 4
    (ops.Slice(3, 1, 31), 1), (ops.Slice(3, 3, 32, 2), 1),  # odd ones; every other, as a shuffle
    (ops.Slice(1, 1, 4), 8), (ops.Slice(2, 0, 5, 2), 8),    # rows; every other column
    (ops.Slice(0, 1, 2), 8), (ops.Slice(1, 0, 5), 8)])      # an image; everything
def test_slices_take_the_widest_vectors(op, lanes, dtype, runner):
    bits, most = (32, 4) if dtype == "float32" else (16, 8)
    assert_exact(op, numbered(2, 5, 5, 32), dtype=dtype, runner=runner,
                 kernel=f"slice_copy_b{bits}x{min(lanes, most)}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("before", "after", "lanes"), [
    ((0, 1, 2, 0), (0, 2, 1, 0), 8),        # height and width: whole vectors of channels
    ((0, 0, 0, 8), (0, 0, 0, 16), 8),       # channels, by vectors
    ((0, 0, 0, 0), (0, 0, 0, 4), 4),        # by narrower ones
    ((0, 0, 0, 1), (0, 0, 0, 2), 1),
    ((1, 2, 0, 3), (0, 1, 2, 1), 1),        # every axis
    ((0, 3, 0, 0), (0, 0, 0, 0), 8),        # one side of one axis
    ((1, 0, 0, 0), (2, 0, 0, 0), 8),        # the batch
    ((0,) * 4, (0,) * 4, 8)])               # nothing
def test_padding_goes_around(before, after, lanes, dtype, runner):
    bits, most = (32, 4) if dtype == "float32" else (16, 8)
    assert_exact(ops.Pad(before, after, -3.5), numbered(2, 3, 4, 16), dtype=dtype, runner=runner,
                 kernel=f"pad_b{bits}x{min(lanes, most)}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["reflect", "edge"])
@pytest.mark.parametrize(("before", "after", "lanes"), [
    ((0, 1, 2, 0), (0, 2, 1, 0), 8),        # height and width
    ((0, 0, 0, 8), (0, 0, 0, 4), 1),        # channels
    ((1, 2, 0, 3), (0, 1, 2, 1), 1),        # every axis
    ((0,) * 4, (0,) * 4, 8)])
def test_padding_with_what_x_has_at_its_edges(before, after, lanes, mode, dtype, runner):
    bits, most = (32, 4) if dtype == "float32" else (16, 8)
    assert_exact(ops.Pad(before, after, mode=mode), numbered(2, 3, 4, 16), dtype=dtype,
                 runner=runner, kernel=f"pad_{mode}_b{bits}x{min(lanes, most)}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, np.inf, -np.inf, np.nan, 1e30])
def test_padding_is_the_value_rounded_once(value, dtype, runner):
    op = ops.Pad((1, 0), (0, 2), value)
    y = run(op, numbered(3, 6), dtype=dtype, runner=runner)
    with np.errstate(over="ignore"):
        expected = np.pad(numbered(3, 6).astype(NUMPY[dtype]), ((1, 0), (0, 2)),
                          constant_values=np.float32(value).astype(NUMPY[dtype]))
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(("shape", "before", "after"), [
    ((5,), (2,), (1,)), ((3, 8), (1, 0), (0, 0)),
    ((2, 2, 3, 2, 4), (0, 0, 1, 1, 0), (0, 0, 0, 1, 0)),
    ((2, 3, 1, 2, 2, 2), (0, 1, 0, 0, 0, 0), (0, 1, 2, 0, 0, 0))])
def test_padding_of_any_rank_that_merges(shape, before, after, runner):
    assert_exact(ops.Pad(before, after, 7.0), numbered(*shape), kernel="pad_", runner=runner)


def test_padding_of_five_axes_is_refused():
    with pytest.raises(ValueError, match=r"Pad: 5 axes of sizes .* walk over at most 4"):
        run(ops.Pad((1,) * 5, (0,) * 5), numbered(2, 3, 2, 3, 2))


def test_bits_of_nan_are_kept(runner):
    odd = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)
    for op, x in ((ops.Concat(0), odd), (ops.Reshape((2, 1)), odd),
                  (ops.Transpose((1, 0)), odd.reshape(2, 1)), (ops.Slice(0, 0, 2), odd),
                  (ops.Pad((0,), (0,)), odd)):
        y = run(op, x, runner=runner)
        assert np.array_equal(y.reshape(-1).view(np.uint32), odd.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [ops.Reshape((4, -1)), ops.Flatten(1), ops.Flatten(2)])
def test_reshape_keeps_the_order(op, dtype, runner):
    assert_exact(op, numbered(2, 3, 4, 5), dtype=dtype, kernel="copy_b", runner=runner)


NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EDGES = [0.0, -0.0, 1 + 2 ** -9, 1 + 3 * 2 ** -12, 65504, 1e6, -1e-6, 3e38, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(DTYPES, 2)))
@pytest.mark.parametrize("size", [1, 11, 256])
def test_conversion_rounds_to_nearest(source, target, size, runner):
    with np.errstate(over="ignore"):
        x = np.resize(np.array(EDGES), size).astype(NUMPY[source])
        expected = x.astype(np.float32).astype(NUMPY[target])
    step = copy.prepare_convert(TensorSpec(x.shape, source), TensorSpec(x.shape, target))
    assert step.kernel.startswith(f"copy_{vector.short(source, target)}x")
    y = run_step(step, [x], TensorSpec(x.shape, target), runner=runner)
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 5, 8), (2, 3, 5, 7)])
def test_layout_and_dtype_change_in_one_go(shape, target, runner):
    x, op = numbered(*shape), ops.Transpose((0, 2, 3, 1))
    output = TensorSpec(ops.known(op.output_shape(shape)), target)
    step = copy.prepare_transpose(op, [TensorSpec(shape)], output, [None], None)
    y = run_step(step, [x], output, runner=runner)
    np.testing.assert_array_equal(y.astype(np.float32), x.transpose(op.permutation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "padded", "group"), [
    ((2, 4, 6, 3), 3, 4), ((2, 4, 6, 3), 4, 4), ((1, 5, 5, 3), 8, 1), ((1, 5, 5, 3), 3, 1),
    ((1, 28, 28, 1), 1, 4)])
def test_photos_become_inputs(shape, padded, group, dtype, runner):
    channels = shape[-1]
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean, std = [(123.675, 116.28, 103.53)[:channels], (58.395, 57.12, 57.375)[:channels]]
    output = TensorSpec((*shape[:3], padded), dtype)
    step = copy.prepare_pixels(TensorSpec(shape, "uint8"), output, mean, std)
    assert step.kernel == f"pixels_u8x{channels}_{vector.short(dtype)}x{padded}_p{group}"
    y = run_step(step, [x], output, runner=runner).astype(np.float64)
    expected = (x - np.array(mean)) / np.array(std)
    unit = {"float32": 2 ** -24, "float16": 2 ** -11, "bfloat16": 2 ** -8}[dtype]
    bound = unit * np.abs(expected) + 4 * 2 ** -24 * (x / np.array(std) + 3)
    assert (np.abs(y[..., :channels] - expected) <= bound).all()
    assert (y[..., channels:] == 0).all()


def test_photos_that_do_not_fit_are_refused():
    target = TensorSpec((1, 4, 4, 3), "float16")
    with pytest.raises(ValueError, match="photos are uint8"):
        copy.prepare_pixels(TensorSpec((1, 4, 4, 3)), target, (0,) * 3, (1,) * 3)
    with pytest.raises(ValueError, match="only channels may be added"):
        copy.prepare_pixels(TensorSpec((1, 4, 5, 3), "uint8"), target, (0,) * 3, (1,) * 3)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_resources(dtype, arch):
    for kernel in copy.kernels(dtype):
        found = assert_resources(kernel, arch)
        if kernel.name in ("copy_b32x4", "copy_b16x8", "pad_b32x4", "pad_b16x8"):
            assert found.counts["LDG.E.128"] == found.counts["STG.E.128"] == 1
