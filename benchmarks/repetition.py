"""Which prompts end in repetition, greedy, for several models; the first one is what the others are compared with.

    python benchmarks/repetition.py FLOAT.onnx OTHER.onnx ... [--prompts FILE] [--tokens 64] [--last 32] [--period 16]

A text ends in repetition where its last ``--last`` tokens are a period of at most ``--period`` tokens again and again:
x[i] = x[i - p] for one p. A text that the model ends before that does not. Told are the period of every model and
prompt, or where the model ended; the token at which a text parts from the first model's; and there, of the first model,
how far its own choice lies ahead of the other one's, in logits and in probability: a hair means that rounding decided,
not damage. Where a text ends in repetition and the first model's does not, the first model goes on from the token at
which they part, as the other one chose it: if that ends in repetition, too, it is the first model's own. Prompts are
lines of a UTF-8 file; ten are built in.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.generation.generator import Generated, Generator

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "The three most important inventions of the nineteenth century are",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain because",
    "My favourite recipe for a quick dinner begins with",
    "In 1969 the first people walked on the moon.",
    "The difference between a virus and a bacterium is",
    "Dear Sir or Madam, I am writing to you about",
    "The train to the north leaves at nine, and",
)
SHOWN = 42


@dataclass(frozen=True)
class Parting:
    """Where a text parts from another.

    Attributes:
        place: The number of the token, from 0.
        logits: How far the first model's choice lies ahead of the other one's, by its own logits.
        chances: The two probabilities.
    """

    place: int
    logits: float
    chances: tuple[float, float]


def period(ids: Sequence[int], last: int, longest: int) -> int | None:
    """The length of what a text repeats at its end; None where it does not."""
    if len(ids) < last:
        return None
    end = ids[-last:]
    return next((p for p in range(1, longest + 1) if end[p:] == end[:-p]), None)


def greedy(path: Path, prompts: Sequence[str], options: argparse.Namespace) -> list[Generated]:
    """What a model says; it is closed again."""
    generator = Generator(path, options.tokenizer, threads=options.threads)
    return [generator.run(generator.task(prompt, max_new_tokens=options.tokens)) for prompt in prompts]


def parting(decoder: Decoder, first: Generated, other: Generated) -> Parting | None:
    """Where a text parts from the first model's, and what that model thinks of the two tokens."""
    pairs = itertools.zip_longest(first.ids, other.ids)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None or place >= min(len(first.ids), len(other.ids)):
        return None  # alike, or one of them ended
    decoder.start()
    before = [*first.task.ids, *first.ids[:place]]
    logits = np.asarray(decoder.feed(before[decoder.model.brought(before) :]), np.float64)
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    a, b = first.ids[place], other.ids[place]
    return Parting(place, float(logits[a] - logits[b]), (float(chances[a]), float(chances[b])))


def period_of_first(decoder: Decoder, other: Generated, place: int, options: argparse.Namespace) -> int | None:
    """What the first model repeats at its end once it has the other one's token at a place."""
    ids = list(other.ids[: place + 1])
    before = [*other.task.ids, *ids]
    decoder.start()
    following = before[decoder.model.brought(before) :]
    while len(ids) < options.tokens:
        following = [int(decoder.feed(following).argmax())]
        ids += following
    return period(ids, options.last, options.period)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--last", type=int, default=32)
    parser.add_argument("--period", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--texts", action="store_true", help="show what is said, too")
    options = parser.parse_args()
    for path in (*options.models, options.tokenizer, options.prompts):
        if path is not None and not path.exists():
            parser.error(f"there is no file {path}")
    lines = PROMPTS if options.prompts is None else options.prompts.read_text("utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    said = [greedy(path, prompts, options) for path in options.models]
    reference = Decoder(options.models[0], threads=options.threads)
    for path, texts in zip(options.models, said, strict=True):
        periods = [period(text.ids, options.last, options.period) for text in texts]
        found = sum(value is not None for value in periods)
        print(f"{path}: {found} of {len(prompts)} end in repetition")
        for prompt, text, value, first in zip(prompts, texts, periods, said[0], strict=True):
            shown = prompt if len(prompt) <= SHOWN else f"{prompt[: SHOWN - 1]}…"
            ended = f"ended after {len(text.ids)}" if text.ended else f"{len(text.ids)} tokens"
            line = f"  {shown:{SHOWN}} {ended if value is None else f'period {value}':16}"
            place = None if texts is said[0] else parting(reference, first, text)
            if place is not None:
                a, b = place.chances
                line += f" parts at {place.place}: {place.logits:.3f} logits ahead, p {a:.3f} and {b:.3f}"
                if value is not None and period(first.ids, options.last, options.period) is None:
                    own = period_of_first(reference, text, place.place, options)
                    line += "; so does the first from there" if own else "; the first does not from there"
            elif texts is not said[0]:
                line += " the same" if text.ids == first.ids else " one of the two ended"
            print(line)
            if options.texts:
                print(f"    {text.text!r}")


if __name__ == "__main__":
    main()
