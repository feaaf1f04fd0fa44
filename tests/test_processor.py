"""The assumptions about 8-bit products, held against onnxruntime on whatever processor the tests run on."""

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx import processor

TERMS = 64


def product(weight: NDArray[np.integer], rows: int = 1, exact: bool = False) -> NDArray[np.int32]:
    """255 in every place of the activation, as onnxruntime multiplies it."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, TERMS])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    if exact:
        options.add_session_config_entry(processor.EXACT_PRODUCTS, "1")
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.full((rows, TERMS), 255, np.uint8)})[0]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("value", [127, -128])
def test_the_probe_says_what_products_do(value: int, rows: int) -> None:
    found = product(np.full((TERMS, 16), value, np.int8), rows)
    assert (found != 255 * value * TERMS).any() == processor.saturates()


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    ("value", "dtype"), [(processor.LARGEST_SAFE, np.int8), (-processor.LARGEST_SAFE, np.int8), (255, np.uint8)]
)
def test_what_is_said_to_be_safe_is_exact_everywhere(value: int, dtype: type, rows: int) -> None:
    assert (product(np.full((TERMS, 16), value, dtype), rows) == 255 * value * TERMS).all()


def test_one_more_is_not_safe_where_products_saturate() -> None:
    found = product(np.full((TERMS, 16), processor.LARGEST_SAFE + 1, np.int8))
    assert (found != 255 * (processor.LARGEST_SAFE + 1) * TERMS).any() == processor.saturates()


def test_the_processor_is_named() -> None:
    name, _, products = processor.described().rpartition(", ")
    assert name
    assert ("saturate" in products) == processor.saturates()
