"""The ``optimize`` command."""

import json
from pathlib import Path

import onnxruntime
from command_line import Shell, files
from exports import EXPORTS


def test_the_command(shell: Shell, tmp_path: Path) -> None:
    source = EXPORTS["genai"]()
    done = shell.ok("optimize", source, tmp_path / "copy", "--json").json
    assert done["model"] == str(tmp_path / "copy" / source.name)
    report = json.loads(Path(done["report"]).read_text())
    assert report["optimized"]["onnxruntime"] == onnxruntime.__version__
    assert report["optimized"]["processor"]
    told_genai = json.loads((tmp_path / "copy" / "genai_config.json").read_text())["model"]["decoder"]
    assert told_genai["session_options"]["graph_optimization_level"] == "ORT_DISABLE_ALL"
    told = shell.ok("optimize", source, tmp_path / "copy" / source.name)
    assert "wrote" in told.out
    assert "ORT_DISABLE_ALL" in told.err
    before = files(tmp_path)
    assert "would overwrite the input" in shell.fails("optimize", source, source)
    (tmp_path / "text.onnx").write_text("no model")
    assert "text.onnx" in shell.fails("optimize", tmp_path / "text.onnx", tmp_path / "x")
    (tmp_path / "text.onnx").unlink()
    assert files(tmp_path) == before
