"""The machine code for AMX itself, on CPUs that lack it: each of its instructions is trapped and
done by amx_traps.py, all others run as they are."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.registry import cpu_target

from kernels.cpu.dot_units import AMX_BF16, missing

PROGRAM = """
import sys
import numpy as np
sys.path.insert(0, "tests")
import amx_traps
import test_bf16_matmul
from bf16_checks import backend, narrow, prepare_stored
from checks import aligned, integers
from test_bf16_conv import WAYS, arrays
from test_bf16_simd import BLOCK, bits, numbers, products, tile_sums
from test_bf16_values import IN_PLACE
from kernels import reference
from kernels.step import Options
from kernels.cpu.dot_units import AMX_INT8
from kernels.cpu.host import dot_conv, unit_choice
from kernels.ops import Linear
from int8_checks import IN, codes, specs
from test_int8_conv import layer

amx_traps.install()
unit = unit_choice.BF16["amx"]
backend.PREPARE.update(backend.narrow())

problems = [(op, arrays(integers, op, 2, *sizes, residual=residual))
            for *sizes, op, _, _ in WAYS for residual in (False, True)]
problems += [(Linear(), test_bf16_matmul.arrays(integers, shape, outputs))
             for shape in ((8, 77), (33, 64), (70, 5)) for outputs in (16, 50)]
problems += [(op, [narrow(x), *rest]) for op, (x, *rest) in problems]
problems += [(op, [narrow(x), *rest]) for h, w, c, kernel, op in IN_PLACE
             for x, *rest in [arrays(integers, op, 2, h, w, c, 40, kernel)]]
for op, given in problems:
    before = amx_traps.PRODUCTS[0]
    step = prepare_stored(op, given, "float32", unit=unit)
    y = np.full(op.output_shape(*(array.shape for array in given)), np.nan, np.float32)
    for launch in step.bind(given, y, aligned(step.workspace)):
        launch()
    assert "_bf16_amx_32x32" in step.kernel
    assert np.array_equal(y, reference.run(op, *given)), op
    assert amx_traps.PRODUCTS[0] > before
    assert not amx_traps.CONFIGURATION.any()        # the tiles were released

for *sizes, op, _, _ in WAYS:
    before = amx_traps.PRODUCTS[0]
    x, *rest = layer(op, 2, *sizes)
    given = [codes(x, IN), *rest]
    step = dot_conv.prepare_conv2d(op, *specs(op, given, [IN, None, None]), [None, *rest],
                                   Options(1), AMX_INT8)
    y = np.full(op.output_shape(*(array.shape for array in given)), np.nan, np.float32)
    for launch in step.bind(given, y, aligned(step.workspace)):
        launch()
    assert "_int8_amx_32x32" in step.kernel
    assert np.array_equal(y, reference.run(op, x, *rest)), op
    assert amx_traps.PRODUCTS[0] > before
    assert not amx_traps.CONFIGURATION.any()

rng = np.random.default_rng(0)
x, w = numbers(rng, 32, 96), numbers(rng, 96, BLOCK)
sums = np.full(32 * BLOCK, np.nan, np.float32)
products(unit, bits(x), bits(w.reshape(48, 2, BLOCK).transpose(0, 2, 1)), sums, 3)
assert np.array_equal(sums.reshape(32, BLOCK), tile_sums(x, w))
print("right")
"""


@pytest.mark.skipif(not missing(AMX_BF16), reason="this CPU has AMX, and the other tests run it")
def test_the_machine_code_for_tiles_is_right():
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    environment = {**os.environ, "NUMBA_CPU_FEATURES": f"{features},+amx-tile,+amx-bf16,+amx-int8"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent.parent,
                          env=environment, capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr
