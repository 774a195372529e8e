"""Ops that move data: nothing may be lost, doubled or changed."""
import itertools

import numpy as np
import pytest
from checks import assert_exact, run

from kernels import ops
from kernels.axes import as_matrices


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


def test_bits_of_nan_are_kept():
    odd = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)
    for y in (run(ops.Concat(0), odd), run(ops.Reshape((2, 1)), odd),
              run(ops.Transpose((1, 0)), odd.reshape(2, 1))):
        assert np.array_equal(y.reshape(-1).view(np.uint32), odd.view(np.uint32))


@pytest.mark.parametrize("op", [ops.Reshape((4, -1)), ops.Reshape((0, 3, 20)), ops.Flatten(1),
                                ops.Flatten(0), ops.Flatten(2)])
def test_reshape_keeps_the_order(op):
    assert_exact(op, numbered(2, 3, 4, 5))
