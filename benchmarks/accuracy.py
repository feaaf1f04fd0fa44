"""What low-bit schemes cost in perplexity: method by scheme, over seeds of the random Hadamard rotation.

    python benchmarks/accuracy.py MODEL.onnx --calib TRAIN.txt --text TEST.txt OTHER.txt --results accuracy.json

Every Linear of the decoder is quantized, head and embedding stay in float; weights per channel, symmetric; activations
per token. The model is rotated once for each seed, quantized through the same call as `quarot-onnx quantize`, written
with fake quantization, and its perplexity taken on every text in windows of 512 tokens with BOS. The first text should
be of the kind that was calibrated on, the others of another kind. Results are kept in a JSON file: what is there
already is not run again, so that a long series can be interrupted. `--set perc_damp=1.0` sets an option of the method,
`--blocks 12` leaves what comes after the first 12 decoder blocks in float: experiments at a part of the time. With
`--own 16` the float model writes so many windows beside those of the text, as `quarot-onnx quantize` has it write;
with `--no-spread` those of the text follow each other from its start.
"""

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from first_blocks import split_after

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.config import QConfig, QLayerConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.rounding import ROUNDINGS
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.generation.own_text import own_windows
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.processor import described
from quarot_onnx.recipes.build import activation_spec, weight_spec
from quarot_onnx.recipes.own import Activations, Weights
from quarot_onnx.sites.detect import detect


@dataclass(frozen=True)
class Scheme:
    """Weights and activations, and the rotations that go with them."""

    weights: Weights
    activations: Activations

    @property
    def r4(self) -> bool:
        """R4 pays where activations are quantized."""
        return self.activations.quantized


SCHEMES = {
    "w4a16": Scheme(Weights(bits=4), Activations()),
    "w3a16": Scheme(Weights(bits=3), Activations()),
    "w4a8": Scheme(Weights(bits=4), Activations(bits=8)),
    "w4a4": Scheme(Weights(bits=4), Activations(bits=4, symmetric=False, clip_ratio=0.9)),
    "w8a8": Scheme(Weights(bits=8), Activations(bits=8)),
    "w4a16-asym": Scheme(Weights(bits=4, symmetric=False), Activations()),
    "w4a8-asym": Scheme(Weights(bits=4, symmetric=False), Activations(bits=8)),
}


@dataclass(frozen=True)
class Study:
    """The model, the texts and where things go."""

    model: Path
    calib: Path
    texts: list[Path]
    tokenizer: Path
    samples: int
    own: int
    spread: bool
    windows: list[int]
    work: Path
    options: dict[str, Any]
    blocks: int | None

    @cached_property
    def written(self) -> TokenIds:
        """The windows that the float model writes."""
        return own_windows(self.model, self.own, tokenizer=self.tokenizer)

    def rotated(self, *, r4: bool, seed: int) -> Path:
        """The model, rotated; made when it is first asked for."""
        path = self.work / f"r4-{r4}-seed-{seed}" / "model.onnx"
        if not path.is_file():
            rotate(self.model, path, QuarotConfig(use_random_had=True, seed=seed, r4=r4), verify=False)
        return path

    def perplexities(self, model: Path) -> dict[str, float]:
        """Of a model on every text, by the text's name; says what is odd about a text."""
        found = {}
        for text, windows in zip(
            self.texts, itertools.chain(self.windows, itertools.repeat(self.windows[-1])), strict=False
        ):
            result = perplexity(model, text, self.tokenizer, seq_len=512, windows=windows)
            found[text.stem] = result.perplexity
            for note in result.notes if model == self.model else ():
                print(f"note: {note}", flush=True)
        return found

    def in_float(self, source: Path) -> list[str]:
        """The head, and the Linears after the first blocks."""
        model = model_io.load(source)
        sites = detect(model)
        left = [linear.name for linear in sites.head]
        if self.blocks is None:
            return left
        return [*(linear.name for linear in split_after(self.blocks, model, sites)[1]), *left]

    def run(self, scheme: Scheme, method: str, seed: int | None) -> dict[str, Any]:
        """Perplexities and seconds of one way to quantize; seed None does without rotation."""
        source = self.model if seed is None else self.rotated(r4=scheme.r4, seed=seed)
        activation = activation_spec(scheme.activations)
        config = QConfig(
            QLayerConfig(activation=activation, weight=weight_spec(scheme.weights, activation)),
            exclude=self.in_float(source),
            algo_config=[ROUNDINGS[method](**self.options)],
            output_format="fake",
        )
        more = (lambda _length: self.written) if self.own else None
        reader = TextReader(
            source,
            self.calib,
            self.tokenizer,
            samples=self.samples,
            seq_len=512,
            more=more,
            spread=self.spread,
        )
        out = self.work / "quantized"
        start = time.perf_counter()
        outcome = quantize(source, out / "model.onnx", config, reader, check=None)
        seconds = time.perf_counter() - start
        found = self.perplexities(out / "model.onnx")
        shutil.rmtree(out)
        return {"perplexity": found, "seconds": seconds, "round": outcome.seconds.get("round")}


def cells(schemes: list[str], methods: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int | None]]:
    """All runs: round to nearest without rotation once, everything else for each seed."""
    for scheme in schemes:
        if "rtn" in methods:
            yield scheme, "rtn", None
        for seed in seeds:
            yield from ((scheme, method, seed) for method in methods)


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The results as lines of Markdown: ratios to float on each text, mean and range over seeds."""
    exact = results["float"]["perplexity"]
    yield f"{described()}; float32: {', '.join(f'{name} {value:.2f}' for name, value in exact.items())}"
    yield ""
    yield f"| scheme | rotation | method | seeds |{''.join(f' {name} | range |' for name in exact)} minutes |"
    yield f"|---|---|---|--:|{'--:|---|' * len(exact)}--:|"
    keys = [key for key in results if key != "float"]
    for (scheme, method, is_rotated), group in itertools.groupby(sorted(keys, key=_place), _group):
        values = [results[key] for key in group]
        rotation = "none" if not is_rotated else "R1+R2+R4" if SCHEMES[scheme].r4 else "R1+R2"
        cells = "".join(_cell([value["perplexity"][name] / exact[name] for value in values]) for name in exact)
        minutes = statistics.mean(value["seconds"] for value in values) / 60
        yield f"| {scheme.upper()} | {rotation} | {method} | {len(values)} |{cells} {minutes:.1f} |"


def _cell(ratios: list[float]) -> str:
    spread = f"{min(ratios):.3f}-{max(ratios):.3f}" if len(ratios) > 1 else ""
    return f" {statistics.mean(ratios):.3f} | {spread} |"


def _group(key: str) -> tuple[str, str, bool]:
    scheme, method, seed = key.split("/")
    return scheme, method, seed != "none"


def _place(key: str) -> tuple[int, bool, int, str]:
    scheme, method, is_rotated = _group(key)
    return list(SCHEMES).index(scheme), is_rotated, list(ROUNDINGS).index(method.split()[0]), key


def _setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value as in JSON."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a number or true or false") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of low-bit schemes, by method and seed.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--calib", type=Path, required=True, metavar="TEXT", help="calibration text")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="TEXT", help="held-out texts")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: beside the model")
    parser.add_argument("--results", type=Path, required=True, metavar="JSON", help="read and written")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["w4a16", "w4a8", "w4a4", "w8a8"])
    parser.add_argument("--methods", nargs="+", choices=list(ROUNDINGS), default=list(ROUNDINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=16, help="windows of the calibration text (default: 16)")
    parser.add_argument("--own", type=int, default=0, help="so many more that the model writes (default: none)")
    parser.add_argument("--no-spread", action="store_true", help="windows from the start of the text")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[20], help="test windows of 512 tokens, for each text (default: 20)"
    )
    parser.add_argument("--set", type=_setting, nargs="+", default=[], metavar="NAME=VALUE", help="of the method")
    parser.add_argument("--blocks", type=int, help="quantize so many decoder blocks (default: all)")
    given = parser.parse_args()
    work = given.results.absolute().with_suffix(".work")
    tokenizer, options = given.tokenizer or given.model.parent, dict(given.set)
    study = Study(
        given.model,
        given.calib,
        given.text,
        tokenizer,
        given.samples,
        given.own,
        not given.no_spread,
        given.windows,
        work,
        options,
        given.blocks,
    )
    results = json.loads(given.results.read_text()) if given.results.is_file() else {}
    if "float" not in results:
        results["float"] = {"perplexity": study.perplexities(given.model)}
    settings = "".join(f" {name}={value}" for name, value in sorted(options.items()))
    for scheme, method, seed in cells(given.schemes, given.methods, given.seeds):
        key = f"{scheme}/{method}{settings}/{'none' if seed is None else seed}"
        if key not in results:
            results[key] = study.run(SCHEMES[scheme], method, seed)
            given.results.write_text(json.dumps(results, indent=2))
            print(key, results[key], flush=True)
    shutil.rmtree(work, ignore_errors=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
