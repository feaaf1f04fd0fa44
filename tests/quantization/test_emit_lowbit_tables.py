"""Embeddings rounded beforehand: the rows that onnxruntime gathers, and the integers that files hold."""

from pathlib import Path

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
from quarot_onnx.graph.query import resolve_constant
from quarot_onnx.io import model_io
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme

ROWS = 11
IDS = np.array([[3, 0, 10], [3, 7, 1]])
# Two roundings of float32; a float16 output is rounded once at 2^-11.
RTOL = {TensorProto.FLOAT: 3e-7, TensorProto.FLOAT16: 1e-3}


def embedding(hidden: int, dtype: int = TensorProto.FLOAT, opset: int = 17, *, tied: bool = False):
    nodes = [helper.make_node("Gather", ["T", "ids"], ["y"], name="embed")]
    if tied:
        nodes.append(helper.make_node("Gemm", ["h", "T"], ["z"], name="head", transB=1))
    table = np.random.default_rng(5).standard_normal((ROWS, hidden)).astype(np.float32)
    inputs = {"ids": ["b", "s"]} | ({"h": ["n", hidden]} if tied else {})
    outputs = {"y": ["b", "s", hidden]} | ({"z": ["n", ROWS]} if tied else {})
    return graphs.model(nodes, inputs, outputs, {"T": table}, dtype=dtype, opset=opset)


def emitted(proto, weight: QuantizedWeight, form: OutputFormat, block: int | None = None) -> ir.Model:
    model = ir.from_proto(proto)
    node = next(n for n in model.graph if n.op_type == "Gather")
    table = resolve_constant(node.inputs[0])
    assert table is not None
    Emitter(model).table(node, table, StoredWeight(rounded_weights.rounded(weight), form, block))
    return model


def check(path: Path, weight: QuantizedWeight, dtype: int = TensorProto.FLOAT) -> None:
    actual = graphs.run(path, {"ids": IDS})
    assert actual.dtype == graphs.FLOATS[dtype]
    expected = weight.dequantized().T[IDS].astype(np.float64)
    np.testing.assert_allclose(actual, expected, rtol=RTOL[dtype], atol=0)
    assert expected.std() > 0.01


@pytest.mark.parametrize("dtype", RTOL, ids=["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("hidden", [576, 64, 48, 37])
@pytest.mark.parametrize(
    ("form", "bits", "group", "block"),
    [
        (OutputFormat.NBITS, 4, None, None),
        (OutputFormat.NBITS, 4, None, 32),
        (OutputFormat.NBITS, 4, 32, None),
        (OutputFormat.NBITS, 4, 64, 16),
        (OutputFormat.W4A8, 3, None, None),
        (OutputFormat.NBITS, 2, 16, None),
        (OutputFormat.NBITS, 8, 16, None),
        (OutputFormat.W8, 4, 16, None),
    ],
)
def test_few_bits_or_groups_are_gathered_as_blocks(form, bits, group, block, hidden, symmetric, dtype, tmp_path):
    weight = rounded_weights.quantized((hidden, ROWS), WeightScheme(bits, symmetric=symmetric, group_size=group))
    path = model_io.save(emitted(embedding(hidden, dtype), weight, form, block), tmp_path / "m.onnx").path
    check(path, weight, dtype)
    graphs.run(path, {"ids": IDS}, tmp_path / "o.onnx")
    assert graphs.operators(tmp_path / "o.onnx")["GatherBlockQuantized"] == 1
    stored = 8 if hidden % 2 or bits == 8 or form is OutputFormat.W8 else 4
    held = rounded_weights.unpacked(rounded_weights.initializer(path, "T_packed"), stored)
    assert held.shape == (ROWS, hidden)
    np.testing.assert_array_equal(held.astype(int).T - 2 ** (stored - 1), weight.integers)


@pytest.mark.parametrize("dtype", RTOL, ids=["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("form", "bits"), [(OutputFormat.W8, 8), (OutputFormat.W8, 3), (OutputFormat.NBITS, 8)])
def test_8_bits_per_row_stay_in_standard_operators(form, bits, per_channel, signed, symmetric, dtype, tmp_path) -> None:
    scheme = WeightScheme(bits, symmetric=symmetric, signed=signed, per_channel=per_channel)
    weight = rounded_weights.quantized((48, ROWS), scheme)
    model = emitted(embedding(48, dtype), weight, form)
    assert not any(node.domain for node in model.graph)
    path = model_io.save(model, tmp_path / "m.onnx").path
    check(path, weight, dtype)
    held = rounded_weights.initializer(path, "T_int8" if signed else "T_uint8")
    np.testing.assert_array_equal(held.T, weight.integers, strict=True)


@pytest.mark.parametrize("dtype", RTOL, ids=["float32", "float16"])
@pytest.mark.parametrize("group", [None, 16])
def test_fake_tables_are_real_numbers(group, dtype, tmp_path: Path) -> None:
    weight = rounded_weights.quantized((37, ROWS), WeightScheme(3, symmetric=False, group_size=group))
    path = model_io.save(emitted(embedding(37, dtype), weight, OutputFormat.FAKE), tmp_path / "m.onnx").path
    check(path, weight, dtype)
    assert graphs.operators(path) == {"Gather": 1}


@pytest.mark.parametrize("form", [OutputFormat.NBITS, OutputFormat.FAKE, OutputFormat.W8])
def test_a_tied_head_keeps_its_float_weight(form: OutputFormat) -> None:
    proto = embedding(48, tied=True)
    weight = rounded_weights.quantized((48, ROWS), WeightScheme(4))
    model = emitted(proto, weight, form)
    assert "T" in model.graph.initializers
    assert [linear.weight.value.name for linear in linears(model.graph)] == ["T"]


def test_a_table_of_another_shape_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        emitted(embedding(48), rounded_weights.quantized((ROWS, 48), WeightScheme(4)), OutputFormat.NBITS)
