"""lm-eval gets the same answers from a session of onnxruntime as from its own Hugging Face back end."""

from functools import partial
from pathlib import Path

import datasets
import exports
import harness_tasks
import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarot_onnx.errors import CalibrationError, ConfigError
from quarot_onnx.evaluation.answers import Answers
from quarot_onnx.evaluation.encoding import Encoding
from quarot_onnx.evaluation.harness import OnnxModel
from quarot_onnx.evaluation.spoken import Spoken
from quarot_onnx.evaluation.tasks import evaluate_tasks
from quarot_onnx.piecewise.memory import WHOLE

PAIRS = [
    ("The quick brown fox", " jumps over"),
    ("The quick brown fox ", "jumps"),  # the space goes with the answer
    ("", "No context at all"),
    ("", "<s>begun"),
    ("<s>It begins with the BOS", " itself"),
    ("Longer than the model " * 12, "is"),
]
TEXTS = ["A text.", "<s>begun", "in several windows of the model's positions " * 9]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets keeps of a file that it read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def requests(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_as_the_hugging_face_back_end_does() -> None:
    source, export = exports.hf_folder("llama"), exports.optimum_export("llama")
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(source),
        batch_size=2,
    )
    ours = OnnxModel(Answers(export, batch_size=2), Encoding.of(export.parent))
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours._answers.positions == theirs.max_length == 128
    asked = requests("loglikelihood", PAIRS)
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    # Sums of some ten float32 logits, each rounded in the 7th digit.
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert [same for _, same in found] == [same for _, same in expected]
    texts = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    whole = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(whole, rel=1e-5)
    assert len(TEXTS[-1]) > 2 * 128


def test_tasks_groups_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    # Half a minute for lm-eval's own 15,000; the folder's are enough here.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    folder, path = harness_tasks.write(tmp_path / "tasks"), exports.optimum_export("llama")
    seen: list[str] = []
    run = partial(evaluate_tasks, path, path.parent, include_path=folder)
    alone = run(["pick", "roll", "pick"], progress=lambda phase, *_: seen.append(phase))
    assert list(dict.fromkeys(seen)) == ["index", "evaluate"]
    grouped, matched = run(["both"], batch_size=3), run(["[pr]*"], batch_size=4)
    for other in (grouped, matched):
        for name, metric in (("pick", "acc,none"), ("roll", "bits_per_byte,none")):
            value = alone.record["results"][name][metric]  # type: ignore[index]
            assert other.record["results"][name][metric] == pytest.approx(value, rel=1e-6)  # type: ignore[index]
    assert len(grouped.tables) == 2
    assert "|both" in grouped.tables[1]
    assert alone.record["n-samples"]["pick"] == {"original": 6, "effective": 6}  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"knows no task 'pickk' \(did you mean 'pick'"):
        run(["pick", "pickk"])
    with pytest.raises(ConfigError, match="no task is named"):
        run([])


GENERATED: list[tuple[str, dict[str, object]]] = [
    ("The quick brown fox", {"until": ["\n\n"], "max_gen_toks": 12}),
    ("Jumps over", {"until": [], "max_new_tokens": 7, "do_sample": False, "temperature": 0.7}),
    ("Longer than the model " * 12, {"until": ["never said"], "max_gen_toks": 20}),
    ("<s>It begins with the BOS", {"until": "\n", "max_gen_toks": 9}),
]


@pytest.mark.parametrize("cached", [True, False])
def test_generated_text_is_that_of_the_hugging_face_back_end(cached: bool) -> None:
    source = exports.hf_folder("llama")
    export = exports.optimum_export("llama") if cached else exports.dynamo_export("llama")
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(source),
    )
    answers, encoding = Answers(export, memory=WHOLE), Encoding.of(exports.optimum_export("llama").parent)
    done: list[int] = []
    spoken = partial(Spoken, answers.source, encoding.path, answers.positions)
    ours = OnnxModel(answers, encoding, lambda count, _: done.append(count), spoken)
    # The first words that it says are stops of their own, so that texts are cut off, too.
    (said,) = theirs.generate_until(requests("generate_until", [GENERATED[0]]), disable_tqdm=True)
    assert len(said) > 4
    cut = ("The quick brown fox", {"until": [said[2:4], said[-1:]], "max_gen_toks": 12})
    found = ours.generate_until(requests("generate_until", [*GENERATED, cut]))
    expected = theirs.generate_until(requests("generate_until", [*GENERATED, cut]), disable_tqdm=True)
    assert found == expected
    assert len(found[-1]) < len(said)
    assert done == [1, 2, 3, 4, 5]
    assert ours.cut == 1


def test_a_task_of_generated_text(tmp_path: Path) -> None:
    folder, path = harness_tasks.write(tmp_path / "tasks"), exports.optimum_export("llama")
    found = evaluate_tasks(path, path.parent, ["say", "pick"], include_path=folder)
    assert 0 <= found.record["results"]["say"]["exact_match,none"] <= 1  # type: ignore[index]
    assert 0 <= found.record["results"]["pick"]["acc,none"] <= 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("manner", "named"),
    [
        ({"do_sample": True, "temperature": 0.5}, r"wants text to be drawn \(do_sample, temperature 0.5"),
        ({"temperature": 0.5}, "set do_sample: false"),
        ({"num_beams": 4}, "wants text generated with num_beams=4"),
        ({"max_gen_toks": 128}, "asks for 128 new tokens, and .* takes 128, its context among them"),
    ],
)
def test_what_cannot_be_generated(manner: dict[str, object], named: str, tmp_path: Path) -> None:
    folder, path = harness_tasks.write(tmp_path / "tasks", manner=manner), exports.optimum_export("llama")
    with pytest.raises(ConfigError, match=named):
        evaluate_tasks(path, path.parent, ["say"], include_path=folder)


def test_data_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = exports.optimum_export("llama")
    folder = harness_tasks.write(tmp_path / "tasks", data="elsewhere.jsonl")
    run = partial(evaluate_tasks, path, path.parent, include_path=folder)
    with pytest.raises(CalibrationError, match=r"the data of the task 'pick' cannot be had \(FileNotFoundError"):
        run(["pick"])
    odd = {"task": "odd", "dataset_path": "json", "output_type": "multiple_choice", "doc_to_texts": "{{question}}"}
    harness_tasks.put(folder, odd)
    with pytest.raises(ConfigError, match=r"lm-eval cannot set up the task 'odd' \(TypeError.*; see .*odd\.yaml"):
        run(["odd"])
    good = harness_tasks.write(tmp_path / "good")
    content = (good / "data.jsonl").read_text()
    (good / "data.jsonl").write_text(content + '{"question": "Which?", "choices": null, "label": 0, "text": ""}\n')
    with pytest.raises(ConfigError, match=r"lm-eval stopped at pick \(TypeError.*see .*pick\.yaml"):
        evaluate_tasks(path, path.parent, ["pick"], include_path=good)


def test_ways_out_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    folder, path = harness_tasks.write(tmp_path / "tasks"), exports.optimum_export("llama")
    run = partial(evaluate_tasks, path, path.parent, include_path=folder)
    with pytest.raises(
        ConfigError, match=r"'pick' is asked for twice .* by its name and in the group 'both': name one"
    ):
        run(["pick", "both"])
    with pytest.raises(ConfigError, match=r"too few items for --num-fewshot 6; give a lower --num-fewshot"):
        run(["pick"], num_fewshot=6)
    (folder / "data.jsonl").write_text("")
    with pytest.raises(CalibrationError, match=r"the data of the task 'pick' hold no item .* in .*pick\.yaml"):
        run(["pick"])
    for wrong in ({"batch_size": 0}, {"num_fewshot": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))} "):
            run(["pick"], **wrong)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("task: broken\ndata: [a\nb: c\n", "line 3, column 2: expected"),
        ("- a\n", "it holds no keys"),
        ("tsk: broken\n", "it has neither the key task nor"),
        ("task: broken\ninclude: gone.yaml\n", "it includes gone.yaml, which is not there"),
    ],
)
def test_a_file_that_lm_eval_passes_over_is_named(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    folder, path = harness_tasks.write(tmp_path / "tasks"), exports.optimum_export("llama")
    with pytest.raises(ConfigError, match=r"knows no task 'broken', and no file \*\.yaml in .*tasks has it"):
        evaluate_tasks(path, path.parent, ["broken"], include_path=folder)
    (folder / "template.yaml").write_text("process: !function utils.process\n")
    (folder / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"knows no task 'broken'; mend .*broken\.yaml \({why}.*\), which"):
        evaluate_tasks(path, path.parent, ["broken"], include_path=folder)


def test_nothing_is_said_of_samples_of_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    folder, path = harness_tasks.write(tmp_path / "tasks"), exports.optimum_export("llama")
    task = yaml.safe_load((folder / "pick.yaml").read_text())
    task |= {"task": "drawn", "output_type": "loglikelihood", "doc_to_target": "{{text}}"}
    task["metric_list"] = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    harness_tasks.put(folder, task)
    found = evaluate_tasks(path, path.parent, ["drawn"], include_path=folder)
    assert "perplexity_stderr,none" in found.record["results"]["drawn"]  # type: ignore[index]
    printed = capfd.readouterr()
    assert "bootstrapping" not in printed.out + printed.err


@pytest.mark.further
@pytest.mark.slow
def test_tasks_that_come_with_lm_eval_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    path = exports.optimum_export("llama")
    with pytest.raises(CalibrationError, match=r"the data of the task 'piqa' cannot be had.*--include-path DIR"):
        evaluate_tasks(path, path.parent, ["piqa"])
