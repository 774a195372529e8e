"""Ops that move data: nothing may be lost, doubled or changed."""
import itertools

import numpy as np
import pytest
from checks import assert_exact, run

from kernels import ops
from kernels.axes import as_matrices
from kernels.cpu.copy import PIECE


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4))))
def test_every_permutation_of_four_axes(permutation):
    assert_exact(ops.Transpose(permutation), numbered(2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 33, 31, 3), (1, 7, 9, 65), (1, 5, 100)])
def test_image_layouts_run_in_blocks(shape):
    to_first = (0, len(shape) - 1, *range(1, len(shape) - 1))
    to_last = (0, *range(2, len(shape)), 1)
    for permutation in (to_first, to_last):
        assert_exact(ops.Transpose(permutation), numbered(*shape), kernel="transpose_f32")


@pytest.mark.parametrize("permutation", [(3, 2, 1, 0), (1, 0, 3, 2), (2, 0, 3, 1)])
def test_other_permutations_go_element_by_element(permutation):
    assert_exact(ops.Transpose(permutation), numbered(2, 3, 4, 5), kernel="transpose_any_f32")
    assert_exact(ops.Transpose(permutation), numbered(1, 33, 1, 70))


def test_which_permutations_swap_two_runs_of_axes():
    assert as_matrices((2, 3, 4, 5), (0, 3, 1, 2)) == (2, 12, 5)
    assert as_matrices((2, 3, 4, 5), (3, 2, 1, 0)) is None


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_concat_along_every_axis(axis, parts):
    arrays = []
    for i in range(parts):
        shape = [2, 3, 4, 5]
        shape[axis] = i + 1
        arrays.append(numbered(*shape) + 1000 * i)
    assert_exact(ops.Concat(axis), *arrays, kernel="concat_f32")


@pytest.mark.parametrize("axis", [3, -1])
def test_a_concat_may_be_a_part_of_another(axis):
    arrays = [numbered(2, 3, 4, channels) + 1000 * channels for channels in (5, 1, 8)]
    assert_exact(ops.Concat(axis), *arrays, gap=6)


@pytest.mark.parametrize("shape", [(2, 7, 9, 38), (7, 9, 11), (9, 8), (17,), (12,)])
@pytest.mark.parametrize(("start", "end", "step"), [
    (0, 0, 1), (1, 0, 1), (0, 1, 1), (2, 3, 1), (0, 0, 2), (1, 0, 2), (1, 1, 3), (2, 0, 3),
    (0, 0, 6)])
def test_slice_along_every_axis(shape, start, end, step):
    """end: elements that are left out there."""
    for axis in range(-1, len(shape)):
        size = shape[axis]
        if size > start + end:
            even = step == 1 or -(-(size - end - start) // step) * step == size
            assert_exact(ops.Slice(axis, start, size - end, step), numbered(*shape),
                         kernel="slice_f32" if even else "slice_any_f32")


@pytest.mark.parametrize(("before", "after"), [
    ((0, 0, 0, 0), (0, 0, 0, 0)), ((0, 1, 1, 0), (0, 1, 1, 0)), ((0, 0, 1, 0), (0, 2, 0, 0)),
    ((0, 3, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 2), (0, 0, 0, 3)), ((0, 1, 0, 2), (0, 0, 3, 0)),
    ((1, 0, 0, 0), (2, 0, 0, 0)), ((1, 0, 2, 0), (0, 0, 0, 0)), ((2, 1, 3, 1), (1, 2, 1, 4))])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (1, 7, 1, 33)])
def test_pad_around_every_axis(before, after, shape):
    for value in (0.0, -1.5):
        assert_exact(ops.Pad(before, after, value), numbered(*shape) + 1, kernel="pad_f32")


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 6])
def test_pad_of_any_rank(rank):
    shape = (3, 2, 4, 1, 2, 5)[:rank]
    assert_exact(ops.Pad(tuple(range(rank)), (1,) * rank, 7.0), numbered(*shape))
    assert_exact(ops.Pad((0,) * (rank - 1) + (2,), (0,) * rank, 7.0), numbered(*shape))
    assert_exact(ops.Pad((2,) + (0,) * (rank - 1), (0,) * rank, 7.0), numbered(*shape))


@pytest.mark.parametrize("mode", ["reflect", "edge"])
@pytest.mark.parametrize(("before", "after"), [
    ((0, 1, 1, 0), (0, 1, 1, 0)), ((0, 2, 0, 0), (0, 1, 0, 0)), ((0, 0, 3, 0), (0, 0, 1, 0)),
    ((0, 0, 0, 4), (0, 0, 0, 2)), ((1, 0, 0, 0), (0, 0, 0, 0)), ((1, 1, 3, 1), (1, 2, 1, 4)),
    ((0, 0, 0, 0), (0, 0, 0, 0))])
def test_pad_with_what_x_has_at_its_edges(before, after, mode):
    for shape in ((2, 3, 4, 5), (2, 9, 5, 33)):
        assert_exact(ops.Pad(before, after, mode=mode), numbered(*shape) + 1,
                     kernel=f"pad_{mode}_f32")
    assert_exact(ops.Pad(before[-1:], after[-1:], mode=mode), numbered(5))


def test_an_edge_may_be_repeated_more_often_than_there_are_elements():
    assert_exact(ops.Pad((0, 5, 4), (0, 6, 0), mode="edge"), numbered(2, 1, 3))
    with pytest.raises(ValueError, match="reflect more elements than"):
        ops.Pad((0, 3), (0, 0), mode="reflect").output_shape((2, 3))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_pad_with_what_is_no_number(value):
    y = run(ops.Pad((0, 1), (2, 0), value), numbered(2, 3))
    np.testing.assert_array_equal(y, np.pad(numbered(2, 3), ((0, 2), (1, 0)),
                                            constant_values=value))


def test_what_is_large_is_copied_in_pieces():
    x = numbered(3, 2 * PIECE + 7)
    assert_exact(ops.Concat(0), x, x + 1)
    assert_exact(ops.Concat(1), x, x[:, :5])
    assert_exact(ops.Slice(1, 3, PIECE + 3), x)
    assert_exact(ops.Slice(1, 3, PIECE + 4), x)
    assert_exact(ops.Slice(0, 1, 3), x)
    assert_exact(ops.Reshape((-1,)), x)


def test_bits_of_nan_are_kept():
    odd = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)
    for y in (run(ops.Concat(0), odd), run(ops.Reshape((2, 1)), odd),
              run(ops.Transpose((1, 0)), odd.reshape(2, 1)),
              run(ops.Slice(0, 0, 2), np.concatenate([odd, odd])),
              run(ops.Slice(0, 0, 3, 2), odd[[0, 0, 1, 1]]),
              run(ops.Pad((1,), (0,)), odd)[1:], run(ops.Pad((0,), (2,), mode="edge"), odd)[:2]):
        assert np.array_equal(y.reshape(-1).view(np.uint32), odd.view(np.uint32))


@pytest.mark.parametrize("op", [ops.Reshape((4, -1)), ops.Reshape((0, 3, 20)), ops.Flatten(1),
                                ops.Flatten(0), ops.Flatten(2)])
def test_reshape_keeps_the_order(op):
    assert_exact(op, numbered(2, 3, 4, 5))
