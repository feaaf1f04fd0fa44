"""Rows that a router chose: which values hold them, and what follows for those who pair, reshape or count rows."""

from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx_ir as ir
import pytest
from command_line import Shell
from lowbit_runs import config_for, text_reader

from quarot_onnx import ModelQuantizer, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.calibration import hessian
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.errors import CalibrationError
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.routing import routed_values
from quarot_onnx.io import model_io

MOE = "optimum MoE"
FEW = ("--calib-samples", 1, "--calib-seq-len", 3, "--calib-own", 0)


@pytest.mark.parametrize("case", exports.EXPORTS)
def test_experts_and_nothing_else_are_routed(case: str) -> None:
    graph = model_io.load(exports.EXPORTS[case]()).graph
    routed = routed_values(graph)
    assert {linear.name for linear in linears(graph) if linear.input in routed} == {
        linear.name for linear in linears(graph) if "/experts." in linear.name
    }


def test_rows_of_a_mask_are_no_choice_of_the_model() -> None:
    """What is visible is the same whatever the weights are."""
    x, mask = (ir.Value(name=name) for name in ("x", "mask"))
    weight = ir.Value(name="w", const_value=ir.tensor(np.eye(4, dtype=np.float32)))
    product = ir.node("MatMul", [x, weight])
    seen = ir.node("NonZero", [mask])
    score = ir.node("NonZero", [product.outputs[0]])
    rows = [ir.node("GatherND", [product.outputs[0], node.outputs[0]]) for node in (seen, score)]
    behind = ir.node("MatMul", [rows[1].outputs[0], weight])
    back = ir.node("ScatterND", [x, score.outputs[0], behind.outputs[0]])
    outputs = [node.outputs[0] for node in (*rows, back)]
    graph = ir.Graph([x, mask], outputs, nodes=[product, seen, score, *rows, behind, back], initializers=[weight])
    assert routed_values(graph) == {rows[1].outputs[0], behind.outputs[0]}


@pytest.mark.parametrize("method", ["qronos", "gptaq"])
def test_no_row_is_paired_with_that_of_another_token(method: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Inputs as they are on the rounded path stand for those of the float model: what is left is their own rounding."""
    path, paired = exports.EXPORTS[MOE](), list[float]()
    end_unit = hessian.Portions.end_unit

    def watched(portions: hessian.Portions) -> None:
        if portions._count and portions._wants_drift:
            rows, exact = np.concatenate(portions._quantized), np.concatenate(portions._float)
            assert len(rows) == len(exact)
            apart = (rows**2).sum(1)[:, None] + (exact**2).sum(1) - 2 * rows @ exact.T
            paired.append(float(np.mean(np.diag(apart) > apart.min(axis=1) + 1e-2 * (rows**2).sum(1))))
        end_unit(portions)

    monkeypatch.setattr(hessian.Portions, "end_unit", watched)
    quantizer = ModelQuantizer(config_for(method, "w4a8", quarot=QuarotConfig()))
    quantizer.quantize_model(path, tmp_path / "q.onnx", text_reader(path))
    assert max(paired) < 0.1, "a share of rows that others are nearer to"
    assert quantizer.outcome is not None
    assert sum("a router chooses the tokens of experts" in note for note in quantizer.outcome.notes) == 1


def test_few_tokens_are_told(shell: Shell, text: Path, tmp_path: Path) -> None:
    path = exports.EXPORTS[MOE]()
    told = shell.ok("quantize", path, tmp_path / "q.onnx", "--scheme", "w4a8", "--calib-text", text, *FEW).err
    assert "some experts see few calibration tokens (more samples help), the first of them: " in told
    assert told.count("some experts see few") == 1


def test_inspect_looks_where_all_tokens_are(shell: Shell, text: Path) -> None:
    text.write_text(4 * text.read_text())
    found = shell.ok("inspect", exports.EXPORTS[MOE](), "--sinks", "--text", text, "--json").json
    assert found["sinks"][0]["prefix"] == []
    lines = shell.ok("inspect", exports.EXPORTS[MOE]()).out.splitlines()
    left = [line for line in lines if line.startswith("left out R1")]
    assert any(line.startswith("left out R1 at 8 places, the first") for line in left)
    assert len(left) <= 3, "not one for every expert"


def test_an_expert_that_no_token_went_to_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = exports.EXPORTS[MOE]()
    config = QConfig(QLayerConfig(UInt8Spec(), UInt8Spec()), OpTypesToQuantize=["MatMul"])
    reader = SampleReader([ModelInputs.from_path(path).feed(np.array([[5]]))])
    with pytest.raises(CalibrationError, match=r"was empty in every sample.*leave the Linears that read it in float"):
        ModelQuantizer(config).quantize_model(path, tmp_path / "q.onnx", reader)
