"""Single numbers that a graph computes of lengths."""

import onnx_ir as ir
import pytest

from quarot_onnx.graph.numbers import is_one_of_lengths

GRAPHS = {
    "n = Size(x)": True,
    "s = Shape <start=1, end=2> (x)\nn = Cast <to=1> (s)": True,
    "s = Shape <start=-1> (x)\nn = Cast <to=1> (s)": True,
    "s = Shape (x)\nn = Gather (s, one)": True,
    "s = Shape (x)\na = Slice (s, minus, far)\nf = Cast <to=1> (a)\nr = Sqrt (f)\nn = Div (half, r)": True,
    "s = Shape (x)\na = Slice (s, one_, two_)\nn = Squeeze (a)": True,
    "n = Shape (x)": False,
    "s = Shape (x)\nn = Slice (s, minus2, far)": False,
    "s = Shape (x)\nn = Gather (s, both)": False,
    "n = Sqrt (x)": False,
    "s = Size (x)\nf = Cast <to=1> (s)\nn = Mul (f, x)": False,
    "s = Size (x)\nn = Mul (s, both)": False,
    "n = Gather (x, one)": False,
    "s = Shape (x)\nn = Slice (s, both, far)": False,
    "n = own.Gather ()": False,
    "n = own.Sqrt (x)": False,
    "n = own.Cast ()": False,
}


@pytest.mark.parametrize("nodes", GRAPHS)
def test_one_number_of_lengths(nodes: str) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 18, "own" : 1]> g (float[a, b] x) => (n)
        <int64 one = {{1}}, int64[1] one_ = {{1}}, int64[1] two_ = {{2}}, int64[1] minus = {{-1}}, float half = {{0.5}},
         int64[1] minus2 = {{-2}}, int64[1] far = {{9223372036854775807}}, int64[2] both = {{0, 1}}>
        {{ {nodes} }}"""
    )
    assert is_one_of_lengths(model.graph.outputs[0]) is GRAPHS[nodes]
