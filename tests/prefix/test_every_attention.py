"""A prefix is read by all that attends in a graph, or refused before any work."""

import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from command_line import Shell
from exports import EXPORTS
from strange_blocks import behind, encoded, without_softmax

from quarot_onnx.errors import ModelError
from quarot_onnx.io import model_io
from quarot_onnx.prefix.covered import require_all
from quarot_onnx.sites.detect import Survey

FEW = ("--calib-samples", 2, "--calib-seq-len", 32, "--no-check")
STRANGE = "takes a cache, and what attends to that is not understood"


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    """In the place of the export's model, beside its other files."""
    shutil.copytree(EXPORTS["optimum llama"]().parent, folder)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    return saved(without_softmax(onnx.load(EXPORTS["optimum llama"]()), 1), tmp_path / "strange")


def test_one_that_does_not_write_to_the_stream_reads_it(shell: Shell, tmp_path: Path) -> None:
    model = onnx.load(EXPORTS["optimum llama"]())
    o = next(node for node in model.graph.node if node.name == "/model/layers.0/self_attn/o_proj/MatMul")
    source = saved(behind(model, o.output[0]), tmp_path / "source")
    found = shell.ok("rotate", source, tmp_path / "m.onnx", "--prefix-ids", "7,3", "--json").json
    assert found["equivalence"]["passed"]


def test_one_that_is_not_found_is_refused_by_name(strange: Path, shell: Shell, text: Path, tmp_path: Path) -> None:
    said = shell.fails("rotate", strange, tmp_path / "m.onnx", "--prefix-ids", "7,3", "--no-verify")
    assert "no prefix fits into this graph: /model/layers.1/self_attn/Concat_" in said
    assert f"{STRANGE}; feed it as a cache (--prefix npz), or go without" in said
    common = ("quantize", strange, tmp_path / "m.onnx", "--scheme", "w8a8-static", *FEW, "--calib-text", text)
    assert STRANGE in shell.fails(*common, "--prefix", "graph", "--prefix-ids", "7,3")
    assert not (tmp_path / "m.onnx").exists()
    told = shell.ok(*common, "--prefix", "auto", "--prefix-ids", "7,3").err
    assert "no sink prefix: no prefix fits into this graph: /model/layers.1/self_attn/Concat_" in told


@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_does_not_reach_the_next_layer_through_linears(layer: int) -> None:
    model = without_softmax(onnx.load(EXPORTS["optimum llama"]()), layer)
    survey = Survey(ir.from_proto(model))
    with pytest.raises(ModelError, match=rf"layers\.{layer}/self_attn/Concat_\S* .*{STRANGE}"):
        require_all(survey.model.graph, survey.visible().attentions)


def test_as_a_cache_it_is_fed_to_all_of_them(strange: Path, shell: Shell, text: Path, tmp_path: Path) -> None:
    common = ("quantize", strange, tmp_path / "m.onnx", "--scheme", "w8a8-static", *FEW, "--calib-text", text)
    shell.ok(*common, "--prefix", "npz", "--prefix-ids", "7,3")
    assert (tmp_path / "prefix.npz").exists()


def test_an_encoder_is_named(tmp_path: Path) -> None:
    survey = Survey(model_io.load(saved(encoded(), tmp_path / "encoded")))
    with pytest.raises(ModelError, match="node_encoder_pr0 attends, too, and is no attention of the decoder"):
        require_all(survey.model.graph, survey.visible().attentions)


@pytest.mark.parametrize("case", EXPORTS)
def test_none_is_taken_for_a_strange_one(case: str) -> None:
    survey = Survey(model_io.load(EXPORTS[case]()))
    require_all(survey.model.graph, survey.visible().attentions)
