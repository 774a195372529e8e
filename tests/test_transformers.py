"""What exporters write of attention and its like, against ONNX Runtime on the same file: which ops
it becomes, and that nothing is turned that can be read as it lies."""
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx_models import RNG, build, compare, node, saved

import cnn
from cnn import passes
from cnn.executor import specialise
from cnn.onnx_import import load_onnx
from cnn.plan import views

BATCH, TOKENS, HEADS, DEPTH = 2, 10, 3, 8
CHANNELS = HEADS * DEPTH
X = RNG.standard_normal((BATCH, TOKENS, CHANNELS)).astype(np.float32)
VALUES = {"x": ["N", TOKENS, CHANNELS]}


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def ran(tmp_path, shape):
    """How often each kind of op runs at this shape."""
    graph = specialise(load_onnx(tmp_path / "net.onnx").graph, {"x": shape})
    return Counter(node.op.kind for node in graph.nodes if node.output not in views(graph))


def queries_keys_values():
    """One Linear layer for all three, as timm's ViT has it."""
    return [node("MatMul", ["x", "w"], ["l"]), node("Reshape", ["l", "split"], ["five"]),
            node("Transpose", ["five"], ["t"], perm=[2, 0, 3, 1, 4]),
            *(part for i, name in enumerate("qkv") for part in (
                node("Gather", ["t", f"i{i}"], [f"{name}1"], axis=0),
                node("Squeeze", [f"{name}1", "first"], [name])))]


def together(value):
    return [node("Transpose", [value], ["o"], perm=[0, 2, 1, 3]),
            node("Reshape", ["o", "joined"], ["y"])]


CONSTANTS = {"w": random(CHANNELS, 3 * CHANNELS), "first": np.int64([0]),
             "split": np.int64([0, TOKENS, 3, HEADS, DEPTH]), "joined": np.int64([0, 0, CHANNELS]),
             **{f"i{i}": np.int64([i]) for i in range(3)}, "scale": np.float32(DEPTH ** -0.5),
             "root": np.float32(DEPTH ** -0.25), "bias": random(1, HEADS, TOKENS, TOKENS),
             "two": random(1, HEADS, 1, 1)}


@pytest.mark.parametrize("scaled", ["queries", "both", "scores", "not"])
@pytest.mark.parametrize("bias", ["", "bias", "two"])
def test_attention_is_one_op(tmp_path, scaled, bias):
    q, k, before = "q", "kt", [node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2])]
    if scaled in ("queries", "both"):
        factor = "scale" if scaled == "queries" else "root"
        before.append(node("Mul", ["q", factor], ["qs"]))
        q = "qs"
    if scaled == "both":
        before.append(node("Mul", ["root", "kt"], ["ks"]))
        k = "ks"
    scores = [node("MatMul", [q, k], ["s"])]
    if scaled == "scores":
        scores.append(node("Mul", ["s", "scale"], ["ss"]))
    if bias:
        scores.append(node("Add", [bias, scores[-1].output[0]], ["b"]))
    nodes = [*queries_keys_values(), *before, *scores,
             node("Softmax", [scores[-1].output[0]], ["p"], axis=-1),
             node("MatMul", ["p", "v"], ["a"]), *together("a")]
    compare(tmp_path, build(nodes, VALUES, constants=CONSTANTS), x=X)
    assert ran(tmp_path, X.shape) == {"Linear": 1, "Attention": 1}


def test_a_residual_is_added_by_the_layer_before(tmp_path):
    """A block's second half: norm, two layers, and what came in."""
    constants = {"one": random(CHANNELS), "zero": random(CHANNELS), "up": random(CHANNELS, 40),
                 "down": random(40, CHANNELS), "upb": random(40), "downb": random(CHANNELS),
                 "gamma": random(CHANNELS)}
    nodes = [node("LayerNormalization", ["x", "one", "zero"], ["n"], axis=-1),
             node("MatMul", ["n", "up"], ["u"]), node("Add", ["u", "upb"], ["v"]),
             node("Relu", ["v"], ["g"]), node("MatMul", ["g", "down"], ["d"]),
             node("Add", ["d", "downb"], ["e"]), node("Mul", ["e", "gamma"], ["s"]),
             node("Add", ["x", "s"], ["y"])]
    compare(tmp_path, build(nodes, VALUES, constants=constants), x=X)
    assert ran(tmp_path, X.shape) == {"LayerNorm": 1, "Linear": 2}


def test_heads_that_are_joined_with_the_batch_stay_apart(tmp_path):
    """As PyTorch's exporter turns keys."""
    constants = {**CONSTANTS, "together": np.int64([-1, TOKENS, DEPTH]),
                 "apart": np.int64([-1, HEADS, DEPTH, TOKENS])}
    nodes = [*queries_keys_values(), node("Reshape", ["k", "together"], ["k3"]),
             node("Transpose", ["k3"], ["t3"], perm=[0, 2, 1]),
             node("Reshape", ["t3", "apart"], ["kt"]), node("MatMul", ["q", "kt"], ["s"]),
             node("Softmax", ["s"], ["p"], axis=-1), node("MatMul", ["p", "v"], ["a"]),
             *together("a")]
    compare(tmp_path, build(nodes, VALUES, constants=constants), x=X)
    assert ran(tmp_path, X.shape) == {"Linear": 1, "Attention": 1}


def vit(tmp_path):
    """A small one, of four patches of 16x16 and a class token, and photos for it."""
    tokens, width = 5, 24
    constants = {
        "patch": random(width, 3, 16, 16) / 16, "rows": np.int64([0, width, 4]),
        "token": random(1, 1, width), "tail": np.int64([1, width]), "zero": np.int64([0]),
        "one": np.int64([1]), "place": random(1, tokens, width), "ns": random(width),
        "nb": random(width), "qkv": random(width, 3 * width) / 5,
        "split": np.int64([0, tokens, 3, HEADS, DEPTH]), "scale": np.float32(DEPTH ** -0.5),
        "joined": np.int64([0, tokens, width]), "out": random(width, width) / 5,
        **{f"i{i}": np.int64(i) for i in range(3)}, "classes": random(width, 7)}
    nodes = [
        node("Conv", ["x", "patch"], ["c"], strides=[16, 16]),
        node("Reshape", ["c", "rows"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 1]), node("Shape", ["t"], ["s"]),
        node("Slice", ["s", "zero", "one"], ["n"]), node("Concat", ["n", "tail"], ["e"], axis=0),
        node("Expand", ["token", "e"], ["tokens"]),
        node("Concat", ["tokens", "t"], ["all"], axis=1),
        node("Add", ["all", "place"], ["p"]), node("LayerNormalization", ["p", "ns", "nb"], ["l"]),
        node("MatMul", ["l", "qkv"], ["m"]), node("Reshape", ["m", "split"], ["five"]),
        node("Transpose", ["five"], ["f"], perm=[2, 0, 3, 1, 4]),
        *(node("Gather", ["f", f"i{i}"], [name], axis=0) for i, name in enumerate("qkv")),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]), node("MatMul", ["q", "kt"], ["sc"]),
        node("Mul", ["sc", "scale"], ["ss"]), node("Softmax", ["ss"], ["sm"], axis=-1),
        node("MatMul", ["sm", "v"], ["a"]), node("Transpose", ["a"], ["o"], perm=[0, 2, 1, 3]),
        node("Reshape", ["o", "joined"], ["j"]), node("MatMul", ["j", "out"], ["d"]),
        node("Add", ["p", "d"], ["w"]), node("Gather", ["w", "i0"], ["first"], axis=1),
        node("MatMul", ["first", "classes"], ["y"])]
    return saved(tmp_path, build(nodes, {"x": ["N", 3, 32, 32]}, constants=constants)), random(
        3, 32, 32, 3)


def test_a_vision_transformer_and_all_its_values(tmp_path):
    path, photos = vit(tmp_path)
    compare(tmp_path, onnx.load(path), x=np.ascontiguousarray(photos.transpose(0, 3, 1, 2)))
    assert ran(tmp_path, photos.shape) == {
        "Conv2d": 1, "Concat": 1, "Add": 1, "LayerNorm": 1, "Linear": 3, "Attention": 1, "Slice": 1}
    model = cnn.load(path)
    values = model.trace(photos)
    assert "Softmax_19" in values
    np.testing.assert_allclose(values["Softmax_19"].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(values["MatMul_26"], model.run({
        "x": photos.transpose(0, 3, 1, 2)})["y"], rtol=0, atol=1e-4)


def test_a_vision_transformer_of_a_fixed_batch(tmp_path):
    """All shapes are known at load, so that all is arranged there, and once more for the call."""
    path, photos = vit(tmp_path)
    file = onnx.load(path)
    file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    compare(tmp_path, file, x=np.ascontiguousarray(photos.transpose(0, 3, 1, 2)))
    graph = passes.optimise(load_onnx(tmp_path / "net.onnx").graph)
    assert any(getattr(node.op, "windows", ()) for node in graph.nodes)
    assert passes.optimise(graph).nodes == graph.nodes


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 0.01),
                                              ("bfloat16", 0.08)])
def test_a_vision_transformer_by_the_cuda_kernels(tmp_path, dtype, bound):
    path, photos = vit(tmp_path)
    x = {"x": photos.transpose(0, 3, 1, 2)}
    expected = cnn.load(path).run(x)["y"]
    model = cnn.load(path, device="emulator", dtype=dtype)
    assert np.abs(model.run(x)["y"] - expected).max() <= bound * np.abs(expected).max()
    (kernel,) = [row.kernel for row in model.summary(3).rows
                 if row.kernel.startswith(("attention", "matmul"))]
    assert kernel.startswith("matmul_f32" if dtype == "float32" else "attention_")


def test_scores_that_are_read_twice_stay_apart(tmp_path):
    nodes = [*queries_keys_values(), node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
             node("MatMul", ["q", "kt"], ["s"]), node("Softmax", ["s"], ["p"], axis=-1),
             node("MatMul", ["p", "v"], ["a"]), node("MatMul", ["s", "v"], ["b"]),
             node("Add", ["a", "b"], ["c"]), *together("c")]
    compare(tmp_path, build(nodes, VALUES, constants=CONSTANTS), x=X)
    assert "Attention" not in ran(tmp_path, X.shape)


def test_attention_across_channels(tmp_path):
    """As XCiT has it (El-Nouby et al. 2021, arXiv:2106.09681): channels attend to channels."""
    nodes = [*queries_keys_values(), *(node("Transpose", [name], [f"{name}t"], perm=[0, 1, 3, 2])
                                       for name in "qv"),
             node("MatMul", ["qt", "k"], ["s"]), node("Softmax", ["s"], ["p"], axis=-1),
             node("MatMul", ["p", "vt"], ["a"]),
             node("Transpose", ["a"], ["o"], perm=[0, 3, 1, 2]),
             node("Reshape", ["o", "joined"], ["y"])]
    compare(tmp_path, build(nodes, VALUES, constants=CONSTANTS), x=X)
    assert ran(tmp_path, X.shape) == {"Linear": 1, "MatMul": 2, "Softmax": 1}


def test_attention_without_softmax(tmp_path):
    """As EfficientViT has it (Cai et al. 2022, arXiv:2205.14756): q @ (k.T @ v)."""
    nodes = [*queries_keys_values(), node("Relu", ["q"], ["qr"]), node("Relu", ["k"], ["kr"]),
             node("Transpose", ["kr"], ["kt"], perm=[0, 1, 3, 2]),
             node("MatMul", ["kt", "v"], ["kv"]), node("MatMul", ["qr", "kv"], ["a"]),
             *together("a")]
    compare(tmp_path, build(nodes, VALUES, constants=CONSTANTS), x=X)
    assert ran(tmp_path, X.shape) == {"Linear": 1, "Slice": 2, "Relu": 2, "MatMul": 2}


def test_attention_between_convolutions(tmp_path):
    """As YOLO's classifiers have it: pixels are columns, and the product is v @ p.T."""
    x, width, pixels = random(2, 8, 5, 6), 8, 30
    constants = {"w": random(3 * HEADS * width, 8, 1, 1), "out": random(8, HEADS * width, 1, 1),
                 "rows": np.int64([0, HEADS, 3 * width, pixels]), "sizes": np.int64([width] * 3),
                 "image": np.int64([0, HEADS * width, 5, 6]), "scale": np.float32(width ** -0.5)}
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Reshape", ["c", "rows"], ["r"]),
             node("Split", ["r", "sizes"], ["q", "k", "v"], axis=2),
             node("Transpose", ["q"], ["qt"], perm=[0, 1, 3, 2]),
             node("MatMul", ["qt", "k"], ["s"]), node("Mul", ["s", "scale"], ["ss"]),
             node("Softmax", ["ss"], ["p"], axis=-1),
             node("Transpose", ["p"], ["pt"], perm=[0, 1, 3, 2]),
             node("MatMul", ["v", "pt"], ["a"]), node("Reshape", ["a", "image"], ["i"]),
             node("Conv", ["i", "out"], ["d"]), node("Add", ["x", "d"], ["y"])]
    compare(tmp_path, build(nodes, {"x": ["N", 8, 5, 6]}, constants=constants), x=x)
    assert ran(tmp_path, (2, 5, 6, 8)) == {"Conv2d": 2, "Attention": 1, "Transpose": 1}


def test_windows_that_a_mask_cuts(tmp_path):
    """Swin's (Liu et al. 2021, arXiv:2103.14030): windows of several images, each with its mask."""
    mask = np.where(RNG.random((4, 1, TOKENS, TOKENS)) < 0.3, -100, 0).astype(np.float32)
    constants = {**CONSTANTS, "mask": mask, "wide": np.int64([-1, 4, HEADS, TOKENS, TOKENS]),
                 "back": np.int64([-1, HEADS, TOKENS, TOKENS])}
    nodes = [*queries_keys_values(), node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
             node("Mul", ["q", "scale"], ["qs"]), node("MatMul", ["qs", "kt"], ["s"]),
             node("Add", ["s", "bias"], ["b"]), node("Reshape", ["b", "wide"], ["w5"]),
             node("Add", ["w5", "mask"], ["m"]), node("Reshape", ["m", "back"], ["n"]),
             node("Softmax", ["n"], ["p"], axis=-1), node("MatMul", ["p", "v"], ["a"]),
             *together("a")]
    compare(tmp_path, build(nodes, VALUES, constants=constants), x=random(8, TOKENS, CHANNELS))


def test_a_token_for_each_image(tmp_path):
    """The class token is expanded to the batch, which is not known yet."""
    constants = {"token": random(1, 1, CHANNELS), "tail": np.int64([1, CHANNELS]),
                 "zero": np.int64([0]), "one": np.int64([1]), "scale": random(CHANNELS),
                 "shift": random(CHANNELS), "place": random(1, TOKENS + 1, CHANNELS)}
    nodes = [node("Shape", ["x"], ["s"]), node("Slice", ["s", "zero", "one"], ["n"]),
             node("Concat", ["n", "tail"], ["shape"], axis=0),
             node("Expand", ["token", "shape"], ["tokens"]),
             node("Concat", ["tokens", "x"], ["c"], axis=1), node("Add", ["c", "place"], ["p"]),
             node("LayerNormalization", ["p", "scale", "shift"], ["y"], axis=-1)]
    path = saved(tmp_path, build(nodes, VALUES, constants=constants))
    for batch in (1, 3):
        compare(tmp_path, build(nodes, VALUES, constants=constants), x=X[:1].repeat(batch, axis=0))
    assert cnn.load(path).run({"x": X})["y"].shape == (BATCH, TOKENS + 1, CHANNELS)


@pytest.mark.parametrize(("equation", "a", "b"), [
    ("bhqd,bhkd->bhqk", (2, 3, 5, 4), (2, 3, 6, 4)),
    ("bqhd,bkhd->bhqk", (2, 5, 3, 4), (2, 6, 3, 4)),
    ("bhqk,bkhd->bqhd", (2, 3, 5, 6), (2, 6, 3, 4)),
    ("byhwc,hkc->byhwk", (2, 3, 5, 6, 4), (5, 7, 4)),
    ("bic,boc->bio", (2, 5, 4), (2, 6, 4)), ("nhwc,nd->nhwcd", (2, 3, 5, 4), (2, 6)),
    ("bcxy,bcxy->bc", (2, 3, 5, 4), (2, 3, 5, 4)), ("b i c , b i -> b c", (2, 5, 4), (2, 5))])
def test_einsum_is_a_product_of_matrices(tmp_path, equation, a, b):
    nodes = [node("Relu", ["k"], ["r"]), node("Einsum", ["x", "r"], ["y"], equation=equation)]
    compare(tmp_path, build(nodes, {"x": ["N", *a[1:]], "k": ["N", *b[1:]] if b[0] == a[0] else b}),
            x=random(*a), k=random(*b))


@pytest.mark.parametrize("equation", ["ij->ji", "ij,jk,kl->il", "ii,ij->ij", "ij,jk->i",
                                      "...ij,...jk->...ik"])
def test_other_einsums_are_refused(tmp_path, equation):
    inputs = ["x"] * (1 + equation.count(","))
    nodes = [node("Einsum", inputs, ["y"], name="e", equation=equation)]
    with pytest.raises(cnn.ModelError, match=r"node 'e'.*not written as a product of two matrices"):
        cnn.load(saved(tmp_path, build(nodes, {"x": [4, 4]})))


@pytest.mark.parametrize(("a", "b"), [((4,), (2, 4, 3)), ((2, 3, 4), (4,)), ((4,), (4,))])
def test_vectors_are_matrices_of_one_row_or_column(tmp_path, a, b):
    nodes = [node("Relu", ["k"], ["r"]), node("MatMul", ["x", "r"], ["y"])]
    compare(tmp_path, build(nodes, {"x": a, "k": b}), x=random(*a), k=random(*b))


def test_tiles(tmp_path):
    """What is repeated for each image is broadcast; other axes are put together."""
    constants = {"place": random(1, 3, CHANNELS), "zero": np.int64([0]), "one": np.int64([1]),
                 "ones": np.int64([1, 1]), "thrice": np.int64([1, 3, 1])}
    nodes = [node("Shape", ["x"], ["s"]), node("Slice", ["s", "zero", "one"], ["n"]),
             node("Concat", ["n", "ones"], ["times"], axis=0), node("Relu", ["place"], ["p"]),
             node("Tile", ["p", "times"], ["t"]), node("Tile", ["x", "thrice"], ["x3"]),
             node("ReduceMean", ["t"], ["m"], axes=[1]), node("Mul", ["x3", "m"], ["y"])]
    compare(tmp_path, build(nodes, VALUES, constants=constants), x=X)


@pytest.mark.parametrize(("times", "sentence"), [
    ([1, 1 << 40, 1], "Tile 1099511627776 times"), ([1, 0, 1], "only 1 to 256 times")])
def test_tiles_that_are_refused(tmp_path, times, sentence):
    nodes = [node("Tile", ["x", "times"], ["y"], name="t")]
    with pytest.raises(cnn.ModelError, match=f"node 't'.*{sentence}"):
        cnn.load(saved(tmp_path, build(nodes, VALUES, constants={"times": np.int64(times)})))


def test_a_pool_along_one_axis(tmp_path):
    nodes = [node("AveragePool", ["x"], ["y"], kernel_shape=[3], strides=[2], pads=[1, 1])]
    compare(tmp_path, build(nodes, VALUES), x=X)
