"""Resize to the nearest pixel, against ONNX Runtime on the same file."""
import numpy as np
import pytest
from onnx_models import build, compare, node, saved, whole

import cnn

X = whole(2, 8, 6, 4)
IMAGE = {"x": ["N", 8, 6, 4]}


@pytest.mark.parametrize(("attributes", "scales"), [
    ({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, [1, 1, 2, 2]),
    ({}, [1, 1, 3, 1]), ({}, [1, 1, 4, 5])])
def test_whole_multiples_are_repeated(tmp_path, attributes, scales):
    constants = {"scales": np.float32(scales), "w": whole(3, 8, 1, 1)}
    model = build([node("Resize", ["x", "", "scales"], ["r"], **attributes),
                   node("Conv", ["r", "w"], ["y"])], IMAGE, constants=constants)
    compare(tmp_path, model, x=X)
    kinds = [layer.op.kind for layer in cnn.load(tmp_path / "net.onnx")._graph.nodes]
    assert kinds.count("Transpose") == 1     # of the output
    assert not {"Slice", "Concat"} & set(kinds)


@pytest.mark.parametrize("place", ["asymmetric", "half_pixel", "pytorch_half_pixel",
                                   "align_corners"])
@pytest.mark.parametrize("nearest", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize("scales", [(1.5, 2.0), (0.5, 1.0), (1.0, 0.75), (2.5, 0.5), (3.0, 2.0)])
def test_any_other_size(tmp_path, place, nearest, scales):
    constants = {"scales": np.float32([1, 1, *scales]), "w": whole(3, 8, 1, 1)}
    model = build([node("Resize", ["x", "", "scales"], ["r"], nearest_mode=nearest,
                        coordinate_transformation_mode=place),
                   node("Conv", ["r", "w"], ["y"])], IMAGE, constants=constants)
    compare(tmp_path, model, x=X)


@pytest.mark.parametrize("size", [(7, 9), (3, 4), (12, 8)])
def test_to_a_size_that_the_file_works_out_beside_the_batch(tmp_path, size):
    """As PyTorch exports F.interpolate(x, size=..): the batch and the channels are x's own."""
    constants = {"size": np.int64(size), "two": np.int64([2]), "zero": np.int64([0])}
    nodes = [node("Shape", ["x"], ["s"]), node("Slice", ["s", "zero", "two"], ["nc"]),
             node("Concat", ["nc", "size"], ["sizes"], axis=0),
             node("Resize", ["x", "", "", "sizes"], ["y"], nearest_mode="floor",
                  coordinate_transformation_mode="asymmetric")]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)


@pytest.mark.parametrize("how", ["half_pixel", "asymmetric", "align_corners",
                                 "pytorch_half_pixel"])
@pytest.mark.parametrize("size", [[12, 15], [3, 5], [1, 11], [6, 2]])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_pixels_are_mixed(tmp_path, size, how, mode):
    """Between convolutions, where nothing is turned: two products by constant matrices."""
    constants = {"size": np.int64([2, 8, *size]), "w": whole(8, 8, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["c"]),
             node("Resize", ["c", "", "", "size"], ["r"], mode=mode,
                  coordinate_transformation_mode=how), node("Conv", ["r", "w"], ["y"])]
    compare(tmp_path, build(nodes, IMAGE, constants=constants), x=X)
    ran = [layer.op.kind for layer in cnn.load(tmp_path / "net.onnx")._graph.nodes]
    assert ran.count("MatMul") == sum(a != b for a, b in zip(size, X.shape[2:], strict=True))
    assert ran.count("Transpose") == 1      # of the output


@pytest.mark.parametrize(("scales", "attributes", "sentence"), [
    ([1, 1, 2, 2], {"mode": "area"}, "mode 'area'.* only 'nearest', 'linear' and 'cubic'"),
    ([1, 1, 0.5, 0.5], {"mode": "linear", "antialias": 1}, "antialias is not supported"),
    ([1, 1, 0.6, 1], {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
     "6 pixels to 3 .* no whole number"),
    ([1, 2, 2, 2], {}, "Resize of axis 1 .* only of an image's height and width"),
    ([1, 1, 0.1, 1], {}, "Resize of 6 pixels to 0.6.* only to 1 to 65536"),
    ([1, 1, np.inf, 1], {}, "Resize of 6 pixels to inf"),
    ([1, 1, 1e9, 1], {}, "Resize of 6 pixels to 6"),
    ([1, 1, 21.5, 1], {}, "129 elements of the 6 .* must be 1 to 64 slices"),
    ([1, 1, 2, 2], {"coordinate_transformation_mode": "tf_crop_and_resize"}, "tf_crop_and_resize")])
def test_what_is_refused_is_named(tmp_path, scales, attributes, sentence):
    nodes = [node("Resize", ["x", "", "s"], ["y"], name="n", **attributes)]
    with pytest.raises(cnn.ModelError, match=f"node 'n'.*{sentence}"):
        cnn.load(saved(tmp_path, build(nodes, IMAGE, constants={"s": np.float32(scales)})))
