"""Zero-shot and few-shot tasks through lm-eval, run by onnxruntime: given answers are scored, texts are gone on with.

Tasks, prompts, metrics and tables are lm-eval's; `harness` answers its requests. lm-eval is imported when tasks are
asked for. Tasks come with it, or from YAML files in a folder of one's own, which may name local data.
"""

import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.distributed.cluster import connected
from quarot_onnx.errors import ConfigError, MissingPackageError, QuarotError
from quarot_onnx.evaluation.answers import Answers
from quarot_onnx.evaluation.encoding import Encoding
from quarot_onnx.evaluation.spoken import Spoken
from quarot_onnx.evaluation.task_names import NamedTasks
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.progress import PhaseProgress, of_phase, silent

if TYPE_CHECKING:
    import distributed

_KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class TaskResults:
    """What came of tasks.

    Attributes:
        tables: As lm-eval prints them: the tasks, and the groups where there are any.
        record: lm-eval's results as JSON types: what ``_KEPT`` names, and ``config``, how they were taken.
        notes: What the user should know.
    """

    tables: tuple[str, ...]
    record: Mapping[str, object]
    notes: tuple[str, ...] = ()


def evaluate_tasks(
    model_path: str | Path,
    tokenizer: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    bos: int | Bos = Bos.AUTO,
    threads: int | None = None,
    exact: bool = False,
    memory: Memory = Memory(),  # noqa: B008 - frozen
    scheduler: "str | distributed.Client | None" = None,
    progress: PhaseProgress = silent,
) -> TaskResults:
    """Score a model on tasks of lm-eval.

    Args:
        model_path: The ONNX file.
        tokenizer: A tokenizer.json, or the folder that holds one.
        tasks: Names of tasks, groups or tags, or patterns such as ``mmlu_*``.
        include_path: A folder with YAML files of further tasks, which go before lm-eval's own.
        limit: Items of each task, from its start; below 1 a share of them. None for all.
        num_fewshot: Solved items before each one; None for what the task says.
        batch_size: Rows that are run at once, at most; of no influence on the results but in the last digits.
        bos: The BOS id, or where it comes from; by default the tokenizer's post-processor puts it there, or not.
        threads: onnxruntime's intra-op threads.
        exact: Compute 8-bit products exactly where this processor's fast way saturates.
        memory: What it may take, and whether the model is run piece by piece for that.
        scheduler: A Dask scheduler's address, or a client of it, whose workers run the model, with the same results.
        progress: Told of the phases "index" and "evaluate".

    Raises:
        MissingPackageError: lm-eval is not installed.
        ConfigError: A task that is not known, that wants text to be drawn, or that lm-eval cannot run.
        CalibrationError: The data of a task cannot be had, or tokenizer and texts do not fit the model.
        ModelError: The model cannot be run, or has no logits of every position.
        ClusterError: There is no such scheduler, or its workers do not see the model.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"no folder at {include_path}: --include-path names one with YAML files of tasks")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise ConfigError(f"--limit {limit:g} is no number of items: need 1 or more, or a share of them below 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} runs nothing: need 1 or more rows at once (--batch-size)")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot {num_fewshot} is no number of items: need 0 or more (--num-fewshot)")
    encoding = Encoding.of(tokenizer, bos)
    if not tasks:
        raise ConfigError("no task is named: --tasks takes names of lm-eval's, such as piqa,arc_easy")
    _require_harness()
    from quarot_onnx.evaluation.harness import OnnxModel  # noqa: PLC0415 - imports lm-eval

    with connected(scheduler) as cluster:
        progress("index", 0, None)
        named = NamedTasks(tasks, include_path)
        _seed()
        loaded = named.loaded()
        answers = Answers(
            model_path, batch_size=batch_size, threads=threads, exact=exact, memory=memory, cluster=cluster
        )
        spoken = partial(Spoken, answers.source, encoding.path, answers.positions, cluster)
        lm = OnnxModel(answers, encoding, of_phase(progress, "evaluate"), spoken)
        start = time.perf_counter()
        found = _run(lm, named, loaded, num_fewshot=num_fewshot, limit=limit)
        seconds = time.perf_counter() - start
    config = {
        "model": str(model_path),
        "tokenizer": str(encoding.path),
        "bos_id": encoding.bos,
        "batch_size": batch_size,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "positions": answers.positions,
        "exact": exact,
        "lm_eval": version("lm_eval"),
        "seconds": seconds,
    }
    return TaskResults(
        tables=_tables(found),
        record={key: found[key] for key in _KEPT if key in found} | {"config": config},
        notes=(
            *answers.notes(),
            *([f"{lm.cut} contexts lost their beginning, for room for new tokens"] if lm.cut else []),
            *(() if cluster is None else cluster.notes),
        ),
    )


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401, PLC0415 - seconds, and optional
    except ImportError as error:
        raise MissingPackageError(
            f"tasks are run by lm-eval, which cannot be imported ({error}): pip install 'quarot-onnx[eval]'"
        ) from error


def _seed() -> None:
    """Seed what the code of some tasks shuffles with, as lm-eval's own command line does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED  # noqa: PLC0415 - late, see above

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 - the generator that lm-eval's tasks use


def _set(task: Any, num_fewshot: int | None) -> None:
    """Few-shot items as lm-eval's own command line sets them: a 0 that a task insists on stays."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED  # noqa: PLC0415 - late, see above

    said = task.get_config("num_fewshot")
    if said != 0 and (said is None or num_fewshot is not None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _run(
    lm: Any, named: NamedTasks, loaded: Sequence[Any], *, num_fewshot: int | None, limit: float | None
) -> dict[str, Any]:
    """lm-eval's results.

    Raises:
        ConfigError: lm-eval stops at a task.
    """
    from lm_eval.api import metrics  # noqa: PLC0415 - late, see above
    from lm_eval.evaluator import evaluate  # noqa: PLC0415

    try:
        tasks = named.manager.load(list(loaded))
        for task in tasks["tasks"].values():
            _set(task, num_fewshot)
        # It prints, and what is on standard output may be JSON; that it draws samples of figures is for nobody.
        with redirect_stdout(sys.stderr), patch.object(metrics, "print", _unsaid, create=True):
            found = evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=False)
    except QuarotError:
        raise
    except Exception as error:  # whatever a YAML file and the code that it names raise
        raise named.stopped(error, num_fewshot) from error
    return dict(found)


def _unsaid(*_: object) -> None:
    """Print nothing."""


def _tables(found: Mapping[str, Any]) -> tuple[str, ...]:
    from lm_eval.utils import make_table  # noqa: PLC0415 - late, see above

    groups = (make_table(found, "groups"),) if found.get("groups") else ()
    return (make_table(found), *groups)
