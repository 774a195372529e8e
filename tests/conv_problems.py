"""Convolutions of any shape, and arrays for them."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from kernels import ops
from kernels.ops import Conv2d


def arrays(make, op: Conv2d, n, h, w, c, o, kernel, residual=False, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    x, weight = make(rng, n, h, w, c), make(rng, o, *kernel, c // op.groups)
    found = [x, weight, make(rng, o)]
    if residual:
        found.append(make(rng, *op.output_shape(x.shape, weight.shape)))
    return found


@st.composite
def problems(draw, channels: Sequence[int], out_channels: Sequence[int], height: int):
    """(op, shape as `arrays` takes it) of any convolution that fits, one-sided padding, dilation,
    groups, stride > kernel; channels are those of a group, height is that of the image at most."""
    small = st.integers(1, 4)
    kernel = draw(small), draw(small)
    dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    h = draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), height))
    w = draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 40))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c = groups * draw(st.sampled_from(channels))
    o = groups * draw(st.sampled_from(out_channels))
    op = Conv2d((draw(st.integers(1, 4)), draw(st.integers(1, 4))), padding, dilation, groups,
                draw(st.sampled_from([None, ops.Relu(), ops.Clip(-3.0, 6.0)])))
    # One filter a channel is depthwise.py's.
    if groups == c == o:
        o = 2 * o
    return op, (draw(st.integers(1, 3)), h, w, c, o, kernel, draw(st.booleans()))
