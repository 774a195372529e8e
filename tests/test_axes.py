"""Fewer axes, and the pixels of an array that may be some channels of another."""
import numpy as np
import pytest

from kernels.axes import flat_pixels


@pytest.mark.parametrize("shape", [(2, 3, 4, 9), (1, 1, 4, 9), (3, 1, 1, 9), (1, 1, 1, 9), (5, 9)])
@pytest.mark.parametrize(("first", "end"), [(0, 9), (0, 4), (3, 9), (8, 9)])
def test_every_pixel_is_where_the_step_says(shape, first, end):
    wide = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    part = wide[..., first:end]
    memory, step = flat_pixels(part)
    assert np.shares_memory(memory, wide)
    assert memory.ctypes.data == part.ctypes.data
    assert memory.flags.c_contiguous
    assert memory.size <= wide.size - first
    for pixel, expected in enumerate(part.reshape(-1, end - first)):
        found = memory[pixel * step:pixel * step + end - first]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("cut", [
    lambda y: y[:, 1:], lambda y: y[:, ::2], lambda y: y[..., ::2], lambda y: y[::-1],
    lambda y: y.transpose(0, 2, 1, 3), lambda y: np.broadcast_to(y[:, :, :1], y.shape)])
def test_other_layouts_are_refused(cut):
    y = cut(np.zeros((2, 3, 4, 5), np.float32))
    with pytest.raises(ValueError, match="is no part of the channels of a C-contiguous one"):
        flat_pixels(y)
