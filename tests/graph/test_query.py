"""Looking through what exporters put between a tensor and its user."""

import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.graph.query import (
    consumers,
    consumers_through,
    data_users,
    label,
    resolve_constant,
    scalar,
    small_ints,
    through,
)


def initializer(array: np.ndarray, name: str = "w") -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(array))


def after(value: ir.Value, op_type: str, *attributes: ir.Attr) -> ir.Value:
    node = ir.Node("", op_type, [value], attributes)
    node.outputs[0].name = f"{value.name}_{op_type}"
    return node.outputs[0]


FLIP = ir.AttrInt64s("perm", [1, 0])
TO_FLOAT = ir.AttrInt64("to", int(ir.DataType.FLOAT))


def test_a_constant_behind_transpose_cast_and_identity() -> None:
    weight = initializer(np.zeros((2, 3), np.float16))
    seen = resolve_constant(after(after(after(weight, "Transpose", FLIP), "Cast", TO_FLOAT), "Identity"))
    assert seen is not None
    assert seen.value is weight
    assert (seen.shape, seen.transposed, seen.dtype) == ((3, 2), True, ir.DataType.FLOAT)


def test_two_transposes_cancel() -> None:
    seen = resolve_constant(after(after(initializer(np.zeros((2, 3))), "Transpose"), "Transpose", FLIP))
    assert seen is not None
    assert (seen.shape, seen.transposed) == ((2, 3), False)


def test_what_is_no_constant() -> None:
    x = ir.Value(name="x")
    assert resolve_constant(x) is None
    assert resolve_constant(after(x, "Cast", TO_FLOAT)) is None
    assert resolve_constant(None) is None
    assert resolve_constant(after(initializer(np.zeros((2, 3))), "Neg")) is None
    assert (
        resolve_constant(after(initializer(np.zeros((1, 2, 3))), "Transpose", ir.AttrInt64s("perm", [0, 2, 1]))) is None
    )


def test_the_type_of_cast_like_is_known_only_where_the_graph_says_so() -> None:
    seen = after(initializer(np.zeros((2, 3), np.float16)), "CastLike")
    assert resolve_constant(seen) is None
    seen.dtype = ir.DataType.FLOAT
    constant = resolve_constant(seen)
    assert constant is not None
    assert constant.dtype == ir.DataType.FLOAT


def test_an_initializer_that_is_an_input_is_no_constant() -> None:
    weight = initializer(np.zeros((2, 3)))
    ir.Graph([weight], [], nodes=[], initializers=[weight])
    assert resolve_constant(weight) is None


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        (ir.AttrInt64("value_int", 3), 3.0),
        (ir.AttrFloat32("value_float", 0.5), 0.5),
        (ir.AttrTensor("value", ir.tensor(np.array([2.0]))), 2.0),
        (ir.AttrFloat32s("value_floats", [1.0, 2.0]), None),
    ],
    ids=lambda item: getattr(item, "name", str(item)),
)
def test_constant_nodes(attribute: ir.Attr, expected: float | None) -> None:
    assert scalar(ir.Node("", "Constant", [], [attribute]).outputs[0]) == expected


def test_small_integers() -> None:
    assert small_ints(initializer(np.array([-1, 4]))) == (-1, 4)
    assert small_ints(initializer(np.array(7))) == (7,)
    assert small_ints(initializer(np.array([1.0]))) is None
    assert small_ints(initializer(np.zeros(65, np.int64))) is None


def test_users_through_pass_through_operators() -> None:
    x = ir.Value(name="x")
    cast = after(x, "Cast", TO_FLOAT)
    exp, shape = after(cast, "Exp").producer(), after(x, "Shape").producer()
    assert [node for node, _ in consumers(x)] == [cast.producer(), shape]
    assert [node for node, _ in consumers_through(x)] == [exp, shape]
    assert [node for node, _ in data_users(x)] == [exp]
    assert through(cast) is x
    assert through(x) is x


def test_labels() -> None:
    node = ir.Node("", "Exp", [ir.Value(name="x")], name="named")
    assert label(node) == "named"
    node.name, node.outputs[0].name = "", "y"
    assert label(node) == "Exp->y"
