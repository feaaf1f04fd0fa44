"""What a Linear is, and its bias."""

import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.graph.linear import Linear, linear_at, linear_producing, linears
from quarot_onnx.graph.tags import mark_online

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def value(name: str, array: np.ndarray | None = None) -> ir.Value:
    return ir.Value(name=name, const_value=None if array is None else ir.tensor(array))


def linear(op_type: str, *operands: np.ndarray | None, **attributes: float) -> Linear | None:
    kinds = {int: ir.AttrInt64, float: ir.AttrFloat32}
    attrs = [kinds[type(number)](name, number) for name, number in attributes.items()]
    inputs = [value(f"v{i}", array) for i, array in enumerate(operands)]
    return linear_at(ir.Node("", op_type, inputs, attrs, name="node"))


def test_matmul() -> None:
    found = linear("MatMul", None, W)
    assert found is not None
    assert (found.name, found.in_features, found.out_features) == ("node", 2, 3)
    assert (found.bias, found.output) == (None, found.node.outputs[0])
    assert found.input is found.node.inputs[0]


@pytest.mark.parametrize(
    "operands",
    [(None, None), (W, None), (W.T, W), (None, W[0]), (None, W.astype(np.int8)), (None, W[None])],
    ids=["two inputs", "weight in front", "two constants", "vector", "integers", "batch"],
)
def test_what_is_no_linear(operands: tuple) -> None:
    assert linear("MatMul", *operands) is None


def test_other_operators_and_domains_are_no_linears() -> None:
    assert linear("Mul", None, W) is None
    assert linear_at(ir.Node("com.microsoft", "MatMul", [value("x"), value("w", W)])) is None


def test_gemm() -> None:
    found = linear("Gemm", None, W.T, np.ones(3, np.float32), transA=1, transB=1, alpha=0.5, beta=2.0)
    assert found is not None
    assert (found.in_features, found.out_features, found.transposed_input) == (2, 3, True)
    assert (found.alpha, found.beta) == (0.5, 2.0)
    assert found.bias is not None
    assert (found.bias.node, found.bias.index) == (found.node, 2)
    assert linear("Gemm", None, W, None) is None  # a computed bias


@pytest.mark.parametrize(
    ("shape", "spread"), [((3,), False), ((1, 3), False), ((1,), True), ((), True), ((4, 1), True)]
)
def test_a_bias_of_one_number_for_all_outputs(shape: tuple[int, ...], spread: bool) -> None:
    found = linear("Gemm", None, W, np.ones(shape, np.float32))
    assert found is not None
    assert found.bias_is_spread is spread


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3)])
def test_the_add_behind_a_matmul_is_its_bias(shape: tuple[int, ...], swapped: bool) -> None:
    product = ir.Node("", "MatMul", [value("x"), value("w", W)])
    operands = [product.outputs[0], value("b", np.ones(shape, np.float32))]
    add = ir.Node("", "Add", operands[::-1] if swapped else operands)
    found = linear_at(product)
    assert found is not None
    assert found.bias is not None
    assert (found.bias.node, found.bias.index, found.output) == (add, 0 if swapped else 1, add.outputs[0])
    assert linear_producing(add.outputs[0]) == found or linear_producing(add.outputs[0]) is not None
    assert linear_producing(product.outputs[0]) is None


def test_adds_that_are_no_bias() -> None:
    for other in (
        value("residual"),
        value("scalar", np.ones(1, np.float32)),
        value("rows", np.ones((2, 3), np.float32)),
    ):
        product = ir.Node("", "MatMul", [value("x"), value("w", W)])
        ir.Node("", "Add", [product.outputs[0], other])
        found = linear_at(product)
        assert found is not None
        assert found.bias is None
    product = ir.Node("", "MatMul", [value("x"), value("w", W)])
    for _ in range(2):
        ir.Node("", "Add", [product.outputs[0], value("b", np.ones(3, np.float32))])
    found = linear_at(product)
    assert found is not None
    assert found.bias is None


def test_online_rotations_are_no_linears() -> None:
    x, w = value("x"), value("w", W)
    node = ir.Node("", "MatMul", [x, w], name="rotation")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w])
    assert [item.name for item in linears(graph)] == ["rotation"]
    mark_online(node)
    assert list(linears(graph)) == []


def test_what_a_branch_adds_is_no_bias() -> None:
    """The Add is of another graph, and runs in one of two cases."""
    product = ir.Node("", "MatMul", [value("x"), value("w", W)], name="product")
    bias = ir.Value(name="b", const_value=ir.tensor(np.ones(3, np.float32)))
    add = ir.Node("", "Add", [product.outputs[0], bias], name="add")
    then = ir.Graph([], add.outputs, nodes=[add], initializers=[], name="then")
    other = ir.Node("", "Identity", [bias], name="other")
    choice = ir.Node(
        "",
        "If",
        [value("condition")],
        [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", ir.Graph([], other.outputs, nodes=[other]))],
        name="choice",
    )
    ir.Graph([], choice.outputs, nodes=[product, choice])
    found = linear_at(product)
    assert found is not None
    assert found.bias is None
    assert found.output is product.outputs[0]
