"""A cache that the graph fixes: no prefix is made from one, and what comes after a prefix may be fed into one."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Shell
from exports import EXPORTS

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import texts_of
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.io import model_io

ROOM = 64
CACHED = ("genai", "genai RoPE outside", "optimum llama", "dynamo cache 23")
FEW = ("--calib-samples", 4, "--calib-seq-len", 32, "--no-check")
REFUSED = (
    f"the graph fixes its cache at {ROOM} positions, so that a prefix cannot be run alone: export with a free length"
)


def buffered(source: Path, folder: Path) -> Path:
    """The same model with caches of fixed length; those that go into a buffer come out of it as long."""
    shutil.copytree(source.parent, folder)
    model = onnx.load(folder / source.name, load_external_data=False)
    in_place = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
    names = {name for pair in ModelInputs.from_path(source).presents for name in pair[: 1 + in_place]}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in names:
            dim = value.type.tensor_type.shape.dim[2]
            dim.Clear()
            dim.dim_value = ROOM
    onnx.save(model, folder / source.name)
    assert ModelInputs.from_path(folder / source.name).lengths.past == ROOM
    return folder / source.name


@pytest.mark.parametrize("case", CACHED)
def test_no_prefix_is_made_from_one(case: str, shell: Shell, text: Path, tmp_path: Path) -> None:
    source, target = buffered(EXPORTS[case](), tmp_path / "source"), tmp_path / "target" / "m.onnx"
    assert REFUSED in shell.fails("rotate", source, target, "--prefix-ids", "7,3", "--no-verify")
    common = ("quantize", source, target, "--scheme", "w8a8-static", *FEW, "--calib-text", text)
    for form in ("graph", "npz"):
        said = shell.fails(*common, "--prefix", form, "--prefix-ids", "7,3")
        assert REFUSED in said
    assert not target.parent.exists()
    assert f"no sink prefix: {REFUSED}" in shell.ok(*common, "--prefix", "auto").err


def test_the_way_out(shell: Shell, text: Path, tmp_path: Path) -> None:
    found = []
    fixed = [word for name in ("past", "total") for word in ("--fix-shape", f"{name}_sequence_length={ROOM}")]
    for name, more in (("free", ()), ("fixed", fixed)):
        target = tmp_path / name / "m.onnx"
        common = ("--scheme", "w8a8-static", "--prefix", "graph", "--prefix-ids", "7,3", "--calib-text", text)
        shell.ok("quantize", EXPORTS["genai"](), target, *common, *FEW, *more)
        decoder = Decoder(target)
        found.append([decoder.feed(ids) for ids in ([10, 20, 30], [5], [6])])
    assert ModelInputs.from_path(target).lengths.past == ROOM
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("case", ["genai", "optimum llama"])
def test_a_buffer_holds_nothing_where_it_is_zeros(case: str, tmp_path: Path) -> None:
    source = buffered(EXPORTS[case](), tmp_path / "source")
    model, inputs = model_io.load(source), ModelInputs.from_path(source)
    ids = np.arange(10, 18)[None]
    assert [rows.tolist() for rows in texts_of(model, [inputs.feed(ids)])] == [ids.tolist()]
    past = {name: np.ones_like(inputs.feed(ids)[name]) for name, _ in inputs.presents}
    with pytest.raises(CalibrationError, match="calibration sample 1 holds a past"):
        texts_of(model, [inputs.feed(ids), inputs.feed(ids, past, 3)])


def test_a_model_behind_a_prefix_is_calibrated_after_its_cache_was_fixed(
    shell: Shell, text: Path, tmp_path: Path
) -> None:
    shell.ok("rotate", EXPORTS["genai"](), tmp_path / "held" / "model.onnx", "--prefix-ids", "7,3")
    fixed = buffered(tmp_path / "held" / "model.onnx", tmp_path / "fixed")
    found = [
        shell.ok("quantize", source, tmp_path / name / "m.onnx", "--scheme", "w8a8-static", *FEW, "--calib-text", text)
        and Decoder(tmp_path / name / "m.onnx").feed([10, 20, 30])
        for name, source in (("a", tmp_path / "held" / "model.onnx"), ("b", fixed))
    ]
    np.testing.assert_allclose(*found, atol=1e-4)
