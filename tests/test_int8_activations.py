"""Activations whose results become codes of 8 bits before they leave the registers."""
from dataclasses import replace

import numpy as np
import pytest
from bf16_checks import every
from checks import EPS
from int8_checks import IN, codes, run_prepared, values, weights
from test_bf16_activations import sweep
from test_passes import Net, check, kinds

from cnn import passes
from kernels import ops, reference
from kernels.cpu import scalar
from kernels.cpu.dot_units import BLOCK, COLUMNS, VNNI_EMULATED_INT8
from kernels.cpu.host import depthwise, dot_conv, norm, unit_choice
from kernels.cpu.sizes import LANES
from kernels.ops import Conv2d, FakeQuantize, Grid

OUT = Grid(0.0625, 5)
# (op, its name in scalar.py, error where it is large, error anywhere)
FIRST = [(ops.Gelu(), "gelu", 0.0, 2.0 ** -13.6),
         (ops.Gelu(tanh=True), "gelu_tanh", 2.0 ** -13, 0.0),
         (ops.Silu(), "silu", 2.0 ** -13, 0.0), (ops.HardSwish(), "hard_swish", 0.0, 0.0)]
every_first = pytest.mark.parametrize("first", [op for op, *_ in FIRST], ids=repr)


@pytest.mark.parametrize(("op", "name", "relative", "absolute"), FIRST)
def test_what_is_quantised_is_off_by_a_fraction_of_a_code(op, name, relative, absolute):
    x = np.concatenate([np.linspace(-30, 30, 300_001), np.linspace(-1e-3, 1e-3, 1001)])
    x = x.astype(np.float32)
    y, expected = np.empty_like(x), reference.run(op, x)
    sweep(getattr(scalar, f"code_of_{name}"), x, y, 1, 0)
    bound = relative * np.abs(expected) + absolute + 4 * EPS * np.abs(x)
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize(("op", "name", "relative", "absolute"), FIRST)
def test_far_from_zero_it_is_nothing_or_all(op, name, relative, absolute):
    x = np.array([np.nan, np.inf, 1e30, 50, 0.0, -50, -1e6, -1e30], np.float32)
    y = np.empty_like(x)
    sweep(getattr(scalar, f"code_of_{name}"), x, y, 4, 3)
    assert np.isnan(y[0])
    np.testing.assert_allclose(y[1:4], 4 * x[1:4] + 3, rtol=1e-6)
    assert (np.abs(y[4:] - 3) < 1e-6).all()


def assert_codes(found, op, arrays, grid):
    """Of the numbers that a layer gives before it quantises them; off by less than a fiftieth of a
    code before that is rounded."""
    plain = replace(op, activation=op.activation.first)
    exact = reference.run(plain, *arrays) / grid.scale + grid.zero_point
    assert np.abs(found - np.clip(exact, 0, 255)).max() <= 0.52
    assert len(np.unique(found)) > 60


def quantised(first, grid=OUT):
    return FakeQuantize(*grid, first=first)


def layer(rng, outputs, channels, *kernel):
    """(weight, bias) whose sums of inputs of IN are some -10 to 20."""
    weight = weights(rng, outputs, *kernel, channels, scale=2.0 ** -12)
    return weight, rng.uniform(-4, 8, outputs).astype(np.float32)


@every({name: unit_choice.INT8[name] for name in ("amx", "vnni_emulated")})
@pytest.mark.parametrize("outputs", [5, COLUMNS, BLOCK + 3])
def test_convolutions_write_it(unit, outputs):
    """By tiles, which multiply meanwhile, and by vectors. Blocks of one vector of outputs and of
    two, with a residual and without."""
    rng, op = np.random.default_rng(0), Conv2d(padding=(1, 1, 1, 1),
                                               activation=quantised(ops.Gelu()))
    x = values(rng, IN, 2, 9, 7, 12)
    given = [x, *layer(rng, outputs, 12, 3, 3)]
    other = rng.standard_normal((2, 9, 7, outputs), np.float32)
    for arrays in (given, [*given, other]):
        grids = [IN, *[None] * (len(arrays) - 1)]
        y, step = run_prepared(dot_conv.prepare_conv2d, op, [codes(x, IN), *arrays[1:]], grids,
                               OUT, unit=unit)
        assert step.kernel.endswith("_gelu_fakequantize")
        assert_codes(y, op, arrays, OUT)


def test_numbers_that_are_not_stored_as_codes_are_the_same():
    """Where something reads it that takes no codes; test_traced.py has all."""
    rng = np.random.default_rng(1)
    op = Conv2d(activation=quantised(ops.HardSwish()))
    x = values(rng, IN, 1, 9, 7, 12)
    arrays = [x, *layer(rng, BLOCK, 12, 1, 1)]
    y, _ = run_prepared(dot_conv.prepare_conv2d, op, arrays, [IN, None, None],
                        unit=VNNI_EMULATED_INT8)
    assert_codes(y / OUT.scale + OUT.zero_point, op, arrays, OUT)


@pytest.mark.parametrize("first", [ops.Silu(), ops.HardSwish()], ids=repr)
def test_depthwise_convolutions_and_batch_norms_write_it(first):
    rng = np.random.default_rng(2)
    zero = Grid(IN.scale, 0)        # around an image are codes of 0
    x = values(rng, zero, 2, 9, 14, 37) / 16
    op = Conv2d(padding=(1, 1, 1, 1), groups=37, activation=quantised(first))
    arrays = [x, *layer(rng, 37, 1, 3, 3)]
    arrays[1] *= 16

    def prepare(op, inputs, output, constants, options):
        return depthwise.prepare_depthwise(op, inputs, output, *arrays[1:], options)
    y, _ = run_prepared(prepare, op, arrays, [None] * 3, OUT)
    assert_codes(y, op, arrays, OUT)

    op = ops.BatchNorm(activation=quantised(first))
    arrays = [rng.uniform(-6, 14, (2, 3, 50, 37)).astype(np.float32), np.ones(37, np.float32),
              *(rng.uniform(-1, 1, 37).astype(np.float32) for _ in range(2)),
              rng.uniform(0.5, 1, 37).astype(np.float32)]
    y, _ = run_prepared(norm.prepare_batch_norm, op, arrays, [None] * 5, OUT)
    assert_codes(y, op, arrays, OUT)


# ---- how layers come by it --------------------------------------------------------------------

@every_first
def test_a_layer_takes_in_both(first):
    net, last = Net(4, 4, 3), FakeQuantize(0.5, 100)
    done = check(net.graph(net.add(ops.Transpose((0, 2, 3, 1)),
                                   net.add(last, net.add(first, net.conv(net.x, 3, 4))))))
    assert "FakeQuantize" not in kinds(done)
    assert done.nodes[0].op.activation == replace(last, first=first)


@pytest.mark.parametrize(("first", "last"), [
    (ops.Tanh(), FakeQuantize(0.5, 100)), (ops.Gelu(), FakeQuantize(0.5, 100, relu=True))])
def test_others_stay_two(first, last):
    """Functions that no kernel has together."""
    net = Net(4, 4, 3)
    graph = net.graph(net.add(ops.Transpose((0, 2, 3, 1)),
                              net.add(last, net.add(first, net.conv(net.x, 3, 4)))))
    done = passes.optimise(graph)
    assert done.nodes[0].op.activation == first
    assert "FakeQuantize" in kinds(done)


def test_an_activation_that_others_read_stays():
    net, last = Net(4, 4, 3), FakeQuantize(0.5, 100)
    gelu = net.add(ops.Gelu(), net.conv(net.x, 3, 4))
    done = passes.optimise(net.graph(*(net.add(ops.Transpose((0, 2, 3, 1)), value)
                                       for value in (gelu, net.add(last, gelu)))))
    assert kinds(done).count("FakeQuantize") == 1


# ---- layer norms ------------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [1, 7, 20])
@pytest.mark.parametrize("channels", [3, LANES, 5 * LANES + 3])
def test_layer_norms_write_codes(rows, channels):
    rng, grid = np.random.default_rng(3), Grid(0.03125, 101)
    op = ops.LayerNorm(activation=FakeQuantize(*grid))
    arrays = [rng.uniform(-6, 14, (2, rows, channels)).astype(np.float32),
              *(rng.uniform(-2, 2, channels).astype(np.float32) for _ in range(2))]
    exact = reference.run(ops.LayerNorm(), *arrays) / grid.scale + grid.zero_point
    for output in (grid, None):     # as codes, and as the numbers that these stand for
        y, step = run_prepared(norm.prepare_layer_norm, op, arrays, [None] * 3, output)
        assert step.kernel == "layer_norm_f32_fakequantize"
        found = y if output else np.rint(y / grid.scale) + grid.zero_point
        assert np.abs(found - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-3


def test_a_layer_norm_takes_in_what_quantises_it():
    net, last = Net(4, 4, 8), FakeQuantize(0.5, 100)
    value = net.add(ops.Transpose((0, 2, 3, 1)), net.x)
    for relu in (False, True):      # which would clip at another code
        normal = net.add(ops.LayerNorm(), value, net.weight(8), net.weight(8))
        done = check(net.graph(net.add(replace(last, relu=relu), normal)))
        assert kinds(done).count("FakeQuantize") == relu
        assert done.nodes[0].op.activation == (None if relu else last)
