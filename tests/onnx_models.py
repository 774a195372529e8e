"""ONNX files of a few nodes, and their results by ONNX Runtime."""
import numpy as np
import onnx
import onnxruntime
from graph_reference import evaluate
from onnx import TensorProto, helper, numpy_helper

import cnn
from cnn import fold
from cnn.onnx_import import load_onnx

RNG = np.random.default_rng(0)


def whole(*shape):
    return RNG.integers(-3, 4, shape).astype(np.float32)


def node(operator, inputs, outputs, name="", **attributes):
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


def build(nodes, inputs, outputs=("y",), constants=None, opset=17, kind=TensorProto.FLOAT):
    constants = constants or {}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def saved(tmp_path, model):
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    return path


def compare(tmp_path, model, **arrays):
    """The kernels against ONNX Runtime on the same file, and the graph evaluated in float64."""
    path = saved(tmp_path, model)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = dict(zip([o.name for o in session.get_outputs()], session.run(None, arrays),
                        strict=True))
    found = cnn.load(path, device="cpu").run(arrays)
    assert set(found) == set(expected)
    imported = load_onnx(path)
    inside = {name: a.transpose(0, 2, 3, 1) if name in imported.channels_first else a
              for name, a in arrays.items()}
    fixed = fold.fold(imported.graph.with_input_shapes({n: a.shape for n, a in inside.items()}))
    literal = evaluate(fixed, inside)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        scale = np.abs(array).max() + 1
        assert np.abs(found[name] - array).max() <= 1e-5 * scale
        assert np.abs(literal[name] - array).max() <= 1e-5 * scale
