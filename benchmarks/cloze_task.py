"""Write a task for lm-eval from a text of your own: which of four continuations does a passage have?

    python benchmarks/cloze_task.py TEXT.txt tasks/ [--items 200 --context 16 --answer 5 --seed 0]
    quarot-onnx evaluate MODEL.onnx --tasks cloze --include-path tasks/

Passages are cut from the text one behind the other and chosen at random; of the four continuations one is the passage's
own and three begin elsewhere in the text. The folder gets cloze.jsonl and cloze.yaml, which lm-eval's own command line
takes as well. Nothing is fetched.
"""

import argparse
import json
import random
from pathlib import Path

import yaml

CHOICES = 4


def items(words: list[str], count: int, context: int, answer: int, seed: int) -> list[dict[str, object]]:
    """Items of ``context`` words and four continuations of ``answer`` words."""
    rng = random.Random(seed)
    length = context + answer
    starts = range(0, len(words) - length + 1, length)
    if len(starts) < max(count, CHOICES):
        raise SystemExit(f"{count} items need {max(count, CHOICES) * length} words of text, there are {len(words)}")
    found = []
    for start in sorted(rng.sample(starts, count)):
        first = start + context
        elsewhere = [other for other in range(len(words) - answer + 1) if abs(other - first) >= length]
        places = [first, *rng.sample(elsewhere, CHOICES - 1)]
        rng.shuffle(places)
        choices = [" ".join(words[place : place + answer]) for place in places]
        found.append({"context": " ".join(words[start:first]), "choices": choices, "label": places.index(first)})
    return found


def write(text: Path, folder: Path, *, count: int, context: int, answer: int, seed: int) -> None:
    """Write data and task."""
    found = items(text.read_text(encoding="utf-8").split(), count, context, answer, seed)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "cloze.jsonl"
    data.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in found), encoding="utf-8")
    task = {
        "task": "cloze",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    (folder / "cloze.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--context", type=int, default=16, help="words of a passage")
    parser.add_argument("--answer", type=int, default=5, help="words of a continuation")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.text.is_file():
        parser.error(f"there is no file {given.text}")
    if min(given.items, given.context, given.answer) < 1:
        parser.error("items, words of a passage and words of a continuation are 1 or more each")
    write(given.text, given.folder, count=given.items, context=given.context, answer=given.answer, seed=given.seed)


if __name__ == "__main__":
    main()
