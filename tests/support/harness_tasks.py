"""Tasks for lm-eval in a folder: YAML files that name local data."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import yaml

WORDS = ("one fox", "two dogs", "a lazy hat", "no one")


def write(
    folder: Path, *, items: int = 6, data: str = "data.jsonl", manner: Mapping[str, object] = MappingProxyType({})
) -> Path:
    """``pick`` (four answers), ``roll`` (whole texts), ``say`` (generated text), ``both`` (a group of two).

    ``manner`` goes into the ``generation_kwargs`` of ``say``.
    """
    folder.mkdir()
    rows = [
        {
            "question": f"{WORDS[i % 4]} and {i}",
            "choices": list(WORDS),
            "label": i % 4,
            "text": f"{WORDS[i % 4]} " * (i + 1),
        }
        for i in range(items)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 2.0},
    }
    put(
        folder,
        common
        | {
            "task": "pick",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    )
    put(
        folder,
        common
        | {
            "task": "roll",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
    )
    put(
        folder,
        common
        | {
            "task": "say",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8} | dict(manner),
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    )
    put(
        folder,
        {
            "group": "both",
            "task": ["pick", "roll"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        },
        "both",
    )
    return folder


def put(folder: Path, content: dict[str, object], name: str = "") -> None:
    (folder / f"{name or content['task']}.yaml").write_text(yaml.safe_dump(content))
