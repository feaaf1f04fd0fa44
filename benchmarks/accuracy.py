"""What low-bit schemes cost in perplexity: method by scheme, over seeds of the random Hadamard rotation.

    python benchmarks/accuracy.py MODEL.onnx --calib TRAIN.txt --text TEST.txt --results accuracy.json [--schemes ...]

Every Linear of the decoder is quantized, head and embedding stay in float; weights per channel, symmetric; activations
per token. The model is rotated once for each seed, quantized through the same call as `quarot-onnx quantize`, written
with fake quantization, and its perplexity taken in windows of 512 tokens with BOS. Results are kept in a JSON file:
what is there already is not run again, so that a long series can be interrupted.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quarot_onnx import model_io
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.quantization.config import QConfig, QLayerConfig
from quarot_onnx.quantization.config.algorithm import QuarotConfig
from quarot_onnx.quantization.config.rounding import GPTAQConfig, GPTQConfig, QronosConfig, RoundingConfig, RTNConfig
from quarot_onnx.recipes.build import activation_spec, weight_spec
from quarot_onnx.recipes.own import Activations, Weights
from quarot_onnx.sites.detect import detect

METHODS: dict[str, RoundingConfig] = {
    "rtn": RTNConfig(),
    "gptq": GPTQConfig(),
    "gptaq": GPTAQConfig(),
    "qronos": QronosConfig(),
}


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
}


@dataclass(frozen=True)
class Study:
    """The model, the texts and where things go."""

    model: Path
    calib: Path
    text: Path
    tokenizer: Path
    samples: int
    windows: int
    work: Path

    def rotated(self, *, r4: bool, seed: int) -> Path:
        """The model, rotated; made when it is first asked for."""
        path = self.work / f"r4-{r4}-seed-{seed}" / "model.onnx"
        if not path.is_file():
            rotate(self.model, path, QuarotConfig(use_random_had=True, seed=seed, r4=r4), verify=False)
        return path

    def run(self, scheme: Scheme, method: str, seed: int | None) -> dict[str, float]:
        """Perplexity and seconds of one way to quantize; seed None does without rotation."""
        source = self.model if seed is None else self.rotated(r4=scheme.r4, seed=seed)
        head = [linear.name for linear in detect(model_io.load(source)).head]
        activation = activation_spec(scheme.activations)
        config = QConfig(
            QLayerConfig(activation=activation, weight=weight_spec(scheme.weights, activation)),
            exclude=head,
            algo_config=[METHODS[method]],
            output_format="fake",
        )
        reader = TextReader(source, self.calib, self.tokenizer, samples=self.samples, seq_len=512)
        out = self.work / "quantized"
        start = time.perf_counter()
        outcome = quantize(source, out / "model.onnx", config, reader, check=None)
        seconds = time.perf_counter() - start
        found = perplexity(out / "model.onnx", self.text, self.tokenizer, seq_len=512, windows=self.windows)
        shutil.rmtree(out)
        return {"perplexity": found.perplexity, "seconds": seconds, "round": outcome.seconds["round"]}


def cells(schemes: list[str], methods: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int | None]]:
    """All runs: round to nearest without rotation once, everything else for each seed."""
    for scheme in schemes:
        if "rtn" in methods:
            yield scheme, "rtn", None
        for seed in seeds:
            yield from ((scheme, method, seed) for method in methods)


def table(results: dict[str, dict[str, float]]) -> Iterator[str]:
    """The results as lines of Markdown: ratios to float, mean and range over seeds."""
    exact = results["float"]["perplexity"]
    yield f"float32: {exact:.2f}"
    yield ""
    yield "| scheme | rotation | method | seeds | perplexity | ratio to float | range | minutes |"
    yield "|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, bool], list[dict[str, float]]] = {}
    for key, value in results.items():
        if key != "float":
            scheme, method, seed = key.split("/")
            groups.setdefault((scheme, method, seed != "none"), []).append(value)
    for (scheme, method, is_rotated), values in groups.items():
        found = [value["perplexity"] for value in values]
        rotation = "none" if not is_rotated else "R1+R2+R4" if SCHEMES[scheme].r4 else "R1+R2"
        spread = f"{min(found) / exact:.3f}-{max(found) / exact:.3f}" if len(found) > 1 else ""
        mean, minutes = statistics.mean(found), statistics.mean(v["seconds"] for v in values) / 60
        yield (
            f"| {scheme.upper()} | {rotation} | {method} | {len(found)} | {mean:.2f} | {mean / exact:.3f} | {spread} | "
            f"{minutes:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of low-bit schemes, by method and seed.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--calib", type=Path, required=True, metavar="TEXT", help="calibration text")
    parser.add_argument("--text", type=Path, required=True, metavar="TEXT", help="held-out text")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: beside the model")
    parser.add_argument("--results", type=Path, required=True, metavar="JSON", help="read and written")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["w4a16", "w4a8", "w4a4", "w8a8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens (default: 16)")
    parser.add_argument("--windows", type=int, default=20, help="test windows of 512 tokens (default: 20)")
    given = parser.parse_args()
    work = given.results.absolute().with_suffix(".work")
    tokenizer = given.tokenizer or given.model.parent
    study = Study(given.model, given.calib, given.text, tokenizer, given.samples, given.windows, work)
    results = json.loads(given.results.read_text()) if given.results.is_file() else {}
    if "float" not in results:
        found = perplexity(given.model, given.text, tokenizer, seq_len=512, windows=given.windows)
        results["float"] = {"perplexity": found.perplexity}
    for scheme, method, seed in cells(given.schemes, given.methods, given.seeds):
        key = f"{scheme}/{method}/{'none' if seed is None else seed}"
        if key not in results:
            results[key] = study.run(SCHEMES[scheme], method, seed)
            given.results.write_text(json.dumps(results, indent=2))
            print(key, results[key], flush=True)
    shutil.rmtree(work, ignore_errors=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
