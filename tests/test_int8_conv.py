"""Convolutions and Linear layers of 8 bits, by tiles and by vectors: exact where scales are powers
of two, and within a code of the reference for others."""
import numpy as np
from conv_problems import problems
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_checks import (
    IN,
    OUT,
    WEIGHT,
    codes,
    every_int8_unit,
    expected_codes,
    quantise,
    run_prepared,
    values,
    weights,
)

from kernels import reference
from kernels.cpu.dot_units import BLOCK, COLUMNS
from kernels.cpu.host import dot_conv
from kernels.ops import Conv2d

ANY = problems([1, 2, 3, 4, 8, 17, 32, 64], [1, 2, 5, COLUMNS, COLUMNS + 1, BLOCK,
                                             BLOCK + COLUMNS + 3], 12)


def layer(op, n, h, w, c, outputs, kernel, residual=False, seed=0):
    """(x, weight, bias[, residual]) as numbers."""
    rng = np.random.default_rng(seed)
    arrays = [values(rng, IN, n, h, w, c), weights(rng, outputs, *kernel, c // op.groups),
              (rng.integers(-99, 100, outputs) * IN.scale * WEIGHT).astype(np.float32)]
    if residual:
        shape = op.output_shape(*(array.shape for array in arrays))
        arrays.append(rng.integers(-9, 10, shape).astype(np.float32))
    return arrays


@every_int8_unit
@given(problem=ANY, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_convolution_is_exact(unit, problem, seed):
    """From numbers or codes, to either."""
    op, shape = problem
    op = Conv2d(op.stride, op.padding, op.dilation, op.groups)
    x, *rest = layer(op, *shape, seed=seed)
    last = Conv2d(op.stride, op.padding, op.dilation, op.groups, quantise(OUT))
    grids = [IN, *[None] * len(rest)]
    for given_x in (x, codes(x, IN)):
        y, step = run_prepared(dot_conv.prepare_conv2d, op, [given_x, *rest], grids, unit=unit)
        np.testing.assert_array_equal(y, reference.run(op, x, *rest))
        assert f"_int8_{unit.name}_" in step.kernel or "depthwise" in step.kernel
        if "depthwise" in step.kernel:
            break
        y, _ = run_prepared(dot_conv.prepare_conv2d, last, [given_x, *rest], grids, OUT, unit=unit)
        np.testing.assert_array_equal(y, expected_codes(last, [x, *rest], OUT))
