"""Values that pass in bfloat16 from one layer to another on the CPU: which they are, and that they
are what float32 would have held, rounded."""
import itertools

import ml_dtypes
import numpy as np
import pytest
import test_bf16_matmul
from bf16_checks import (  # noqa: F401
    narrow,
    prepare_stored,
    prepared_in_bfloat16,
    rounded,
    run_stored,
    unit_of_each_kind,
)
from checks import THREADS, normal
from conv_problems import arrays, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn import devices, executor, passes
from cnn.graph import Graph, Node
from cnn.storage import storage
from kernels import ops
from kernels.cpu.dot_units import AMX_BF16, AVX512_BF16, AVX512_EMULATED_BF16, BLOCK, COLUMNS
from kernels.cpu.geometry import ConvGeometry
from kernels.cpu.host import dot_conv
from kernels.ops import Conv2d, Linear, TensorSpec

PADDED = Conv2d(padding=(1, 1, 1, 1))
ANY = problems([2, 8, 24, 32], [5, BLOCK, BLOCK + COLUMNS + 3], 12)


def assert_stored_right(op, given, unit, variants=("", "x", "y", "xy")):
    """In each variant these are bfloat16, "x" with the residual: the output has the bits of one
    whose inputs and output are float32, rounded where it is bfloat16."""
    given = [rounded(given[0]), *given[1:3], *(rounded(array) for array in given[3:])]
    expected = run_stored(op, given, "float32", unit=unit)
    for variant in variants:
        inputs = list(given)
        if "x" in variant:
            inputs = [narrow(given[0]), *given[1:3], *(narrow(array) for array in given[3:])]
        dtype = "bfloat16" if "y" in variant else "float32"
        found = run_stored(op, inputs, dtype, unit=unit)
        assert found.tobytes() == expected.astype(dtype).tobytes(), variant


@unit_of_each_kind
@given(problem=ANY, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_what_is_stored_is_what_float32_would_hold_rounded(unit, problem, seed):
    op, shape = problem
    assert_stored_right(op, arrays(normal, op, *shape, seed=seed), unit)


@unit_of_each_kind
@pytest.mark.parametrize(("x", "residual", "y"), list(itertools.product(
    ["float32", "bfloat16"], repeat=3)))
def test_input_residual_and_output_are_each_of_any_dtype(unit, x, residual, y):
    given = arrays(normal, PADDED, 2, 5, 9, 32, 40, (3, 3), residual=True)
    given[0], given[3] = rounded(given[0]), rounded(given[3])
    expected = run_stored(PADDED, given, "float32", unit=unit)
    given[0], given[3] = given[0].astype(x), given[3].astype(residual)
    found = run_stored(PADDED, given, y, unit=unit)
    assert found.tobytes() == expected.astype(y).tobytes()


@unit_of_each_kind
@pytest.mark.parametrize("channels", [24, 32, 64])
@pytest.mark.parametrize("pixels", [1, 2, 7, 8, 14, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 97])
def test_any_number_of_pixels_read_in_place(unit, channels, pixels):
    assert_stored_right(Conv2d(), arrays(normal, Conv2d(), 1, 1, pixels, channels, 40, (1, 1)),
                        unit, ["xy"])


IN_PLACE = [
    # height, width, channels, kernel, op
    (7, 7, 64, (1, 1), Conv2d()),
    (9, 57, 64, (1, 1), Conv2d((2, 2))),
    (9, 34, 32, (3, 3), Conv2d()),
    (9, 9, 32, (3, 3), Conv2d()),
    (9, 33, 16, (2, 2), Conv2d((1, 2))),
    (9, 9, 64, (1, 1), Conv2d(groups=2)),
    (9, 20, 32, (3, 3), Conv2d(dilation=(2, 2))),
    (9, 28, 6, (3, 3), Conv2d((2, 2))),
]


@unit_of_each_kind
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width", "channels", "kernel", "op"), IN_PLACE)
def test_an_input_without_padding_is_read_in_place(unit, batch, height, width, channels, kernel,
                                                   op):
    given = arrays(normal, op, batch, height, width, channels, 40, kernel)
    step = prepare_stored(op, [narrow(given[0]), *given[1:]], "float32", unit=unit)
    y = np.empty(op.output_shape(*(array.shape for array in given)), np.float32)
    workspace = np.empty(step.workspace, np.uint8)
    assert len(step.bind([narrow(given[0]), *given[1:]], y, workspace)) == 1
    assert_stored_right(op, given, unit, ["x"])


@pytest.mark.parametrize("unit", [AMX_BF16, AVX512_BF16], ids=["amx", "avx512"])
@pytest.mark.parametrize("pixels", range(1, 100))
def test_tiles_that_would_read_beyond_the_input_begin_earlier(unit, pixels):
    g = ConvGeometry(1, pixels, 64, 1, pixels, 8, 1, 1, 1, 1, 0, 0, 1, 1, 64)
    cut = dot_conv.cut_images(1, g, unit)
    back = dot_conv.beyond(cut, 64 * pixels, 64, 64, unit)
    computed = cut.computed(unit)
    np.testing.assert_array_equal(back[:-1], 0)
    assert back[-1] == max(0, cut.position[-1] + computed[-1] - pixels) <= computed[-1] - 1
    table, patterns = dot_conv.tabulate(cut, back, g, unit)
    rows, first, offset, pattern = table[-1]
    assert offset + 64 * computed[-1] <= 64 * pixels
    assert (offset >= 0) == (pixels >= computed[-1])
    places = patterns[pattern]
    assert (places[:back[-1]] == -1).all()      # they are another tile's
    np.testing.assert_array_equal(first + places[back[-1]:rows],
                                  np.arange(cut.position[-1], pixels))


@unit_of_each_kind
def test_what_needs_a_padded_image_gets_one(unit):
    for op, channels in ((PADDED, 32), (PADDED, 5), (Conv2d(padding=(0, 0, 1, 0)), 32)):
        given = arrays(normal, op, 2, 6, 9, channels, 20, (3, 3))
        given[0] = narrow(given[0])
        step = prepare_stored(op, given, "float32", unit=unit)
        y = np.empty(op.output_shape(*(array.shape for array in given)), np.float32)
        assert len(step.bind(given, y, np.empty(step.workspace, np.uint8))) == 2
        assert_stored_right(op, [given[0].astype(np.float32), *given[1:]], unit)


@unit_of_each_kind
@pytest.mark.parametrize("shape", [(1, 64), (1, 33), (7, 64), (33, 96), (70, 5), (2, 3, 40)])
def test_linear_layers(unit, shape):
    op = Linear(ops.Relu())
    assert_stored_right(op, test_bf16_matmul.arrays(normal, shape, 50), unit)


@unit_of_each_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_nan_and_infinity_are_stored(unit, value):
    x, weight, bias = arrays(normal, Conv2d(), 1, 3, 5, 32, 40, (1, 1))
    bias[3] = value         # 3.4e38 is nearest to infinity in bfloat16
    found = run_stored(Conv2d(), [narrow(x), weight, bias], "bfloat16", unit=unit)
    expected = run_stored(Conv2d(), [narrow(x), weight, bias], "float32", unit=unit)
    np.testing.assert_array_equal(found.astype(np.float32), rounded(expected))
    assert not np.isfinite(found[..., 3].astype(np.float32)).any()


DEPTHWISE = [
    # height, width, channels, kernel, op: windows of their own, and any
    (9, 14, 40, (3, 3), Conv2d(padding=(1, 1, 1, 1), groups=40, activation=ops.Relu())),
    (9, 15, 33, (3, 3), Conv2d((2, 2), (0, 0, 1, 1), groups=33)),
    (5, 9, 3, (3, 3), Conv2d(padding=(1, 1, 1, 1), groups=3)),
    (9, 14, 20, (2, 4), Conv2d((1, 3), (1, 2, 0, 2), (2, 1), groups=20)),
]


@pytest.mark.parametrize(("height", "width", "channels", "kernel", "op"), DEPTHWISE)
def test_depthwise_convolutions_read_and_write_it(height, width, channels, kernel, op):
    given = arrays(normal, op, 2, height, width, channels, channels, kernel)
    assert_stored_right(op, given, AVX512_EMULATED_BF16)


@pytest.mark.parametrize("channels", [3, 16, 33, 160])
@pytest.mark.parametrize("op", [ops.MaxPool2d((3, 3), (2, 2), (1, 1, 1, 1)),
                                ops.MaxPool2d((2, 2), (2, 2))])
def test_a_maximum_is_of_what_is_stored(op, channels):
    x = rounded(normal(np.random.default_rng(0), 2, 7, 9, channels))
    x[0, 2, 2, 0], x[1, 1, 1, 1] = np.nan, np.inf
    expected = run_stored(op, [x], "float32")
    assert run_stored(op, [narrow(x)], "bfloat16").tobytes() == narrow(expected).tobytes()


@pytest.mark.parametrize("channels", [1, 7, 16, 37])
@pytest.mark.parametrize("activation", [None, ops.Relu(), ops.LeakyRelu(0.3)])
def test_a_batch_norm_reads_and_writes_it(channels, activation):
    rng, op = np.random.default_rng(0), ops.BatchNorm(activation=activation)
    x, *of_channel = normal(rng, 2, 3, 5, channels), *(normal(rng, channels) for _ in range(3))
    given = [rounded(x), *of_channel, rng.random(channels, np.float32)]
    expected = narrow(run_stored(op, given, "float32")).tobytes()
    assert run_stored(op, given, "bfloat16").tobytes() == expected
    assert run_stored(op, [narrow(x), *given[1:]], "bfloat16").tobytes() == expected


@pytest.mark.parametrize("channels", [3, 16, 70])
@pytest.mark.parametrize("op", [
    ops.AvgPool2d((3, 3), (2, 2), (1, 1, 1, 1)), ops.GlobalAvgPool2d(), ops.GlobalMaxPool2d(),
    ops.GlobalL2Pool2d()])
def test_pools_read_and_write_it(op, channels):
    x = rounded(normal(np.random.default_rng(0), 2, 7, 9, channels))
    expected = narrow(run_stored(op, [x], "float32")).tobytes()
    assert run_stored(op, [narrow(x)], "bfloat16").tobytes() == expected


@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 7), (20, 16), (3, 197)])
def test_a_layer_norm_writes_it(shape):
    rng = np.random.default_rng(0)
    given, op = [normal(rng, *shape), *(normal(rng, shape[-1]) for _ in range(2))], ops.LayerNorm()
    found = run_stored(op, given, "bfloat16")
    assert found.tobytes() == narrow(run_stored(op, given, "float32")).tobytes()


@pytest.mark.parametrize("axis", [1, -1])
def test_a_concat_copies_what_is_stored(axis):
    rng = np.random.default_rng(0)
    given = [narrow(normal(rng, 2, 5, 6, 7)), narrow(normal(rng, 2, 5, 6, 7))]
    found = run_stored(ops.Concat(axis), given, "bfloat16")
    assert found.tobytes() == np.concatenate(given, axis).tobytes()


# ---- networks ---------------------------------------------------------------------------------

@pytest.fixture
def device(monkeypatch):
    monkeypatch.setenv("CNN_BF16", "avx512_emulated")
    return devices.CpuDevice(1, "bfloat16")


class Chain:
    """Convolutions x -> a -> b -> c, c with a as residual, then whatever is added."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.constants = {"w": normal(rng, 8, 1, 1, 8), "d": normal(rng, 8), "f": normal(rng, 5, 8),
                          "g": normal(rng, 8, 3, 3, 1)}
        self.nodes = []
        for inputs, name in ((("x", "w", "d"), "a"), (("a", "w", "d"), "b"),
                             (("b", "w", "d", "a"), "c")):
            self.add(Conv2d(activation=ops.Relu()), inputs, name)

    def add(self, op, inputs, name):
        self.nodes.append(Node(op, inputs, name, name))

    def graph(self, *outputs):
        return Graph({"x": TensorSpec((2, 4, 5, 8))}, outputs, tuple(self.nodes), self.constants)


def narrow_values(graph, device, keep=frozenset()):
    specs = storage(graph, device, device.options(), keep)
    return {name for name, spec in specs.items() if spec.dtype == "bfloat16"}


def test_what_only_bfloat16_layers_read_is_stored_so(device):
    chain = Chain()
    assert narrow_values(chain.graph("c"), device) == {"a", "b"}
    assert narrow_values(chain.graph("b", "c"), device) == {"a"}
    assert narrow_values(chain.graph("c"), device, frozenset({"a"})) == {"b"}
    assert narrow_values(chain.graph("c"), devices.CpuDevice(1)) == set()
    chain.add(ops.Sigmoid(), ("b",), "s")
    assert narrow_values(chain.graph("c", "s"), device) == {"a"}


@pytest.mark.parametrize(("op", "inputs"), [
    (ops.Add(), ("c", "x")), (ops.Concat(-1), ("c", "x")), (ops.Softmax(-1), ("c",)),
    (ops.Slice(1, 0, 2), ("c",)), (ops.Gelu(), ("c",)), (ops.Sqrt(), ("c",)),
    (ops.Pad((0, 1, 1, 0), (0, 1, 1, 0)), ("c",)), (ops.LocalResponseNorm(), ("c",))])
def test_what_another_op_reads_or_writes_stays_float32(device, op, inputs):
    chain = Chain()
    chain.add(op, inputs, "p")
    chain.add(Conv2d(), ("p", "w2" if isinstance(op, ops.Concat) else "w", "d"), "y")
    chain.constants["w2"] = np.zeros((8, 1, 1, 16), np.float32)
    assert narrow_values(chain.graph("y"), device) == {"a", "b"}


def test_what_only_moves_numbers_stores_them_as_they_came(device):
    chain = Chain()
    chain.constants["w2"] = np.zeros((8, 1, 1, 16), np.float32)
    chain.add(ops.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), ("b",), "p")
    chain.add(ops.Concat(-1), ("c", "p"), "q")
    chain.add(Conv2d(), ("q", "w2", "d"), "y")
    assert narrow_values(chain.graph("y"), device) == {"a", "b", "c", "p", "q"}
    chain.add(ops.Concat(-1), ("c", "c"), "r")
    chain.add(Conv2d(), ("r", "w2", "d"), "z")
    assert narrow_values(chain.graph("y", "z"), device) == {"a", "b", "c", "p", "q", "r"}
    assert narrow_values(chain.graph("y", "z", "r"), device) == {"a"}    # all meet in a Concat
    assert narrow_values(chain.graph("y", "z", "p"), device) == {"a"}


@pytest.mark.parametrize(("op", "inputs"), [
    (Conv2d(groups=8), ("c", "g", "d")), (Conv2d(groups=8, activation=ops.Silu()), ("c", "g", "d")),
    (ops.BatchNorm(activation=ops.Relu()), ("c", "d", "d", "d", "d")),
    (ops.BatchNorm(activation=ops.Sigmoid()), ("c", "d", "d", "d", "d")),
    (Conv2d(activation=ops.Sigmoid()), ("c", "w", "d")), (ops.GlobalAvgPool2d(), ("c",)),
    (ops.AvgPool2d((2, 2), (1, 1)), ("c",)), (ops.GlobalMaxPool2d(), ("c",))])
def test_what_is_read_and_written(device, op, inputs):
    """An activation is applied to numbers in registers, whatever it is."""
    chain = Chain()
    chain.add(op, inputs, "n")
    chain.add(Conv2d(), ("n", "w", "d"), "y")
    assert narrow_values(chain.graph("y"), device) == {"a", "b", "c", "n"}


@pytest.mark.parametrize(("op", "inputs"), [
    (Conv2d(activation=ops.FakeQuantize(0.1, 100)), ("c", "w", "d")),
    (Conv2d(groups=8, activation=ops.FakeQuantize(0.1, 100)), ("c", "g", "d")),
    (ops.BatchNorm(activation=ops.FakeQuantize(0.1, 100)), ("c", "d", "d", "d", "d"))])
def test_numbers_of_a_grid_stay_float32(device, op, inputs):
    """Of 8 bits, of which bfloat16 has not all."""
    chain = Chain()
    chain.add(op, inputs, "n")
    chain.constants["w7"] = np.full((8, 1, 1, 8), np.pi, np.float32)    # of no codes
    chain.add(Conv2d(), ("n", "w7", "d"), "y")
    assert "n" not in narrow_values(chain.graph("y"), device)


SCORES = ops.MatMul(((0, 1, 2, 3), (0, 1, 3, 2), (0, 1, 2, 3)))      # of a (.., 5, 8) .., 5 of 5


@pytest.mark.parametrize(("op", "inputs"), [
    (ops.LayerNorm(), ("c", "d", "d")), (ops.Attention(), ("a", "b", "c")), (SCORES, ("a", "c"))])
def test_attention_and_norms_write_it_and_attention_reads_it(device, op, inputs):
    chain = Chain()
    chain.add(op, inputs, "p")
    chain.constants["w5"] = np.zeros((8, 1, 1, 5 if op is SCORES else 8), np.float32)
    chain.add(Conv2d(), ("p", "w5", "d"), "y")
    assert narrow_values(chain.graph("y"), device) == {"a", "b", "p", *inputs} - {"d"} - (
        set() if "a" in inputs else {"c"})


def test_what_is_added_to_scores_stays_float32(device):
    chain = Chain()
    chain.add(SCORES, ("a", "c"), "p")
    chain.add(ops.Attention(), ("a", "b", "c", "p"), "y")
    assert narrow_values(chain.graph("y"), device) == {"a", "b", "c"}


def test_views_are_stored_as_what_they_show(device):
    chain = Chain()
    chain.add(ops.Reshape((40, 8)), ("c",), "v")
    chain.add(Linear(), ("v", "f"), "y")
    assert narrow_values(chain.graph("y"), device) == {"a", "b", "c", "v"}
    chain.add(ops.Relu(), ("v",), "z")
    assert narrow_values(chain.graph("y", "z"), device) == {"a", "b"}
    assert narrow_values(chain.graph("y", "v"), device) == {"a", "b"}


@pytest.mark.parametrize("name", ["avx512_emulated", "amx_emulated"])
@pytest.mark.parametrize("threads", THREADS)
def test_a_network_computes_what_its_layers_do(monkeypatch, name, threads):
    """Of values of a Program, by layers that read and write float32 and are rounded by hand."""
    monkeypatch.setenv("CNN_BF16", name)
    device = devices.CpuDevice(threads, "bfloat16")
    chain = Chain()
    chain.constants["w3"] = normal(np.random.default_rng(2), 8, 1, 1, 32)
    chain.add(ops.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), ("b",), "p")
    chain.add(Conv2d(), ("b", "w", "d"), "i")
    chain.add(Conv2d(padding=(1, 1, 1, 1), groups=8), ("i", "g", "d"), "e")
    chain.add(Conv2d(), ("a", "w", "d"), "h")
    chain.add(ops.Concat(-1), ("p", "e", "h", "c"), "q")
    chain.add(Conv2d(), ("q", "w3", "d"), "r")
    chain.add(ops.Reshape((40, 8)), ("r",), "v")
    chain.add(Linear(), ("v", "f"), "y")
    graph = chain.graph("y")
    assert narrow_values(graph, device) == {node.output for node in graph.nodes} - {"y"}
    program = executor.Program(graph, device, device.options())
    assert np.shares_memory(program.values["h"], program.values["q"])      # not copied
    x = normal(np.random.default_rng(1), 2, 4, 5, 8)
    found = program.run({"x": x})["y"]
    values = {**graph.constants, "x": x}
    for node in graph.nodes:
        given = [values[name] for name in node.inputs]
        y = run_stored(node.op, given, "float32")
        values[node.output] = y if node.output == "y" else rounded(y)
    assert found.dtype == np.float32
    assert found.tobytes() == values["y"].tobytes()


def test_half_the_bytes_are_held(device):
    fixed = passes.optimise(Chain().graph("c"))
    wide, half = (executor.Program(fixed, device, device.options(), keep)
                  for keep in (frozenset({"a", "b"}), frozenset()))
    assert wide.values["a"].nbytes == 2 * half.values["a"].nbytes
    assert half.values["b"].dtype == ml_dtypes.bfloat16
