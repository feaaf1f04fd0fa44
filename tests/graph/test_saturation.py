"""Which products of a quantized graph saturate on processors without VNNI."""

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.graph.saturation import saturable_products


def graph(nodes: list, constants: dict[str, NDArray], x: int = TensorProto.FLOAT) -> ir.Model:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", x, ["b", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))


def weight(value: int, dtype: type = np.int8) -> NDArray:
    return np.full((4, 3), value, dtype)


SCALE = np.array(0.1, np.float32)


def qdq(w: NDArray, zero: NDArray, op_type: str = "MatMul", through: list | None = None) -> ir.Model:
    """x and w through Q/DQ into a product; ``zero`` is the activation's zero point and chooses its type."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        *(through or []),
        helper.make_node("DequantizeLinear", ["w8" if through else "w", "s"], ["b"]),
        helper.make_node(op_type, ["a", "b"], ["y"], name="product"),
    ]
    return graph(nodes, {"w": w, "s": SCALE, "z": zero})


UINT8, INT8 = np.array(128, np.uint8), np.array(0, np.int8)


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize(("value", "found"), [(65, ["product"]), (-65, ["product"]), (64, []), (-64, [])])
def test_qdq_with_int8_weights(op_type: str, value: int, found: list[str]) -> None:
    assert saturable_products(qdq(weight(value), UINT8, op_type)) == found


def test_uint8_weights_and_int8_activations_are_safe() -> None:
    assert not saturable_products(qdq(weight(255, np.uint8), UINT8))
    assert not saturable_products(qdq(weight(127), INT8))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_activations_of_16_bits_are_safe(dtype: type) -> None:
    # onnxruntime has no integer product for them
    assert not saturable_products(qdq(weight(127), np.array(0, dtype)))


def test_weights_that_are_cast_from_4_bits_are_safe() -> None:
    cast = [helper.make_node("Cast", ["w"], ["w8"], to=TensorProto.INT8)]
    made = qdq(weight(7), UINT8, through=cast)
    w = made.graph.initializers["w"]
    w.const_value = ir.Tensor(np.full((4, 3), 7, ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)
    assert not saturable_products(made)


def test_weights_alone_are_safe() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["b"]),
        helper.make_node("MatMul", ["x", "b"], ["y"], name="product"),
    ]
    assert not saturable_products(graph(nodes, {"w": weight(127), "s": SCALE}))


@pytest.mark.parametrize(
    ("op_type", "domain", "inputs"),
    [
        ("MatMulInteger", "", ["x", "w"]),
        ("MatMulIntegerToFloat", "com.microsoft", ["x", "w", "s", "s"]),
        ("DynamicQuantizeMatMul", "com.microsoft", ["x", "w", "s"]),
        ("QLinearMatMul", "", ["x", "s", "z", "w", "s", "w0", "s", "z"]),
        ("QGemm", "com.microsoft", ["x", "s", "z", "w", "s", "w0"]),
    ],
)
def test_other_tools_operators(op_type: str, domain: str, inputs: list[str]) -> None:
    def made(value: int) -> ir.Model:
        node = helper.make_node(op_type, inputs, ["y"], name="product", domain=domain)
        constants = {"w": weight(value), "s": SCALE, "z": UINT8, "w0": np.array(0, np.int8)}
        return graph([node], constants, TensorProto.UINT8)

    assert saturable_products(made(-128)) == ["product"]
    assert not saturable_products(made(5))


def test_products_in_a_branch() -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["r"], name="inside")],
        "then",
        [],
        [helper.make_tensor_value_info("r", TensorProto.INT32, None)],
        [numpy_helper.from_array(weight(100), "w")],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    made = graph([node], {"c": np.array([True])[0]}, TensorProto.UINT8)
    assert set(saturable_products(made)) == {"inside"}
