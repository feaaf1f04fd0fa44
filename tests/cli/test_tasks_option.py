"""Tasks of lm-eval on the command line."""

import sys
from pathlib import Path

import harness_tasks
import pytest
from command_line import Shell


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return harness_tasks.write(tmp_path / "tasks")


def test_as_a_table_and_as_json(shell: Shell, model: Path, tasks: Path) -> None:
    command = ("evaluate", model, "--tasks", "pick", "--include-path", tasks)
    printed = shell.ok(*command)
    assert "|Tasks|Version|Filter|n-shot|Metric|" in printed.out
    assert "|pick |      2|none  |     0|acc   |" in printed.out
    found = shell.ok(*command, "--limit", 4, "--num_fewshot", 2, "--batch-size", 3, "--json", "--bos-id", 7).json
    assert found["n-samples"]["pick"] == {"original": 6, "effective": 4}
    assert found["n-shot"]["pick"] == 2
    assert 0 <= found["results"]["pick"]["acc,none"] <= 1
    config = found["config"]
    assert (config["batch_size"], config["limit"], config["num_fewshot"], config["bos_id"]) == (3, 4, 2, 7)
    assert (config["model"], config["positions"]) == (str(model), 128)


def test_what_goes_with_the_other_one_is_refused(shell: Shell, model: Path, text: Path, tasks: Path) -> None:
    line = shell.fails("evaluate", model, "--tasks", "pick", "--text", text, "--windows", 20, "--batch-size", 2)
    assert "--tasks, --batch-size and --text, --windows go with" in line
    for more in (("--seq-len", 64), ("--unscored", 2), ("--text-key", "text")):
        assert more[0] in shell.fails("evaluate", model, "--tasks", "pick", "--include-path", tasks, *more)
    for more in (("--include-path", tasks), ("--limit", 3), ("--num-fewshot", 0)):
        assert more[0] in shell.fails("evaluate", model, "--text", text, *more)
        assert "nothing to evaluate on" in shell.fails("evaluate", model, *more)
    assert "--text FILE" in shell.fails("evaluate", model)


def test_errors_in_one_line(shell: Shell, model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("evaluate", model, "--tasks", "pick", "--include-path")
    assert "no folder at" in shell.fails(*command, tasks / "nowhere")
    assert "--batch-size" in shell.fails(*command, tasks, "--batch-size", 0)
    for limit in (0, -1):
        assert f"--limit {limit}" in shell.fails(*command, tasks, "--limit", limit)
    (tasks / "data.jsonl").unlink()
    assert "the data of the task 'pick' cannot be had" in shell.fails(*command, tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'quarot-onnx[eval]'" in shell.fails(*command, tasks)
