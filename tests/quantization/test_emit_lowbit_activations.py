"""Rounded activations: the graph computes what NumPy computes, element by element."""

import linear_graphs as graphs
import numpy as np
import onnx_ir as ir
import pytest
import rounded_weights
from onnx import TensorProto, helper

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.emission.emit import Emitter
from quarot_onnx.emission.formats import StoredWeight
from quarot_onnx.graph.linear import linears
from quarot_onnx.quantization.activations import Activation, FakePerToken, FakeStatic, PerToken, Static, round_trip
from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme

FEATURES = 48
KINDS: list[Activation] = [
    *(
        FakePerToken(bits, symmetric, group, clip)
        for bits in (2, 4, 8)
        for symmetric in (True, False)
        for group in (None, 16)
        for clip in (1.0, 0.9)
    ),
    *(
        FakeStatic.for_range(-2.1, 4.3, bits, symmetric=symmetric)
        for bits in range(2, 9)
        for symmetric in (True, False)
    ),
    FakeStatic.for_range(0.0, 5.0, 4, symmetric=False),
    PerToken(),
    PerToken(0.75),
    Static(Grid(np.array(0.05, np.float32), np.array(100, np.uint8))),
    Static(Grid(np.array(0.3, np.float32), np.array(-7, np.int8))),
]

FIXED = [FakeStatic(4, scale=0.375), FakeStatic(5, symmetric=False, scale=0.375, zero_point=9)]


def seen_by_the_product(x: np.ndarray, kind: Activation, opset: int = 18, dtype: int = TensorProto.FLOAT) -> np.ndarray:
    """What comes out of a Linear with the identity for its weight."""
    dims = ["a", "b", "c"][: x.ndim - 1]
    proto = graphs.model(
        [helper.make_node("MatMul", ["x", "W"], ["y"], name="up")],
        {"x": [*dims, FEATURES]},
        {"y": [*dims, FEATURES]},
        {"W": np.zeros((FEATURES, FEATURES), np.float32)},
        opset=opset,
        dtype=dtype,
    )
    model = ir.from_proto(proto)
    ones = np.ones((1, FEATURES), np.float32)
    identity = QuantizedWeight(WeightScheme(2), np.eye(FEATURES, dtype=np.int8), ones, np.zeros_like(ones, np.int8))
    weight = StoredWeight(rounded_weights.rounded(identity), OutputFormat.FAKE)
    Emitter(model).linear(next(linears(model.graph)), weight, kind)
    return graphs.run(model, {"x": x})


def sample(*rows: int) -> np.ndarray:
    x = np.random.default_rng(8).standard_normal((*rows, FEATURES)).astype(np.float32) + np.float32(0.2)
    return x * np.geomspace(1e-3, 30, rows[-1], dtype=np.float32)[:, None]


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_graph_is_the_numpy_function(kind: Activation, opset: int) -> None:
    x = sample(3, 7)
    x[1, 2] = 0
    x[0, 0], x[0, 1] = np.abs(x[0, 0]), -np.abs(x[0, 1])
    expected, actual = round_trip(x, kind), seen_by_the_product(x, kind, opset)
    # The same operations in float32; the product with ones and zeros and, per token, its scale: two roundings. A value
    # that falls on a half may be rounded to the other side: the sample has none.
    np.testing.assert_allclose(actual, expected, rtol=2.5e-7, atol=0)
    assert not np.allclose(expected, x, rtol=1e-4)
    assert not actual[1, 2].any()


@pytest.mark.parametrize("rows", [(4,), (2, 4), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("group", [None, 16])
def test_any_number_of_axes(rows, group) -> None:
    x = sample(*rows)
    for kind in (FakePerToken(4, symmetric=False, group_size=group), FIXED[1]):
        np.testing.assert_allclose(seen_by_the_product(x, kind), round_trip(x, kind), rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("kind", [*KINDS[:8], *FIXED], ids=str)
def test_float16_models_round_in_float32(kind: Activation) -> None:
    x = sample(5).astype(np.float16)
    actual = seen_by_the_product(x, kind, dtype=TensorProto.FLOAT16)
    assert actual.dtype == np.float16
    # Float16 on the way into the product and on the way out; below 6e-5 its steps are 6e-8 wide.
    np.testing.assert_allclose(actual, round_trip(x.astype(np.float32), kind), rtol=2e-3, atol=1.2e-7)


@pytest.mark.parametrize("kind", [FakePerToken(4), FakePerToken(4, group_size=16), FIXED[1], PerToken()], ids=str)
def test_no_rows_at_all(kind: Activation) -> None:
    assert seen_by_the_product(np.zeros((2, 0, FEATURES), np.float32), kind).shape == (2, 0, FEATURES)
