"""Edits keep names unique, the order topological, and outputs where they were."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.shapes import Shapes


def model() -> ir.Model:
    """y = exp(x W); z = neg(y); y and z are outputs."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Exp", ["h"], ["y"], name="exp"),
        helper.make_node("Neg", ["y"], ["z"], name="neg"),
    ]
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["s", width])
        for name, width in (("x", 2), ("y", 3), ("z", 3))
    ]
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(made)
    return ir.serde.deserialize_model(made)


def check(edited: ir.Model) -> onnx.ModelProto:
    proto = ir.serde.serialize_model(edited)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def test_unique_names() -> None:
    edit = Editor(model())
    assert edit.unique("new") == "new"
    assert edit.unique("new") != "new"
    for taken in ("x", "w", "h", "y", "product"):
        assert edit.unique(taken) != taken


def test_names_inside_subgraphs_are_taken_too() -> None:
    made = model()
    inner = ir.Node("", "Identity", [made.graph.inputs[0]], name="deep")
    inner.outputs[0].name = "deep_output"
    body = ir.Graph(
        [], inner.outputs, nodes=[inner], initializers=[ir.Value(name="deep_weight", const_value=ir.tensor([1.0]))]
    )
    made.graph.append(ir.Node("", "If", [made.graph.inputs[0]], [ir.AttrGraph("then_branch", body)], name="if"))
    edit = Editor(made)
    for taken in ("deep", "deep_output", "deep_weight"):
        assert edit.unique(taken) != taken


def test_a_domain_is_imported_with_its_first_node() -> None:
    made = model()
    edit = Editor(made)
    edit.node("Exp", [made.graph.inputs[0]], "standard")
    assert dict(made.graph.opset_imports) == {"": 20}
    edit.node("RotaryEmbedding", [made.graph.inputs[0]], "fused", domain="com.microsoft")
    assert dict(made.graph.opset_imports) == {"": 20, "com.microsoft": 1}


@pytest.mark.parametrize("name", ["x", "h", "y"])
def test_redirect_sends_all_users_on(name: str) -> None:
    made = model()
    edit = Editor(made)
    values = {v.name: v for v in (*made.graph.inputs, *(out for node in made.graph for out in node.outputs))}
    users = {use.node.name for use in values[name].uses()}
    edit.redirect(values[name], lambda v: [edit.node("Abs", [v], "abs")])
    proto = check(made)
    assert [output.name for output in proto.graph.output] == ["y", "z"]
    inserted = next(node for node in proto.graph.node if node.op_type == "Abs")
    assert {node.name for node in proto.graph.node if inserted.output[0] in node.input} == users
    if name == "y":
        assert inserted.output[0] == "y"


def test_replace_input_removes_what_it_orphans() -> None:
    made = model()
    edit = Editor(made)
    other = edit.initializer("v", ir.tensor(np.zeros((2, 3), np.float32)))
    edit.replace_input(made.graph[0], 1, other)
    assert set(made.graph.initializers) == {"v"}
    check(made)


def test_a_shared_initializer_stays_for_its_other_user() -> None:
    made = model()
    edit = Editor(made)
    weight = made.graph.initializers["w"]
    alias = edit.node("Identity", [weight], "alias")
    edit.before(made.graph[0], [alias])
    edit.replace_input(made.graph[1], 1, alias.outputs[0])
    assert "w" in made.graph.initializers
    edit.replace_input(made.graph[1], 1, edit.initializer("v", ir.tensor(np.zeros((2, 3), np.float32))))
    assert set(made.graph.initializers) == {"v"}
    assert "alias" not in {node.name for node in made.graph}


def test_replace_node_takes_the_output_over() -> None:
    made = model()
    edit = Editor(made)
    exp = made.graph[1]
    edit.replace_node(exp, [edit.node("Abs", [exp.inputs[0]], "abs")])
    proto = check(made)
    assert [node.op_type for node in proto.graph.node] == ["MatMul", "Abs", "Neg"]
    assert proto.graph.node[1].output[0] == proto.graph.node[2].input[0] == "y"


def test_nodes_after_an_input_stand_before_everything() -> None:
    made = model()
    edit = Editor(made)
    edit.after_value(made.graph.inputs[0], [edit.node("Abs", [made.graph.inputs[0]], "abs")])
    assert made.graph[0].op_type == "Abs"


def test_shapes_are_inferred_beside_the_graph() -> None:
    made = model()
    shapes = Shapes(made)
    hidden = made.graph[0].outputs[0]
    assert hidden.shape is None
    assert shapes.of(hidden) == (None, 3)
    assert (shapes.rank(hidden), shapes.last(hidden), shapes.dtype(hidden)) == (2, 3, ir.DataType.FLOAT)
    assert shapes.of(made.graph.initializers["w"]) == (2, 3)
    assert not shapes.is_single(hidden)
    stranger = ir.Value(name="stranger")
    assert (shapes.of(stranger), shapes.last(stranger), shapes.is_one_per_row(stranger)) == (None, None, False)


def test_shapes_survive_renaming() -> None:
    made = model()
    shapes = Shapes(made)
    made.graph[0].outputs[0].name = "renamed"
    assert shapes.last(made.graph[0].outputs[0]) == 3
