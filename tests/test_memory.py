"""Memory for arrays, and copies into it."""
import numpy as np
import pytest

from kernels.memory import ALIGNMENT, aligned, copy_into


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("axes", [(0, 2, 3, 1), (0, 3, 2, 1), (0, 1, 2, 3), (3, 2, 1, 0)])
def test_any_layout_is_copied(channels, axes):
    array = np.arange(2 * channels * 4 * 6, dtype=np.float32).reshape(2, channels, 4, 6)
    for given in (array.transpose(axes), array[:, :, ::-1, ::2].transpose(axes)):
        target = np.full(given.shape, np.nan, np.float32)
        copy_into(target, given)
        np.testing.assert_array_equal(target, given)


def test_an_aligned_copy_begins_with_a_cache_line():
    for size in (1, 7, 100):
        copy = aligned(np.arange(size, dtype=np.float32))
        assert copy.ctypes.data % ALIGNMENT == 0
        np.testing.assert_array_equal(copy, np.arange(size))
