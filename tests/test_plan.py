"""The memory plan: nothing that lives at the same time may overlap."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn.graph import Graph, Node
from cnn.plan import ALIGNMENT, Block, alive_at_once, place, place_in_turn, plan, views
from kernels import ops
from kernels.ops import TensorSpec


@st.composite
def graphs(draw):
    """Random DAGs of concats, reshapes and activations over two rows of several lengths."""
    inputs = {f"i{k}": TensorSpec((2, draw(st.integers(1, 150)))) for k in range(2)}
    sizes = {name: spec.shape[1] for name, spec in inputs.items()}
    nodes = []
    for step in range(draw(st.integers(1, 15))):
        first = draw(st.sampled_from(sorted(sizes)))
        kind = draw(st.sampled_from(["relu", "reshape", "concat"]))
        name = f"v{step}"
        if kind == "concat":
            second = draw(st.sampled_from(sorted(sizes)))
            nodes.append(Node(ops.Concat(1), (first, second), name, name))
            sizes[name] = sizes[first] + sizes[second]
        else:
            op = ops.Relu() if kind == "relu" else ops.Reshape((2, -1))
            nodes.append(Node(op, (first,), name, name))
            sizes[name] = sizes[first]
        if sizes[name] > 1500:
            break
    outputs = (nodes[-1].output, draw(st.sampled_from(sorted(sizes))))
    return Graph(inputs, tuple(dict.fromkeys(outputs)), tuple(nodes))


@given(graphs(), st.data())
@settings(max_examples=150, deadline=None)
def test_running_the_plan_destroys_no_value_before_its_last_use(graph, data):
    """Simulated with owners: each value marks its bytes; a reader must find its own marks, or in
    what a Concat gives those of its parts.

    Where a part of a Concat's value lies is worked out from the Concat's inputs.
    """
    keep = frozenset(data.draw(st.sets(st.sampled_from([n.output for n in graph.nodes]),
                                       max_size=2)))
    workspaces = [data.draw(st.sampled_from([0, 0, 100])) for _ in graph.nodes]
    specs = graph.infer()
    strided, readers = ({node.output: data.draw(st.sampled_from([1, 1, 2]))
                         for node in graph.nodes
                         if isinstance(node.op, kinds) and data.draw(st.booleans())}
                        for kinds in ((ops.Relu, ops.Concat), ops.Relu))
    made = plan(graph, specs, workspaces, keep, strided, readers)
    roots = views(graph)
    owner = [None] * made.size
    places = {name: (made.offsets[name], specs[name].shape[1]) for name in made.offsets}
    of_concat = {}
    for node in reversed(graph.nodes):
        if isinstance(node.op, ops.Concat):
            start, pitch = places[node.output]
            of_concat[node.output] = [name for name in node.inputs if name in made.parts]
            for name in node.inputs:
                if name in made.parts:
                    whole, first = made.parts[name]
                    assert start == made.offsets[whole] + 4 * first
                    units = [strided[name], *(readers[reader.output] for reader in graph.nodes
                                              if name in reader.inputs
                                              and not isinstance(reader.op, ops.Concat))]
                    assert all(first % unit == specs[whole].shape[1] % unit == 0
                               for unit in units)
                    places[name] = start, pitch
                start += 4 * specs[name].shape[1]

    def span(name):
        start, pitch = places[name]
        return [start + 4 * pitch * row + byte for row in range(2)
                for byte in range(4 * specs[name].shape[1])]

    def owners(name):
        """Of the bytes of a value: its own mark, or those of the parts of a Concat's."""
        root = roots.get(name, name)
        marks = dict.fromkeys(span(root), root)
        for part in of_concat.get(root, ()):
            marks.update(owners(part))
        return marks

    def write(name):
        inside = {byte for part in of_concat.get(name, ()) for byte in span(part)}
        for byte in set(span(name)) - inside:
            owner[byte] = name

    def check(name):
        assert all(owner[byte] == mark for byte, mark in owners(name).items()), name

    for name in graph.inputs:
        write(name)
    for node, offset, size in zip(graph.nodes, made.workspaces, workspaces, strict=True):
        for byte in range(offset, offset + size):
            owner[byte] = "scratch"
        if node.output not in roots:
            write(node.output)
        for name in node.inputs:        # after the write: an output must not overlap its inputs
            check(name)                 # but where they lie in it
        assert all(owner[byte] == "scratch" for byte in range(offset, offset + size))
    for name in (*graph.outputs, *keep):
        check(name)
    assert all(offset % ALIGNMENT == 0 for offset in made.offsets.values())
    sizes = [8 * specs[name].shape[1] for name in made.offsets if name not in roots] + workspaces
    assert made.size <= sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def most_alive(graph, specs):
    """Bytes alive in the worst step: no plan can need less."""
    size = {name: 4 * ops.count(specs[name].shape) for name in specs if name not in graph.constants}
    worst = 0
    for step, node in enumerate(graph.nodes):
        read_later = {name for later in graph.nodes[step:] for name in later.inputs}
        made = {*graph.inputs, *(earlier.output for earlier in graph.nodes[:step])}
        alive = (made & (read_later | set(graph.outputs))) | {node.output}
        worst = max(worst, sum(size[name] for name in alive))
    return worst


def test_a_residual_network_needs_little_more_than_its_worst_step():
    """Bottlenecks as in ResNet: the shortcut's size doubles where the image halves."""
    nodes, constants, value = [], {}, "x"

    def conv(x, inputs, outputs, stride, *residual):
        name = f"v{len(nodes)}"
        weights = f"{name}:weight", f"{name}:bias"
        constants[weights[0]] = np.zeros((outputs, 1, 1, inputs), np.float32)
        constants[weights[1]] = np.zeros(outputs, np.float32)
        nodes.append(Node(ops.Conv2d((stride, stride)), (x, *weights, *residual), name, name))
        return name

    channels = 16
    for stage in range(4):
        for block in range(3):
            width, stride = 16 << stage, 1 + (stage > 0 and block == 0)
            shortcut = value if block else conv(value, channels, 4 * width, stride)
            inner = conv(conv(value, channels, width, 1), width, width, stride)
            value, channels = conv(inner, width, 4 * width, 1, shortcut), 4 * width
    graph = Graph({"x": TensorSpec((1, 56, 56, 16))}, (value,), tuple(nodes), constants)
    specs = graph.infer()
    least = most_alive(graph, specs)
    assert least <= plan(graph, specs, [0] * len(nodes)).size <= 1.2 * least


def test_a_chain_needs_room_for_two_values():
    nodes = [Node(ops.Relu(), (f"v{i}",), f"v{i + 1}", f"n{i}") for i in range(10)]
    graph = Graph({"v0": TensorSpec((1024,))}, ("v10",), tuple(nodes))
    assert plan(graph, graph.infer(), [0] * 10).size == 2 * 4096


def test_a_residual_block_needs_room_for_three():
    ops_in_order = [("a", ops.Relu(), ("x",)), ("b", ops.Relu(), ("a",)),
                    ("c", ops.Add(), ("b", "x"))]
    nodes = [Node(op, inputs, name, name) for name, op, inputs in ops_in_order]
    graph = Graph({"x": TensorSpec((1024,))}, ("c",), tuple(nodes))
    assert plan(graph, graph.infer(), [0] * 3).size == 3 * 4096


def test_views_share_memory_and_constants_never_do():
    nodes = (Node(ops.Flatten(1), ("x",), "f", "f"), Node(ops.Reshape((-1,)), ("f",), "r", "r"),
             Node(ops.Reshape((-1,)), ("c",), "s", "s"), Node(ops.Add(), ("r", "s"), "y", "y"))
    graph = Graph({"x": TensorSpec((1, 2, 3))}, ("y",), nodes)
    assert views(graph) == {"f": "x", "r": "x", "s": "c"}
    graph = Graph(graph.inputs, graph.outputs, nodes, {"c": np.ones((2, 3), np.float32)})
    assert views(graph) == {"f": "x", "r": "x"}


def concat(outputs=(), axis=-1, twice=False, reshape=False):
    """x -> a, b of 2 and 3 channels -> their Concat y, and what else reads a."""
    weights = {"v": np.zeros((2, 1, 1, 4), np.float32), "w": np.zeros((3, 1, 1, 4), np.float32)}
    nodes = [Node(ops.Conv2d(), ("x", "v"), "a", "a"), Node(ops.Conv2d(), ("x", "w"), "b", "b"),
             Node(ops.Concat(axis), ("a", "b", *"a" * twice), "y", "y")]
    if reshape:
        nodes.append(Node(ops.Flatten(), ("a",), "f", "f"))
    return Graph({"x": TensorSpec((2, 5, 6, 4))}, ("y", *outputs), tuple(nodes), weights)


def test_a_concat_of_convolutions_is_born_with_the_first():
    graph = concat()
    made = plan(graph, graph.infer(), [0, 100, 0], strided=dict.fromkeys("ab", 1))
    assert made.parts == {"a": ("y", 0), "b": ("y", 2)}
    assert set(made.offsets) == {"x", "y"}
    assert made.size == 1216 + 960 + 100        # y to the next 64 bytes, x, and the scratch


@pytest.mark.parametrize(("choice", "strided", "keep", "parts"), [
    ({}, "ab", "", "ab"), ({}, "a", "", "a"), ({}, "", "", ""), ({}, "ab", "a", "b"),
    ({"outputs": "a"}, "ab", "", "b"), ({"twice": True}, "ab", "", "b"),
    ({"reshape": True, "outputs": "f"}, "ab", "", "b")])
def test_what_anything_but_the_concat_reads_is_no_part_of_it(choice, strided, keep, parts):
    graph = concat(**choice)
    made = plan(graph, graph.infer(), [0] * len(graph.nodes), frozenset(keep),
                dict.fromkeys(strided, 1))
    assert set(made.parts) == set(parts)


def test_a_dense_block_has_one_array():
    """x and what is made of all before it, three times: each joins them, and norms read them."""
    nodes, value, shape = [Node(ops.Relu(), ("i",), "x", "x")], "x", (2, 5, 6, 4)
    for i in range(3):
        nodes += [Node(ops.Relu(), (value,), f"n{i}", f"n{i}"),
                  Node(ops.Slice(-1, 0, 3), (f"n{i}",), f"c{i}", f"c{i}"),
                  Node(ops.Concat(-1), (value, f"c{i}"), f"y{i}", f"y{i}")]
        value = f"y{i}"
    graph = Graph({"i": TensorSpec(shape)}, (value,), tuple(nodes))
    strided = {node.output: 1 for node in nodes if node.output[0] in "xcy"}
    for readers, parts in ({"n0", "n1", "n2"}, {"x": 0, "c0": 4, "y0": 0, "c1": 7, "y1": 0,
                                                "c2": 10}), ({"n1"}, {"c0": 4, "y0": 0, "c1": 7}):
        made = plan(graph, graph.infer(), [0] * 10, strided=strided,
                    readers=dict.fromkeys(readers, 1))
        outer = "y2" if "n2" in readers else "y1"
        found = {name: first for name, (whole, first) in made.parts.items() if whole == outer}
        assert found == parts
    # As a second input nobody reads it strided.
    graph = Graph(graph.inputs, (value, "z"), (*nodes, Node(ops.Add(), ("y1", "y1"), "z", "z")))
    made = plan(graph, graph.infer(), [0] * 11, strided=strided,
                readers=dict.fromkeys(("n0", "n1", "n2", "z"), 1))
    assert made.parts["y0"].whole == "y1"
    assert "y1" not in made.parts


@pytest.mark.parametrize(("units", "readers", "parts"), [
    ({"x": 4, "c": 1, "y": 1, "d": 1}, {"n": 1}, "xcyd"),
    ({"x": 4, "c": 4, "y": 4, "d": 4}, {"n": 4}, "xcyd"),
    # c begins at channel 4; the whole has 16; a reader's unit counts as the writer's does.
    ({"x": 1, "c": 8, "y": 1, "d": 1}, {"n": 1}, "xyd"),
    ({"x": 1, "c": 1, "y": 3, "d": 1}, {"n": 1}, "xcd"),
    ({"x": 1, "c": 1, "y": 1, "d": 1}, {"n": 3}, "xcd")])
def test_a_part_lies_where_its_writer_and_its_readers_can_use_it(units, readers, parts):
    """x and c make y, of 8 channels, which n reads, and which makes z of 16 with d."""
    def made(name, channels):
        return Node(ops.Slice(-1, 0, channels), ("i",), name, name)
    nodes = (made("x", 4), made("c", 4), Node(ops.Concat(-1), ("x", "c"), "y", "y"),
             Node(ops.Relu(), ("y",), "n", "n"), made("d", 8),
             Node(ops.Concat(-1), ("y", "d"), "z", "z"))
    graph = Graph({"i": TensorSpec((2, 3, 3, 9))}, ("z", "n"), nodes)
    found = plan(graph, graph.infer(), [0] * 6, strided=units, readers=readers).parts
    assert set(found) == set(parts)
    whole = "z" if "y" in parts else "y"
    assert all(part.whole == (whole if name in "xc" else "z") for name, part in found.items())


def test_only_the_last_axis_has_parts():
    nodes = (Node(ops.Relu(), ("x",), "a", "a"), Node(ops.Concat(1), ("a", "x"), "y", "y"))
    graph = Graph({"x": TensorSpec((2, 5, 6, 4))}, ("y",), nodes)
    assert plan(graph, graph.infer(), [0, 0], strided={"a": 1}).parts == {}


def test_what_lives_long_is_placed_first_where_that_needs_less():
    """As in a dense block: its array outlives what was pooled into it, which is as large, and then
    ever larger values, each beside a smaller one."""
    blocks = [Block(640, 0, 1), Block(640, 1, 9), Block(576, 2, 3), Block(320, 3, 4)]
    assert place_in_turn(blocks, lambda block: -block.size) == 1280 + 320
    assert place(blocks) == alive_at_once(blocks) == 640 + 576 + 320


def test_a_gap_is_used_again():
    blocks = [Block(100, 0, 1), Block(300, 0, 5), Block(100, 2, 5)]
    assert place(blocks) == 320 + 100
    assert blocks[0].offset == blocks[2].offset == 320
