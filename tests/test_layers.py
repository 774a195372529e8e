"""Layers by hand: torch's names, layouts and numbers, and clear errors for what does not fit."""
import math
from collections import OrderedDict

import numpy as np
import pytest
from torch_networks import FILE, NETWORKS, exemplary

import cnn
from cnn import layers, sequential
from kernels import ops, reference

U32, U64 = 2.0 ** -24, 2.0 ** -53       # unit roundoffs


def evaluate(graph, x):
    """Every value of the graph in float64."""
    values = {**graph.constants, "input": x}
    for node in graph.nodes:
        values[node.output] = reference.run(node.op, *(values[name] for name in node.inputs))
    return values


def error_bound(graph, values, u):
    """How far rounding to unit roundoff u can move an output, layer by layer: what came in times
    the layer's gain, and one rounding a term (and 10 for factors folded into it, or for a function
    good to 2 ulp) of the greatest sum of magnitudes."""
    error = 0.0
    for node in graph.nodes:
        x = values[node.inputs[0]]
        weights = [np.abs(graph.constants[name]).astype(float) for name in node.inputs[1:]]
        gain, shift, terms = 1.0, 0.0, 0
        if isinstance(node.op, (ops.Conv2d, ops.Linear)):
            gain = weights[0].reshape(len(weights[0]), -1).sum(axis=1).max()
            shift = weights[1].max() if len(weights) > 1 else 0.0
            terms = weights[0][0].size
        elif isinstance(node.op, ops.BatchNorm):
            scale, bias, mean, var = weights
            gain = (scale / np.sqrt(var + node.op.epsilon)).max()
            shift = bias.max() + gain * mean.max()
        elif isinstance(node.op, ops.AvgPool2d):
            terms = np.prod(node.op.kernel_size)
        elif isinstance(node.op, ops.GlobalAvgPool2d):
            terms = x.shape[1] * x.shape[2]
        elif isinstance(node.op, ops.LayerNorm):
            # dy = (dx - mean(dx) - y * mean(y * dx)) / deviation, for y without scale and bias
            scale, bias = weights
            deviation = np.sqrt(x.var(axis=-1, keepdims=True) + node.op.epsilon)
            greatest = (np.abs(x - x.mean(axis=-1, keepdims=True)) / deviation).max()
            gain, shift = scale.max() * ((2 + greatest) / deviation).max(), bias.max()
            terms = x.shape[-1]
        elif isinstance(node.op, ops.LocalResponseNorm):
            # Its slope is that of x / bias ** beta, and beta times 2 * x * sum|x| against sum x * x
            gain = (1 + 2 * node.op.beta * node.op.size ** 0.5) / node.op.bias ** node.op.beta
            terms = node.op.size
        elif isinstance(node.op, (ops.Gelu, ops.Silu, ops.HardSwish)):
            gain = 1.5                      # the greatest slope of the last, and more than others'
        elif isinstance(node.op, ops.Softmax):
            gain = 2.0 if node.op.log else 1.0
            terms = x.shape[-1] + np.abs(x).max()
        size = max(gain * np.abs(x).max() + shift, np.abs(values[node.output]).max())
        error = gain * error + (terms + 10) * u * size
    return error


# ---- numbers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
def test_names_layouts_and_numbers_are_torchs(name):
    with np.load(FILE) as file:
        stored = {key.removeprefix(f"{name}/"): file[key] for key in file
                  if key.startswith(f"{name}/")}
    state = {key.removeprefix("state/"): array for key, array in stored.items()
             if key.startswith("state/")}
    net = NETWORKS[name](layers)
    assert {key: array.shape for key, array in net.state_dict().items()} == {
        key: array.shape for key, array in state.items() if not key.endswith("_tracked")}
    net.load_state_dict(state)
    assert all(np.array_equal(array, state[key]) for key, array in net.state_dict().items())
    x = np.ascontiguousarray(stored["input"].transpose(0, 2, 3, 1))
    graph = net.graph((None, *x.shape[1:]))
    values = evaluate(graph, x)
    assert np.abs(values["output"] - stored["output"]).max() <= error_bound(graph, values, U64)
    assert np.abs(net(x) - stored["output"]).max() <= error_bound(graph, values, U32)


def by_torchs_rules(state, x, act):
    """The exemplary network on NCHW images with torch's layouts, in plain NumPy."""
    def conv(x, name):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        bias = state[f"{name}.bias"].astype(float)[:, None, None]
        return np.einsum("nchwij,ocij->nohw", windows, state[f"{name}.weight"].astype(float)) + bias

    def pool(x):
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))

    x = act(conv(act(conv(x, "0")), "2"))
    x = pool(act(conv(act(pool(x)), "6")))
    return x.reshape(len(x), -1) @ state["10.weight"].T.astype(float) + state["10.bias"]


ACTIVATIONS = {"ReLU": lambda x: np.maximum(x, 0), "Tanh": np.tanh,
               "LeakyReLU": lambda x: np.where(x > 0, x, x / 100),
               "ELU": lambda x: np.where(x > 0, x, np.exp(x) - 1),
               "Hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
               "GELU": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / 2 ** 0.5)),
               "Sigmoid": lambda x: 1 / (1 + np.exp(-x)), "SiLU": lambda x: x / (1 + np.exp(-x)),
               "Hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_exemplary_network_is_what_torchs_rules_say(activation):
    net = exemplary(layers, activation)
    x = np.random.default_rng(1).standard_normal((3, 8, 8, 3)).astype(np.float32)
    expected = by_torchs_rules(net.state_dict(), x.transpose(0, 3, 1, 2), ACTIVATIONS[activation])
    graph = net.graph((None, 8, 8, 3))
    values = evaluate(graph, x)
    assert np.abs(values["output"] - expected).max() <= error_bound(graph, values, U64)
    assert np.abs(net(x) - expected).max() <= error_bound(graph, values, U32)


def test_the_exemplary_network_is_exact_on_whole_numbers():
    net, rng = exemplary(layers), np.random.default_rng(0)
    net.load_state_dict({key: rng.integers(-1, 2, array.shape).astype(np.float32)
                         for key, array in net.state_dict().items()})
    x = rng.integers(-4, 5, (3, 8, 8, 3)).astype(np.float32)
    expected = by_torchs_rules(net.state_dict(), x.transpose(0, 3, 1, 2), ACTIVATIONS["ReLU"])
    assert 0 < np.abs(expected).max() < 1 << 24
    assert np.array_equal(evaluate(net.graph((None, 8, 8, 3)), x)["output"], expected)
    assert np.array_equal(net(x), expected)


def test_same_padding_keeps_the_size_and_puts_the_odd_element_last():
    for kernel, dilation in [(1, 1), (2, 1), (4, 3), (3, 2), ((2, 5), (3, 1))]:
        graph = layers.Sequential(layers.Conv2d(2, 3, kernel, padding="same", dilation=dilation)
                                  ).graph((1, 9, 11, 2))
        assert graph.infer()["output"].shape == (1, 9, 11, 3)
        top, left, bottom, right = graph.nodes[0].op.padding
        assert 0 <= bottom - top <= 1
        assert 0 <= right - left <= 1


def test_a_channel_shuffle_moves_whole_channels():
    x = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    found = layers.Sequential(layers.ChannelShuffle(3))(x)
    assert np.array_equal(found, x[..., [0, 2, 4, 1, 3, 5]])


def test_zeros_are_padded_in_torchs_order():
    x = np.ones((1, 2, 3, 2), np.float32)
    found = layers.Sequential(layers.ZeroPad2d((1, 2, 3, 4)))(x)
    assert np.array_equal(found, np.pad(x, ((0, 0), (3, 4), (1, 2), (0, 0))))
    assert np.array_equal(layers.Sequential(layers.ZeroPad2d(2))(x),
                          np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))))


def test_a_layer_norm_is_of_the_channels_of_a_pixel():
    x = np.random.default_rng(0).integers(-4, 5, (2, 3, 4, 8)).astype(np.float32)
    net = layers.Sequential(layers.LayerNorm(8, eps=0.25))
    found = net(x)
    alone = net(np.ascontiguousarray(x[1:, 2:, 3:]))
    assert np.array_equal(found[1:, 2:, 3:], alone)
    assert np.abs(found.mean(-1)).max() <= 16 * U32 * np.abs(found).max()
    assert {key: array.tolist() for key, array in net.state_dict().items()} == {
        "0.weight": [1] * 8, "0.bias": [0] * 8}


# ---- graph ------------------------------------------------------------------------------------

def test_graph_has_torchs_paths_and_our_layouts():
    net = layers.Sequential(OrderedDict(
        features=layers.Sequential(layers.Conv2d(4, 6, (3, 5), groups=2), layers.Dropout(),
                                   layers.ReLU(), layers.AdaptiveAvgPool2d(1)),
        flat=layers.Flatten(), head=layers.Linear(6, 2)))
    graph = net.graph((None, 8, 8, 4))
    assert [node.name for node in graph.nodes] == [
        "features.0", "features.2", "features.3", "flat:transpose", "flat", "head"]
    assert list(graph.inputs) == ["input"]
    assert graph.outputs == ("output",)
    assert graph.inputs["input"].shape == (None, 8, 8, 4)
    assert graph.infer()["output"].shape == (None, 2)
    weight = net.state_dict()["features.0.weight"]
    assert weight.shape == (6, 2, 3, 5)
    assert np.array_equal(graph.constants["features.0.weight"], weight.transpose(0, 2, 3, 1))
    assert graph.constants["features.0.weight"].flags.c_contiguous
    assert graph.nodes[3].op == ops.Transpose((0, 3, 1, 2))


def test_each_node_of_a_layer_has_a_name():
    graph = layers.Sequential(layers.ChannelShuffle(2)).graph((None, None, None, 6))
    assert [node.name for node in graph.nodes] == ["0:reshape", "0:transpose", "0"]
    assert graph.infer()["output"].shape == (None, None, None, 6)


def test_any_image_size_that_fits_can_stay_open():
    net = layers.Sequential(layers.Conv2d(3, 4, 3), layers.AdaptiveAvgPool2d(1), layers.Flatten(),
                            layers.Linear(4, 2))
    assert net.graph((None, None, None, 3)).infer()["output"].shape == (None, 2)


@pytest.mark.parametrize(("net", "shape", "sentence"), [
    (exemplary(layers), (None, 16, 16, 3), r"layer '10': .* 96 features, weight \(5, 24\)"),
    (exemplary(layers), (None, 8, 8, 4), r"layer '0': .* 4 channels, .* takes 3"),
    (exemplary(layers), (8, 8, 3), r"layer '0': Conv2d takes x \(N, H, W, C\)"),
    (layers.Sequential(layers.Sequential(layers.MaxPool2d(9))), (None, 8, 8, 3),
     r"layer '0.0': a window of 9 does not fit 8"),
    (layers.Sequential(layers.BatchNorm2d(4)), (None, 8, 8, 3), "layer '0': BatchNorm over 3"),
    (layers.Sequential(layers.BatchNorm2d(4)), (None, 4), r"layer '0': .*takes \(N, H, W, 4\)"),
    (layers.Sequential(layers.Linear(3, 2)), (None, 8, 8, 3), r"put Flatten\(\) before it"),
    (layers.Sequential(layers.Softmax(dim=1)), (None, 8, 8, 3), r"layer '0': Softmax\(dim=1\)"),
    (layers.Sequential(layers.Softmax(dim=3)), (None, 8), "layer '0': axis 3 is out of range"),
    (layers.Sequential(layers.LogSoftmax(dim=1)), (None, 8, 8, 3), r"LogSoftmax\(dim=1\) of"),
    (layers.Sequential(layers.LayerNorm(4)), (None, 8, 8, 3), "layer '0': LayerNorm along the"),
    (layers.Sequential(layers.LocalResponseNorm(5)), (None, 4), r"takes \(N, H, W, C\), not"),
    (layers.Sequential(layers.ChannelShuffle(4)), (None, 8, 8, 6), "a multiple of groups=4, not"),
    (layers.Sequential(layers.ZeroPad2d(1)), (None, 8), "layer '0': Pad:"),
    (layers.Sequential(layers.Identity()), (None, 8), "no layer that computes anything"),
    (layers.Sequential(), (None, 8), "no layer that computes anything"),
    (exemplary(layers), "8x8", "input_shape='8x8' must be a shape"),
    (exemplary(layers), (None, 0, 8, 3), r"input_shape=\(None, 0, 8, 3\) must be a shape"),
])
def test_shapes_that_do_not_fit_name_the_layer(net, shape, sentence):
    with pytest.raises(cnn.ModelError, match=sentence):
        net.graph(shape)


# ---- arguments --------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: layers.Conv2d(0, 1, 1), "Conv2d: in_channels=0 must be a whole number from 1"),
    (lambda: layers.Conv2d(3, 1.5, 1), "Conv2d: out_channels=1.5 must be a whole number"),
    (lambda: layers.Conv2d(3, True, 1), "Conv2d: out_channels=True must be a whole number"),
    (lambda: layers.Conv2d(3, 1, None), "Conv2d: kernel_size=None must be one number or"),
    (lambda: layers.Conv2d(3, 1, (1, 2, 3)), r"Conv2d: kernel_size=\(1, 2, 3\) must be"),
    (lambda: layers.Conv2d(3, 1, 1, stride=0), "Conv2d: stride=0 must be"),
    (lambda: layers.Conv2d(3, 1, 1, padding=-1), "Conv2d: padding=-1 must be"),
    (lambda: layers.Conv2d(3, 1, 1, padding=(1, 2, 3)), r"Conv2d: padding=\(1, 2, 3\) must be"),
    (lambda: layers.Conv2d(3, 1, 1, padding="full"), "padding='full' can be a number, 'same' or"),
    (lambda: layers.Conv2d(3, 1, 3, 2, padding="same"), r"padding='same' needs stride 1, not \(2"),
    (lambda: layers.Conv2d(3, 1, 1, dilation="1"), "Conv2d: dilation='1' must be"),
    (lambda: layers.Conv2d(3, 4, 1, groups=2), "in_channels=3 must divide into groups=2"),
    (lambda: layers.Conv2d(4, 3, 1, groups=2), "out_channels=3 must divide into groups=2"),
    (lambda: layers.Conv2d(3, 1, 1, bias=5), "Conv2d: bias=5 must be True or False"),
    (lambda: layers.Linear(1 << 31, 1), "Linear: in_features=2147483648 must be a whole number"),
    (lambda: layers.Linear(1, "2"), "Linear: out_features='2' must be"),
    (lambda: layers.BatchNorm2d(-3), "BatchNorm2d: num_features=-3 must be"),
    (lambda: layers.BatchNorm2d(3, eps=float("nan")), "BatchNorm2d: eps=nan must be a number"),
    (lambda: layers.BatchNorm2d(3, eps="0"), "BatchNorm2d: eps='0' must be a number"),
    (lambda: layers.Softmax(None), "Softmax: dim=None must be a whole number"),
    (lambda: layers.MaxPool2d([]), r"MaxPool2d: kernel_size=\[\] must be"),
    (lambda: layers.MaxPool2d(2, stride=-1), "MaxPool2d: stride=-1 must be"),
    (lambda: layers.MaxPool2d(2, padding=2), r"MaxPool2d: padding=\(2, 2, 2, 2\) must be at most"),
    (lambda: layers.MaxPool2d(2, ceil_mode=1), "MaxPool2d: ceil_mode=1 must be True or False"),
    (lambda: layers.AvgPool2d(3, padding=(0, 2)), r"AvgPool2d: padding=\(0, 2, 0, 2\) must be"),
    (lambda: layers.AvgPool2d(3, count_include_pad=None), "AvgPool2d: count_include_pad=None must"),
    (lambda: layers.AdaptiveAvgPool2d(7), r"output_size=\(7, 7\) is not supported, only 1"),
    (lambda: layers.AdaptiveMaxPool2d(2), r"AdaptiveMaxPool2d: output_size=\(2, 2\) is not supp"),
    (lambda: layers.LeakyReLU("0"), "LeakyReLU: negative_slope='0' must be a number from -21"),
    (lambda: layers.ELU(inplace=1), "ELU: inplace=1 must be True or False"),
    (lambda: layers.ELU(float("inf")), "ELU: alpha=inf must be a number"),
    (lambda: layers.GELU("erf"), "GELU: approximate='erf' can be 'none' or 'tanh'"),
    (lambda: layers.LayerNorm((3, 4)), r"LayerNorm: normalized_shape=\(3, 4\) must be one whole"),
    (lambda: layers.LayerNorm(3, eps=-1), "LayerNorm: eps=-1 must be a number from 0 to 1"),
    (lambda: layers.LocalResponseNorm(4), "LocalResponseNorm: size=4 is not supported, only odd"),
    (lambda: layers.LocalResponseNorm(5, k=-1), "LocalResponseNorm: k=-1 must be a number from 0"),
    (lambda: layers.ZeroPad2d((1, 2)), r"ZeroPad2d: padding=\(1, 2\) must be one number or"),
    (lambda: layers.ZeroPad2d(-1), "ZeroPad2d: padding=-1 must be one number or"),
    (lambda: layers.ChannelShuffle(0), "ChannelShuffle: groups=0 must be a whole number from 1"),
    (lambda: layers.Flatten(0), "Flatten: start_dim=0 is not supported, only 1"),
    (lambda: layers.Dropout(1.5), "Dropout: p=1.5 must be a number from 0 to 1"),
    (lambda: layers.ReLU(inplace=0), "ReLU: inplace=0 must be True or False"),
    (lambda: layers.Sequential(layers.ReLU), "layer '0' is <class 'cnn.activations.ReLU'>, which"),
    (lambda: layers.Sequential({"a.b": layers.ReLU()}), "'a.b' can not be a layer's name"),
    (lambda: layers.Sequential({"": layers.ReLU()}), "'' can not be a layer's name"),
    (lambda: exemplary(layers).reset_parameters("x"), "reset_parameters: seed='x' must be"),
])
def test_an_argument_that_makes_no_sense_is_named(make, sentence):
    with pytest.raises(cnn.ModelError, match=sentence):
        make()


def test_numpy_integers_and_lists_are_sizes_too():
    layer = layers.Conv2d(np.int64(3), 4, [np.int32(3), 1], padding=[1, 0])
    assert repr(layer) == repr(layers.Conv2d(3, 4, (3, 1), padding=(1, 0)))


def test_a_sequential_is_a_sequence_of_layers():
    inner = layers.Sequential(layers.ReLU())
    net = layers.Sequential(inner, layers.Tanh())
    assert len(net) == 2
    assert net[0] is inner
    assert net[-1] is list(net)[1]
    assert repr(net) == ("Sequential(\n  (0): Sequential(\n    (0): ReLU(inplace=False)\n  )\n"
                         "  (1): Tanh()\n)")


# ---- weights ----------------------------------------------------------------------------------

def test_load_state_dict_lists_all_that_is_wrong_and_changes_nothing():
    net = layers.Sequential(layers.Conv2d(3, 4, 3), layers.BatchNorm2d(4), layers.Flatten(),
                            layers.Linear(4, 2))
    before = net.state_dict()
    state = {key: array + 1 for key, array in before.items()}
    del state["0.bias"], state["1.weight"]
    state |= {"3.weight": np.zeros((4, 2)), "3.bias": np.zeros(2, int), "fc.weight": np.zeros(1),
              "0.num_batches_tracked": np.array(1), "1.num_batches_tracked": np.array(1),
              "1.bias": object()}
    with pytest.raises(cnn.ModelError) as error:
        net.load_state_dict(state)
    assert str(error.value) == (
        "the state_dict does not fit the network; missing: '0.bias' (4,), '1.weight' (4,); "
        "unexpected: 'fc.weight', '0.num_batches_tracked'; misshapen: '3.weight' is (4, 2), (2, 4) "
        "is needed; no floats: '1.bias' (its dtype is object), '3.bias' (its dtype is int64)")
    after = net.state_dict()
    assert all(np.array_equal(after[key], array) for key, array in before.items())
    with pytest.raises(cnn.ModelError, match="takes a mapping of names to arrays, not list"):
        net.load_state_dict([])


class Tensor:
    """What load_state_dict may use of a torch tensor that needs a gradient and is bfloat16."""

    def __init__(self, array, ready=()):
        self.array, self.ready = array, {*ready}

    def detach(self):
        return Tensor(self.array, self.ready | {"detached"})

    def cpu(self):
        return Tensor(self.array, self.ready | {"cpu"})

    def float(self):
        return Tensor(self.array, self.ready | {"float"})

    def is_floating_point(self):
        return True

    def __array__(self, dtype=None, copy=None):
        assert self.ready == {"detached", "cpu", "float"}
        return self.array


@pytest.mark.parametrize("convert", [np.float16, np.float64, Tensor, np.ndarray.tolist])
def test_load_state_dict_takes_every_kind_of_floats(convert):
    net = layers.Sequential(layers.Linear(3, 2))
    state = {"0.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
             "0.bias": np.ones(2, np.float32)}
    net.load_state_dict({key: convert(array) for key, array in state.items()})
    for key, array in net.state_dict().items():
        assert array.dtype == np.float32
        assert np.array_equal(array, state[key])


def test_weights_are_copied_in_and_out():
    net = layers.Sequential(layers.Linear(3, 2))
    given = {"0.weight": np.ones((2, 3), np.float32), "0.bias": np.ones(2, np.float32)}
    net.load_state_dict(given)
    given["0.weight"][:] = 5
    net.state_dict()["0.bias"][:] = 5
    assert all((array == 1).all() for array in net.state_dict().values())


def test_initial_weights_are_torchs_rule_and_always_the_same():
    def make():
        return layers.Sequential(layers.Conv2d(8, 32, 3, groups=2), layers.Conv2d(32, 32, 1),
                                 layers.Conv2d(32, 32, 1), layers.BatchNorm2d(32))
    first, second = make().state_dict(), make().state_dict()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert not np.array_equal(first["1.weight"], first["2.weight"])
    for key, inputs in {"0.weight": 36, "0.bias": 36, "1.weight": 32, "1.bias": 32}.items():
        assert first[key].dtype == np.float32
        assert 0.8 / inputs ** 0.5 < np.abs(first[key]).max() <= 1 / inputs ** 0.5
        assert first[key].min() < 0 < first[key].max()
    assert (first["3.weight"] == 1).all()
    assert (first["3.running_var"] == 1).all()
    assert not first["3.bias"].any()
    assert not first["3.running_mean"].any()
    net = make()
    net.reset_parameters(seed=1)
    assert not np.array_equal(net.state_dict()["0.weight"], first["0.weight"])
    net.reset_parameters()
    assert np.array_equal(net.state_dict()["0.weight"], first["0.weight"])


def test_a_loaded_part_keeps_its_weights_in_a_larger_network():
    part = layers.Sequential(layers.Linear(3, 3, bias=False))
    part.load_state_dict({"0.weight": np.eye(3)})
    net = layers.Sequential(part, layers.Linear(3, 2))
    assert np.array_equal(net.state_dict()["0.0.weight"], np.eye(3))


# ---- calling ----------------------------------------------------------------------------------

def test_new_weights_are_used_at_once_also_those_of_a_part():
    part = layers.Sequential(layers.Linear(2, 2, bias=False))
    net = layers.Sequential(part, layers.ReLU())
    x = np.array([[1, 2]], np.float32)
    for factor in (1, 3):
        net.load_state_dict({"0.0.weight": factor * np.eye(2)})
        assert np.array_equal(net(x), factor * x)
    part.load_state_dict({"0.weight": 5 * np.eye(2)})
    assert np.array_equal(net(x), 5 * x)


def test_image_sizes_and_batch_sizes_may_change_from_call_to_call(monkeypatch):
    monkeypatch.setattr(sequential, "MAX_MODELS", 2)
    net = layers.Sequential(layers.Conv2d(1, 1, 2, stride=2, bias=False))
    net.load_state_dict({"0.weight": np.ones((1, 1, 2, 2))})
    for n, height, width in [(1, 2, 2), (2, 4, 6), (0, 4, 6), (1, 2, 4), (3, 2, 2)]:
        assert np.array_equal(net(np.ones((n, height, width, 1), np.float32)),
                              np.full((n, height // 2, width // 2, 1), 4))
    assert len(net._models) == 2


@pytest.mark.parametrize(("batch", "sentence"), [
    ([[1.0]], r"a batch is a NumPy array \(N, H, W, C\), not \[\[1.0\]\]"),
    (np.zeros(3, np.float32), r"not shape \(3,\)"),
    (np.zeros((1, 8, 8, 3)), "must be a float32 NumPy array, it is float64"),
    (np.zeros((1, 3, 8, 8), np.float32), "layer '0': Conv2d: x has 8 channels"),
    (np.zeros((8, 8, 3), np.float32), r"layer '0': Conv2d takes x \(N, H, W, C\)"),
])
def test_a_batch_that_does_not_fit_is_refused(batch, sentence):
    with pytest.raises(cnn.ModelError, match=sentence):
        exemplary(layers)(batch)
