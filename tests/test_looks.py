"""A run looks at each graph once: the original, the rotated one, the smoothed one."""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from quarot_onnx import pipeline
from quarot_onnx.cli import choosing, main
from quarot_onnx.run import preparing
from quarot_onnx.sites import detect

TWO_WINDOWS = ["--calib-samples", "3", "--calib-seq-len", "96"]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[int]]:
    """How often each graph was searched for sites, and selected from; graphs are kept so that none shares an id."""
    counts: dict[str, Counter[int]] = {"understood": Counter(), "select": Counter()}
    kept: list[ir.Model] = []

    def counted(name: str, function, model_of):
        def wrapped(first, *rest):
            model = model_of(first)
            kept.append(model)
            counts[name][id(model)] += 1
            return function(first, *rest)

        return wrapped

    select = counted("select", pipeline.select, lambda survey: survey.model)
    monkeypatch.setattr(detect, "understood", counted("understood", detect.understood, lambda model: model))
    monkeypatch.setattr(pipeline, "select", select)
    monkeypatch.setattr(preparing, "select", select)
    monkeypatch.setattr(choosing, "select", select)
    return counts


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        (["--scheme", "w8a8-dynamic", "--lm-head", "float", "--embedding", "int8"], 2),
        (["--scheme", "w8a8-static", "--no-rotate", *TWO_WINDOWS], 1),
        (["--w-bits", "4", "--weights", "gptq", "--int8-down-proj", "--embedding", "int8", *TWO_WINDOWS], 2),
        (["--scheme", "w8a8-dynamic", "--smooth-alpha", "0.5", *TWO_WINDOWS], 3),
        (["--w-bits", "4", "--weights", "rtn", "--no-rotate", "--lm-head", "int8"], 1),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else str(value),
)
def test_each_graph_is_looked_at_once(
    options: list[str],
    graphs: int,
    looks: dict[str, Counter[int]],
    llama_optimum: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["quantize", str(llama_optimum), str(tmp_path / "q.onnx"), *options, "--no-check", "--quiet"]
    monkeypatch.setattr("sys.argv", ["quarot-onnx", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert sorted(looks["select"].values()) == [1] * graphs
    assert set(looks["understood"].values()) == {1}
    assert len(looks["understood"]) <= graphs
