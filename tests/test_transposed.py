"""ConvTranspose against ONNX Runtime on the same file."""
import numpy as np
import pytest
from onnx_models import build, compare, node, saved, whole

import cnn

X = whole(2, 4, 5, 3)
IMAGE = {"x": ["N", 4, 5, 3]}


def transposed(weight, bias=True, **attributes):
    """A file with one, and a convolution that reads it."""
    group = attributes.get("group", 1)
    constants = {"w": weight, "v": whole(3, weight.shape[1] * group, 1, 1)}
    if bias:
        constants["b"] = whole(weight.shape[1] * group)
    nodes = [node("ConvTranspose", ["x", "w", "b"] if bias else ["x", "w"], ["t"], name="n",
                  **attributes), node("Conv", ["t", "v"], ["y"])]
    return build(nodes, IMAGE, ("t", "y"), constants)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 2), (1, 3)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (1, 4)])
@pytest.mark.parametrize("group", [1, 2])
def test_kernels_and_strides(tmp_path, kernel, stride, group):
    model = transposed(whole(4, 3, *kernel), strides=stride, group=group, kernel_shape=kernel)
    compare(tmp_path, model, x=X)


@pytest.mark.parametrize("attributes", [
    {"pads": [1, 1, 1, 1]}, {"pads": [0, 1, 2, 0]}, {"pads": [2, 2, 2, 2], "group": 4},
    {"pads": [1, 1, 1, 1], "output_padding": [1, 1]}, {"output_padding": [1, 0]},
    {"output_shape": [10, 7]}, {"output_shape": [11, 6], "auto_pad": "SAME_LOWER"},
    {"output_shape": [9, 6], "auto_pad": "SAME_UPPER"},
    {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"}])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_padding(tmp_path, attributes, kernel, bias):
    model = transposed(whole(4, 2, *kernel), bias, strides=[2, 2], **attributes)
    compare(tmp_path, model, x=X)


def test_a_kernel_as_large_as_the_stride_is_a_pointwise_convolution(tmp_path):
    """As U-Nets and detectors have it."""
    path = saved(tmp_path, transposed(whole(4, 2, 2, 2), strides=[2, 2]))
    rows = cnn.load(path, device="cpu").summary().rows
    assert [row.kernel.split("_f32")[0] for row in rows].count("conv2d_1x1") == 2


@pytest.mark.parametrize("group", [1, 2])
def test_a_gpu_computes_the_same(tmp_path, group):
    path = saved(tmp_path, transposed(whole(4, 2, 4, 3), strides=[2, 3], pads=[1, 1, 1, 1],
                                      group=group))
    on_cpu, there = (cnn.load(path, device=device).run({"x": X}) for device in ("cpu", "emulator"))
    assert on_cpu.keys() == there.keys() == {"t", "y"}
    for name, values in on_cpu.items():
        np.testing.assert_array_equal(there[name], values)


@pytest.mark.parametrize(("weight", "attributes", "sentence"), [
    (whole(4, 2, 3, 3), {"dilations": [2, 2]}, "without dilation"),
    (whole(4, 2, 3), {}, "only of images"), (whole(3, 2, 3, 3), {}, "does not fit 4 channels"),
    (whole(4, 2, 3, 3), {"group": 3}, "does not fit 4 channels, group=3"),
    (whole(4, 2, 3, 3), {"kernel_shape": [2, 2]}, "does not fit"),
    (whole(4, 2, 3, 3), {"output_shape": [12, 9]}, "has no part"),
    (whole(4, 2, 3, 3), {"pads": [4, 4, 4, 4]}, "has no part")])
def test_what_is_refused_is_named(tmp_path, weight, attributes, sentence):
    with pytest.raises(cnn.ModelError, match=f"node 'n'.*{sentence}"):
        cnn.load(saved(tmp_path, transposed(weight, **attributes)))


def test_an_image_of_any_size_is_refused_until_its_size_is_given(tmp_path):
    model = transposed(whole(4, 2, 2, 2), strides=[2, 2])
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "HW"[axis - 2]
    path = saved(tmp_path, model)
    with pytest.raises(cnn.ModelError, match=r"node 'n'.*give input_shape="):
        cnn.load(path)
    found = cnn.load(path, input_shape=(5, 3, 4)).run({"x": np.zeros((1, 4, 5, 3), np.float32)})
    assert found["t"].shape == (1, 2, 10, 6)
