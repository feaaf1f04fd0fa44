"""Graphs that are raised to opset 21 compute what they computed, or stay as they are."""

import linear_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from quarot_onnx.emission.opset import raise_opset
from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.edit import Editor

X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def built(nodes, opset: int, constants=None, rank: int = 2) -> onnx.ModelProto:
    return graphs.model(nodes, {"x": [4, 6]}, {"y": ["a", "b", "c", "d"][:rank]}, constants or {}, opset=opset)


def raised(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    raise_opset(Editor(model), "4-bit weights", "the format nbits or w8")
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.mark.parametrize("opset", [13, 16, 17, 18, 20])
def test_reductions_and_splits_are_spelt_anew(opset: int) -> None:
    old = opset < 18
    reductions = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceProd")
    nodes = [helper.make_node("Split", ["x"], ["a", "b"], axis=1, name="split", **({} if old else {"num_outputs": 2}))]
    sums = ["a", "b"]
    for number, kind in enumerate(reductions):
        inputs, attributes = (["x"], {"axes": [1]}) if old else (["x", "axes"], {})
        nodes.append(helper.make_node(kind, inputs, [kind], name=kind, keepdims=number % 2, **attributes))
        nodes.append(helper.make_node("Reshape", [kind, "shape"], [f"{kind}1"], name=f"{kind}1"))
        sums.append(f"{kind}1")
    nodes.append(helper.make_node("ReduceMean", ["x"], ["all"], name="all", keepdims=1))
    nodes.append(helper.make_node("Concat", sums, ["c"], axis=1, name="join"))
    nodes.append(helper.make_node("Add", ["c", "all"], ["y"], name="add"))
    constants = {"shape": np.array([4, 1])} | ({} if old else {"axes": np.array([1])})
    proto = built(nodes, opset, constants)
    made = raised(proto)
    assert [(o.domain, o.version) for o in made.opset_import] == [("", 21)]
    assert made.ir_version >= 10
    np.testing.assert_array_equal(graphs.run(made, {"x": X}), graphs.run(proto, {"x": X}))


def test_subgraphs_are_raised_too() -> None:
    def branch(kind: str) -> onnx.GraphProto:
        node = helper.make_node(kind, ["x"], [f"{kind}_y"], axes=[1], keepdims=1, name=kind)
        return helper.make_graph(
            [node], kind, [], [helper.make_tensor_value_info(f"{kind}_y", TensorProto.FLOAT, None)]
        )

    nodes = [
        helper.make_node("Shape", ["x"], ["n"], name="shape"),
        helper.make_node("Gather", ["n", "zero"], ["rows"], name="rows"),
        helper.make_node("Equal", ["rows", "four"], ["is"], name="is"),
        helper.make_node(
            "If", ["is"], ["y"], name="if", then_branch=branch("ReduceMean"), else_branch=branch("ReduceMax")
        ),
    ]
    proto = built(nodes, 17, {"zero": np.array(0), "four": np.array(4)})
    np.testing.assert_array_equal(graphs.run(raised(proto), {"x": X}), graphs.run(proto, {"x": X}))


def test_an_operator_that_changed_is_refused_by_name_and_the_graph_is_left_alone() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=1, name="mean"),
        helper.make_node("Unsqueeze", ["m", "axes"], ["u"], name="axes"),
        helper.make_node("AveragePool", ["u"], ["y"], kernel_shape=[1], name="pool"),
    ]
    model = ir.from_proto(built(nodes, 17, {"axes": np.array([0])}, rank=3))
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(ConfigError, match=r"opset 21; the model has 17, and its AveragePool 'pool'.*nbits or w8"):
        raise_opset(Editor(model), "4-bit weights", "the format nbits or w8")
    assert ir.to_proto(model).SerializeToString() == before


def test_a_newer_opset_stays() -> None:
    model = ir.from_proto(built([helper.make_node("Relu", ["x"], ["y"], name="relu")], 22))
    raise_opset(Editor(model), "4-bit weights", "the format nbits or w8")
    assert model.graph.opset_imports[""] == 22
    assert model.ir_version == 10
