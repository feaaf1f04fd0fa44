"""Tasks of lm-eval with a cluster's workers: the results of one machine alone, and what is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import exports
import harness_tasks
import numpy as np
import onnx
import pytest
import worker_tasks
from command_line import Shell, run
from distributed import Client
from onnx import numpy_helper

from quarot_onnx.distributed import cluster
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.errors import ModelError
from quarot_onnx.evaluation import rows, source, tasks
from quarot_onnx.evaluation.answers import Answers
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.evaluation.tasks import TaskResults, evaluate_tasks
from quarot_onnx.piecewise.memory import Memory

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.further]

ITEMS = 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return harness_tasks.write(tmp_path / "tasks", items=ITEMS)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """More groups than workers."""
    monkeypatch.setattr(source, "units", lambda lengths: [range(i, i + 1) for i in range(len(lengths))])


def results(found: TaskResults) -> dict[str, Any]:
    return {name: found.record[name] for name in ("results", "n-samples")}


@pytest.mark.parametrize(
    ("export", "kinds", "options"),
    [
        ("optimum llama", ["pick", "roll", "say"], {}),
        ("genai", ["say", "pick"], {"batch_size": 3}),
        ("optimum fp16", ["pick"], {"memory": Memory(320_000, by_stages=True), "batch_size": 2}),
    ],
)
def test_the_same_results(export: str, kinds: list[str], options: dict[str, Any], address: str, folder: Path) -> None:
    """Given answers, whole texts and generated ones."""
    path = exports.EXPORTS[export]()
    evaluate = partial(evaluate_tasks, path, path.parent, kinds, include_path=folder, **options)
    seen: list[tuple[str, int, int | None]] = []
    here = evaluate()
    there = evaluate(scheduler=address, progress=lambda *now: seen.append(now))
    assert results(here) == results(there)
    assert here.notes == there.notes
    assert ("evaluate", 4 * ITEMS, 4 * ITEMS) in seen, "of the given answers"
    assert ("say" in kinds) == (("evaluate", ITEMS, ITEMS) in seen), "of the generated texts"


def test_a_worker_that_is_killed_is_done_without(
    address: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exports.optimum_export("llama")
    evaluate = partial(evaluate_tasks, path, path.parent, ["pick"], include_path=folder)
    here = evaluate()
    monkeypatch.setattr(rows, "find_group", partial(worker_tasks.find_or_die, tmp_path))
    there = evaluate(scheduler=address)
    assert (tmp_path / "killed").exists()
    assert results(here) == results(there)


def test_the_model_is_not_opened_here(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exports.optimum_export("llama")

    def opened(*_given: object, **_options: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(source, "opened", opened)
    with Client(address, set_as_default=False) as client:
        answers = Answers(path, cluster=Cluster(client))
        assert answers.score([([5, 6], [7])])[0][0] < 0
    with pytest.raises(AssertionError, match="opened"):
        Answers(path)


def test_texts_beside_each_other_share_the_model_alone() -> None:
    """As the threads of a worker ask it."""
    path = exports.optimum_export("llama")
    one = Decoder(path)
    one.feed([5, 6])
    other = one.another()
    other.feed([9, 3, 4])
    np.testing.assert_array_equal(one.feed([7]), in_steps(path, [5, 6], [7]))
    np.testing.assert_array_equal(other.feed([8]), in_steps(path, [9, 3, 4], [8]))


def in_steps(path: Path, *steps: list[int]) -> np.ndarray:
    decoder = Decoder(path)
    return [decoder.feed(step) for step in steps][-1]


def test_an_error_of_a_worker_is_that_of_a_run_without(address: str, tmp_path: Path) -> None:
    broken = onnx.load(exports.optimum_export("llama"))
    weight = next(i for i in broken.graph.initializer if len(i.dims) == 2)
    array = numpy_helper.to_array(weight).copy()
    array[:] = float("nan")
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(broken, tmp_path / "model.onnx")
    with Client(address, set_as_default=False) as client:
        answers = Answers(tmp_path / "model.onnx", cluster=Cluster(client))
        with pytest.raises(ModelError, match=r"the logits of .* are not finite"):
            answers.score([([5, 6], [7])])


def test_from_the_command_line(address: str, folder: Path, shell: Shell) -> None:
    path = exports.optimum_export("llama")
    command = ["evaluate", path, "--tasks", "pick", "--include-path", folder, "--json"]
    here, there = (shell.ok(*command, *more).json for more in ((), ("--scheduler", address)))
    assert here["results"] == there["results"]


def test_a_scheduler_that_does_not_answer_is_told_before_tasks_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "NamedTasks", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(cluster, "_CONNECT", 0.5)
    path = exports.optimum_export("llama")
    command = ["evaluate", str(path), "--tasks", "pick", "--include-path", str(folder)]
    assert run([*command, "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "no scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err
