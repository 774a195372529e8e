"""ONNX's own backend node tests, for every operator that is supported.

What these tests give as inputs at run time and we take as constants (weights, shapes, axes) becomes
an initializer first; of codes of 8 bits the numbers are given and taken. A case that is refused
must be listed in REFUSED with its reason, and the number of those that run is asserted, so that
none can vanish unseen.
"""
import re
import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

import cnn
from cnn.operators import OPERATORS

# Operators of a network, each with the positions of its inputs that are constants here.
CONSTANTS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "BatchNormalization": (1, 2, 3, 4),
             "Gemm": (1, 2), "Tile": (1,), "Attention": (3,),
             "Clip": (1, 2), "Reshape": (1,), "Squeeze": (1,),
             "Unsqueeze": (1,),
             "ReduceMean": (1,), "Dropout": (1, 2), "PRelu": (1,), "Pow": (1,),
             "ReduceMax": (1,), "ReduceL2": (1,), "ReduceSum": (1,), "Gather": (1,),
             "Resize": (1, 2, 3), "Expand": (1,),
             "LayerNormalization": (1, 2), "InstanceNormalization": (1, 2),
             "GroupNormalization": (1, 2), "Split": (1,), "Slice": (1, 2, 3, 4), "Pad": (1, 2, 3),
             "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2),
             "QLinearConv": (1, 2, 3, 4, 5, 6, 7, 8), "QLinearMatMul": (1, 2, 4, 5, 6, 7)}
CODES = {TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8}

# Name (a pattern) -> what the refusal says.
REFUSED = {
    r"batchnorm_.*training_mode": "training mode",
    r"training_dropout.*mask": "2 outputs|training mode|not computed",
    r"training_dropout": "training mode",
    r"dropout_default_mask": "'z' is not computed",
    r"(maxpool_[13]|averagepool_3)d": "only 2-D images|must be four",
    r"averagepool_2d_dilations": "dilations",
    r"convtranspose_([13]d|dilations)": "only of images and without dilation",
    r"maxpool_with_argmax": "2 outputs",
    r"maxpool_2d_uint8": "only float32 is supported",
    r"gemm_transposeA|gemm_all_attributes": "transA=1",
    r"gemm_default_matrix_bias": "its bias has shape",
    r"reduce_(mean|max|l2|sum)_default_axes": "must name axes",
    r"reduce_(max|l2|sum)_empty_set(_bool)?$": "must name axes|only float32 is supported",
    r"reduce_max_bool": "only float32 is supported",
    r"pow(_bcast_array)?$|pow_example": "only to 1/2, 1, 2 or 3",
    r"pow_types_(int|float32_(u?int))": "only float32 is supported|only to 1/2",
    r"resize_.*(antialias|half_pixel_symmetric|exclude_outside)": "only 'nearest'",
    r"resize_downsample_scales_(linear|cubic)_align_corners": "gives no whole number",
    r"resize_tf_crop": "only 'nearest'",
    r"resize_(up|down)sample_sizes_nearest_not": "only 'nearest'",
    r"attention_23_boolmask_fullymasked": "leaves no key",
    r"attention_.*(causal|softcap|past|qk_matmul|window|gqa|nonpad|padded)":
        "Attention is supported only|only float32 is supported|data type 16",
    r"attention_4d_fp16": "must be a float32",
    r"einsum": "only float32 is supported",
    r"(add|mul|sub|div)_(uint|int)": "only float32 is supported",
    r"layer_normalization": "with 3 outputs",
    r"(de)?quantizelinear_(axis|blocked|u?int16)":
        "only to uint8 or int8 by one scale|only float32 is supported",
    r"(de)?quantizelinear_(e4m3|e5m2|float4|u?int[24])":
        "is no number|only to uint8 or int8|only float32 is supported",
    r"(edge|reflect|wrap)_pad": "only float32 is supported",
    r"slice_start_out_of_bounds": "are not elements of axis",
    r"split_zero_size": "whose size is not known",
    r"(identity|clip)_.*(int8|sequence|opt)": "only float32|has no shape",
}


def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # ONNX's own generators overflow on purpose
        made = load_model_tests(kind="node")
    for case in made:
        nodes = case.model.graph.node
        # Cast is left out: its cases are all about data types, and values are float32 here.
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS.keys() - {"Cast"}:
            yield pytest.param(case, id=case.name.removeprefix("test_"))


CASES = list(cases())


def with_constants(case):
    """The model with its constant inputs as initializers, and the inputs that are left."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    (node,), (inputs, outputs) = model.graph.node, case.data_sets[0]
    fixed = {node.input[i] for i in CONSTANTS.get(node.op_type, ()) if i < len(node.input)}
    left = {}
    for info, value in zip(list(model.graph.input), inputs, strict=True):
        if info.name in fixed:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value if isinstance(value, TensorProto) else
                            numpy_helper.from_array(np.asarray(value)))
            tensor.name = info.name
            model.graph.input.remove(info)
        else:
            left[info.name] = value
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul"):
        as_numbers(model, left)
    return model, left, outputs


def as_numbers(model, inputs):
    """Inputs and outputs of codes become floats of the same number."""
    nodes, before, after = list(model.graph.node), [], []
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    for info in [*model.graph.input, *model.graph.output]:
        tensor = info.type.tensor_type
        if tensor.elem_type not in CODES:
            continue
        name, zero = info.name, f"zero:{info.name}"
        model.graph.initializer.append(
            numpy_helper.from_array(np.zeros((), CODES[tensor.elem_type]), zero))
        info.name, tensor.elem_type = f"{name}:number", TensorProto.FLOAT
        if name in inputs:
            inputs[info.name] = inputs.pop(name).astype(np.float32)
            before.append(helper.make_node("QuantizeLinear", [info.name, "one", zero], [name]))
        else:
            after.append(helper.make_node("DequantizeLinear", [name, "one", zero], [info.name]))
    del model.graph.node[:]
    model.graph.node.extend([*before, *nodes, *after])


@pytest.mark.parametrize("case", CASES)
def test_node(case, tmp_path):
    if not case.data_sets:
        pytest.fail("the case brings no data")
    model, inputs, outputs = with_constants(case)
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    name = case.name.removeprefix("test_")
    refusal = next((text for pattern, text in REFUSED.items() if re.match(pattern, name)), None)
    if refusal is not None:
        with pytest.raises(cnn.ModelError, match=refusal):
            cnn.load(path).run(inputs)
        return
    found = cnn.load(path).run(inputs)
    assert len(found) == len(outputs)
    for ours, theirs in zip(found.values(), outputs, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=case.rtol, atol=case.atol)


def test_enough_of_the_cases_run():
    names = [case.values[0].name.removeprefix("test_") for case in CASES]
    refused = [name for name in names if any(re.match(pattern, name) for pattern in REFUSED)]
    assert len(names) - len(refused) >= 299     # with onnx 1.23; newer ones may add cases
