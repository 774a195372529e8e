"""Values that pass in codes of 8 bits from one layer to another on the CPU: kernels that read and
write them beside those that multiply them, and which values they are."""
import numpy as np
import pytest
from checks import EPS, normal
from code_checks import ABOVE, EVEN, ODD, SMALL, chain, in_codes, of_norm, run_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_checks import codes, expected_codes, quantise, stored, values, weights
from test_depthwise import problems

from cnn import devices
from cnn.storage import storage
from kernels import ops, reference
from kernels.cpu.host import narrow
from kernels.cpu.sizes import LANES
from kernels.ops import Conv2d, Grid, Linear, TensorSpec
from kernels.step import Narrow, Options

# ---- kernels ----------------------------------------------------------------------------------

def quantised(op, grid):
    return type(op)(op.stride, op.padding, op.dilation, op.groups, quantise(grid))


def of_depthwise(op, n, h, w, c, kernel, seed=0, grid=ABOVE):
    """(x on a grid, weight, bias): whole numbers times a power of two."""
    rng = np.random.default_rng(seed)
    return [values(rng, grid, n, h, w, c), weights(rng, c, *kernel, 1),
            rng.integers(-99, 100, c).astype(np.float32)]


def assert_codes_right(op, arrays, grid, x_grid, kernel, constants):
    """Each input and output as float32 and as codes: exactly the reference's numbers."""
    expected, x, rest = reference.run(op, *arrays), arrays[0], arrays[1:]
    grids = [x_grid, *[None] * len(rest)]
    of_codes = TensorSpec(expected.shape, "uint8", grid)
    for given_x in (x, codes(x, x_grid)):
        for output, right in ((of_codes, codes(expected, grid)), (None, expected)):
            y = run_codes(op, [given_x, *rest], grids, output, kernel, weights=constants)
            np.testing.assert_array_equal(y, right)


@given(problems(), st.integers(0, 99), st.integers(0, 127), st.sampled_from([0, 37, 255]))
@settings(max_examples=60, deadline=None)
def test_depthwise_convolutions_of_any_window_are_exact(problem, seed, half, zero_point):
    """Around an image are numbers that are 0, whatever code that is."""
    op, shape = problem
    grid, x_grid = Grid(4.0, 2 * half), Grid(0.5, zero_point)
    assert_codes_right(quantised(op, grid), of_depthwise(op, *shape, seed=seed, grid=x_grid), grid,
                       x_grid, "depthwise_", (1, 2))


@pytest.mark.parametrize("width", [1, 2, 6, 7, 8, 14, 15, 29])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)])
def test_depthwise_convolutions_of_common_windows_are_exact_at_every_width(width, kernel, stride):
    p = kernel // 2
    op = Conv2d((stride, stride), (p, p, p, p), (1, 1), LANES + 3, quantise(EVEN))
    assert_codes_right(op, of_depthwise(op, 2, 6, width, LANES + 3, (kernel, kernel)), EVEN, ABOVE,
                       f"depthwise_{kernel}x{kernel}_", (1, 2))


def test_depthwise_codes_reach_both_ends_and_meet_ties():
    op = Conv2d(padding=(1, 1, 1, 1), groups=40, activation=quantise(EVEN))
    x, weight, bias = of_depthwise(op, 2, 14, 15, 40, (3, 3))
    found = expected_codes(op, [x, weight, bias], EVEN)
    assert (found.min(), found.max()) == (0, 255)
    sums = reference.run(Conv2d(padding=(1, 1, 1, 1), groups=40), x, weight, bias) / EVEN.scale
    assert (sums % 1 == 0.5).any()


@given(problems(), st.integers(0, 99), st.floats(0.01, 0.1), st.floats(0.5, 2))
@settings(max_examples=30, deadline=None)
def test_depthwise_codes_on_any_scales_are_off_by_one_at_ties_alone(problem, seed, fine, coarse):
    op, shape = problem
    *shape, c, kernel = shape
    rng, x_grid, grid = np.random.default_rng(seed), Grid(fine, 0), Grid(coarse, 100)
    x, rest = values(rng, x_grid, *shape, c), [normal(rng, c, *kernel, 1), normal(rng, c)]
    last = quantised(op, grid)
    y = run_codes(last, [codes(x, x_grid), *rest], [x_grid, None, None],
                  TensorSpec(last.output_shape(*(a.shape for a in (x, *rest))), "uint8", grid),
                  weights=(1, 2))
    plain = Conv2d(op.stride, op.padding, op.dilation, op.groups)
    sums = reference.run(plain, stored(codes(x, x_grid), x_grid), *rest) / coarse
    size = reference.run(plain, *(np.abs(array) for array in (x, *rest))) / coarse
    bound = (rest[0][0].size + 8) * EPS * (size + 100)
    unclear = np.abs(sums - np.floor(sums) - 0.5) <= bound
    right = np.clip(np.rint(sums) + 100, 0, 255)
    np.testing.assert_array_equal(y[~unclear], right[~unclear])
    assert np.abs(y - right).max() <= 1


@pytest.mark.parametrize("channels", [1, 7, 16, 37, 160])
@pytest.mark.parametrize("grid", [Grid(1.0, 0), Grid(2.0, 100), Grid(8.0, 254)])
def test_batch_norms_are_exact(channels, grid):
    arrays = of_norm(channels, 2, 3, 5)
    assert_codes_right(ops.BatchNorm(0.25, quantise(grid)), arrays, grid, ODD, "batch_norm_",
                       (1, 2, 3, 4))


@pytest.mark.parametrize("activation", [None, ops.Relu(), ops.Clip(0.0, 6.0), quantise(ODD),
                                        ops.HardSigmoid(0.25, 0.5)])
def test_batch_norms_of_codes_give_numbers_of_any_kind(activation):
    x, *rest = of_norm(37, 2, 3, 5)
    op = ops.BatchNorm(0.25, activation)
    y = run_codes(op, [codes(x, ODD), *rest], [ODD, *[None] * 4], weights=(1, 2, 3, 4))
    np.testing.assert_array_equal(y, reference.run(op, x, *rest))


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 33, 64, 160, 300])
@pytest.mark.parametrize("op", [
    ops.MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)), ops.MaxPool2d((2, 2), (2, 2)),
    ops.MaxPool2d((5, 5), (1, 1), (2, 2, 2, 2)),
    ops.MaxPool2d((2, 3), (1, 2), (0, 1, 1, 2), (2, 1))])
def test_a_maximum_is_of_codes(op, channels):
    x = np.random.default_rng(0).integers(0, 256, (2, 7, 9, channels)).astype(np.uint8)
    shape = op.output_shape(x.shape)
    y = run_codes(op, [x], [ODD], TensorSpec(shape, "uint8", ODD), "max_pool2d_")
    np.testing.assert_array_equal(y, codes(reference.run(op, stored(x, ODD)), ODD))


@pytest.mark.parametrize(("axis", "gap"), [(0, 0), (1, 0), (2, 0), (-1, 0), (-1, 5)])
def test_a_concat_copies_codes(axis, gap):
    rng = np.random.default_rng(0)
    x, z = (rng.integers(0, 256, (2, 5, 6, 7)).astype(np.uint8) for _ in range(2))
    given_x, op = [x, z, x], ops.Concat(axis)
    shape = op.output_shape(*(array.shape for array in given_x))
    y = run_codes(op, given_x, [ODD] * 3, TensorSpec(shape, "uint8", ODD), "concat_", gap)
    np.testing.assert_array_equal(y, np.concatenate(given_x, axis))


# ---- what kernels can do ----------------------------------------------------------------------

@pytest.fixture(autouse=True)
def vectors(monkeypatch):
    """There is a unit on any CPU."""
    monkeypatch.setenv("CNN_INT8", "vnni_emulated")


RNG = np.random.default_rng(0)
OF_DEPTHWISE, OF_CONV = weights(RNG, 8, 3, 3, 1), weights(RNG, 8, 1, 1, 8)
PLAIN = normal(RNG, 8, 1, 1, 8)


def can(op, grid, *constants, shape=(2, 4, 5, 8)):
    """`narrow.codes` of an op whose first input is of this grid."""
    specs = [TensorSpec(shape, "float32", grid), *(TensorSpec(array.shape) for array in constants)]
    return narrow.codes(op, specs, [None, *constants], Options())


@pytest.mark.parametrize(("op", "grid", "constants", "expected"), [
    (Conv2d(activation=quantise(ODD)), ODD, [OF_CONV], Narrow((0, 3), True)),
    (Conv2d(), ODD, [OF_CONV], Narrow((0, 3))),
    (Conv2d(activation=ops.Sigmoid()), ODD, [OF_CONV], Narrow((0, 3))),
    (Conv2d(activation=quantise(ODD)), ODD, [PLAIN], Narrow()),
    (Conv2d(activation=quantise(ODD)), None, [OF_CONV], Narrow()),
    (Conv2d(groups=8, activation=quantise(EVEN)), ABOVE, [OF_DEPTHWISE], Narrow((0,), True)),
    (Conv2d(groups=8, activation=quantise(EVEN)), ABOVE, [OF_DEPTHWISE * PLAIN[0, 0, 0, 0]],
     Narrow((0,), True)),
    (Conv2d(groups=8, activation=quantise(ODD)), ABOVE, [OF_DEPTHWISE], Narrow((0,))),
    (Conv2d(groups=8, activation=quantise(EVEN)), ODD, [OF_DEPTHWISE], Narrow((0,), True)),
    (Conv2d(groups=8, activation=quantise(EVEN)), None, [OF_DEPTHWISE], Narrow(writes=True)),
    (ops.BatchNorm(activation=quantise(EVEN)), ODD, [PLAIN[0, 0, 0]] * 4, Narrow((0,), True)),
    (ops.BatchNorm(activation=quantise(ODD)), ODD, [PLAIN[0, 0, 0]] * 4, Narrow((0,))),
    (ops.BatchNorm(activation=ops.Relu()), ODD, [PLAIN[0, 0, 0]] * 4, Narrow((0,))),
    (ops.BatchNorm(activation=ops.FakeQuantize(*ODD, first=ops.Silu())), ODD,
     [PLAIN[0, 0, 0]] * 4, Narrow((0,), True)),
    (ops.LayerNorm(activation=quantise(ODD)), EVEN, [PLAIN[0, 0, 0]] * 2, Narrow(writes=True)),
    (ops.LayerNorm(activation=ops.FakeQuantize(*ODD, relu=True)), EVEN, [PLAIN[0, 0, 0]] * 2,
     Narrow()),
    (ops.LayerNorm(), EVEN, [PLAIN[0, 0, 0]] * 2, Narrow()),
    (quantise(ODD), EVEN, [], Narrow((0, 1), True)),
    (ops.AddFakeQuantize(*ODD), EVEN, [], Narrow((0, 1), True)),
    (ops.MaxPool2d((2, 2)), ODD, [], Narrow(moves=True)),
    (ops.Concat(-1), ODD, [], Narrow(moves=True)),
    *((op, EVEN, [], Narrow()) for op in (
        ops.Relu(), ops.Sigmoid(), ops.Add(), ops.Mul(), ops.AvgPool2d((2, 2)), ops.Slice(1, 0, 2),
        ops.GlobalAvgPool2d(), ops.GlobalMaxPool2d(), ops.Transpose((0, 2, 1, 3)),
        ops.Pad((0, 1, 1, 0), (0, 1, 1, 0)), ops.Softmax(-1)))])
def test_what_each_op_can_do_with_codes(op, grid, constants, expected):
    assert can(op, grid, *constants) == expected


def test_sums_that_may_not_fit_32_bits_are_not_of_codes():
    for features, fits in (((1 << 16) - 1, True), (1 << 16, False)):
        weight = np.ones((2, features), np.float32)
        found = can(Linear(quantise(ODD)), ODD, weight, shape=(3, features))
        assert found == (Narrow((0, 3), True) if fits else Narrow())


def test_nothing_is_of_codes_where_float32_multiplies(monkeypatch):
    monkeypatch.setenv("CNN_INT8", "none")
    for op, constants in ((Conv2d(activation=quantise(ODD)), [OF_CONV]), (quantise(ODD), []),
                          (ops.MaxPool2d((2, 2)), [])):
        assert can(op, ODD, *constants) == Narrow()


# ---- which values are stored so ---------------------------------------------------------------

@pytest.fixture
def device(vectors):
    return devices.CpuDevice(1)


def test_what_only_layers_of_codes_read_is_stored_so(device):
    net = chain()
    assert in_codes(net.graph("c"), device) == {"q", "a", "b"}
    assert in_codes(net.graph("b", "c"), device) == {"q", "a"}
    assert in_codes(net.graph("c"), device, frozenset({"a"})) == {"q", "b"}
    net.add(ops.Sigmoid(), ("b",), "s")
    assert in_codes(net.graph("c", "s"), device) == {"q", "a"}


def test_nothing_is_where_float32_multiplies(device, monkeypatch):
    monkeypatch.setenv("CNN_INT8", "none")
    assert in_codes(chain().graph("c"), device) == set()


def test_the_input_of_a_network_and_its_grids_are_not(device):
    net = chain()
    graph = net.graph("c")
    specs = storage(graph, device, device.options())
    assert specs["x"] == TensorSpec(SMALL)
    assert (specs["q"].grid, specs["a"].grid, specs["c"].grid) == (ABOVE, ABOVE, ODD)
    assert specs["c"].dtype == "float32"


@pytest.mark.parametrize(("op", "inputs"), [
    (ops.Relu(), "b"), (ops.Add(), "ab"), (ops.Mul(), "ab"), (ops.AvgPool2d((2, 2)), "b"),
    (ops.GlobalAvgPool2d(), "b"), (ops.Slice(1, 0, 2), "b"), (ops.Softmax(-1), "b"),
    (ops.Pad((0, 1, 1, 0), (0, 1, 1, 0)), "b"), (ops.Transpose((0, 2, 1, 3)), "b")])
def test_what_another_op_reads_is_not(device, op, inputs):
    net = chain()
    net.add(op, inputs, "p")
    assert in_codes(net.graph("c", "p"), device) == {"q", "a", "b"} - set(inputs)


def test_weights_that_are_no_codes_keep_their_input_and_output_wide(device):
    net = chain()
    net.constants["w2"] = normal(net.rng, 8, 1, 1, 8)       # of b
    assert in_codes(net.graph("c"), device) == {"q"}


def test_what_is_of_a_grid_is_not_stored_in_bfloat16(monkeypatch):
    """Which has 8 digits, and so not all codes."""
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    monkeypatch.setenv("CNN_INT8", "vnni_emulated")
    device, net = devices.CpuDevice(1, "bfloat16"), chain()
    net.add(Conv2d(activation=ops.Relu()), ("a", net.constant(normal(net.rng, 8, 1, 1, 8))), "f")
    net.add(Conv2d(), ("f", net.constant(normal(net.rng, 8, 1, 1, 8))), "g")
    specs = storage(net.graph("c", "g"), device, device.options())
    assert [specs[name].dtype for name in "bafg"] == ["uint8", "float32", "bfloat16", "float32"]


def test_what_only_moves_codes_stores_them_as_they_came(device):
    net = chain()
    net.add(ops.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), "b", "p")
    net.add(ops.Concat(-1), "cp", "k")
    net.conv("k", "y", inputs=16)
    assert in_codes(net.graph("y"), device) == {*"qabcpk"}
    assert in_codes(net.graph("y", "p"), device) == {"q", "a"}
    assert in_codes(net.graph("y", "k"), device) == {"q", "a"}
    assert in_codes(net.graph("y"), device, frozenset("p")) == {"q", "a"}


def test_a_concat_of_two_grids_is_not(device):
    net = chain()
    net.add(ops.Concat(-1), "ab", "k")
    net.conv("k", "y", inputs=16)
    assert in_codes(net.graph("y", "c"), device) == {"q"}


def test_views_are_stored_as_what_they_show(device):
    net = chain()
    net.add(ops.Reshape((60, 8)), "c", "v")
    net.add(Linear(), ("v", net.constant(weights(net.rng, 5, 8))), "y")
    assert in_codes(net.graph("y"), device) == {*"qabcv"}
    assert in_codes(net.graph("y", "v"), device) == {*"qab"}


def test_depthwise_layers_read_codes_and_write_even_ones(device):
    for grid, expected in ((EVEN, {*"qabd"}), (ODD, {*"qab"})):
        net = chain()
        net.conv("a", "d", grid, k=3, groups=8)
        net.conv("d", "y")
        assert in_codes(net.graph("y", "c"), device) == expected
    net.conv("b", "e", EVEN, k=3, groups=8)     # b lies on ODD
    net.conv("e", "z")
    assert in_codes(net.graph("y", "c", "z"), device) == {*"qabe"}


def test_sums_and_grids_that_change_read_codes_and_write_them(device):
    net = chain()
    net.add(ops.AddFakeQuantize(*EVEN), "ab", "s")
    net.add(quantise(ABOVE), "s", "r")
    net.conv("r", "y")
    assert in_codes(net.graph("c", "y"), device) == {*"qabsr"}
    net.add(ops.AddFakeQuantize(*EVEN), "sx", "t")      # of codes and numbers
    net.conv("t", "z")
    assert in_codes(net.graph("c", "y", "z"), device) == {*"qabsrt"}
